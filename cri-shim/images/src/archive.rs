//! Reads images from a tar archive: either an OCI image layout (OCI image-spec, image-layout.md) or
//! the output of `docker save`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{CWD, Mode, OFlags};
use serde::Deserialize;

use crate::documents::DOCUMENT_BYTES;
use crate::error::{ImageError, Kind};
use crate::failure::{clean, unreadable_json};
use crate::layer::{self, LayerDescriptor, archive as tar, digest_of};
use crate::manifest::{self, Configuration, Document, MAX_LAYERS};
use crate::reference::Name;
use crate::resolved::ResolvedImage;
use rrun_kernel::regular_file;

/// The maximum number of files and links in an archive. The files are blobs and JSON documents. For
/// each layer, archives from old versions of `docker save` contain a few additional files.
const MAX_FILES: usize = 1 << 16;

/// The maximum number of bytes of all manifests and configurations in an archive. Without this
/// limit, an archive could list one document of 8 MiB a hundred thousand times.
const ALL_DOCUMENTS_BYTES: u64 = 64 << 20;

/// The maximum number of names of one image in an archive.
const MAX_NAMES: usize = 1000;

/// The maximum number of links that are followed from a path in the archive to a file.
const MAX_LINKS: usize = 8;

/// An opened archive and an index of its files.
pub(crate) struct ImageArchive {
    file: Arc<File>,
    files: HashMap<String, Span>,
    /// The position of each blob in the archive, by the blob's digest.
    blobs: HashMap<String, Span>,
    /// The digests of the compressed layers of `docker save`, by their positions in the archive.
    computed: HashMap<u64, String>,
    /// The number of bytes of the documents that were read.
    documents: u64,
}

/// The position of a file in the archive.
#[derive(Clone, Copy)]
struct Span {
    offset: u64,
    length: u64,
}

/// One image in an archive.
pub(crate) struct ArchivedImage {
    /// The image's names in the archive. Most images have one name, but an image can also have
    /// several names or no name.
    pub names: Vec<Name>,
    /// The digest of the image's manifest or index. The digest is `None` for an archive of `docker
    /// save`, which contains no digest of a manifest or index.
    pub digest: Option<String>,
    pub image: ResolvedImage,
}

/// One entry of `docker save`'s manifest.json.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

fn damaged(what: impl Into<String>) -> ImageError {
    ImageError::new(Kind::DataLoss, what)
}

fn unreadable(error: &io::Error) -> ImageError {
    damaged(format!("the archive can't be read: {error}"))
}

impl ImageArchive {
    /// Opens the archive at `path` and indexes its files. A compressed archive is first
    /// decompressed into a file without a name in the directory `scratch`. `open` fails if the
    /// decompressed archive has more than `most` bytes. This call blocks on disk I/O.
    pub(crate) fn open(path: &Path, scratch: &Path, most: u64) -> Result<Self, ImageError> {
        let file = regular_file::open(path, OFlags::RDONLY)
            .map_err(|unfit| damaged(format!("the archive can't be read: {unfit}")))?;
        let mut first = [0; 6];
        let count = file
            .read_at(&mut first, 0)
            .map_err(|error| unreadable(&error))?;
        let first = first.get(..count).unwrap_or_default();
        let plain = layer::is_plain(first).map_err(|error| unreadable(&error))?;
        let file = if plain {
            file
        } else {
            decompressed(&file, scratch, most)?
        };
        let files = index(&file)?;
        let blobs = files
            .iter()
            .filter_map(|(path, span)| {
                let hex = path.strip_prefix("blobs/sha256/")?;
                Some((format!("sha256:{hex}"), *span))
            })
            .collect();
        Ok(ImageArchive {
            file: Arc::new(file),
            files,
            blobs,
            computed: HashMap::new(),
            documents: 0,
        })
    }

    /// Returns the images in the archive. This call blocks on disk I/O.
    pub(crate) fn images(&mut self) -> Result<Vec<ArchivedImage>, ImageError> {
        if self.files.contains_key("oci-layout") && self.files.contains_key("index.json") {
            self.layout()
        } else if self.files.contains_key("manifest.json") {
            self.docker()
        } else {
            Err(damaged(
                "the archive is neither an OCI image layout nor the output of docker save",
            ))
        }
    }

    fn layout(&mut self) -> Result<Vec<ArchivedImage>, ImageError> {
        let descriptors = manifest::parse_layout(&self.document("index.json")?)?;
        let ours: Vec<_> = descriptors
            .iter()
            .filter(|descriptor| descriptor.may_fit())
            .collect();
        if ours.is_empty() {
            return Err(ImageError::new(
                Kind::NotFound,
                format!(
                    "the archive contains no image for linux/{}",
                    manifest::architecture()
                ),
            ));
        }
        ours.into_iter()
            .map(|descriptor| {
                let top = self.verified(&descriptor.digest)?;
                let (document, size) = match manifest::parse(&top)? {
                    Document::Image(manifest) => (manifest, top.len()),
                    Document::Index(chosen) => {
                        let bytes = self.verified(&chosen)?;
                        match manifest::parse(&bytes)? {
                            Document::Image(manifest) => (manifest, bytes.len()),
                            Document::Index(_) => {
                                return Err(damaged("the archive's index refers to another index"));
                            }
                        }
                    }
                };
                let configuration = self.verified(&document.config.digest)?;
                let names = descriptor.name().map(Name::parse).transpose()?;
                Ok(ArchivedImage {
                    names: names.into_iter().collect(),
                    digest: Some(descriptor.digest.clone()),
                    image: ResolvedImage::of_manifest(
                        &document,
                        size as u64,
                        configuration.into(),
                    )?,
                })
            })
            .collect()
    }

    fn docker(&mut self) -> Result<Vec<ArchivedImage>, ImageError> {
        let images: Vec<DockerImage> = serde_json::from_slice(&self.document("manifest.json")?)
            .map_err(|error| {
                damaged(format!(
                    "the archive's manifest.json can't be read: {}",
                    unreadable_json(&error)
                ))
            })?;
        images
            .into_iter()
            .map(|image| {
                let configuration = self.document(&image.config)?;
                let id = digest_of(&configuration);
                let Configuration { config, diff_ids } =
                    manifest::parse_configuration(&configuration)?;
                let layers = image.layers.unwrap_or_default();
                if layers.len() > MAX_LAYERS {
                    return Err(damaged(format!(
                        "an image in the archive has {} layers, and the limit is {MAX_LAYERS} layers",
                        layers.len()
                    )));
                }
                if layers.len() != diff_ids.len() {
                    return Err(damaged(format!(
                        "the archive's manifest.json has {} layers, but the image's configuration has {}",
                        layers.len(),
                        diff_ids.len()
                    )));
                }
                let descriptors = layers
                    .iter()
                    .zip(diff_ids)
                    .map(|(path, diff_id)| self.docker_layer(path, diff_id))
                    .collect::<Result<_, _>>()?;
                let tags = image.repo_tags.unwrap_or_default();
                if tags.len() > MAX_NAMES {
                    return Err(damaged(format!(
                        "an image in the archive has {} names, and the limit is {MAX_NAMES} names",
                        tags.len()
                    )));
                }
                let names = tags
                    .iter()
                    .map(|tag| Name::parse(tag))
                    .collect::<Result<_, _>>()?;
                Ok(ArchivedImage {
                    names,
                    digest: None,
                    image: ResolvedImage::new(id, descriptors, 0, configuration.into(), config),
                })
            })
            .collect()
    }

    /// Returns the descriptor of the layer that is stored at `path` in an archive of `docker save`.
    /// An archive of `docker save` contains no digests of layers. For an uncompressed layer, the
    /// digest is the diff ID. For a compressed layer, this function computes the digest.
    fn docker_layer(&mut self, path: &str, diff_id: String) -> Result<LayerDescriptor, ImageError> {
        let span = self.span(path)?;
        let mut reader = self.reader(span);
        let mut first = [0; 6];
        let count = reader
            .read_at_start(&mut first)
            .map_err(|error| unreadable(&error))?;
        let plain = layer::is_plain(first.get(..count).unwrap_or_default());
        let digest = if plain.unwrap_or(true) {
            diff_id.clone()
        } else if let Some(known) = self.computed.get(&span.offset) {
            known.clone()
        } else {
            let digest = layer::digest_of_all(&mut reader).map_err(|error| unreadable(&error))?;
            self.computed.insert(span.offset, digest.clone());
            digest
        };
        self.blobs.insert(digest.clone(), span);
        Ok(LayerDescriptor {
            digest,
            size: span.length,
            diff_id,
        })
    }

    fn span(&self, path: &str) -> Result<Span, ImageError> {
        let found = normal(path.as_bytes()).and_then(|path| self.files.get(&path).copied());
        found.ok_or_else(|| {
            let shown = clean(path);
            damaged(format!(
                "the archive refers to the file {shown:?}, but does not contain this file"
            ))
        })
    }

    fn reader(&self, span: Span) -> FileSection {
        FileSection {
            file: Arc::clone(&self.file),
            begin: span.offset,
            at: span.offset,
            end: span.offset.saturating_add(span.length),
        }
    }

    /// Returns a reader for the bytes of a blob. The reader does not verify the blob's digest. The
    /// caller must read the whole blob and then verify the digest.
    pub(crate) fn blob(&self, digest: &str) -> Result<impl Read + Send + 'static, ImageError> {
        let span = self.blobs.get(digest).copied();
        let span = span.ok_or_else(|| damaged("the archive does not contain the layer"))?;
        Ok(self.reader(span))
    }

    fn bytes(&mut self, what: &str, span: Span) -> Result<Bytes, ImageError> {
        if span.length > DOCUMENT_BYTES {
            return Err(damaged(format!(
                "{what} has {} bytes, and the limit is {DOCUMENT_BYTES} bytes",
                span.length
            )));
        }
        self.documents += span.length;
        if self.documents > ALL_DOCUMENTS_BYTES {
            return Err(damaged(format!(
                "the manifests and configurations in the archive have more than the limit of {ALL_DOCUMENTS_BYTES} bytes in total"
            )));
        }
        let mut bytes = Vec::new();
        self.reader(span)
            .read_to_end(&mut bytes)
            .map_err(|error| unreadable(&error))?;
        Ok(bytes.into())
    }

    fn document(&mut self, path: &str) -> Result<Bytes, ImageError> {
        self.bytes(path, self.span(path)?)
    }

    /// Reads a small blob and verifies its digest.
    fn verified(&mut self, digest: &str) -> Result<Bytes, ImageError> {
        let span = self.blobs.get(digest).copied();
        let span =
            span.ok_or_else(|| damaged(format!("the archive does not contain the blob {digest}")))?;
        let bytes = self.bytes(digest, span)?;
        match digest_of(&bytes) {
            actual if actual == digest => Ok(bytes),
            actual => Err(damaged(format!(
                "the archive's blob {digest} has the digest {actual}"
            ))),
        }
    }
}

fn decompressed(file: &File, scratch: &Path, most: u64) -> Result<File, ImageError> {
    let here = |what: &str, error: io::Error| {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
            _ => Kind::Internal,
        };
        ImageError::new(kind, format!("{what} {}: {error}", scratch.display()))
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    // Ours: O_TMPFILE creates a new file without a name, so no other process can have created it.
    let into = rustix::fs::openat(CWD, scratch, flags, Mode::from_raw_mode(0o600))
        .map_err(|error| here("create a temporary file in", error.into()))?;
    let mut into = File::from(into);
    let decoder = layer::decoder(file).map_err(|error| unreadable(&error))?;
    let mut decoder = decoder.take(most.saturating_add(1));
    let mut buffer = vec![0; 256 << 10];
    let mut sum = 0;
    loop {
        let count = decoder
            .read(&mut buffer)
            .map_err(|error| unreadable(&error))?;
        let Some(chunk) = buffer.get(..count).filter(|chunk| !chunk.is_empty()) else {
            into.rewind()
                .map_err(|error| here("seek to the start of the temporary file in", error))?;
            return Ok(into);
        };
        sum += count as u64;
        if sum > most {
            return Err(ImageError::new(
                Kind::ResourceExhausted,
                format!("the archive decompresses to more than the limit of {most} bytes"),
            ));
        }
        io::Write::write_all(&mut into, chunk)
            .map_err(|error| here("write the unpacked archive to a file in", error))?;
    }
}

/// Returns a map from the path of each file in the archive to the file's position. For the path of
/// a link, the map contains the position of the link's target.
fn index(file: &File) -> Result<HashMap<String, Span>, ImageError> {
    let bad = |error: layer::ArchiveError| damaged(error.to_string());
    let mut archive = tar::TarArchive::new(CountingReader {
        reader: BufReader::with_capacity(256 << 10, file),
        count: 0,
    });
    let mut files = HashMap::new();
    let mut links = HashMap::new();
    while let Some(entry) = archive.next_entry().map_err(bad)? {
        let Some(path) = normal(&entry.path) else {
            continue;
        };
        if files.len() + links.len() >= MAX_FILES {
            return Err(damaged(format!(
                "the archive contains more than the limit of {MAX_FILES} files"
            )));
        }
        match entry.kind {
            tar::EntryKind::File if !entry.content.is_sparse() => {
                let span = Span {
                    offset: archive.reader().count,
                    length: entry.content.length,
                };
                files.insert(path, span);
            }
            tar::EntryKind::HardLink => {
                links.extend(normal(&entry.link).map(|target| (path, target)));
            }
            // A symbolic link's target is relative to the link's own directory.
            tar::EntryKind::Symlink => {
                let (directory, _) = path.rsplit_once('/').unwrap_or(("", &path));
                let target = [directory.as_bytes(), b"/", &entry.link].concat();
                links.extend(normal(&target).map(|target| (path, target)));
            }
            _ => {}
        }
    }
    let followed: Vec<(String, Span)> = links
        .keys()
        .filter_map(|link| {
            let mut at = link;
            for _ in 0..MAX_LINKS {
                at = links.get(at)?;
                if let Some(span) = files.get(at) {
                    return Some((link.clone(), *span));
                }
            }
            None
        })
        .collect();
    files.extend(followed);
    Ok(files)
}

/// Normalises a path from the archive: removes `.` and doubled slashes, and resolves `..`. Returns
/// `None` if the path leads out of the archive or is not UTF-8.
fn normal(path: &[u8]) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in std::str::from_utf8(path).ok()?.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            _ => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

struct CountingReader<R> {
    reader: R,
    count: u64,
}

impl<R: Read> Read for CountingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.count += count as u64;
        Ok(count)
    }
}

/// A reader of one part of a file.
struct FileSection {
    file: Arc<File>,
    begin: u64,
    at: u64,
    end: u64,
}

impl FileSection {
    fn read_at_start(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.end - self.begin).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        self.file.read_at(&mut buffer[..most], self.begin)
    }
}

impl Read for FileSection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        let count = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Writes a tar archive with the given files, and returns the error of reading its images.
    fn refusal(
        name: &str,
        files: &[(String, Vec<u8>)],
    ) -> Result<String, Box<dyn std::error::Error>> {
        let path = std::env::temp_dir().join(format!("rrun-{name}-{}.tar", std::process::id()));
        let mut archive = ::tar::Builder::new(File::create(&path)?);
        for (name, content) in files {
            let mut header = ::tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, name, content.as_slice())?;
        }
        archive.into_inner()?;
        let images = ImageArchive::open(&path, &std::env::temp_dir(), u64::MAX)?.images();
        std::fs::remove_file(&path)?;
        Ok(images.err().ok_or("the archive was accepted")?.to_string())
    }

    fn configuration(layers: usize, padding: usize) -> Vec<u8> {
        let diff_ids = vec![digest_of(b"x"); layers];
        let padding = " ".repeat(padding);
        json!({ "rootfs": { "diff_ids": diff_ids }, "comment": padding })
            .to_string()
            .into_bytes()
    }

    fn blob(content: Vec<u8>) -> (String, Vec<u8>) {
        let name = digest_of(&content).replace(':', "/");
        (format!("blobs/{name}"), content)
    }

    #[test]
    fn an_archive_that_lists_a_large_document_again_and_again_is_refused()
    -> Result<(), Box<dyn std::error::Error>> {
        let configuration = configuration(0, 7 << 20);
        let descriptor = |bytes: &[u8]| json!({ "digest": digest_of(bytes), "size": bytes.len() });
        let manifest = json!({ "config": descriptor(&configuration), "layers": [] });
        let manifest = manifest.to_string().into_bytes();
        let index = json!({ "manifests": vec![descriptor(&manifest); 10_000] });
        let layout = [
            ("oci-layout".to_owned(), Vec::new()),
            ("index.json".to_owned(), index.to_string().into_bytes()),
            blob(manifest),
            blob(configuration.clone()),
        ];
        let error = refusal("large-documents", &layout)?;
        assert!(error.contains("67108864 bytes in total"), "{error}");
        let saved = [
            ("c".to_owned(), configuration),
            (
                "manifest.json".to_owned(),
                Value::from(vec![json!({ "Config": "c" }); 30_000])
                    .to_string()
                    .into_bytes(),
            ),
        ];
        let error = refusal("large-configurations", &saved)?;
        assert!(error.contains("67108864 bytes in total"), "{error}");
        Ok(())
    }

    #[test]
    fn an_archive_with_too_many_layers_or_names_is_refused()
    -> Result<(), Box<dyn std::error::Error>> {
        let layers = vec!["layer"; 100_000];
        let names: Vec<String> = (0..100_000).map(|number| format!("a:{number}")).collect();
        for (image, layers, expected) in [
            (json!({ "Layers": layers }), layers.len(), "100000 layers"),
            (json!({ "RepoTags": names }), 0, "100000 names"),
        ] {
            let mut image = image;
            image["Config"] = "c".into();
            let files = [
                ("c".to_owned(), configuration(layers, 0)),
                ("layer".to_owned(), b"x".to_vec()),
                (
                    "manifest.json".to_owned(),
                    json!([image]).to_string().into_bytes(),
                ),
            ];
            let error = refusal("many", &files)?;
            assert!(error.contains(expected), "{error}");
        }
        Ok(())
    }

    /// In CVE-2023-25153, containerd read documents of any size from an archive.
    #[test]
    fn a_too_large_document_in_an_archive_is_refused() -> std::io::Result<()> {
        let name = format!("rrun-archive-{}.tar", std::process::id());
        let path = std::env::temp_dir().join(name);
        for large in ["index.json", "manifest.json"] {
            let mut archive = ::tar::Builder::new(std::fs::File::create(&path)?);
            for (name, size) in [("oci-layout", 2), (large, DOCUMENT_BYTES + 1)] {
                let mut header = ::tar::Header::new_gnu();
                header.set_size(size);
                archive.append_data(&mut header, name, std::io::repeat(b' ').take(size))?;
            }
            archive.into_inner()?;
            let opened = ImageArchive::open(&path, &std::env::temp_dir(), 1 << 30);
            let images = opened.and_then(|mut archive| archive.images());
            let sentence = images.err().map(|error| error.to_string());
            assert!(
                sentence.is_some_and(|it| it.contains("the limit is")),
                "{large}"
            );
        }
        std::fs::remove_file(&path)
    }

    #[test]
    fn paths_that_lead_out_of_the_archive_are_refused() {
        assert_eq!(normal(b"./a//b").as_deref(), Some("a/b"));
        assert_eq!(normal(b"a/../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(normal(b"../a"), None);
        assert_eq!(normal(b"a\xff"), None);
    }
}
