//! The size and the digests that a layer must have, and the limits for a layer.

/// The limits for one layer.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The maximum number of bytes of the uncompressed archive, and of the unpacked files in whole
    /// blocks of 4 KiB.
    pub bytes: u64,
    /// The maximum number of files and directories in the layer.
    pub entries: u64,
}

/// The size and the digests of a layer, as the manifest and the configuration specify them.
#[derive(Clone, Debug)]
pub struct LayerDescriptor {
    /// The digest of the blob that the registry sends, as `sha256:…`.
    pub digest: String,
    /// The size in bytes of the blob that the registry sends.
    pub size: u64,
    /// The digest of the uncompressed archive, as `sha256:…`.
    pub diff_id: String,
}
