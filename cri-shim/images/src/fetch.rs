//! One layer's way from where it comes from to its directory.
//!
//! The network's side is a future; decompression, hashing and unpacking have a thread of their
//! own, with a short queue between the two, so that a slow disk slows the sender down instead of
//! filling memory.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::archive::ImageArchive;
use crate::blob_reader::BlobReader;
use crate::catalog::{Layer, directory};
use crate::error::{ImageError, Kind};
use crate::layer::{self, Bounds, LayerDescriptor, LayerError, LowerLayer, UnpackSummary};
use crate::limits::MinRate;
use crate::pace::RateWatch;
use crate::partial::{self, DiscardOnDrop, Partial};
use crate::settings::ImageSettings;
use crate::slots::{Slot, Slots};
use crate::source::Source;
use crate::turns::{ReaderInTurns, UnpackTurn, UnpackTurns};
use crate::unpacked_layer::{UnpackedLayer, make};
use rrun_calls::wait::{blocking, slow};

/// Chunks on their way to the thread. The HTTP client makes them up to 400 KiB.
const CHUNK_QUEUE_LENGTH: usize = 8;

/// Where an image's layers come from.
pub(crate) enum Origin {
    Registry(Source),
    Archive(ImageArchive),
}

/// A layer that is to come, and where it goes.
#[derive(Clone)]
pub(crate) struct LayerRequest {
    pub root: PathBuf,
    pub number: u64,
    pub descriptor: LayerDescriptor,
    pub bounds: Bounds,
}

/// The queues in which a fetch waits.
pub(crate) struct Queues {
    pub slots: Arc<Slots>,
    /// One permit for each layer that may be half unpacked, because it is arriving or because it
    /// waits for its turn. Each such layer has a thread and the memory of a decoder.
    pub places: Arc<Semaphore>,
    pub turns: Arc<UnpackTurns>,
    pub min_rate: MinRate,
}

impl Queues {
    pub(crate) fn new(settings: &ImageSettings) -> Self {
        let fetched = settings.parallel_layers.max(1);
        Queues {
            slots: Slots::new(fetched, settings.layers_per_host()),
            places: Arc::new(Semaphore::new(
                fetched
                    .saturating_add(settings.parallel_unpacks)
                    .min(Semaphore::MAX_PERMITS),
            )),
            turns: UnpackTurns::new(settings.parallel_unpacks),
            min_rate: settings.min_rate(),
        }
    }
}

/// Fetches, verifies and unpacks one layer into `layers/NUMBER`. Dropped before its end, it
/// leaves nothing but the beginning of a large blob, for the next try; after it the layer is the
/// caller's.
pub(crate) async fn fetch(
    origin: Arc<Origin>,
    request: LayerRequest,
    pull: u64,
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<Layer, ImageError> {
    let what = format!("layer {}", request.descriptor.digest);
    let fetched = match &*origin {
        Origin::Registry(source) => {
            let slot = queues.slots.slot(pull, what.clone());
            download(source, &request, slot, queues, progress).await
        }
        Origin::Archive(archive) => extract(archive, request, queues, progress).await,
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
    archive: &ImageArchive,
    request: LayerRequest,
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<Layer, ImageError> {
    let LayerDescriptor { digest, size, .. } = request.descriptor.clone();
    let reader = archive.blob(&digest)?;
    let what = format!("layer {digest}");
    let _place = place(queues, &what).await;
    let turn = UnpackTurn::new(&queues.turns, what);
    let unpacked = on_a_thread(request.number, move || {
        receive(ReaderInTurns { reader, turn }, &request)
    })?;
    let fetched = unpacked.await.unwrap_or_else(|_| Err(ended_early()))?;
    progress(size);
    Ok(fetched.keep())
}

async fn download(
    source: &Source,
    request: &LayerRequest,
    slot: Slot,
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<Layer, ImageError> {
    let descriptor = &request.descriptor;
    // A blob may be a little longer than its unpacked content, but not twice as long.
    if descriptor.size / 2 > request.bounds.bytes {
        return Err(LayerError::Bound(format!(
            "it has {} bytes, and a layer may unpack to at most {} bytes",
            descriptor.size, request.bounds.bytes
        ))
        .into());
    }
    let slot = Arc::new(slot);
    let watch = Arc::new(RateWatch::new(queues.min_rate, Some(Arc::clone(&slot))));
    let _piece = DiscardOnDrop::of_small(&request.root, &descriptor.digest, descriptor.size);
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
        let (had, error) = match attempt(source, request, &slot, &watch, queues, progress).await {
            Ok(layer) => return Ok(layer),
            Err(failure) => failure,
        };
        if slot.gave_way() && error.kind() == Kind::Unavailable {
            if farthest.load(Ordering::Relaxed) == before {
                slot.came_no_farther();
            }
            log::info!("layer {}: {error}; it goes on later", descriptor.digest);
            continue;
        }
        // The bytes that an earlier attempt left may be the wrong ones.
        if had == 0 || anew || error.kind() != Kind::DataLoss {
            return Err(error);
        }
        log::info!("layer {}: {error}; begins anew", descriptor.digest);
        partial::discard(&request.root, &descriptor.digest, descriptor.size);
        anew = true;
    }
}

/// One try; a failure tells as well how many bytes there were from an earlier one.
async fn attempt(
    source: &Source,
    request: &LayerRequest,
    slot: &Arc<Slot>,
    watch: &Arc<RateWatch>,
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<Layer, (u64, ImageError)> {
    let descriptor = &request.descriptor;
    if let Some(host) = source.first_host() {
        slot.at(&host).await;
    }
    let what = format!("layer {}", descriptor.digest);
    let _place = place(queues, &what).await;
    let (to_thread, chunks) = mpsc::channel(CHUNK_QUEUE_LENGTH);
    let (send_had, had) = oneshot::channel();
    let for_thread = request.clone();
    let turn = UnpackTurn::new(&queues.turns, what);
    let gave_way = slot.whether_it_gave_way();
    let unpacked = on_a_thread(request.number, move || {
        let LayerDescriptor { digest, size, .. } = &for_thread.descriptor;
        let partial = Partial::open(&for_thread.root, digest, *size);
        let mut blob = BlobReader::new(chunks, turn, partial);
        let _ = send_had.send(blob.replay);
        let result = receive(&mut blob, &for_thread);
        blob.end(
            result.as_ref().err(),
            *size,
            gave_way.load(Ordering::Relaxed),
        );
        result
    });
    let unpacked = unpacked.map_err(|error| (0, error))?;
    let had = had.await.unwrap_or(0);
    slot.begins_at(had);
    progress(had);
    let sent = if had == descriptor.size {
        Ok(())
    } else {
        let LayerDescriptor { digest, size, .. } = descriptor;
        source
            .blob(digest, *size, had, &to_thread, watch, progress)
            .await
    };
    // The remaining work needs no registry.
    slot.leave();
    drop(to_thread);
    let unpacked = unpacked.await.unwrap_or_else(|_| Err(ended_early()));
    match (sent, unpacked) {
        (Ok(()), Ok(layer)) => Ok(layer.keep()),
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
    work: impl FnOnce() -> Result<UnpackedLayer, LayerError> + Send + 'static,
) -> Result<oneshot::Receiver<Result<UnpackedLayer, LayerError>>, ImageError> {
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

fn receive(compressed: impl Read, request: &LayerRequest) -> Result<UnpackedLayer, LayerError> {
    let made = make(&request.root, request.number, |into| {
        let unpacked = layer::unpack(compressed, into, &request.descriptor, &request.bounds)?;
        Ok(Some(unpacked))
    })?;
    made.ok_or_else(ended_early)
}

/// Makes the layer that sets the owner and mode of an image's directories, if the image needs one.
/// It goes on top of `stack`, which is listed uppermost first. `pull` is for the log.
///
/// An image may make this as much work as a large layer, and each layer of the image costs several
/// open files. So it waits in the queues of the layers that are unpacked. The thread keeps its
/// place until it ends, and it ends soon after the pull has been abandoned.
pub(crate) async fn make_directory_layer(
    queues: &Queues,
    root: &Path,
    number: u64,
    stack: &[Layer],
    pull: &str,
) -> Result<Option<UnpackedLayer>, ImageError> {
    let layers: Vec<LowerLayer> = stack
        .iter()
        .map(|layer| LowerLayer {
            path: directory(root, layer.number).join("fs"),
            unlisted: layer.unlisted,
        })
        .collect();
    let root = root.to_owned();
    let what = "set the owner and mode of directories that its layers do not list";
    let whole = format!("pull {pull}: {what}");
    let place = place(queues, &whole).await;
    let mut turn = UnpackTurn::new(&queues.turns, whole.clone());
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
            let inodes = layer::make_directory_layer(&layers, into, go_on)?;
            Ok((inodes > 0).then(|| UnpackSummary {
                bytes: inodes.saturating_mul(4096),
                inodes,
                ..UnpackSummary::default()
            }))
        })
    });
    let made = made.await;
    drop(waits);
    made.map_err(|error| ImageError::from(error).context(what))
}
