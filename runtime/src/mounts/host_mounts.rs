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
use crate::namespaces::Namespaces;
use crate::namespaces::idmap::{IdMapNamespaces, IdMaps};

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
    /// Returns whether a privileged parent opens the sources after the creation of the first
    /// process, with [`HostMounts::in_namespace_of`].
    pub(crate) fn are_opened_after_clone(&self) -> bool {
        self.namespaces.own(Type::User) && self.namespaces.is_new(Type::Mount)
    }
}

/// Parts of the host's file system, opened as detached mounts.
#[derive(Default)]
pub(crate) struct HostMounts {
    /// The container's root as a detached mount.
    pub(crate) root: Option<OwnedFd>,
    /// The container's root, if it is already attached at root.path in the mount namespace of the
    /// first process.
    pub(crate) attached_root: Option<OwnedFd>,
    /// One element for each of the container's mounts. The element is `None` if rrun has not opened
    /// the mount. The vector can have fewer elements than the container has mounts.
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
        if !rustix::process::geteuid().is_root() || sources.are_opened_after_clone() {
            return Ok(host_mounts);
        }
        if sources.namespaces.own(Type::User) {
            host_mounts.open(sources, Mount::is_bind)?;
            let directory = open_root(sources.rootfs)?;
            let root = clone_root(&directory, sources.rootfs, sources.root_is_slave)?;
            host_mounts.root = Some(root);
        } else if sources.mounts.iter().any(Mount::is_idmapped) {
            host_mounts.open(sources, Mount::is_idmapped)?;
        }
        Ok(host_mounts)
    }

    /// Attaches the container's root at root.path in the mount namespace of the first process, and
    /// opens the sources of the bind mounts there. `pid` and `pidfd` refer to the first process,
    /// which is in a user namespace and has no right to open these files.
    ///
    /// The mount namespace of the first process is a copy of the host's mount namespace. Because it
    /// belongs to another user namespace, the kernel has locked its mounts (mount_namespaces(7)). A
    /// container with CAP_SYS_ADMIN in its user namespace can make no locked mount of the host
    /// writable, and cannot reveal what a mount of the host covers. In the host's own mount
    /// namespace, the mounts are not locked.
    pub(crate) fn in_namespace_of(
        pidfd: &OwnedFd,
        pid: i32,
        sources: &MountSources<'_>,
    ) -> Result<HostMounts> {
        let doing = || "open the container's mounts in its mount namespace";
        let root = rustix::fs::open(
            format!("/proc/{pid}/root"),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing(|| "open the root directory of the container's first process")?;
        let mut ids = IdMapNamespaces::default();
        for mount in sources.mounts {
            mount.id_namespace(sources, &mut ids)?;
        }
        let mut host_mounts = HostMounts::default();
        // rrun needs its own mount namespace afterwards, so only a thread enters the other one.
        let opened = std::thread::scope(|scope| {
            let open = || {
                enter_mount_namespace(pidfd, &root).doing(doing)?;
                host_mounts.attach_root(sources)?;
                let wanted = |mount: &Mount| mount.can_be_locked(sources);
                host_mounts.open_with(sources, wanted, &mut ids)
            };
            let thread = std::thread::Builder::new().spawn_scoped(scope, open);
            let joined = thread.doing(|| format!("create a thread to {}", doing()))?;
            joined
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        opened?;
        host_mounts.open_with(sources, Mount::is_bind, &mut ids)?;
        Ok(host_mounts)
    }

    fn attach_root(&mut self, sources: &MountSources<'_>) -> Result<()> {
        let directory = open_root(sources.rootfs)?;
        let root = clone_root(&directory, sources.rootfs, sources.root_is_slave)?;
        attach_root(&root, &directory, sources.rootfs)?;
        self.attached_root = Some(root);
        Ok(())
    }

    /// Adds the opened source of the bind mount with the index `index` in config.json.
    pub(crate) fn insert(&mut self, index: usize, mount: OwnedFd) {
        if self.mounts.len() <= index {
            self.mounts.resize_with(index + 1, || None);
        }
        if let Some(place) = self.mounts.get_mut(index) {
            *place = Some(mount);
        }
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

    /// Returns whether this is a bind mount that rrun can open in the mount namespace of the first
    /// process, where the kernel has locked it. Otherwise, rrun opens the source in the host's mount
    /// namespace, because config.json asks for something that a locked mount does not permit:
    /// * New mounts in the container propagate to the host.
    /// * The mounts below the source are missing. The kernel refuses to copy the source without them
    ///   (EINVAL), because the copy would reveal what they cover.
    fn can_be_locked(&self, sources: &MountSources<'_>) -> bool {
        let is_shared = |(kind, _): &(u64, bool)| *kind == SHARED;
        if !self.is_bind()
            || sources.root_is_shared && self.options.propagation.iter().any(is_shared)
        {
            return false;
        }
        self.options.bind == Bind::Recursive
            || !matches!(clone_tree(&self.source, false), Err(Errno::INVAL))
    }
}

/// Moves the calling thread into the mount namespace of another process, and into the root directory
/// of that process.
fn enter_mount_namespace(pidfd: &OwnedFd, root: &OwnedFd) -> std::result::Result<(), Errno> {
    // The kernel refuses a thread that shares its root directory with other threads, setns(2).
    nix::sched::unshare(CloneFlags::CLONE_FS)
        .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
    move_into_link_name_space(pidfd.as_fd(), Some(LinkNameSpaceType::Mount))?;
    rustix::process::fchdir(root)?;
    rustix::process::chroot(".")
}
