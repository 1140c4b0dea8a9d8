//! Mounts that rrun opens for the container's first process, because the first process has no
//! access to the host's files.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use nix::sched::CloneFlags;
use oci_spec::runtime::LinuxNamespaceType as Type;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::entry::Mount;
use super::options::{Bind, SHARED};
use super::tree::{attach_root, clone_root, clone_tree, open_root};
use crate::error::{Context, Result};
use crate::namespaces::idmap::{IdMapNamespaces, IdMaps};
use crate::namespaces::{NamespaceHolder, Namespaces};

/// The settings of config.json that determine which of the host's files rrun mounts, and how.
pub(crate) struct MountSources<'a> {
    pub(crate) rootfs: &'a Path,
    pub(crate) mounts: &'a [Mount],
    /// True if the container's root is a shared mount, so that new mounts below it propagate to the
    /// host.
    pub(crate) root_is_shared: bool,
    /// True if new mounts of the host propagate to the container's root.
    pub(crate) root_is_slave: bool,
    pub(crate) namespaces: &'a Namespaces,
    pub(crate) id_maps: &'a IdMaps,
}

impl MountSources<'_> {
    fn clone_root(&self) -> Result<OwnedFd> {
        clone_root(&open_root(self.rootfs)?, self.rootfs, self.root_is_slave)
    }
}

/// Parts of the host's file system, opened as detached mounts before the container's first process
/// loses access to the host's files.
#[derive(Default)]
pub(crate) struct HostMounts {
    pub(crate) root: Option<OwnedFd>,
    /// One element for each of the container's mounts. The element is `None` if rrun has not opened
    /// the mount.
    pub(crate) mounts: Vec<Option<OwnedFd>>,
}

impl HostMounts {
    /// Opens the mounts that the container's first process could not open itself. In its user
    /// namespace, the first process cannot reach the host's files. The first process also cannot
    /// map ids, because an id mapping requires all privileges over the file system.
    ///
    /// If rrun's caller is unprivileged, this function opens nothing. The first process can then
    /// reach the same files as rrun's caller, and has all privileges over its own mounts.
    pub(crate) fn before_clone(sources: &MountSources<'_>) -> Result<HostMounts> {
        let mut host_mounts = HostMounts::default();
        if !rustix::process::geteuid().is_root() {
            return Ok(host_mounts);
        }
        match (
            sources.namespaces.own(Type::User),
            sources.namespaces.is_new(Type::Mount),
        ) {
            (true, true) => host_mounts.open_locked(sources)?,
            (true, false) => {
                host_mounts.open(sources, Mount::is_bind)?;
                host_mounts.root = Some(sources.clone_root()?);
            }
            (false, _) if sources.mounts.iter().any(Mount::is_idmapped) => {
                host_mounts.open(sources, Mount::is_idmapped)?;
            }
            (false, _) => {}
        }
        Ok(host_mounts)
    }

    /// Opens the container's root and the sources of the bind mounts in a copy of the host's mount
    /// namespace that belongs to another user namespace, because the kernel locks the mounts in such
    /// a copy (mount_namespaces(7)). A container with CAP_SYS_ADMIN in its user namespace can make no
    /// locked mount of the host writable, and cannot reveal what a mount of the host covers.
    ///
    /// The mount namespace of the first process is also such a copy. But if the container joins a
    /// user namespace, other containers in this user namespace could change the copy.
    fn open_locked(&mut self, sources: &MountSources<'_>) -> Result<()> {
        let mut ids = IdMapNamespaces::default();
        for mount in sources.mounts {
            mount.id_namespace(sources, &mut ids)?;
        }
        let locked = NamespaceHolder::create(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)
            .map_err(|error| error.while_doing("lock a copy of the host's mounts"))?;
        in_mount_namespace(&locked.pidfd, locked.pid, || {
            self.root = Some(sources.clone_root()?);
            let wanted = |mount: &Mount| mount.can_be_locked(sources);
            self.open_with(sources, wanted, &mut ids)
        })?;
        self.open_with(sources, Mount::is_bind, &mut ids)
    }

    /// Opens the sources of the bind mounts that `wanted` selects. Skips the sources that are
    /// already open.
    pub(crate) fn open(
        &mut self,
        sources: &MountSources<'_>,
        wanted: fn(&Mount) -> bool,
    ) -> Result<()> {
        self.open_with(sources, wanted, &mut IdMapNamespaces::default())
    }

    fn open_with(
        &mut self,
        sources: &MountSources<'_>,
        wanted: impl Fn(&Mount) -> bool,
        namespaces: &mut IdMapNamespaces,
    ) -> Result<()> {
        // If the container's root is shared, later mounts below a bind mount must still propagate
        // to the host. So rrun does not stop the propagation in this case.
        let cut_off = !sources.root_is_shared;
        self.mounts.resize_with(sources.mounts.len(), || None);
        for (mount, opened) in sources.mounts.iter().zip(&mut self.mounts) {
            if opened.is_some() || !wanted(mount) {
                continue;
            }
            let ids = mount.id_namespace(sources, namespaces)?;
            *opened = Some(mount.make_detached(None, cut_off, ids)?);
        }
        Ok(())
    }
}

impl Mount {
    /// Returns the user namespace whose id mappings the mount has. Returns `None` if the mount has
    /// no id mappings.
    fn id_namespace<'a>(
        &self,
        sources: &MountSources<'_>,
        namespaces: &'a mut IdMapNamespaces,
    ) -> Result<Option<&'a OwnedFd>> {
        if !self.is_idmapped() {
            return Ok(None);
        }
        let namespace = if self.id_maps.is_empty() {
            namespaces.for_container(sources.namespaces, sources.id_maps)
        } else {
            namespaces.for_maps(&self.id_maps)
        };
        namespace
            .map(Some)
            .map_err(|error| error.while_doing(self.sentence()))
    }

    /// Returns whether rrun can copy this bind mount from a mount that the kernel has locked.
    /// Otherwise, rrun opens the source in the host's mount namespace, because config.json asks for
    /// something that a locked mount does not permit:
    /// * New mounts in the container propagate to the host.
    /// * The mounts below the source are missing. The kernel refuses to copy the source without them
    ///   (EINVAL), because the copy would reveal what they cover.
    /// * The source is a link of /proc that leads to a file in another mount namespace, such as
    ///   /proc/PID/root (EINVAL).
    fn can_be_locked(&self, sources: &MountSources<'_>) -> bool {
        let is_shared = |(kind, _): &(u64, bool)| *kind == SHARED;
        if !self.is_bind()
            || sources.root_is_shared && self.options.propagation.iter().any(is_shared)
        {
            return false;
        }
        let recursive = self.options.bind == Bind::Recursive;
        let is_certain = recursive && !self.source.starts_with("/proc");
        is_certain || !matches!(clone_tree(&self.source, recursive), Err(Errno::INVAL))
    }
}

/// Attaches the container's root at root.path in the mount namespace of the first process, which has
/// no right to reach this path. `pid` and `pidfd` refer to the first process.
pub(crate) fn attach_for_first_process(
    root: &OwnedFd,
    pidfd: &OwnedFd,
    pid: i32,
    sources: &MountSources<'_>,
) -> Result<()> {
    let path = sources.rootfs;
    in_mount_namespace(pidfd, pid, || attach_root(root, &open_root(path)?, path))
}

/// Calls `work` in the mount namespace and in the root directory of another process. rrun needs its
/// own mount namespace afterwards, so only a thread enters the other one.
fn in_mount_namespace(
    pidfd: &OwnedFd,
    pid: i32,
    work: impl FnOnce() -> Result<()> + Send,
) -> Result<()> {
    let doing = || format!("enter the mount namespace of process {pid}");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(format!("/proc/{pid}/root"), flags, Mode::empty()).doing(doing)?;
    let enter = || {
        // The kernel refuses a thread that shares its root directory with other threads, setns(2).
        nix::sched::unshare(CloneFlags::CLONE_FS)
            .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
        move_into_link_name_space(pidfd.as_fd(), Some(LinkNameSpaceType::Mount))?;
        rustix::process::fchdir(&root)?;
        rustix::process::chroot(".")
    };
    std::thread::scope(|scope| {
        let thread = || enter().doing(doing).and_then(|()| work());
        let thread = std::thread::Builder::new().spawn_scoped(scope, thread);
        let joined = thread.doing(doing)?.join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
