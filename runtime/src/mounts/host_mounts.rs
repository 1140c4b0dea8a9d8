//! Mounts opened on the host before the container can no longer reach it.

use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType as Type;

use super::entry::Mount;
use super::tree::clone_root;
use crate::error::Result;
use crate::namespaces::Namespaces;
use crate::namespaces::idmap::{self, IdMaps};

/// What config.json says about the mounts that lead to the host's files.
pub(crate) struct MountSources<'a> {
    pub(crate) rootfs: &'a Path,
    pub(crate) mounts: &'a [Mount],
    /// Whether what is mounted in the container reaches the host by its root.
    pub(crate) root_is_shared: bool,
    pub(crate) namespaces: &'a Namespaces,
    pub(crate) id_maps: &'a IdMaps,
}

/// Parts of the host's file system, opened as detached mounts before the container's first process
/// lost sight of them or the right to reach them.
#[derive(Default)]
pub(crate) struct HostMounts {
    pub(crate) root: Option<OwnedFd>,
    /// For each of the container's mounts.
    pub(crate) mounts: Vec<Option<OwnedFd>>,
}

impl HostMounts {
    /// Opens what the container's first process could not: in another user namespace, it cannot
    /// reach the host's files, and mapping ids takes all rights over the file system.
    ///
    /// Opens nothing for an unprivileged caller: the first process can reach his files as well, and
    /// it has all rights over its own mounts.
    pub(crate) fn before_clone(sources: &MountSources<'_>) -> Result<HostMounts> {
        let mut host_mounts = HostMounts::default();
        if !rustix::process::geteuid().is_root() {
            return Ok(host_mounts);
        }
        if sources.namespaces.own(Type::User) {
            host_mounts.open(sources, Mount::is_bind)?;
            host_mounts.root = Some(clone_root(sources.rootfs)?);
        } else if sources.mounts.iter().any(Mount::is_idmapped) {
            host_mounts.open(sources, Mount::is_idmapped)?;
        }
        Ok(host_mounts)
    }

    /// Opens the sources of the bind mounts that are `wanted` and not opened yet.
    pub(crate) fn open(
        &mut self,
        sources: &MountSources<'_>,
        wanted: fn(&Mount) -> bool,
    ) -> Result<()> {
        // With a shared root, later mounts below must still propagate to the host.
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
