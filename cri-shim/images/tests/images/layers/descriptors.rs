//! Tests with layers that do not match their descriptor.

use libtest_mimic::Trial;
use rrun_images::layer::{self, LayerDescriptor, LayerError};

use super::{BOUNDS, descriptor};
use crate::build::{Archive, Compression, Failure, digest};
use crate::node::Dir;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial(
        "data_that_does_not_match_the_descriptor_is_refused",
        promised,
    )]
}

async fn promised() -> Result<(), Failure> {
    let archive = Archive::new().file("a", "a").end();
    let blob = Compression::Gzip.apply(&archive);
    let good = descriptor(&archive, &blob);
    let try_with = |blob: &[u8], descriptor: &LayerDescriptor| -> Result<String, Failure> {
        let dir = Dir::new()?;
        match layer::unpack(blob, &dir.0.join("fs"), descriptor, &BOUNDS, &|| Ok(())) {
            Err(LayerError::Digest(what)) => Ok(what),
            other => Err(format!(
                "the layer must be refused for its digest; the result: {other:?}"
            )
            .into()),
        }
    };
    let wrong = digest(b"else");
    try_with(
        &blob,
        &LayerDescriptor {
            digest: wrong.clone(),
            ..good.clone()
        },
    )?;
    try_with(
        &blob,
        &LayerDescriptor {
            diff_id: wrong,
            ..good.clone()
        },
    )?;
    try_with(
        &blob,
        &LayerDescriptor {
            size: good.size - 1,
            ..good.clone()
        },
    )?;
    try_with(
        &blob,
        &LayerDescriptor {
            size: good.size + 1,
            ..good.clone()
        },
    )?;
    // A bit that flipped during the transfer is reported as a wrong digest.
    let mut damaged = blob.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x40;
    try_with(&damaged, &good)?;
    let mut longer = blob;
    longer.extend(Compression::Gzip.apply(b""));
    try_with(&longer, &good)?;
    Ok(())
}
