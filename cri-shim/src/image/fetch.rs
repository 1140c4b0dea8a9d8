//! One layer's way from where it comes from to its directory.
//!
//! The network's side is a future; decompression, hashing and unpacking have a thread of their
//! own, with a short queue between the two, so that a slow disk slows the sender down instead of
//! filling memory.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};

use super::archive::Archive;
use super::catalog::{Layer, directory};
use super::error::{ImageError, Kind};
use super::partial::{self, Partial};
use super::source::Source;
use crate::layer::{self, Bounds, LayerError, Promise, Stacked, Unpacked};

/// Chunks on their way to the thread. The HTTP client makes them up to 400 KiB.
const QUEUE: usize = 8;

/// Where an image's layers come from.
pub enum Origin {
    Registry(Source),
    Archive(Archive),
}

/// A layer that is to come, and where it goes.
#[derive(Clone)]
pub struct Wanted {
    pub root: PathBuf,
    pub number: u64,
    pub promise: Promise,
    pub bounds: Bounds,
}

/// Fetches, verifies and unpacks one layer into `layers/NUMBER`. Dropped before its end, it
/// leaves nothing but the beginning of a large blob, for the next try; after it the layer is the
/// caller's.
pub async fn fetch(
    origin: Arc<Origin>,
    wanted: Wanted,
    progress: impl Fn(u64),
) -> Result<Layer, ImageError> {
    let digest = wanted.promise.digest.clone();
    let fetched = match &*origin {
        Origin::Registry(source) => download(source, &wanted, progress).await,
        Origin::Archive(archive) => extract(archive, wanted, progress).await,
    };
    fetched.map_err(|error| error.context(format_args!("layer {digest}")))
}

async fn extract(
    archive: &Archive,
    wanted: Wanted,
    progress: impl Fn(u64),
) -> Result<Layer, ImageError> {
    let size = wanted.promise.size;
    let mut reader = archive.blob(&wanted.promise.digest)?;
    let unpacked = on_a_thread(wanted.number, move || receive(&mut reader, &wanted))?;
    let fetched = unpacked.await.unwrap_or_else(|_| Err(ended_early()))?;
    progress(size);
    Ok(fetched.keep())
}

async fn download(
    source: &Source,
    wanted: &Wanted,
    progress: impl Fn(u64),
) -> Result<Layer, ImageError> {
    // What was kept of an earlier try may be what is wrong.
    let (had, error) = match attempt(source, wanted, &progress).await {
        Ok(fetched) => return Ok(fetched),
        Err(failure) => failure,
    };
    if had == 0 || error.kind() != Kind::DataLoss {
        return Err(error);
    }
    log::info!("layer {}: {error}; begins anew", wanted.promise.digest);
    partial::discard(&wanted.root, &wanted.promise.digest);
    let second = attempt(source, wanted, |_| ()).await;
    second.map_err(|(_, error)| error)
}

/// One try; a failure tells as well how many bytes there were from an earlier one.
async fn attempt(
    source: &Source,
    wanted: &Wanted,
    progress: impl Fn(u64),
) -> Result<Layer, (u64, ImageError)> {
    let (to_thread, chunks) = mpsc::channel(QUEUE);
    let (tell, told) = oneshot::channel();
    let promise = &wanted.promise;
    let for_thread = wanted.clone();
    let unpacked = on_a_thread(wanted.number, move || {
        let Promise { digest, size, .. } = &for_thread.promise;
        let mut arriving = Arriving::new(chunks, Partial::open(&for_thread.root, digest, *size));
        let _ = tell.send(arriving.replay);
        let result = receive(&mut arriving, &for_thread);
        arriving.end(result.as_ref().err(), *size);
        result
    });
    let unpacked = unpacked.map_err(|error| (0, error))?;
    let had = told.await.unwrap_or(0);
    progress(had);
    let sent = if had == promise.size {
        Ok(())
    } else {
        source
            .blob(&promise.digest, promise.size, had, &to_thread, progress)
            .await
    };
    drop(to_thread);
    let unpacked = unpacked.await.unwrap_or_else(|_| Err(ended_early()));
    match (sent, unpacked) {
        (Ok(()), Ok(placed)) => Ok(placed.keep()),
        // What broke on this side stopped the sending, not the other way round.
        (_, Err(error @ (LayerError::System { .. } | LayerError::Bound(_)))) => {
            Err((had, error.into()))
        }
        (Err(error), _) => Err((had, error)),
        (_, Err(error)) => Err((had, error.into())),
    }
}

fn ended_early() -> LayerError {
    LayerError::Stream(io::Error::other("the thread that unpacked it ended"))
}

/// Runs what blocks on a thread of its own. If nobody waits any more its answer is dropped, and
/// the layer removed with it.
fn on_a_thread(
    number: u64,
    work: impl FnOnce() -> Result<Placed, LayerError> + Send + 'static,
) -> Result<oneshot::Receiver<Result<Placed, LayerError>>, ImageError> {
    let (done, unpacked) = oneshot::channel();
    std::thread::Builder::new()
        .name(format!("layer-{number}"))
        .stack_size(512 << 10)
        .spawn(move || {
            let _ = done.send(work());
        })
        .map_err(|error| {
            ImageError::new(
                Kind::Internal,
                format!("start a thread for a layer: {error}"),
            )
        })?;
    Ok(unpacked)
}

fn receive(compressed: impl Read, wanted: &Wanted) -> Result<Placed, LayerError> {
    let made = make(&wanted.root, wanted.number, |into| {
        let unpacked = layer::unpack(compressed, into, &wanted.promise, &wanted.bounds)?;
        Ok(Some(unpacked))
    })?;
    made.ok_or_else(ended_early)
}

/// Makes the layer that gives the directories of an image their looks, if it needs one: on top of
/// `stack`, which is named uppermost first. Blocks.
pub fn make_looks(root: &Path, number: u64, stack: &[Layer]) -> Result<Option<Placed>, ImageError> {
    let layers: Vec<Stacked> = stack
        .iter()
        .map(|layer| Stacked {
            path: directory(root, layer.number).join("fs"),
            unlisted: layer.unlisted,
        })
        .collect();
    let made = make(root, number, |into| {
        let inodes = layer::looks(&layers, into)?;
        Ok((inodes > 0).then(|| Unpacked {
            bytes: inodes.saturating_mul(4096),
            inodes,
            ..Unpacked::default()
        }))
    });
    let what = "the looks of directories that its layers do not list";
    made.map_err(|error| ImageError::from(error).context(what))
}

/// Has `fill` make a layer in `ingest/NUMBER/fs`, and moves it to its place; `None` if there is
/// none to be made.
fn make(
    root: &Path,
    number: u64,
    fill: impl FnOnce(&Path) -> Result<Option<Unpacked>, LayerError>,
) -> Result<Option<Placed>, LayerError> {
    let ingest = root.join("ingest").join(number.to_string());
    let fail = |what: &str, error: io::Error| LayerError::System {
        what: format!("{what} {}", ingest.display()),
        errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    };
    std::fs::create_dir(&ingest).map_err(|error| fail("make the directory", error))?;
    let result = fill(&ingest.join("fs")).and_then(|unpacked| {
        let Some(unpacked) = unpacked else {
            return Ok(None);
        };
        let path = directory(root, number);
        std::fs::rename(&ingest, &path)
            .map_err(|error| fail("move to its place the layer in", error))?;
        Ok(Some(Placed {
            path: Some(path),
            number,
            unpacked,
        }))
    });
    if !matches!(result, Ok(Some(_))) {
        remove(&ingest);
    }
    result
}

/// A layer in its place that belongs to nobody yet; it goes when it is dropped.
pub struct Placed {
    path: Option<PathBuf>,
    number: u64,
    unpacked: Unpacked,
}

impl Placed {
    pub fn keep(mut self) -> Layer {
        self.path = None;
        Layer {
            number: self.number,
            bytes: self.unpacked.bytes,
            inodes: self.unpacked.inodes,
            opaque_root: self.unpacked.opaque_root,
            unlisted: self.unpacked.unlisted > 0,
        }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            // It may be dropped where nothing must block.
            let removal = std::thread::Builder::new().spawn(move || remove(&path));
            if let Err(error) = removal {
                log::warn!("start a thread to remove a layer: {error}");
            }
        }
    }
}

/// Removes a directory that nobody names; what can't be removed now is at the next start.
pub fn remove(path: &Path) {
    if let Err(error) = layer::remove_path(path) {
        log::warn!("remove {}: {}", path.display(), io::Error::from(error));
    }
}

/// A blob as it comes: first what was kept of it, then what the network brings, kept as well.
struct Arriving {
    chunks: mpsc::Receiver<Bytes>,
    current: Bytes,
    partial: Option<Partial>,
    /// Bytes that an earlier try left.
    replay: u64,
    replayed: u64,
    /// Bytes from the network.
    came: u64,
    /// The network has no more.
    ended: bool,
}

impl Arriving {
    fn new(chunks: mpsc::Receiver<Bytes>, partial: Option<Partial>) -> Self {
        Arriving {
            chunks,
            current: Bytes::new(),
            replay: partial.as_ref().map_or(0, Partial::length),
            partial,
            replayed: 0,
            came: 0,
            ended: false,
        }
    }

    /// Keeps what has come if all that is wrong is that the rest has not.
    fn end(self, error: Option<&LayerError>, size: u64) {
        let broke_off = self.ended && self.replay + self.came < size;
        let ours = matches!(
            error,
            Some(LayerError::System { .. } | LayerError::Bound(_))
        );
        let keep = error.is_some() && broke_off && !ours;
        if let Some(partial) = self
            .partial
            .filter(|partial| !keep || partial.length() == 0)
        {
            partial.remove();
        }
    }

    fn keep(&mut self) {
        self.came += self.current.len() as u64;
        if let Some(partial) = &mut self.partial
            && let Err(error) = partial.append(&self.current)
        {
            // The layer itself may still find room.
            log::warn!("keep what has come of a layer: {error}");
            if let Some(partial) = self.partial.take() {
                partial.remove();
            }
        }
    }
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.replayed < self.replay
            && let Some(partial) = &self.partial
        {
            let left = usize::try_from(self.replay - self.replayed).unwrap_or(usize::MAX);
            let most = left.min(buffer.len());
            let count = partial.read_at(&mut buffer[..most], self.replayed)?;
            self.replayed += count as u64;
            return Ok(count);
        }
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => {
                    self.current = chunk;
                    self.keep();
                }
                None => {
                    self.ended = true;
                    return Ok(0);
                }
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

impl From<LayerError> for ImageError {
    fn from(error: LayerError) -> Self {
        let kind = match &error {
            LayerError::Stream(error) if error.kind() == io::ErrorKind::Unsupported => {
                Kind::Unimplemented
            }
            LayerError::Stream(_) | LayerError::Malformed(_) | LayerError::Digest(_) => {
                Kind::DataLoss
            }
            LayerError::Bound(_) => Kind::ResourceExhausted,
            LayerError::System {
                errno: Errno::NOSPC | Errno::DQUOT | Errno::FBIG,
                ..
            } => Kind::ResourceExhausted,
            LayerError::System { .. } => Kind::Internal,
        };
        ImageError::new(kind, error.to_string())
    }
}
