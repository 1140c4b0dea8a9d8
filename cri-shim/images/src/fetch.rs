//! One layer's way from where it comes from to its directory.
//!
//! The network's side is a future; decompression, hashing and unpacking have a thread of their
//! own, with a short queue between the two, so that a slow disk slows the sender down instead of
//! filling memory.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes};
use rustix::io::Errno;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::ImageSettings;
use super::archive::Archive;
use super::catalog::{Layer, directory};
use super::error::{ImageError, Kind};
use super::pace::{Least, Watch};
use super::partial::{self, Forgotten, Partial};
use super::slots::{Slot, Slots};
use super::source::Source;
use super::turns::{InTurns, Turn, Turns};
use crate::layer::{self, Bounds, LayerError, Promise, Stacked, Unpacked};
use rrun_calls::wait::{blocking, slow};

/// Chunks on their way to the thread. The HTTP client makes them up to 400 KiB.
const QUEUE: usize = 8;

/// Where an image's layers come from.
pub(crate) enum Origin {
    Registry(Source),
    Archive(Archive),
}

/// A layer that is to come, and where it goes.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub root: PathBuf,
    pub number: u64,
    pub promise: Promise,
    pub bounds: Bounds,
}

/// The queues in which a fetch waits.
pub(crate) struct Queues {
    pub slots: Arc<Slots>,
    /// One permit for each layer that may be half unpacked, because it is arriving or because it
    /// waits for its turn. Each such layer has a thread and the memory of a decoder.
    pub places: Arc<Semaphore>,
    pub turns: Arc<Turns>,
    pub least: Least,
}

impl Queues {
    pub(crate) fn new(limits: &ImageSettings) -> Self {
        let fetched = limits.parallel_layers.max(1);
        Queues {
            slots: Slots::new(fetched, limits.layers_per_host()),
            places: Arc::new(Semaphore::new(
                fetched
                    .saturating_add(limits.parallel_unpacks)
                    .min(Semaphore::MAX_PERMITS),
            )),
            turns: Turns::new(limits.parallel_unpacks),
            least: limits.least(),
        }
    }
}

/// Fetches, verifies and unpacks one layer into `layers/NUMBER`. Dropped before its end, it
/// leaves nothing but the beginning of a large blob, for the next try; after it the layer is the
/// caller's.
pub(crate) async fn fetch(
    origin: Arc<Origin>,
    wanted: Wanted,
    pull: u64,
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<Layer, ImageError> {
    let what = format!("layer {}", wanted.promise.digest);
    let fetched = match &*origin {
        Origin::Registry(source) => {
            let slot = queues.slots.slot(pull, what.clone());
            download(source, &wanted, slot, queues, progress).await
        }
        Origin::Archive(archive) => extract(archive, wanted, queues, progress).await,
    };
    fetched.map_err(|error| error.context(what))
}

/// `what` is for the log: "layer sha256:…".
async fn place(queues: &Queues, what: &str) -> Option<OwnedSemaphorePermit> {
    let what = format!("{what}: unpack other layers first");
    // Nobody closes the semaphore.
    slow(what, Arc::clone(&queues.places).acquire_owned())
        .await
        .ok()
}

async fn extract(
    archive: &Archive,
    wanted: Wanted,
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<Layer, ImageError> {
    let Promise { digest, size, .. } = wanted.promise.clone();
    let reader = archive.blob(&digest)?;
    let what = format!("layer {digest}");
    let _place = place(queues, &what).await;
    let turn = Turn::new(&queues.turns, what);
    let unpacked = on_a_thread(wanted.number, move || {
        receive(InTurns { reader, turn }, &wanted)
    })?;
    let fetched = unpacked.await.unwrap_or_else(|_| Err(ended_early()))?;
    progress(size);
    Ok(fetched.keep())
}

async fn download(
    source: &Source,
    wanted: &Wanted,
    slot: Slot,
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<Layer, ImageError> {
    let promise = &wanted.promise;
    // A blob may be a little longer than its unpacked content, but not twice as long.
    if promise.size / 2 > wanted.bounds.bytes {
        return Err(LayerError::Bound(format!(
            "it has {} bytes, and a layer may unpack to at most {} bytes",
            promise.size, wanted.bounds.bytes
        ))
        .into());
    }
    let slot = Arc::new(slot);
    let watch = Arc::new(Watch::new(queues.least, Some(Arc::clone(&slot))));
    let _piece = Forgotten::at_the_end(&wanted.root, &promise.digest, promise.size);
    // The most bytes that any attempt has received: bytes that arrive again are no progress.
    let farthest = AtomicU64::new(0);
    let mut anew = false;
    loop {
        slot.again();
        let before = farthest.load(Ordering::Relaxed);
        let at = AtomicU64::new(0);
        let progress = |bytes: u64| {
            let now = at.fetch_add(bytes, Ordering::Relaxed) + bytes;
            let before = farthest.fetch_max(now, Ordering::Relaxed);
            if now > before {
                progress(now - before);
            }
        };
        let (had, error) = match attempt(source, wanted, &slot, &watch, queues, progress).await {
            Ok(layer) => return Ok(layer),
            Err(failure) => failure,
        };
        if slot.gave_way() && error.kind() == Kind::Unavailable {
            if farthest.load(Ordering::Relaxed) == before {
                slot.came_no_farther();
            }
            log::info!("layer {}: {error}; it goes on later", promise.digest);
            continue;
        }
        // The bytes that an earlier attempt left may be the wrong ones.
        if had == 0 || anew || error.kind() != Kind::DataLoss {
            return Err(error);
        }
        log::info!("layer {}: {error}; begins anew", promise.digest);
        partial::discard(&wanted.root, &promise.digest, promise.size);
        anew = true;
    }
}

/// One try; a failure tells as well how many bytes there were from an earlier one.
async fn attempt(
    source: &Source,
    wanted: &Wanted,
    slot: &Arc<Slot>,
    watch: &Arc<Watch>,
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<Layer, (u64, ImageError)> {
    let promise = &wanted.promise;
    if let Some(host) = source.first_host() {
        slot.at(&host).await;
    }
    let what = format!("layer {}", promise.digest);
    let _place = place(queues, &what).await;
    let (to_thread, chunks) = mpsc::channel(QUEUE);
    let (tell, told) = oneshot::channel();
    let for_thread = wanted.clone();
    let turn = Turn::new(&queues.turns, what);
    let gave_way = slot.whether_it_gave_way();
    let unpacked = on_a_thread(wanted.number, move || {
        let Promise { digest, size, .. } = &for_thread.promise;
        let partial = Partial::open(&for_thread.root, digest, *size);
        let mut arriving = Arriving::new(chunks, turn, partial);
        let _ = tell.send(arriving.replay);
        let result = receive(&mut arriving, &for_thread);
        arriving.end(
            result.as_ref().err(),
            *size,
            gave_way.load(Ordering::Relaxed),
        );
        result
    });
    let unpacked = unpacked.map_err(|error| (0, error))?;
    let had = told.await.unwrap_or(0);
    slot.begins_at(had);
    progress(had);
    let sent = if had == promise.size {
        Ok(())
    } else {
        let Promise { digest, size, .. } = promise;
        source
            .blob(digest, *size, had, &to_thread, watch, progress)
            .await
    };
    // The remaining work needs no registry.
    slot.leave();
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

/// Makes the layer that sets the owner and mode of an image's directories, if the image needs one.
/// It goes on top of `stack`, which is listed uppermost first. `pull` is for the log.
///
/// An image may make this as much work as a large layer, and each layer of the image costs several
/// open files. So it waits in the queues of the layers that are unpacked. The thread keeps its place
/// until it ends, and it ends soon after the pull has been abandoned.
pub(crate) async fn make_looks(
    queues: &Queues,
    root: &Path,
    number: u64,
    stack: &[Layer],
    pull: &str,
) -> Result<Option<Placed>, ImageError> {
    let layers: Vec<Stacked> = stack
        .iter()
        .map(|layer| Stacked {
            path: directory(root, layer.number).join("fs"),
            unlisted: layer.unlisted,
        })
        .collect();
    let root = root.to_owned();
    let what = "set the owner and mode of directories that its layers do not list";
    let whole = format!("pull {pull}: {what}");
    let place = place(queues, &whole).await;
    let mut turn = Turn::new(&queues.turns, whole.clone());
    let waits = Arc::new(());
    let waiter = Arc::downgrade(&waits);
    let made = blocking(whole, move || {
        let _place = place;
        let go_on = || {
            turn.take();
            match waiter.strong_count() {
                0 => Err(LayerError::Stream(io::Error::other("nobody waits for it"))),
                _ => Ok(()),
            }
        };
        make(&root, number, |into| {
            let inodes = layer::looks(&layers, into, go_on)?;
            Ok((inodes > 0).then(|| Unpacked {
                bytes: inodes.saturating_mul(4096),
                inodes,
                ..Unpacked::default()
            }))
        })
    });
    let made = made.await;
    drop(waits);
    made.map_err(|error| ImageError::from(error).context(what))
}

/// Lets `fill` make a layer in `ingest/NUMBER/fs`, and moves the layer to its place. `None`: `fill`
/// made no layer.
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
        std::fs::rename(&ingest, &path).map_err(|error| fail("move the layer from", error))?;
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
pub(crate) struct Placed {
    path: Option<PathBuf>,
    number: u64,
    unpacked: Unpacked,
}

impl Placed {
    pub(crate) fn keep(mut self) -> Layer {
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
pub(crate) fn remove(path: &Path) {
    if let Err(error) = layer::remove_path(path) {
        log::warn!("remove {}: {}", path.display(), io::Error::from(error));
    }
}

/// A blob as it comes: first what was kept of it, then what the network brings, kept as well.
struct Arriving {
    chunks: mpsc::Receiver<Bytes>,
    current: Bytes,
    /// Held while there are bytes to unpack.
    turn: Turn,
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
    fn new(chunks: mpsc::Receiver<Bytes>, turn: Turn, partial: Option<Partial>) -> Self {
        Arriving {
            chunks,
            current: Bytes::new(),
            turn,
            replay: partial.as_ref().map_or(0, Partial::length),
            partial,
            replayed: 0,
            came: 0,
            ended: false,
        }
    }

    /// Keeps the bytes that have arrived, if the only error is that the rest has not. A large blob
    /// is kept for a later pull. A blob of any size is kept if the fetch gave its slot away.
    fn end(self, error: Option<&LayerError>, size: u64, gave_way: bool) {
        let broke_off = self.ended && self.replay + self.came < size;
        let ours = matches!(
            error,
            Some(LayerError::System { .. } | LayerError::Bound(_))
        );
        let worth = gave_way || size >= partial::WORTH_KEEPING;
        let keep = error.is_some() && broke_off && !ours && worth;
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
            self.turn.take();
            let left = usize::try_from(self.replay - self.replayed).unwrap_or(usize::MAX);
            let most = left.min(buffer.len());
            let count = partial.read_at(&mut buffer[..most], self.replayed)?;
            self.replayed += count as u64;
            return Ok(count);
        }
        while self.current.is_empty() {
            let chunk = match self.chunks.try_recv() {
                Ok(chunk) => Some(chunk),
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => {
                    self.turn.give_back();
                    self.chunks.blocking_recv()
                }
            };
            self.turn.take();
            match chunk {
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
