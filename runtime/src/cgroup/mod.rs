//! A container's cgroup, in the unified hierarchy (cgroup v2) at /sys/fs/cgroup.
//!
//! rrun creates the cgroup, sets its limits, and then creates the container's first process inside
//! the cgroup. So the first process never runs without these limits. See cgroups(7) and the
//! kernel's Documentation/admin-guide/cgroup-v2.rst.

mod controllers;
mod dbus;
#[cfg(feature = "fuzz")]
pub(crate) use dbus::fuzz_message as fuzz_dbus_message;
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
use crate::sys::files::exists;
use directory::{Directory, EMPTY_TIMEOUT, check_unified, wait_until_empty};
use rrun_kernel::cgroup::Survivors;
use systemd::{Placeholder, Scope};

pub(crate) use directory::{
    MOUNT_POINT, all_pids, existing_below, freeze, is_frozen, is_path_of_cgroup, kill_all,
    kill_all_and_survivors, of_process, open,
};
pub(crate) use resources::{check_memory_above_use, complete_update, memory_swap};
pub(crate) use stats::{oom_kills, stats};
pub(crate) use systemd::ANNOTATION;
pub(crate) use validate::validate;

/// A container's cgroup, with the open descriptor of its directory.
pub(crate) struct Cgroup {
    directory: Directory,
    /// The process that keeps a systemd scope alive until the container's first process is in the
    /// cgroup. See [`systemd`].
    placeholder: Option<Placeholder>,
    /// True if [`Cgroup::complete`] still has to apply the device rules.
    devices_deferred: bool,
}

/// The path of a container's cgroup, and the systemd scope if systemd creates the cgroup.
pub(crate) struct CgroupLocation {
    pub(crate) path: PathBuf,
    scope: Option<Scope>,
}

impl CgroupLocation {
    /// Returns the location of the cgroup that `linux.cgroupsPath` specifies. If `by_systemd` is
    /// true, the systemd driver creates the cgroup. If `by_systemd` is false, the cgroupfs driver
    /// creates the cgroup.
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
            // Without --systemd-cgroup, rrun treats a value of the form slice:prefix:name as an
            // ordinary path, as runc and crun do.
            log::warning(&format!(
                "linux.cgroupsPath: {} has the form of the systemd cgroup driver (slice:prefix:name), but --systemd-cgroup is not set",
                cgroups_path.display()
            ));
        }
        Ok(CgroupLocation {
            path: path_for(cgroups_path, id)?,
            scope: None,
        })
    }

    /// Returns the name of the systemd unit, if systemd creates the cgroup.
    pub(crate) fn unit(&self) -> Option<&str> {
        self.scope.as_ref().map(|scope| scope.unit.as_str())
    }

    /// Creates the cgroup. The caller must call [`Cgroup::apply`] afterwards.
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
        match Directory::open(&self.path) {
            Ok(directory) => Ok(Cgroup {
                directory,
                placeholder: Some(placeholder),
                devices_deferred: false,
            }),
            Err(error) => {
                scope.abandon(placeholder);
                Err(error)
            }
        }
    }
}

/// Returns the host path of a container's cgroup.
///
/// Like runc, rrun resolves an absolute `linux.cgroupsPath` from the mount point of the hierarchy.
/// rrun resolves a relative path from the parent of rrun's own cgroup. If `linux.cgroupsPath` is
/// missing, rrun uses the container's id as a relative path. A cgroup that contains processes
/// cannot enable controllers for its children. So rrun's own cgroup cannot be the container's
/// parent cgroup.
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

/// Returns the path of the parent of rrun's own cgroup, relative to the mount point of the
/// hierarchy. `text` is the content of /proc/self/cgroup.
fn parent_of_own(text: &str) -> &Path {
    text.lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .and_then(|own| Path::new(own).parent())
        .unwrap_or_else(|| Path::new(""))
}

impl Cgroup {
    /// Sets all limits. If `defer_devices` is true, [`Cgroup::complete`] applies the device rules
    /// later. The caller must always call [`Cgroup::complete`] afterwards.
    pub(crate) fn apply(&mut self, resources: &LinuxResources, defer_devices: bool) -> Result<()> {
        resources::apply(&self.directory, resources)?;
        if self.placeholder.is_some() && resources::allows_one_process(resources) {
            self.set_pids_max("2")?;
        }
        log::debug(|| {
            let path = self.directory.path().display();
            format!("created cgroup {path} and set its limits")
        });
        self.devices_deferred = defer_devices;
        if defer_devices {
            return Ok(());
        }
        self.apply_devices(resources)
    }

    fn apply_devices(&self, resources: &LinuxResources) -> Result<()> {
        // The kernel refuses BPF programs from an unprivileged process. If rrun's caller is
        // unprivileged, the container is in a user namespace, which already prevents access to
        // devices.
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        let rules = resources.devices().as_deref().unwrap_or_default();
        devices::apply(&self.directory, rules, false)
    }

    /// Closes the descriptor of the cgroup's directory, but does not end the placeholder process. A
    /// child of rrun calls this function. Only rrun itself, the parent, is allowed to end the
    /// placeholder process.
    pub(crate) fn leave_to_parent(self) {
        std::mem::forget(self.placeholder);
    }

    /// Ends the placeholder process, and applies the limits that [`Cgroup::apply`] deferred. The
    /// container's first process must already be in the cgroup. Without a process in the cgroup,
    /// systemd would end its scope.
    pub(crate) fn complete(&mut self, resources: &LinuxResources) -> Result<()> {
        if self.placeholder.take().is_some() && resources::allows_one_process(resources) {
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

/// Changes the limits of an existing container. `unit` is the systemd unit of the cgroup, if the
/// cgroup has a unit. Replaces the device rules only if `resources` contains device rules.
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

/// Returns the name of the systemd unit for which systemd created the cgroup at `path`. This
/// function assumes that systemd created the cgroup if three conditions are true: systemd is
/// running, the cgroup's name ends in `.scope`, and the cgroup's parent is a slice.
pub(crate) fn unit_at(path: &Path) -> Option<String> {
    let unit = systemd::unit_name(path.file_name()?.to_str()?);
    let slice = path.parent()?;
    let in_slice =
        slice == Path::new(MOUNT_POINT) || slice.file_name()?.to_str()?.ends_with(".slice");
    let by_systemd = in_slice && unit.ends_with(".scope") && systemd::is_running();
    by_systemd.then(|| unit.to_owned())
}

/// Removes a cgroup and all cgroups below it. Kills the processes that are still in these cgroups.
/// If the cgroup has a systemd unit, stops the unit.
///
/// # Errors
/// Fails if a killed process does not leave the cgroup within [`EMPTY_TIMEOUT`].
pub(crate) fn remove(path: &Path, unit: Option<&str>) -> Result<()> {
    if let Some(unit) = unit {
        // rrun kills the processes itself. systemd would first send SIGTERM, and would send SIGKILL
        // only after a delay.
        kill_all(path)?;
        let deadline = Instant::now() + EMPTY_TIMEOUT;
        wait_until_empty(path, &mut Survivors::new(), deadline)?;
        systemd::stop(unit)?;
    }
    match rustix::fs::rmdir(path) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // A missing cgroup is not an error. The container of an unprivileged caller does not always
        // have a cgroup.
        Err(_) if !exists(path)? => return Ok(()),
        // rmdir(2) failed because the cgroup still contains processes or child cgroups.
        Err(_) => kill_all(path)?,
    }
    let mut survivors = Survivors::new();
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    loop {
        let emptied = wait_until_empty(path, &mut survivors, deadline)?;
        let Err((directory, errno)) = rrun_kernel::cgroup::remove_tree(path) else {
            return Ok(());
        };
        if errno != Errno::BUSY || !emptied || Instant::now() >= deadline {
            return Err(errno).doing(|| format!("remove cgroup {}", directory.display()));
        }
        // rmdir(2) can fail with EBUSY although the cgroup was empty. For example, another program
        // reads the cgroup's files, or has just created a process in the cgroup. The call of
        // `kill_all` below kills such a process.
        std::thread::sleep(Duration::from_millis(2));
        kill_all(path)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_paths_start_at_the_mount_point_and_relative_paths_at_the_parent_of_rruns_cgroup() {
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
