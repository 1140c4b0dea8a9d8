//! A container's cgroup, in the unified hierarchy (cgroup v2) at /sys/fs/cgroup.
//!
//! It is made, with all its limits, before the process that is made in it. So there is
//! no moment in which that process is not held by them. See cgroups(7) and the kernel's
//! Documentation/admin-guide/cgroup-v2.rst.

mod controllers;
mod dbus;
mod devices;
mod directory;
mod properties;
mod resources;
mod stats;
mod systemd;
mod validate;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use rustix::io::Errno;

use crate::error::{Context, Result};
use crate::log;
use directory::{Directory, EMPTY_TIMEOUT, check_unified, wait_for_event};
use systemd::{Placeholder, Scope};

pub(crate) use directory::{
    MOUNT_POINT, all_pids, existing_below, freeze, is_frozen, kill_all, of_process, open,
};
pub(crate) use resources::{check_memory_above_use, complete_update, memory_swap};
pub(crate) use stats::{oom_kills, stats};
pub(crate) use systemd::ANNOTATION;
pub(crate) use validate::validate;

/// A container's cgroup, open.
pub(crate) struct Cgroup {
    directory: Directory,
    /// Until the container's first process is in the cgroup: see [`systemd`].
    placeholder: Option<Placeholder>,
    /// Whether the device rules are still to be put in place.
    devices_deferred: bool,
}

/// Where a container's cgroup will be, and who makes it.
pub(crate) struct CgroupLocation {
    pub(crate) path: PathBuf,
    scope: Option<Scope>,
}

impl CgroupLocation {
    /// By the cgroupfs driver, or the systemd driver if `by_systemd`.
    pub(crate) fn new(
        cgroups_path: &Path,
        annotations: &HashMap<String, String>,
        id: &str,
        by_systemd: bool,
    ) -> Result<CgroupLocation> {
        if by_systemd {
            let scope = Scope::from_spec(cgroups_path, id, annotations)?;
            return Ok(CgroupLocation {
                path: Path::new(MOUNT_POINT).join(scope.path()?),
                scope: Some(scope),
            });
        }
        if !cgroups_path.is_absolute() && cgroups_path.to_string_lossy().contains(':') {
            // As runc and crun have it, it is a path like any other then.
            log::warning(&format!(
                "linux.cgroupsPath: {} is in the form of the systemd cgroup driver, and --systemd-cgroup is not given",
                cgroups_path.display()
            ));
        }
        Ok(CgroupLocation {
            path: path_for(cgroups_path, id)?,
            scope: None,
        })
    }

    /// The unit of systemd that the cgroup is, if it is one.
    pub(crate) fn unit(&self) -> Option<&str> {
        self.scope.as_ref().map(|scope| scope.unit.as_str())
    }

    /// Makes the cgroup. [`Cgroup::apply`] has to follow.
    pub(crate) fn create(&self, id: &str, resources: &LinuxResources) -> Result<Cgroup> {
        let Some(scope) = &self.scope else {
            return Ok(Cgroup {
                directory: Directory::create(&self.path)?,
                placeholder: None,
                devices_deferred: false,
            });
        };
        check_unified()?;
        let mut limits = properties::from_resources(resources, true)?;
        limits.extend(properties::only_at_start(resources)?);
        let placeholder = scope.start(id, limits)?;
        Ok(Cgroup {
            directory: Directory::open(&self.path)?,
            placeholder: Some(placeholder),
            devices_deferred: false,
        })
    }
}

/// Where a container's cgroup lies on the host.
///
/// `linux.cgroupsPath` counts from the mount point if it is absolute. Otherwise, and if it
/// is missing (then the container's id takes its place), it counts from the parent of the
/// cgroup that rrun itself is in, as with runc: its own has processes, and could therefore
/// not have controllers for children.
fn path_for(cgroups_path: &Path, id: &str) -> Result<PathBuf> {
    if cgroups_path.is_absolute() {
        let relative = cgroups_path.strip_prefix("/").unwrap_or(cgroups_path);
        return Ok(Path::new(MOUNT_POINT).join(relative));
    }
    let inner = if cgroups_path.as_os_str().is_empty() {
        Path::new(id)
    } else {
        cgroups_path
    };
    let own = std::fs::read_to_string("/proc/self/cgroup").doing(|| "read /proc/self/cgroup")?;
    Ok(Path::new(MOUNT_POINT).join(parent_of_own(&own)).join(inner))
}

/// From the content of /proc/self/cgroup, the path of the parent, relative.
fn parent_of_own(text: &str) -> &Path {
    text.lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .and_then(|own| Path::new(own).parent())
        .unwrap_or_else(|| Path::new(""))
}

impl Cgroup {
    /// Puts all limits in place; with `defer_devices`, the device rules only by
    /// [`Cgroup::complete`], which has to follow in any case.
    pub(crate) fn apply(&mut self, resources: &LinuxResources, defer_devices: bool) -> Result<()> {
        resources::apply(&self.directory, resources)?;
        if self.placeholder.is_some() && resources::takes_one_process(resources) {
            self.set_pids_max("2")?;
        }
        log::debug(|| {
            let path = self.directory.path().display();
            format!("made cgroup {path} with its limits")
        });
        self.devices_deferred = defer_devices;
        if defer_devices {
            return Ok(());
        }
        self.apply_devices(resources)
    }

    fn apply_devices(&self, resources: &LinuxResources) -> Result<()> {
        // A user namespace is what keeps an unprivileged caller's container from devices; the
        // kernel takes no programs from such a caller.
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        let rules = resources.devices().as_deref().unwrap_or_default();
        devices::apply(&self.directory, rules, false)
    }

    /// In a copy of the process that made it: closes its descriptors, and undoes nothing.
    pub(crate) fn leave_to_parent(self) {
        std::mem::forget(self.placeholder);
    }

    /// To be called when the first process is in the cgroup, which then keeps it alive.
    pub(crate) fn complete(&mut self, resources: &LinuxResources) -> Result<()> {
        if self.placeholder.take().is_some() && resources::takes_one_process(resources) {
            self.set_pids_max("1")?;
        }
        if self.devices_deferred {
            self.apply_devices(resources)?;
        }
        Ok(())
    }

    fn set_pids_max(&self, limit: &str) -> Result<()> {
        self.directory
            .write("pids.max", limit)
            .doing(|| format!("set pids.max of cgroup {}", self.directory.path().display()))
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Changes limits of an existing container, whose cgroup may be a unit of systemd. Device
/// rules are changed if there are any.
pub(crate) fn update(path: &Path, unit: Option<&str>, resources: &LinuxResources) -> Result<()> {
    let cgroup = Directory::open(path)?;
    let with_devices = resources.devices().is_some();
    if let Some(unit) = unit {
        systemd::set(unit, &properties::from_resources(resources, with_devices)?)?;
    }
    resources::apply(&cgroup, resources)?;
    if with_devices {
        devices::apply(
            &cgroup,
            resources.devices().as_deref().unwrap_or_default(),
            true,
        )?;
    }
    Ok(())
}

/// The unit of systemd that a cgroup is, by its place alone: a scope in a slice, on a
/// machine that systemd runs.
pub(crate) fn unit_at(path: &Path) -> Option<String> {
    let unit = path.file_name()?.to_str()?;
    let slice = path.parent()?;
    let in_slice =
        slice == Path::new(MOUNT_POINT) || slice.file_name()?.to_str()?.ends_with(".slice");
    let by_systemd = in_slice && unit.ends_with(".scope") && systemd::is_running();
    by_systemd.then(|| unit.to_owned())
}

/// Removes a cgroup and those below it, killing what is still in them, and the unit of
/// systemd that it may be.
///
/// # Errors
/// If a process does not die within some seconds.
pub(crate) fn remove(path: &Path, unit: Option<&str>) -> Result<()> {
    if let Some(unit) = unit {
        // systemd would first ask politely, and wait.
        kill_all(path)?;
        wait_for_event(path, "populated 0", EMPTY_TIMEOUT)?;
        systemd::stop(unit)?;
    }
    match rustix::fs::rmdir(path) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // An unprivileged caller's container can have none.
        Err(_) if !path.exists() => return Ok(()),
        // Processes, or cgroups below.
        Err(_) => kill_all(path)?,
    }
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    loop {
        let emptied = wait_for_event(
            path,
            "populated 0",
            deadline.saturating_duration_since(Instant::now()),
        )?;
        let Err((directory, errno)) = rrun_kernel::cgroup::remove_tree(path) else {
            return Ok(());
        };
        if errno != Errno::BUSY || !emptied || Instant::now() >= deadline {
            return Err(errno).doing(|| format!("remove cgroup {}", directory.display()));
        }
        // Emptied, and busy all the same: someone is just looking into it, or a process is
        // being made in there, which the next round kills.
        std::thread::sleep(Duration::from_millis(2));
        kill_all(path)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_count_from_the_mount_point_or_from_beside_ones_own() {
        assert_eq!(
            path_for(Path::new("/kubepods/pod1/c1"), "c1").unwrap(),
            Path::new("/sys/fs/cgroup/kubepods/pod1/c1")
        );
        assert_eq!(
            parent_of_own("1:name=systemd:/x\n0::/user.slice/s1\n"),
            Path::new("user.slice")
        );
        assert_eq!(parent_of_own("0::/\n"), Path::new(""));
    }
}
