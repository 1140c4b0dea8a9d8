//! An image whose manifest and configuration have been read.

use crate::documents::DocumentText;
use crate::error::ImageError;
use crate::layer::LayerDescriptor;
use crate::manifest::{self, Manifest};
use crate::record::{Image, ImageConfig, LayerName};

/// An image with a complete record, before its layers are fetched.
pub(crate) struct ResolvedImage {
    pub image: Image,
    pub descriptors: Vec<LayerDescriptor>,
    pub configuration: DocumentText,
}

impl ResolvedImage {
    /// Creates a resolved image from its manifest. `manifest_size` is the manifest's size in bytes,
    /// which is added to the image's size.
    pub(crate) fn of_manifest(
        document: &Manifest,
        manifest_size: u64,
        configuration: DocumentText,
    ) -> Result<Self, ImageError> {
        let parsed = manifest::parse_configuration(&configuration)?;
        let descriptors = manifest::layer_descriptors(document, &parsed.diff_ids)?;
        let id = document.config.digest.clone();
        let parsed = parsed.config;
        Ok(Self::new(
            id,
            descriptors,
            manifest_size,
            configuration,
            parsed,
        ))
    }

    /// Creates a resolved image. `id` is the digest of `configuration`, and `config` contains the
    /// parsed values of `configuration`.
    pub(crate) fn new(
        id: String,
        descriptors: Vec<LayerDescriptor>,
        manifest_size: u64,
        configuration: DocumentText,
        config: ImageConfig,
    ) -> Self {
        let image = Image {
            id,
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            size: descriptors.iter().map(|layer| layer.size).fold(
                manifest_size.saturating_add(configuration.len() as u64),
                u64::saturating_add,
            ),
            config,
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
        ResolvedImage {
            image,
            descriptors,
            configuration,
        }
    }
}
