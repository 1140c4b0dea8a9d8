//! Builds images without an image builder. The archives can then have content that no image builder
//! would write.

use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub(crate) type Failure = Box<dyn std::error::Error>;

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// A tar archive that a test creates. Tests can set every header field to an invalid value.
pub(crate) struct Archive(tar::Builder<Vec<u8>>);

pub(crate) struct Item<'a> {
    pub path: &'a [u8],
    pub kind: u8,
    pub link: &'a [u8],
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: u64,
    pub device: (u32, u32),
    pub content: &'a [u8],
    /// True for a header in the format of POSIX, and false for a header in GNU tar's format.
    pub ustar: bool,
}

pub(crate) const ITEM: Item = Item {
    path: b"",
    kind: b'0',
    link: b"",
    mode: 0o644,
    uid: 0,
    gid: 0,
    mtime: 1_000_000_000,
    device: (0, 0),
    content: b"",
    ustar: false,
};

impl Archive {
    pub(crate) fn new() -> Self {
        Archive(tar::Builder::new(Vec::new()))
    }

    pub(crate) fn item(mut self, item: &Item) -> Self {
        let mut header = if item.ustar {
            tar::Header::new_ustar()
        } else {
            tar::Header::new_gnu()
        };
        {
            let old = header.as_old_mut();
            let name = &item.path[..item.path.len().min(100)];
            old.name[..name.len()].copy_from_slice(name);
            let link = &item.link[..item.link.len().min(100)];
            old.linkname[..link.len()].copy_from_slice(link);
            old.linkflag = [item.kind];
        }
        header.set_mode(item.mode);
        header.set_uid(item.uid);
        header.set_gid(item.gid);
        header.set_mtime(item.mtime);
        header.set_size(item.content.len() as u64);
        if matches!(item.kind, b'3' | b'4') {
            header
                .set_device_major(item.device.0)
                .expect("the header contains device numbers");
            header
                .set_device_minor(item.device.1)
                .expect("the header contains device numbers");
        }
        header.set_cksum();
        self.0
            .append(&header, item.content)
            .expect("writing to memory does not fail");
        self
    }

    pub(crate) fn dir(self, path: &str, mode: u32) -> Self {
        self.item(&Item {
            path: path.as_bytes(),
            kind: b'5',
            mode,
            ..ITEM
        })
    }

    pub(crate) fn file(self, path: &str, content: &str) -> Self {
        self.item(&Item {
            path: path.as_bytes(),
            content: content.as_bytes(),
            ..ITEM
        })
    }

    pub(crate) fn symlink(self, path: &str, to: &str) -> Self {
        self.item(&Item {
            path: path.as_bytes(),
            kind: b'2',
            link: to.as_bytes(),
            ..ITEM
        })
    }

    pub(crate) fn hard_link(self, path: &str, to: &str) -> Self {
        self.item(&Item {
            path: path.as_bytes(),
            kind: b'1',
            link: to.as_bytes(),
            ..ITEM
        })
    }

    /// Adds a pax header that applies to the next item.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            content.extend(format!("{length} {key}=").into_bytes());
            content.extend(*value);
            content.push(b'\n');
        }
        self.item(&Item {
            path: b"PaxHeaders/x",
            kind: b'x',
            content: &content,
            ..ITEM
        })
    }

    /// Adds a header with the next item's long name (`L`) or long link target (`K`) in GNU tar's
    /// format.
    pub(crate) fn gnu_long(self, kind: u8, name: &[u8]) -> Self {
        let mut content = name.to_vec();
        content.push(0);
        self.item(&Item {
            path: b"././@LongLink",
            kind,
            content: &content,
            ..ITEM
        })
    }

    pub(crate) fn end(self) -> Vec<u8> {
        self.0
            .into_inner()
            .expect("writing to memory does not fail")
    }
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    pub(crate) fn apply(self, archive: &[u8]) -> Vec<u8> {
        match self {
            Compression::None => archive.to_vec(),
            Compression::Gzip => {
                let mut gzip =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(archive)
                    .expect("writing to memory does not fail");
                gzip.finish().expect("writing to memory does not fail")
            }
            Compression::Zstd => {
                zstd::encode_all(archive, 3).expect("writing to memory does not fail")
            }
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Compression::None => "application/vnd.oci.image.layer.v1.tar",
            Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// An image that a test creates. The last blob is the image's manifest.
pub(crate) struct Image {
    pub blobs: Vec<Vec<u8>>,
    pub id: String,
    pub manifest: String,
    pub layers: Vec<String>,
}

pub(crate) fn image(layers: &[(Vec<u8>, Compression)], config: Value) -> Image {
    let mut blobs = Vec::new();
    let mut descriptors = Vec::new();
    for (archive, compression) in layers {
        let blob = compression.apply(archive);
        descriptors.push(json!({
            "mediaType": compression.media_type(), "digest": digest(&blob), "size": blob.len(),
        }));
        blobs.push(blob);
    }
    let names = blobs.iter().map(|blob| digest(blob)).collect();
    let diff_ids: Vec<String> = layers.iter().map(|(archive, _)| digest(archive)).collect();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        _ => "arm64",
    };
    let configuration = json!({
        "created": "2026-01-02T03:04:05Z", "architecture": architecture, "os": "linux",
        "config": config, "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string()
    .into_bytes();
    let id = digest(&configuration);
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                   "digest": id, "size": configuration.len()},
        "layers": descriptors,
    })
    .to_string()
    .into_bytes();
    blobs.push(configuration);
    let name = digest(&manifest);
    blobs.push(manifest);
    Image {
        blobs,
        id,
        manifest: name,
        layers: names,
    }
}

/// Returns an image with `count` layers. Each layer is a zstd frame of 2 MiB that decompresses to
/// almost 64 GiB of zeros (RFC 8878, section 3.1.1.2).
pub(crate) fn bombs(name: &str, count: usize) -> Image {
    const BLOCK: u32 = 128 << 10;
    let block = |last: u32| {
        let header = (BLOCK << 3 | 1 << 1 | last).to_le_bytes();
        [&header[..3], &[0]].concat()
    };
    let layers: Vec<_> = (0..count)
        .map(|number| {
            let skipped = format!("{name}-{number:10}");
            let mut frame = b"\x50\x2a\x4d\x18".to_vec();
            frame.extend((skipped.len() as u32).to_le_bytes());
            frame.extend(skipped.into_bytes());
            frame.extend([0x28, 0xb5, 0x2f, 0xfd, 0, 0x38]);
            frame.extend(block(0).repeat((1 << 19) - 2));
            frame.extend(block(1));
            (frame, Compression::None)
        })
        .collect();
    image(&layers, json!({ "Labels": { "name": name } }))
}

impl Image {
    /// Writes the image as an OCI image layout that skopeo can push. The image has the tag
    /// `latest`.
    pub(crate) fn write_layout(&self, dir: &Path) -> Result<(), Failure> {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs)?;
        for blob in &self.blobs {
            let name = digest(blob);
            std::fs::write(blobs.join(name.trim_start_matches("sha256:")), blob)?;
        }
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let size = self.blobs.last().map_or(0, Vec::len);
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": self.manifest, "size": size,
                "annotations": {"org.opencontainers.image.ref.name": "latest"}}],
        });
        std::fs::write(dir.join("index.json"), index.to_string())?;
        Ok(())
    }
}
