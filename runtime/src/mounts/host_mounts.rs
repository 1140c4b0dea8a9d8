//! Mounts that rrun opens before the container's first process loses access to the host's files.

use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType as Type;

use super::entry::Mount;
use super::tree::clone_root;
use crate::error::Result;
use crate::namespaces::Namespaces;
use crate::namespaces::idmap::{self, IdMaps};

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
        if sources.namespaces.own(Type::User) {
            host_mounts.open(sources, Mount::is_bind)?;
            host_mounts.root = Some(clone_root(sources.rootfs, sources.root_is_slave)?);
        } else if sources.mounts.iter().any(Mount::is_idmapped) {
            host_mounts.open(sources, Mount::is_idmapped)?;
        }
        Ok(host_mounts)
    }

    /// Returns whether the first process attaches the container's root at its working directory,
    /// because it could not reach root.path in its user namespace. rrun enters root.path before it
    /// creates the first process. In the new mount namespace, the working directory is the same
    /// directory (mount_namespaces(7)).
    pub(crate) fn root_is_at_working_directory(&self, namespaces: &Namespaces) -> bool {
        self.root.is_some() && namespaces.is_new(Type::Mount)
    }

    /// Opens the sources of the bind mounts that `wanted` selects. Skips the sources that are
    /// already open.
    pub(crate) fn open(
        &mut self,
        sources: &MountSources<'_>,
        wanted: fn(&Mount) -> bool,
    ) -> Result<()> {
        // If the container's root is shared, later mounts below a bind mount must still propagate
        // to the host. So rrun does not stop the propagation in this case.
        let cut_off = !sources.root_is_shared;
        let mut namespaces = idmap::IdMapNamespaces::default();
        self.mounts.resize_with(sources.mounts.len(), || None);
        for (mount, opened) in sources.mounts.iter().zip(&mut self.mounts) {
            if opened.is_some() || !wanted(mount) {
                continue;
            }
            let ids = mount
                .is_idmapped()
                .then(|| {
                    if mount.id_maps.is_empty() {
                        namespaces.for_container(sources.namespaces, sources.id_maps)
                    } else {
                        namespaces.for_maps(&mount.id_maps)
                    }
                })
                .transpose()
                .map_err(|error| error.while_doing(mount.sentence()))?;
            *opened = Some(mount.make_detached(None, cut_off, ids)?);
        }
        Ok(())
    }
}
