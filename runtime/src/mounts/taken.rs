//! What is taken of the host's file system while it can be reached.

use std::os::fd::OwnedFd;

use oci_spec::runtime::LinuxNamespaceType as Type;

use super::Mount;
use super::tree::take_root;
use crate::config::Config;
use crate::error::Result;
use crate::namespaces::idmap;

/// Parts of the host's file system that were taken, as detached mounts, before the
/// container's first process lost sight of them or the right to reach them.
#[derive(Default)]
pub struct Taken {
    pub root: Option<OwnedFd>,
    /// For each of the container's mounts.
    pub mounts: Vec<Option<OwnedFd>>,
}

impl Taken {
    /// Takes what the container's first process could not: in another user namespace, it
    /// could not reach the host's files; and ids are mapped only by who has all rights over
    /// the file system.
    ///
    /// An unprivileged caller can take nothing: his files are within reach of the first
    /// process as well, which has all rights over its own mounts.
    pub fn before_birth(config: &Config) -> Result<Taken> {
        let mut taken = Taken::default();
        if !rustix::process::geteuid().is_root() {
            return Ok(taken);
        }
        if config.namespaces.own(Type::User) {
            taken.take(config, Mount::is_bind)?;
            taken.root = Some(take_root(&config.rootfs)?);
        } else if config.mounts.iter().any(Mount::is_idmapped) {
            taken.take(config, Mount::is_idmapped)?;
        }
        Ok(taken)
    }

    /// Takes the sources of the bind mounts that are `wanted` and not taken yet.
    pub fn take(&mut self, config: &Config, wanted: fn(&Mount) -> bool) -> Result<()> {
        // What the configuration shares with the host stays as it is.
        let cut_off = !config.root_is_shared();
        let mut namespaces = idmap::Namespaces::default();
        self.mounts.resize_with(config.mounts.len(), || None);
        for (mount, taken) in config.mounts.iter().zip(&mut self.mounts) {
            if taken.is_some() || !wanted(mount) {
                continue;
            }
            let ids = mount
                .is_idmapped()
                .then(|| {
                    if mount.id_maps.is_empty() {
                        namespaces.of_container(&config.namespaces, &config.id_maps)
                    } else {
                        namespaces.with(&mount.id_maps)
                    }
                })
                .transpose()
                .map_err(|error| error.while_doing(mount.sentence()))?;
            *taken = Some(mount.detached(None, cut_off, ids)?);
        }
        Ok(())
    }
}
