//! The creation of mounts, and their attachment to a path in the container.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, OFlags};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

use super::entry::{Isolation, Mount};
use super::tree::{clone_tree, make_slave, move_mount};
use super::{options, remount, tmpcopyup};
use crate::error::{Context, Error, Reason as _, Result, refuse};
use crate::mounts::options::Bind;
use crate::mounts::rootfs::{MountTarget, Rootfs};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};
use rrun_kernel::procfs::PROC_SUPER_MAGIC;

/// The files in /proc that a bind mount is allowed to cover. For example, lxcfs covers some of
/// these files to show a container its limits.
const PROC_FILES: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

impl Mount {
    /// Creates the mount and attaches it in the container. `opened` is the detached mount, if
    /// [`super::HostMounts`] has already opened it.
    pub(crate) fn mount(
        &self,
        rootfs: &mut Rootfs,
        opened: Option<OwnedFd>,
        isolation: &Isolation<'_>,
    ) -> Result<()> {
        if self.options.remount {
            return remount::remount(self, rootfs)
                .map_err(|error| error.while_doing(self.sentence()));
        }
        let mount = match opened {
            Some(mount) => mount,
            None => self.make_detached(Some(isolation), false, None)?,
        };
        self.attach(rootfs, mount)
    }

    /// Creates the mount without attaching it. If `cut_off` is true, later mounts below a bind
    /// mount do not propagate to the host. `ids` is an optional user namespace. If `ids` is given,
    /// the mount maps user and group ids like this user namespace.
    pub(super) fn make_detached(
        &self,
        isolation: Option<&Isolation<'_>>,
        cut_off: bool,
        ids: Option<&OwnedFd>,
    ) -> Result<OwnedFd> {
        let mount = match (self.is_bind(), isolation) {
            (true, _) => self.clone_source(&self.source),
            (false, Some(isolation))
                if self.typ == "cgroup2" && !isolation.has_cgroup_namespace =>
            {
                self.bind_instead(isolation.cgroup, false)
            }
            (false, _) => self.new_file_system(isolation),
        }
        .map_err(|error| error.while_doing(self.sentence()))?;
        if cut_off && self.is_bind() {
            make_slave(&mount).doing(|| self.sentence())?;
        }
        if let Some(namespace) = ids {
            self.map_ids(&mount, namespace)
                .map_err(|error| error.while_doing(self.sentence()))?;
        }
        self.set_attributes(&mount)
            .map_err(|error| error.while_doing(self.sentence()))?;
        Ok(mount)
    }

    fn clone_source(&self, source: &Path) -> Result<OwnedFd> {
        if let Some((name, _)) = self.options.data.first() {
            refuse!("option {name} is unknown for a bind mount");
        }
        clone_tree(source, self.options.bind == Bind::Recursive)
            .map_err(|errno| Error::new(errno.reason()))
    }

    fn map_ids(&self, mount: &OwnedFd, namespace: &OwnedFd) -> Result<()> {
        let attr = MountAttr {
            attr_set: options::ATTR_IDMAP,
            userns_fd: namespace.as_raw_fd() as u64,
            ..MountAttr::default()
        };
        mount_setattr(mount.as_fd(), self.options.idmap == Some(true), &attr).map_err(|errno| {
            let hint = match errno {
                Errno::INVAL => ": perhaps the file system does not support id mappings",
                Errno::PERM => ": perhaps the ids of the source are already mapped",
                _ => "",
            };
            Error::new(format!("map the mount's ids: {}{hint}", errno.reason()))
        })
    }

    /// Attaches `mount`, which [`Mount::make_detached`] created, at its destination in the
    /// container.
    fn attach(&self, rootfs: &mut Rootfs, mount: OwnedFd) -> Result<()> {
        self.attach_to_target(rootfs, mount)
            .map_err(|error| error.while_doing(self.sentence()))
    }

    fn attach_to_target(&self, rootfs: &mut Rootfs, mount: OwnedFd) -> Result<()> {
        let is_new = !self.is_bind() && matches!(&*self.typ, "proc" | "sysfs");
        let mut inherits = self.inherits_from_target();
        let is_kernel_mount = is_new || matches!(self.destination.to_str(), Some("/proc" | "/sys"));
        let target = if is_new {
            // Programs expect the kernel's own files at the path of a procfs or sysfs. A symbolic
            // link in this path could lead programs to other files (CVE-2019-19921).
            rootfs.plain_directory(&self.destination)?
        } else {
            let stat = rustix::fs::fstat(&mount).doing(|| "stat the source")?;
            let kind = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => MountTarget::Directory,
                _ => MountTarget::File,
            };
            // A directory that does not exist yet has no contents or mode to inherit.
            if inherits {
                inherits = match rootfs.open(&self.destination, OFlags::PATH) {
                    Err(Errno::NOENT | Errno::NOTDIR) => false,
                    found => found.doing(|| "open the destination").map(|_| true)?,
                };
            }
            let target = if self.is_new_dev() {
                rootfs.record_dev(&stat);
                rootfs.make_dev()?
            } else {
                rootfs.mount_target(&self.destination, kind)?
            };
            self.refuse_inside_proc(&target, &mount)?;
            target
        };
        if inherits && self.options.tmpcopyup {
            tmpcopyup::copy(&target, &mount, |option| self.has_data(option))?;
        } else if inherits {
            tmpcopyup::copy_mode(&target, &mount)?;
        }
        move_mount(&mount, &target).doing(|| "attach the mount to the destination")?;
        let attributes = [&self.options.attr, &self.options.recursive_attr];
        if self.is_written_first() && attributes.into_iter().any(options::is_read_only) {
            let again =
                fcntl_dupfd_cloexec(&mount, 0).doing(|| "duplicate the mount's descriptor")?;
            rootfs.read_only_later(self.sentence(), again);
        }
        rootfs.record_attached(&self.destination, mount, is_kernel_mount);
        Ok(())
    }

    /// Refuses a mount at any path that leads into /proc, because the mount would hide the kernel's
    /// own files (CVE-2019-16884). The exceptions are [`PROC_FILES`], and a procfs that is bound
    /// over /proc itself.
    fn refuse_inside_proc(&self, target: &OwnedFd, mount: &OwnedFd) -> Result<()> {
        let is_proc = |fd: &OwnedFd| {
            rustix::fs::fstatfs(fd)
                .doing(|| "determine the file system type of the mount or of its destination")
                .map(|statfs| statfs.f_type == PROC_SUPER_MAGIC)
        };
        let inside = self.destination.starts_with("/proc") || is_proc(target)?;
        if !inside
            || PROC_FILES
                .iter()
                .any(|file| self.destination == Path::new(file))
        {
            return Ok(());
        }
        // The configuration is allowed to bind the /proc of the host or of another container over
        // /proc.
        if self.destination == Path::new("/proc") && self.is_bind() && is_proc(mount)? {
            return Ok(());
        }
        refuse!("mounts inside /proc are not allowed")
    }
}
