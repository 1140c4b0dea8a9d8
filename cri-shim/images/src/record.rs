//! The record of an image that is stored on this node.

use serde::{Deserialize, Serialize};

/// The maximum number of bytes of a configuration that is kept in memory. The configurations of
/// most images are far smaller. The creation of a container of another image reads the
/// configuration from the store.
const KEPT_CONFIG_BYTES: usize = 16 << 10;

/// The approximate number of bytes that a string occupies in addition to its content.
const STRING_BYTES: usize = 48;

/// One image: a configuration and the layers that it lists. Several names can refer to one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The digest of the configuration, `sha256:…`.
    pub id: String,
    /// The image's complete tag references, for example `docker.io/library/busybox:1.36`.
    pub repo_tags: Vec<String>,
    /// The image's digest references, for example `docker.io/library/busybox@sha256:…`. The digest
    /// is the index's digest if the image was pulled through an index.
    pub repo_digests: Vec<String>,
    /// The image's size, calculated as in containerd: the number of bytes of the manifest, the
    /// configuration and the compressed layers.
    pub size: u64,
    /// The part of the configuration that is used to create a container. If `large_config` is true,
    /// only the user is set (see [`Images::complete`](crate::Images::complete)).
    pub config: ImageConfig,
    /// True if the configuration is too large to be kept in memory.
    #[serde(default)]
    pub large_config: bool,
    /// The image's layers, lowest first, as the manifest lists them.
    pub layers: Vec<LayerName>,
    /// The keys of the unpacked layers that form the image's root file system, lowest first.
    /// `unpacked` contains one key for each entry of `layers`. If the image has a directory layer,
    /// the key of the directory layer is at the end. A directory layer sets the owner and mode of
    /// directories. `unpacked` is empty in records of older versions (see [`Image::keys`]).
    #[serde(default)]
    pub unpacked: Vec<String>,
    /// True if kubelet's garbage collection must keep the image.
    pub pinned: bool,
}

impl Image {
    /// Returns the keys of the image's unpacked layers, lowest first. In a record of an older
    /// version, the keys are the diff IDs of the layers.
    pub fn keys(&self) -> Vec<&str> {
        if self.unpacked.is_empty() {
            self.layers.iter().map(|l| l.diff_id.as_str()).collect()
        } else {
            self.unpacked.iter().map(String::as_str).collect()
        }
    }

    /// Returns the number of bytes of the manifest and the configuration.
    pub(crate) fn document_bytes(&self) -> u64 {
        let layers = self.layers.iter().map(|layer| layer.size);
        self.size
            .saturating_sub(layers.fold(0, u64::saturating_add))
    }

    /// Removes a large configuration from this record. Only the user remains, because ListImages
    /// returns it. The store contains the complete configuration.
    pub(crate) fn drop_large_config(&mut self) {
        if self.config.memory() > KEPT_CONFIG_BYTES {
            self.large_config = true;
            self.config = ImageConfig {
                user: std::mem::take(&mut self.config.user),
                ..ImageConfig::default()
            };
        }
    }
}

/// One layer, as a manifest and a configuration describe it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerName {
    /// The digest of the uncompressed archive.
    pub diff_id: String,
    /// The digest of the blob that the registry sends.
    pub digest: String,
    /// The compressed size in bytes.
    pub size: u64,
}

/// The part of an image's configuration that is used to create a container (OCI image-spec,
/// config.md).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// The environment variables, each as `NAME=value`.
    pub env: Vec<String>,
    /// The user as `user`, `uid`, `user:group` or `uid:gid`. The field is empty if the image sets
    /// no user.
    pub user: String,
    pub working_dir: String,
    pub volumes: Vec<String>,
    /// The stop signal, which is a name or a number as in the image's configuration.
    pub stop_signal: Option<String>,
}

impl ImageConfig {
    /// Returns the number of bytes of all strings.
    fn bytes(&self) -> usize {
        let listed = self.lists().into_iter().flatten().map(String::len);
        let signal = self.stop_signal.as_ref().map_or(0, String::len);
        listed.sum::<usize>() + self.user.len() + self.working_dir.len() + signal
    }

    /// Returns the approximate number of bytes that the configuration occupies in memory.
    pub(crate) fn memory(&self) -> usize {
        let listed: usize = self.lists().into_iter().map(Vec::len).sum();
        self.bytes() + listed * STRING_BYTES
    }

    fn lists(&self) -> [&Vec<String>; 4] {
        [&self.entrypoint, &self.cmd, &self.env, &self.volumes]
    }
}
