//! An image whose manifest and configuration have been read.

use bytes::Bytes;

use crate::error::ImageError;
use crate::layer::LayerDescriptor;
use crate::manifest::{self, Manifest};
use crate::record::{Image, LayerName};

/// An image with a complete record, before its layers are fetched.
pub(crate) struct ResolvedImage {
    pub image: Image,
    pub descriptors: Vec<LayerDescriptor>,
    pub configuration: Bytes,
}

impl ResolvedImage {
    /// Creates a resolved image from its manifest. `manifest_size` is the manifest's size in bytes,
    /// which is added to the image's size.
    pub(crate) fn of_manifest(
        document: &Manifest,
        manifest_size: u64,
        configuration: Bytes,
    ) -> Result<Self, ImageError> {
        let diff_ids = manifest::parse_configuration(&configuration)?.diff_ids;
        let descriptors = manifest::layer_descriptors(document, &diff_ids)?;
        let id = document.config.digest.clone();
        ResolvedImage::new(id, descriptors, manifest_size, configuration)
    }

    /// Creates a resolved image. `id` is the digest of `configuration`.
    pub(crate) fn new(
        id: String,
        descriptors: Vec<LayerDescriptor>,
        manifest_size: u64,
        configuration: Bytes,
    ) -> Result<Self, ImageError> {
        let parsed = manifest::parse_configuration(&configuration)?;
        let image = Image {
            id,
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            size: descriptors.iter().map(|layer| layer.size).fold(
                manifest_size.saturating_add(configuration.len() as u64),
                u64::saturating_add,
            ),
            config: parsed.config,
            large_config: false,
            unpacked: Vec::new(),
            layers: descriptors
                .iter()
                .map(|descriptor| LayerName {
                    diff_id: descriptor.diff_id.clone(),
                    digest: descriptor.digest.clone(),
                    size: descriptor.size,
                })
                .collect(),
            pinned: false,
        };
        Ok(ResolvedImage {
            image,
            descriptors,
            configuration,
        })
    }
}
