//! `linux.intelRdt`: shares of caches and memory bandwidth, through the kernel's resctrl
//! file system. See Documentation/filesystems/resctrl.rst.

use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::config::spec;
use crate::error::{Context, Error, Reason as _, Result, refuse};

const MOUNT_POINT: &str = "/sys/fs/resctrl";
/// linux/magic.h
const RDTGROUP_SUPER_MAGIC: u64 = 0x0765_5821;

/// What is asked for, checked.
#[derive(Clone, Debug)]
pub(crate) struct Resctrl {
    clos_id: Option<String>,
    /// Lines for the group's schemata file.
    schemata: Vec<String>,
    monitored: bool,
}

/// Directories that `delete` has to remove.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ResctrlGroups {
    group: Option<PathBuf>,
    monitoring: Option<PathBuf>,
}

impl Resctrl {
    /// # Errors
    /// No resctrl on this host; values that contradict each other, by their field.
    pub(crate) fn from_spec(rdt: &spec::IntelRdt) -> Result<Resctrl> {
        let field = "linux.intelRdt";
        let mounted = rustix::fs::statfs(MOUNT_POINT)
            .is_ok_and(|fs| fs.f_type as u64 == RDTGROUP_SUPER_MAGIC);
        if !mounted {
            refuse!("{field}: can not be had, resctrl is not mounted on {MOUNT_POINT}");
        }
        if matches!(rdt.clos_id.as_str(), "." | "..")
            || (rdt.clos_id.contains(['/', '\n', '\0']) && rdt.clos_id != "/")
        {
            refuse!("{field}.closID: {:?} is no name of a group", rdt.clos_id);
        }
        // The root group is there, and everybody's.
        if rdt.clos_id == "info" || rdt.clos_id == "mon_groups" || rdt.clos_id == "mon_data" {
            refuse!("{field}.closID: {} is the kernel's own", rdt.clos_id);
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
                refuse!("{field}.{name}: this machine can not divide {resource}");
            }
            schemata.push(line.clone());
        }
        // The last line for a resource counts.
        schemata.extend(rdt.schemata.iter().flatten().cloned());
        Ok(Resctrl {
            clos_id: Some(rdt.clos_id.clone()).filter(|id| !id.is_empty()),
            schemata,
            monitored: rdt.enable_monitoring,
        })
    }

    /// Makes the group if need be, gives it its shares, and puts a process into it, whose
    /// children will be in there too. What was made is put into `made` as soon as it is.
    pub(crate) fn apply(&self, id: &str, pid: i32, made: &mut ResctrlGroups) -> Result<()> {
        let group = match self.clos_id.as_deref() {
            Some("/") => PathBuf::from(MOUNT_POINT),
            Some(name) => Path::new(MOUNT_POINT).join(name),
            None => Path::new(MOUNT_POINT).join(id),
        };
        let doing = || format!("make resctrl group {} (linux.intelRdt)", group.display());
        if self.clos_id.is_some() && self.schemata.is_empty() && !group.is_dir() {
            refuse!(
                "linux.intelRdt.closID: there is no {}, and no schemata to make it with",
                group.display()
            );
        }
        match make(&group) {
            // One with a name of its own is for others to join.
            Ok(()) if self.clos_id.is_none() => made.group = Some(group.clone()),
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(explained(doing(), &errno.reason())),
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
                Ok(()) => made.monitoring = Some(monitoring.clone()),
                Err(Errno::EXIST) => {}
                Err(errno) => {
                    let doing = format!(
                        "make {} (linux.intelRdt.enableMonitoring)",
                        monitoring.display()
                    );
                    return Err(explained(doing, &errno.reason()));
                }
            }
            write(&monitoring, "tasks", &pid.to_string())?;
        }
        Ok(())
    }
}

/// Writes lines of schemata to the group that a container's first process is in.
///
/// # Errors
/// No resctrl on this host, or no group of the container's own.
pub(crate) fn update(pid: i32, schemata: &[&str]) -> Result<()> {
    let doing = "--l3-cache-schema, --mem-bw-schema";
    let path = format!("/proc/{pid}/cpu_resctrl_groups");
    let groups = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            refuse!("{doing}: the kernel has no resctrl")
        }
        result => result.doing(|| format!("read {path}"))?,
    };
    match group_of(&groups) {
        Some("") | None => {
            refuse!("{doing}: the container has no resctrl group of its own (linux.intelRdt)")
        }
        Some(group) => {
            let mut lines = schemata.join("\n");
            lines.push('\n');
            write(&Path::new(MOUNT_POINT).join(group), "schemata", &lines)
        }
    }
}

/// From the content of /proc/PID/cpu_resctrl_groups, the name of the group; empty for the
/// root's.
fn group_of(groups: &str) -> Option<&str> {
    let name = groups.lines().find_map(|line| line.strip_prefix("res:"))?;
    Some(name.trim_matches('/'))
}

impl ResctrlGroups {
    pub(crate) fn is_empty(&self) -> bool {
        self.group.is_none() && self.monitoring.is_none()
    }

    /// Removes the container's groups; processes that still are in one go back to its parent.
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
        explained(doing, &error.reason())
    })
}

/// An error with what the kernel says beside the errno.
fn explained(doing: String, reason: &str) -> Error {
    let status = std::fs::read_to_string(Path::new(MOUNT_POINT).join("info/last_cmd_status"));
    match status.as_deref().map(str::trim) {
        Ok(status) if !status.is_empty() && status != "ok" => {
            Error::new(format!("{doing}: {reason}: {status}"))
        }
        _ => Error::new(format!("{doing}: {reason}")),
    }
}
