//! `hosts.toml`: where a registry's images are really fetched from.

use std::path::{Path, PathBuf};

/// The tree of `HOST/hosts.toml` files (containerd's convention), read anew at each pull.
#[derive(Clone, Debug)]
pub struct Registries {
    dir: PathBuf,
}

impl Registries {
    /// `dir` is usually /etc/rrun/certs.d; it need not exist.
    pub fn new(dir: &Path) -> Self {
        Registries {
            dir: dir.to_owned(),
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}
