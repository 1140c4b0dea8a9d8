//! Fuzz targets for what a registry, a layer, an archive or a hosts.toml file contains.
//! `tests/fuzz` runs them.

use std::path::{Path, PathBuf};

use super::archive::ImageArchive;
use super::challenge::{self, Challenge};
use super::layer::archive::TarArchive;
use super::layer::{self, Bounds, LayerDescriptor};
use super::manifest::{self, Document};
use super::reference::{Name, is_digest};
use super::registry;

/// The name and the function of a fuzz target.
pub type FuzzTarget = (&'static str, fn(&[u8]));

/// The fuzz targets in this crate.
pub const TARGETS: &[FuzzTarget] = &[
    ("challenge", challenge),
    ("hosts", hosts),
    ("image-archive", image_archive),
    ("image-configuration", configuration),
    ("layer", layer),
    ("manifest", manifest),
    ("reference", reference),
    ("tar", tar),
    ("token", token),
];

/// Reads all entries of a tar archive. The contents must be shorter than the archive, and the
/// pieces of a sparse file must be in order.
fn tar(input: &[u8]) {
    let mut archive = TarArchive::new(input);
    let mut read = 0;
    let mut buffer = [0; 4096];
    while let Ok(Some(entry)) = archive.next_entry() {
        assert!(!entry.path.contains(&0) && !entry.link.contains(&0));
        assert!(entry.mode & !0o7777 == 0, "{:o}", entry.mode);
        assert!(entry.mtime.1 < 1_000_000_000);
        let mut end = 0;
        for (offset, length) in &entry.content.pieces {
            assert!(*offset >= end && offset + length <= entry.content.length);
            end = offset + length;
        }
        while let Ok(count @ 1..) = archive.read(&mut buffer) {
            read += count;
        }
        assert!(read <= input.len());
    }
}

/// A directory that is removed with its contents when the value is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("rrun-fuzz-{name}-{}", std::process::id()));
        let _ = layer::remove_path(&path);
        std::fs::create_dir(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        layer::remove_path(&self.0).unwrap();
    }
}

/// Unpacks a layer without a check of its digests. Nothing outside the layer's directory may
/// change, and the directory must be removable.
fn layer(input: &[u8]) {
    let scratch = Scratch::new("layer");
    let canary = scratch.0.join("canary");
    std::fs::create_dir(&canary).unwrap();
    std::fs::write(canary.join("file"), "unchanged").unwrap();
    let descriptor = LayerDescriptor {
        digest: String::new(),
        size: u64::MAX,
        diff_id: String::new(),
    };
    let bounds = Bounds {
        bytes: 8 << 20,
        entries: 10_000,
    };
    let _ = layer::unpack(
        input,
        &scratch.0.join("layer"),
        &descriptor,
        &bounds,
        &|| Ok(()),
    );
    assert_eq!(names(&canary), ["file"]);
    assert_eq!(std::fs::read(canary.join("file")).unwrap(), b"unchanged");
    assert_eq!(names(&scratch.0), ["canary", "layer"]);
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Parses a manifest or an index. An accepted document contains only valid digests.
fn manifest(input: &[u8]) {
    match manifest::parse(input) {
        Ok(Document::Image(image)) => {
            for descriptor in image.layers.iter().chain([&image.config]) {
                assert!(is_digest(&descriptor.digest));
            }
            let _ = manifest::layer_descriptors(&image, &[]);
        }
        Ok(Document::Index(digest)) => assert!(is_digest(&digest)),
        Err(error) => assert_short(&error),
    }
    if let Ok(descriptors) = manifest::parse_layout(input) {
        assert!(descriptors.iter().all(|found| is_digest(&found.digest)));
    }
}

/// Checks that an error has a message, and that its length does not depend on the input.
fn assert_short(error: &impl std::fmt::Display) {
    let length = error.to_string().len();
    assert!((10..4096).contains(&length), "{length} bytes: {error}");
}

fn configuration(input: &[u8]) {
    match manifest::parse_configuration(input) {
        Ok(configuration) => assert!(configuration.diff_ids.iter().all(|id| is_digest(id))),
        Err(error) => assert_short(&error),
    }
}

/// Parses each line as a `WWW-Authenticate` header.
fn challenge(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Some(Challenge::Bearer { realm, .. }) = challenge::choose(text.lines()) {
        assert!(realm.len() <= text.len());
    }
}

/// Parses the answer of a token server, and the error message of a registry.
fn token(input: &[u8]) {
    match registry::token::token_of(input) {
        Ok(token) => assert!(token.is_sensitive()),
        Err(failure) => assert_short(&failure.error),
    }
    let explained = registry::answer::explanation(input);
    assert!(explained.chars().count() <= 201);
    assert!(!explained.chars().any(char::is_control));
}

/// Parses a reference. The canonical form of an accepted reference is a reference to the same
/// image, and contains no part that would lead to another path or host in a URL.
fn reference(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    match Name::parse(&text) {
        Ok(name) => {
            let canonical = name.canonical();
            let again = Name::parse(&canonical).unwrap();
            assert_eq!(again.canonical(), canonical);
            let mut parts = canonical.split(['/', ':', '@']);
            assert!(parts.all(|part| !matches!(part, "." | "..")), "{canonical}");
            assert!(
                !canonical.contains(['?', '#', '%', '\\', '\n', ' ']),
                "{canonical}"
            );
        }
        Err(error) => assert_short(&error),
    }
}

/// Reads a hosts.toml file.
fn hosts(input: &[u8]) {
    let scratch = Scratch::new("hosts");
    let directory = scratch.0.join("r.example");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), input).unwrap();
    let registries = super::Registries::new(&scratch.0);
    if let Err(error) = registries.endpoints("r.example") {
        assert_short(&error);
    }
}

/// Opens an OCI image layout or the output of docker save, and reads all layers.
fn image_archive(input: &[u8]) {
    let scratch = Scratch::new("archive");
    let path = scratch.0.join("archive.tar");
    std::fs::write(&path, input).unwrap();
    let opened = ImageArchive::open(&path, &scratch.0, 8 << 20);
    let images = opened.and_then(|mut archive| archive.images());
    if let Err(error) = images {
        assert_short(&error);
    }
    assert_eq!(names(&scratch.0), ["archive.tar"]);
}
