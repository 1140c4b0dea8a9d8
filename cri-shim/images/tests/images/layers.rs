//! Tests with archives that image builders write, and with malformed archives.

mod attributes;
mod changes;
mod descriptors;
mod formats;
mod limits;
mod paths;

use std::path::{Path, PathBuf};

use libtest_mimic::Trial;
use rrun_images::layer::{self, Bounds, LayerDescriptor, LayerError, UnpackSummary};

use crate::build::{Archive, Failure, digest};
use crate::node::Dir;

pub(crate) use formats::trials_of_gnu_tar;

pub(crate) fn trials() -> Vec<Trial> {
    [
        attributes::trials(),
        changes::trials(),
        descriptors::trials(),
        formats::trials(),
        limits::trials(),
        paths::trials(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const BOUNDS: Bounds = Bounds {
    bytes: 1 << 30,
    entries: 10_000,
};

fn descriptor(archive: &[u8], blob: &[u8]) -> LayerDescriptor {
    LayerDescriptor {
        digest: digest(blob),
        size: blob.len() as u64,
        diff_id: digest(archive),
    }
}

fn unpack(archive: &[u8], into: &Path) -> Result<UnpackSummary, LayerError> {
    layer::unpack(
        archive,
        into,
        &descriptor(archive, archive),
        &BOUNDS,
        &|| Ok(()),
    )
}

/// Unpacks `archive` into a subdirectory of a new directory. A file that escapes from the layer is
/// then visible in the outer directory.
fn unpacked(archive: Archive) -> Result<(Dir, PathBuf), Failure> {
    let dir = Dir::new()?;
    let fs = dir.0.join("fs");
    unpack(&archive.end(), &fs)?;
    Ok((dir, fs))
}

fn refused(archive: Archive) -> Result<String, Failure> {
    let dir = Dir::new()?;
    let result = unpack(&archive.end(), &dir.0.join("fs"));
    let outside: Vec<_> = std::fs::read_dir(&dir.0)?.collect();
    if outside.len() != 1 {
        return Err(format!(
            "the layer's parent directory must contain only fs, but it contains {outside:?}"
        )
        .into());
    }
    match result {
        Ok(_) => Err("the layer archive was unpacked, but it must be refused".into()),
        Err(error) => Ok(error.to_string()),
    }
}
