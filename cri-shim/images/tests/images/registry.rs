//! Tests with registries that break off connections, send wrong data, refuse requests, or are
//! unreachable.

mod authentication;
mod blobs;
mod crowds;
mod documents;
mod errors;
mod manifests;
mod sharing;

use libtest_mimic::Trial;
use rrun_images::ImageError;
use serde_json::json;

use crate::build::{Archive, Compression, Failure, ITEM, Image, Item, image};
use crate::node::Node;

pub(crate) use blobs::be_the_child;

pub(crate) fn trials() -> Vec<Trial> {
    [
        authentication::trials(),
        blobs::trials(),
        crowds::trials(),
        documents::trials(),
        errors::trials(),
        manifests::trials(),
        sharing::trials(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Returns bytes that can't be compressed. A blob with these bytes is large, so a test can break
/// off its transfer in the middle.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

fn noisy(name: &str, length: usize) -> (Vec<u8>, Compression) {
    let archive = Archive::new().item(&Item {
        path: name.as_bytes(),
        content: &noise(length),
        ..ITEM
    });
    (archive.end(), Compression::Gzip)
}

pub(crate) fn simple() -> Image {
    image(&[noisy("a", 300_000), noisy("b", 200_000)], json!({}))
}

pub(crate) async fn failure(node: &Node, reference: &str) -> Result<ImageError, Failure> {
    let Err(error) = node.images.pull(reference, None).await else {
        return Err("the pull succeeded, although it must fail".into());
    };
    node.becomes_clean().await?;
    assert!(node.images.list().is_empty());
    assert!(error.to_string().contains(reference), "{error}");
    Ok(error)
}
