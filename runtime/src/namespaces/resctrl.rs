//! A container's shares of CPU caches and memory bandwidth (`linux.intelRdt`), which rrun sets
//! through the kernel's resctrl file system. See Documentation/filesystems/resctrl.rst.

use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::config::spec;
use crate::error::{Context, Error, Reason as _, Result, refuse};

const MOUNT_POINT: &str = "/sys/fs/resctrl";
/// linux/magic.h
const RDTGROUP_SUPER_MAGIC: u64 = 0x0765_5821;

/// The checked settings of `linux.intelRdt`.
#[derive(Clone, Debug)]
pub(crate) struct Resctrl {
    clos_id: Option<String>,
    /// The lines that rrun writes to the file `schemata` of the resctrl group.
    schemata: Vec<String>,
    monitored: bool,
}

/// The directories in the resctrl file system that `delete` has to remove.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ResctrlGroups {
    group: Option<PathBuf>,
    monitoring: Option<PathBuf>,
}

impl Resctrl {
    /// Checks `linux.intelRdt` of config.json.
    ///
    /// # Errors
    /// Fails if resctrl is not mounted on this host, or if a value is invalid. The error names the
    /// invalid field.
    pub(crate) fn from_spec(rdt: &spec::IntelRdt) -> Result<Resctrl> {
        let field = "linux.intelRdt";
        let mounted = rustix::fs::statfs(MOUNT_POINT)
            .is_ok_and(|fs| fs.f_type as u64 == RDTGROUP_SUPER_MAGIC);
        if !mounted {
            refuse!("{field}: not available, because resctrl is not mounted on {MOUNT_POINT}");
        }
        if matches!(rdt.clos_id.as_str(), "." | "..")
            || (rdt.clos_id.contains(['/', '\n', '\0']) && rdt.clos_id != "/")
        {
            refuse!(
                "{field}.closID: {:?} is not a valid name of a group",
                rdt.clos_id
            );
        }
        // The root group `/` always exists, and every container is allowed to join it. But the
        // kernel reserves the directories `info`, `mon_groups` and `mon_data` in the root group, so
        // a group cannot have one of these names.
        if rdt.clos_id == "info" || rdt.clos_id == "mon_groups" || rdt.clos_id == "mon_data" {
            refuse!(
                "{field}.closID: {} is a directory that the kernel reserves in resctrl, so it cannot be the name of a resctrl group",
                rdt.clos_id
            );
        }
        let single = [
            ("l3CacheSchema", &rdt.l3_cache_schema, "L3"),
            ("memBwSchema", &rdt.mem_bw_schema, "MB"),
        ];
        let mut schemata = Vec::new();
        for (name, line, resource) in single {
            if line.is_empty() {
                continue;
            }
            if !Path::new(MOUNT_POINT).join("info").join(resource).exists() {
                refuse!(
                    "{field}.{name}: this machine does not support the allocation of {resource}"
                );
            }
            schemata.push(line.clone());
        }
        // If several lines set the same resource, the last line takes effect, so rrun writes the
        // lines of the field `schemata` last.
        schemata.extend(rdt.schemata.iter().flatten().cloned());
        Ok(Resctrl {
            clos_id: Some(rdt.clos_id.clone()).filter(|id| !id.is_empty()),
            schemata,
            monitored: rdt.enable_monitoring,
        })
    }

    /// Creates the resctrl group if it does not exist. Sets the group's shares of the caches and of
    /// the memory bandwidth, and moves the process `pid` into the group. Later children of this
    /// process are in the group too. Records each directory in `created` immediately after its
    /// creation. Then the caller can remove the directory even if a later step fails.
    pub(crate) fn apply(&self, id: &str, pid: i32, created: &mut ResctrlGroups) -> Result<()> {
        let group = match self.clos_id.as_deref() {
            Some("/") => PathBuf::from(MOUNT_POINT),
            Some(name) => Path::new(MOUNT_POINT).join(name),
            None => Path::new(MOUNT_POINT).join(id),
        };
        let doing = || format!("create resctrl group {} (linux.intelRdt)", group.display());
        if self.clos_id.is_some() && self.schemata.is_empty() && !group.is_dir() {
            refuse!(
                "linux.intelRdt.closID: the group {} does not exist, and rrun creates a missing group only if schemata are set",
                group.display()
            );
        }
        match make(&group) {
            // A group that `closID` names is not recorded for removal, because other containers can
            // join it.
            Ok(()) if self.clos_id.is_none() => created.group = Some(group.clone()),
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(with_kernel_status(doing(), &errno.reason())),
        }
        if !self.schemata.is_empty() {
            let mut lines = self.schemata.join("\n");
            lines.push('\n');
            write(&group, "schemata", &lines)?;
        }
        write(&group, "tasks", &pid.to_string())?;
        if self.monitored {
            let monitoring = group.join("mon_groups").join(id);
            match make(&monitoring) {
                Ok(()) => created.monitoring = Some(monitoring.clone()),
                Err(Errno::EXIST) => {}
                Err(errno) => {
                    let doing = format!(
                        "create {} (linux.intelRdt.enableMonitoring)",
                        monitoring.display()
                    );
                    return Err(with_kernel_status(doing, &errno.reason()));
                }
            }
            write(&monitoring, "tasks", &pid.to_string())?;
        }
        Ok(())
    }
}

/// Writes `schemata` to the schemata file of the resctrl group that contains the container's first
/// process.
///
/// # Errors
/// Fails if this host does not have resctrl, or if the container does not have its own resctrl
/// group.
pub(crate) fn update(pid: i32, schemata: &[&str]) -> Result<()> {
    let doing = "--l3-cache-schema, --mem-bw-schema";
    let path = format!("/proc/{pid}/cpu_resctrl_groups");
    let groups = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            refuse!("{doing}: the kernel does not support resctrl")
        }
        result => result.doing(|| format!("read {path}"))?,
    };
    match group_of(&groups) {
        Some("") | None => {
            refuse!("{doing}: the container does not have its own resctrl group (linux.intelRdt)")
        }
        Some(group) => {
            let mut lines = schemata.join("\n");
            lines.push('\n');
            write(&Path::new(MOUNT_POINT).join(group), "schemata", &lines)
        }
    }
}

/// Returns the name of a process's resctrl group from the content of /proc/PID/cpu_resctrl_groups.
/// The name of the root group is empty.
fn group_of(groups: &str) -> Option<&str> {
    let name = groups.lines().find_map(|line| line.strip_prefix("res:"))?;
    Some(name.trim_matches('/'))
}

impl ResctrlGroups {
    pub(crate) fn is_empty(&self) -> bool {
        self.group.is_none() && self.monitoring.is_none()
    }

    /// Removes the container's resctrl groups. The kernel moves the remaining processes of each
    /// group to the parent group.
    pub(crate) fn remove(&self) -> Result<()> {
        for directory in [&self.monitoring, &self.group].into_iter().flatten() {
            match rustix::fs::rmdir(directory) {
                Ok(()) | Err(Errno::NOENT) => {}
                result => {
                    result.doing(|| format!("remove resctrl group {}", directory.display()))?;
                }
            }
        }
        Ok(())
    }
}

fn make(directory: &Path) -> std::result::Result<(), Errno> {
    rustix::fs::mkdir(directory, Mode::from_raw_mode(0o755))
}

fn write(group: &Path, file: &str, text: &str) -> Result<()> {
    std::fs::write(group.join(file), text).map_err(|error| {
        let shown = text.trim_end().replace('\n', ", ");
        let doing = format!(
            "write {shown} to {} (linux.intelRdt)",
            group.join(file).display()
        );
        with_kernel_status(doing, &error.reason())
    })
}

/// Returns an error that contains `reason`, and the kernel's message from last_cmd_status if there
/// is a message.
fn with_kernel_status(doing: String, reason: &str) -> Error {
    let status = std::fs::read_to_string(Path::new(MOUNT_POINT).join("info/last_cmd_status"));
    match status.as_deref().map(str::trim) {
        Ok(status) if !status.is_empty() && status != "ok" => {
            Error::new(format!("{doing}: {reason}: {status}"))
        }
        _ => Error::new(format!("{doing}: {reason}")),
    }
}
