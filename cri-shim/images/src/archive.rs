//! Images in a tar archive: an OCI image layout (OCI image-spec, image-layout.md), or what
//! `docker save` writes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{CWD, Mode, OFlags};
use serde::Deserialize;

use crate::error::{ImageError, Kind};
use crate::layer::{self, LayerDescriptor, archive as tar, digest_of};
use crate::manifest::{self, DOCUMENT_BYTES, Document};
use crate::reference::Name;
use crate::resolved::ResolvedImage;
use rrun_kernel::regular_file;

/// The most files of an archive: blobs, documents, and the directories of old `docker save`s.
const MAX_FILES: usize = 1 << 16;

/// How many links may lead from one to the next.
const MAX_LINKS: usize = 8;

/// An archive whose files are known by their places.
pub(crate) struct ImageArchive {
    file: Arc<File>,
    files: HashMap<String, Span>,
    /// By digest.
    blobs: HashMap<String, Span>,
}

/// Where a file lies in the archive.
#[derive(Clone, Copy)]
struct Span {
    offset: u64,
    length: u64,
}

/// One image of an archive.
pub(crate) struct ArchivedImage {
    /// As the archive has it; most often one, sometimes none.
    pub names: Vec<Name>,
    /// The digest of its manifest or index, which `docker save` does not write down.
    pub digest: Option<String>,
    pub image: ResolvedImage,
}

/// One of `docker save`'s manifest.json.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

fn broken(what: impl Into<String>) -> ImageError {
    ImageError::new(Kind::DataLoss, what)
}

fn unreadable(error: &io::Error) -> ImageError {
    broken(format!("it can't be read: {error}"))
}

impl ImageArchive {
    /// Opens `path`, and finds what is where. One that is compressed is first unpacked, to at most
    /// `most` bytes, into a file without a name in `scratch`. Blocks.
    pub(crate) fn open(path: &Path, scratch: &Path, most: u64) -> Result<Self, ImageError> {
        let file = regular_file::open(path, OFlags::RDONLY)
            .map_err(|unfit| broken(format!("it can't be read: {unfit}")))?;
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
        })
    }

    /// What is in it. Blocks.
    pub(crate) fn images(&mut self) -> Result<Vec<ArchivedImage>, ImageError> {
        if self.files.contains_key("oci-layout") && self.files.contains_key("index.json") {
            self.layout()
        } else if self.files.contains_key("manifest.json") {
            self.docker()
        } else {
            Err(broken(
                "it holds neither an OCI image layout nor what docker save writes",
            ))
        }
    }

    fn layout(&self) -> Result<Vec<ArchivedImage>, ImageError> {
        let descriptors = manifest::parse_layout(&self.document("index.json")?)?;
        let ours: Vec<_> = descriptors
            .iter()
            .filter(|descriptor| descriptor.may_fit())
            .collect();
        if ours.is_empty() {
            return Err(ImageError::new(
                Kind::NotFound,
                format!("it holds no image for linux/{}", manifest::architecture()),
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
                                return Err(broken("its index names another index"));
                            }
                        }
                    }
                };
                let configuration = self.verified(&document.config.digest)?;
                let names = descriptor.name().map(Name::parse).transpose()?;
                Ok(ArchivedImage {
                    names: names.into_iter().collect(),
                    digest: Some(descriptor.digest.clone()),
                    image: ResolvedImage::of_manifest(&document, size as u64, configuration)?,
                })
            })
            .collect()
    }

    fn docker(&mut self) -> Result<Vec<ArchivedImage>, ImageError> {
        let images: Vec<DockerImage> = serde_json::from_slice(&self.document("manifest.json")?)
            .map_err(|error| broken(format!("its manifest.json can't be read: {error}")))?;
        images
            .into_iter()
            .map(|image| {
                let configuration = self.document(&image.config)?;
                let id = digest_of(&configuration);
                let diff_ids = manifest::parse_configuration(&configuration)?.diff_ids;
                let layers = image.layers.unwrap_or_default();
                if layers.len() != diff_ids.len() {
                    return Err(broken(format!(
                        "its manifest.json has {} layers where the image's configuration has {}",
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
                let names = tags
                    .iter()
                    .map(|tag| Name::parse(tag))
                    .collect::<Result<_, _>>()?;
                Ok(ArchivedImage {
                    names,
                    digest: None,
                    image: ResolvedImage::new(id, descriptors, 0, configuration)?,
                })
            })
            .collect()
    }

    /// A layer by its path. Its digest is not written down: that of one that is not compressed is
    /// the diff ID, else it has to be found out.
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
        } else {
            layer::digest_of_all(&mut reader).map_err(|error| unreadable(&error))?
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
            let shown: String = path.chars().filter(|c| !c.is_control()).take(200).collect();
            broken(format!("it names {shown:?} and does not hold it"))
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

    /// The bytes of a blob as the archive has them; whether they are what the digest says shows
    /// when they have been read.
    pub(crate) fn blob(&self, digest: &str) -> Result<impl Read + Send + 'static, ImageError> {
        let span = self.blobs.get(digest).copied();
        let span = span.ok_or_else(|| broken("the archive does not hold it"))?;
        Ok(self.reader(span))
    }

    fn bytes(&self, what: &str, span: Span) -> Result<Bytes, ImageError> {
        if span.length > DOCUMENT_BYTES {
            return Err(broken(format!(
                "{what} has {} bytes, of which {DOCUMENT_BYTES} are the most that is read",
                span.length
            )));
        }
        let mut bytes = Vec::new();
        self.reader(span)
            .read_to_end(&mut bytes)
            .map_err(|error| unreadable(&error))?;
        Ok(bytes.into())
    }

    fn document(&self, path: &str) -> Result<Bytes, ImageError> {
        self.bytes(path, self.span(path)?)
    }

    /// A small blob.
    fn verified(&self, digest: &str) -> Result<Bytes, ImageError> {
        let span = self.blobs.get(digest).copied();
        let span = span.ok_or_else(|| broken(format!("it lacks the blob {digest}")))?;
        let bytes = self.bytes(digest, span)?;
        match digest_of(&bytes) {
            came if came == digest => Ok(bytes),
            came => Err(broken(format!("its blob {digest} has the digest {came}"))),
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
    // Ours: O_TMPFILE makes a new file.
    let into = rustix::fs::openat(CWD, scratch, flags, Mode::from_raw_mode(0o600))
        .map_err(|error| here("make a file in", error.into()))?;
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
            into.rewind().map_err(|error| here("go back in", error))?;
            return Ok(into);
        };
        sum += count as u64;
        if sum > most {
            return Err(ImageError::new(
                Kind::ResourceExhausted,
                format!("it unpacks to more than {most} bytes, which is the bound"),
            ));
        }
        io::Write::write_all(&mut into, chunk)
            .map_err(|error| here("unpack it to a file in", error))?;
    }
}

/// Every file of the archive by its path, links followed.
fn index(file: &File) -> Result<HashMap<String, Span>, ImageError> {
    let bad = |error: layer::ArchiveError| broken(error.to_string());
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
            return Err(broken(format!("it holds more than {MAX_FILES} files")));
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
            // Beside the link.
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

/// A path without `.`, `..` and doubled slashes; `None` if it leads out of the archive.
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

/// A part of a file.
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
    use super::normal;

    #[test]
    fn paths_stay_in_the_archive() {
        assert_eq!(normal(b"./a//b").as_deref(), Some("a/b"));
        assert_eq!(normal(b"a/../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(normal(b"../a"), None);
        assert_eq!(normal(b"a\xff"), None);
    }
}
