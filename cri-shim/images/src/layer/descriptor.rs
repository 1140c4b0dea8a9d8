//! What a layer should be.

/// What a layer may grow to.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes of the uncompressed archive.
    pub bytes: u64,
    /// Files and directories.
    pub entries: u64,
}

/// What the manifest and the configuration say of a layer.
#[derive(Clone, Debug)]
pub struct LayerDescriptor {
    /// `sha256:…` of what the registry sends.
    pub digest: String,
    /// How many bytes it sends.
    pub size: u64,
    /// `sha256:…` of the uncompressed archive.
    pub diff_id: String,
}
