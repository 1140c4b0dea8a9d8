//! Mounts made, and attached to their place in the container.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, OFlags};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

use super::entry::{Mount, OwnCgroup};
use super::tree::{clone_tree, make_slave, move_mount};
use super::{options, remount, tmpcopyup};
use crate::error::{Context, Error, Reason as _, Result, refuse};
use crate::mounts::options::Bind;
use crate::mounts::rootfs::{MountTarget, Rootfs};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};
use rrun_kernel::procfs::PROC_SUPER_MAGIC;

/// Files in /proc that may be bound over, as lxcfs does to show a container its limits.
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
    /// Mounts it in the container. `opened` is the mount, if it was opened already.
    pub(crate) fn mount(
        &self,
        rootfs: &mut Rootfs,
        opened: Option<OwnedFd>,
        cgroup: &OwnCgroup<'_>,
    ) -> Result<()> {
        if self.options.remount {
            return remount::remount(self, rootfs)
                .map_err(|error| error.while_doing(self.sentence()));
        }
        let mount = match opened {
            Some(mount) => mount,
            None => self.make_detached(Some(cgroup), false, None)?,
        };
        self.attach(rootfs, mount)
    }

    /// Makes the mount, attached nowhere. With `cut_off`, what is mounted below a bind mount
    /// later on does not reach the host. Ids are mapped as in the user namespace `ids`.
    pub(super) fn make_detached(
        &self,
        cgroup: Option<&OwnCgroup<'_>>,
        cut_off: bool,
        ids: Option<&OwnedFd>,
    ) -> Result<OwnedFd> {
        let mount = match (self.is_bind(), cgroup) {
            (true, _) => self.clone_source(&self.source),
            (false, Some(cgroup)) if self.typ == "cgroup2" && !cgroup.has_namespace => {
                self.bind_instead(cgroup.path, false)
            }
            (false, _) => self.new_file_system(cgroup),
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
                Errno::INVAL => ": its file system may not support that",
                Errno::PERM => ": its ids may be mapped already",
                _ => "",
            };
            Error::new(format!("map its ids: {}{hint}", errno.reason()))
        })
    }

    /// Moves a mount that [`Mount::make_detached`] made to its place in the container.
    fn attach(&self, rootfs: &mut Rootfs, mount: OwnedFd) -> Result<()> {
        self.attach_to_target(rootfs, mount)
            .map_err(|error| error.while_doing(self.sentence()))
    }

    fn attach_to_target(&self, rootfs: &mut Rootfs, mount: OwnedFd) -> Result<()> {
        let is_new = !self.is_bind() && matches!(&*self.typ, "proc" | "sysfs");
        let mut filled = self.is_filled();
        let is_kernels = is_new || matches!(self.destination.to_str(), Some("/proc" | "/sys"));
        let target = if is_new {
            // Others look for the kernel's own files here; a link would make them look
            // somewhere else (CVE-2019-19921).
            rootfs.plain_directory(&self.destination)?
        } else {
            let stat = rustix::fs::fstat(&mount).doing(|| "stat the source")?;
            let kind = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => MountTarget::Directory,
                _ => MountTarget::File,
            };
            // A directory that is only made for it has nothing to give it.
            let is_there = !filled || rootfs.open(&self.destination, OFlags::PATH).is_ok();
            filled &= is_there;
            let target = rootfs.mount_target(&self.destination, kind)?;
            self.refuse_inside_proc(&target, &mount)?;
            target
        };
        if filled && self.options.tmpcopyup {
            tmpcopyup::copy(&target, &mount)?;
        } else if filled {
            tmpcopyup::copy_mode(&target, &mount)?;
        }
        move_mount(&mount, &target).doing(|| "attach it")?;
        let attributes = [&self.options.attr, &self.options.recursive_attr];
        if self.is_written_first() && attributes.into_iter().any(options::is_read_only) {
            let again = fcntl_dupfd_cloexec(&mount, 0).doing(|| "keep it in mind")?;
            rootfs.read_only_later(self.sentence(), again);
        }
        rootfs.attached(&self.destination, mount, is_kernels);
        Ok(())
    }

    /// Refuses a mount inside /proc, whatever path leads there: it would hide the kernel's own
    /// files (CVE-2019-16884). Allowed are [`PROC_FILES`], and a procfs bound over /proc itself.
    fn refuse_inside_proc(&self, target: &OwnedFd, mount: &OwnedFd) -> Result<()> {
        let is_proc = |fd: &OwnedFd| {
            rustix::fs::fstatfs(fd)
                .doing(|| "ask for the file system")
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
        // The host's own /proc, or another's, may be bound there.
        if self.destination == Path::new("/proc") && self.is_bind() && is_proc(mount)? {
            return Ok(());
        }
        refuse!("nothing may be mounted inside /proc")
    }
}
