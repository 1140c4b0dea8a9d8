//! What is known of an image once it is here.

use serde::{Deserialize, Serialize};

/// One image: a configuration and the layers that it names. Many names may point to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The digest of the configuration, `sha256:…`.
    pub id: String,
    /// Tag references in full: `docker.io/library/busybox:1.36`.
    pub repo_tags: Vec<String>,
    /// Digest references: `docker.io/library/busybox@sha256:…`, of the index if there was one.
    pub repo_digests: Vec<String>,
    /// What containerd calls the size: bytes of manifest, configuration and compressed layers.
    pub size: u64,
    pub config: ImageConfig,
    /// Lowest first, as the manifest lists them.
    pub layers: Vec<LayerName>,
    /// The keys of the unpacked layers that make up its root, lowest first: one for each of
    /// `layers`, and on top, if the image needs it, the layer that sets the owner and mode of
    /// directories. Empty in the records of older versions: see [`Image::keys`].
    #[serde(default)]
    pub unpacked: Vec<String>,
    /// When the image was built (RFC 3339), if it says so.
    pub created: Option<String>,
    /// Kept by kubelet's garbage collection.
    pub pinned: bool,
}

impl Image {
    /// The keys of its unpacked layers, lowest first.
    pub(crate) fn keys(&self) -> Vec<&str> {
        if self.unpacked.is_empty() {
            // Older versions kept each layer under its diff ID.
            self.layers.iter().map(|l| l.diff_id.as_str()).collect()
        } else {
            self.unpacked.iter().map(String::as_str).collect()
        }
    }
}

/// One layer as a manifest and a configuration name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerName {
    /// The digest of the uncompressed archive.
    pub diff_id: String,
    /// The digest of what the registry sends.
    pub digest: String,
    /// Compressed size in bytes.
    pub size: u64,
}

/// The part of an image's configuration that a container starts from (OCI image-spec, config.md).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty if the image names none.
    pub user: String,
    pub working_dir: String,
    pub volumes: Vec<String>,
    /// A name or a number, as the image wrote it.
    pub stop_signal: Option<String>,
    pub labels: std::collections::BTreeMap<String, String>,
}
