//! Fetches one layer from its origin and unpacks it into its directory.
//!
//! A future receives the data from the network, and a separate thread decompresses, hashes and
//! unpacks the data. A short queue connects the future and the thread. If the queue is full, its
//! data moves to a file, or the future stops receiving. The data therefore can't fill the memory.

use std::io::{self, Read};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::archive::ImageArchive;
use crate::blob_reader::{BlobReader, BlobReceiver, blob_queue};
use crate::catalog::{Layer, directory};
use crate::error::{ImageError, Kind};
use crate::layer::{self, Bounds, LayerDescriptor, LayerError, LowerLayer, UnpackSummary};
use crate::limits::MinRate;
use crate::pace::RateWatch;
use crate::partial::{DiscardOnDrop, Partial, PartialName};
use crate::partial_budget::PartialBudget;
use crate::places::{Place, Places};
use crate::settings::ImageSettings;
use crate::slots::{Slot, Slots};
use crate::source::Source;
use crate::turns::{Effort, ReaderInTurns, UnpackTurn, UnpackTurns};
use crate::unpacked_layer::{LayerDirectories, UnpackedLayer};
use rrun_calls::wait::{blocking, slow};

/// The interval at which a fetch that waits for a place checks whether another pull needs its slot.
const GIVE_WAY_INTERVAL: Duration = Duration::from_millis(500);

/// The origin of an image's layers.
pub(crate) enum Origin {
    Registry(Source),
    Archive(ImageArchive),
}

impl Origin {
    /// Returns the name of the registry, or `None` for an archive.
    pub(crate) fn registry(&self) -> Option<&str> {
        match self {
            Origin::Registry(source) => Some(source.name()),
            Origin::Archive(_) => None,
        }
    }

    /// Returns the host from which a layer is probably fetched (see [`Effort::host`]).
    pub(crate) fn host(&self) -> String {
        match self {
            Origin::Registry(source) => source.first_host().unwrap_or_default(),
            Origin::Archive(_) => String::new(),
        }
    }
}

/// A layer to fetch, and its limits.
#[derive(Clone)]
pub(crate) struct LayerRequest {
    pub descriptor: LayerDescriptor,
    pub bounds: Bounds,
}

/// The queues in which a fetch waits, and the directories into which it unpacks.
pub(crate) struct Queues {
    pub slots: Arc<Slots>,
    pub places: Arc<Places>,
    pub turns: Arc<UnpackTurns>,
    pub min_rate: MinRate,
    pub directories: Arc<LayerDirectories>,
    pub partials: Arc<PartialBudget>,
}

impl Queues {
    pub(crate) fn new(settings: &ImageSettings, directories: Arc<LayerDirectories>) -> Self {
        let fetched = settings.parallel_layers.max(1);
        Queues {
            slots: Slots::new(fetched, settings.layers_per_host()),
            places: Places::new(fetched.saturating_add(settings.parallel_unpacks)),
            turns: UnpackTurns::new(settings.parallel_unpacks),
            min_rate: settings.min_rate(),
            partials: PartialBudget::new(&directories.root, settings.partial_bytes),
            directories,
        }
    }
}

/// Fetches, verifies and unpacks one layer into `layers/NUMBER`. If this future is dropped early,
/// the partly unpacked layer is removed. The received bytes of a large blob are kept for the next
/// attempt.
pub(crate) async fn fetch(
    origin: Arc<Origin>,
    request: LayerRequest,
    (pull, effort): (u64, &Arc<Effort>),
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<UnpackedLayer, ImageError> {
    let what = format!("layer {}", request.descriptor.digest);
    let _ended = EndOnDrop(effort);
    let fetched = match &*origin {
        Origin::Registry(source) => {
            let slot = queues.slots.slot(pull, what.clone());
            let layer = (pull, slot, effort);
            download(source, &request, layer, queues, progress).await
        }
        Origin::Archive(archive) => {
            extract(archive, request, (pull, effort), queues, progress).await
        }
    };
    fetched.map_err(|error| error.context(what))
}

/// Ends the unpacking of a layer when the fetch of the layer ends. The thread can still be waiting for
/// its turn to unpack.
struct EndOnDrop<'a>(&'a Effort);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.preempt();
    }
}

/// Waits until `place` is granted. `what` names the layer in the log, for example
/// "layer sha256:…".
async fn granted(place: &Place, what: &str) {
    let what = format!("{what}: wait until other layers are unpacked");
    slow(what, place.granted()).await;
}

/// Waits for the slot and the place of a layer. If `slot` is `None`, waits only for the place.
/// Returns false if another pull gets the slot during the wait for the place.
async fn begin_turn(source: &Source, (slot, place): (Option<&Slot>, &Place), digest: &str) -> bool {
    if let Some(slot) = slot {
        slot.begin_turn();
        if let Some(host) = source.first_host() {
            slot.at(&host).await;
        }
    }
    let what = format!("layer {digest}");
    let mut granted = std::pin::pin!(granted(place, &what));
    while tokio::time::timeout(GIVE_WAY_INTERVAL, &mut granted)
        .await
        .is_err()
    {
        if slot.is_some_and(|slot| slot.gives_way(true)) {
            place.leave();
            return false;
        }
    }
    true
}

async fn extract(
    archive: &ImageArchive,
    request: LayerRequest,
    (pull, effort): (u64, &Arc<Effort>),
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<UnpackedLayer, ImageError> {
    let LayerDescriptor { digest, size, .. } = &request.descriptor;
    let what = format!("layer {digest}");
    loop {
        let reader = archive.blob(digest)?;
        let place = queues.places.place(pull, effort);
        granted(&place, &what).await;
        let (turns, directories) = (Arc::clone(&queues.turns), Arc::clone(&queues.directories));
        let (for_thread, effort_of_thread) = (request.clone(), Arc::clone(effort));
        let name = what.clone();
        let unpacked = on_a_thread(move || {
            let turn = Rc::new(UnpackTurn::new(&turns, name, &effort_of_thread));
            let in_turns = ReaderInTurns {
                reader,
                turn: Rc::clone(&turn),
            };
            receive(in_turns, &turn, &for_thread, &directories)
        })?;
        match unpacked.await.unwrap_or_else(|_| Err(ended_early())) {
            Err(_) if effort.is_preempted() => log_preemption(&what),
            unpacked => {
                let unpacked = unpacked?;
                progress(*size);
                return Ok(unpacked);
            }
        }
    }
}

/// Logs that a layer is unpacked again later.
fn log_preemption(what: &str) {
    log::info!(
        "{what}: unpacking was stopped, because other layers wait; the layer is unpacked again later"
    );
}

async fn download(
    source: &Source,
    request: &LayerRequest,
    (pull, slot, effort): (u64, Slot, &Arc<Effort>),
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<UnpackedLayer, ImageError> {
    let LayerDescriptor { digest, .. } = &request.descriptor;
    let slot = Arc::new(slot);
    let watch = Arc::new(RateWatch::new(queues.min_rate, Some(Arc::clone(&slot))));
    let place = (&*queues.directories.root, &queues.partials);
    let kept = PartialName::new(place, source.name(), &request.descriptor);
    let _piece = DiscardOnDrop::of_small(&kept);
    // The highest number of bytes that an attempt has received. Only later bytes are progress.
    let farthest = AtomicU64::new(0);
    let mut retries = Retries::default();
    loop {
        let place = queues.places.place(pull, effort);
        let needed = (!retries.without_slot).then_some(&*slot);
        while !begin_turn(source, (needed, &place), digest).await {}
        let before = farthest.load(Ordering::Relaxed);
        let at = AtomicU64::new(0);
        let progress = |bytes: u64| {
            let now = at.fetch_add(bytes, Ordering::Relaxed) + bytes;
            let before = farthest.fetch_max(now, Ordering::Relaxed);
            if now > before {
                progress(now - before);
            }
        };
        let (from, ours) = ((source, &kept), (&slot, effort));
        let made = attempt(from, request, ours, &watch, queues, progress).await;
        let (had, error) = match made {
            Ok(layer) => return Ok(layer),
            Err(failure) => failure,
        };
        let gained = farthest.load(Ordering::Relaxed) - before;
        let failed = Failed {
            request,
            kept: &kept,
            had,
            gained,
            error: &error,
        };
        if !retries.follows(&failed, &slot, effort).await {
            return Err(error);
        }
    }
}

/// A failed attempt to fetch and unpack a layer.
struct Failed<'a> {
    request: &'a LayerRequest,
    kept: &'a PartialName,
    /// The number of bytes from earlier attempts that this attempt used.
    had: u64,
    /// The number of bytes that were received for the first time.
    gained: u64,
    error: &'a ImageError,
}

/// Decides whether another attempt follows a failed attempt to fetch and unpack a layer.
#[derive(Default)]
struct Retries {
    /// True if the next attempt needs no slot, because all bytes are kept.
    without_slot: bool,
    /// True if the fetch has started again without its kept bytes.
    restarted: bool,
}

impl Retries {
    async fn follows(&mut self, failed: &Failed<'_>, slot: &Slot, effort: &Effort) -> bool {
        let Failed { had, error, .. } = *failed;
        let LayerDescriptor { digest, size, .. } = &failed.request.descriptor;
        let had_slot = !std::mem::take(&mut self.without_slot);
        if effort.is_preempted() {
            log_preemption(&format!("layer {digest}"));
            self.without_slot = failed.kept.is_whole().await;
            return true;
        }
        // Another fetch of the same blob can have used or removed the file with the kept bytes.
        if !had_slot && had < *size {
            return true;
        }
        if slot.gave_way() && error.kind() == Kind::Unavailable {
            slot.end_turn(failed.gained);
            log::info!("layer {digest}: {error}; the fetch continues later");
            return true;
        }
        // The kept bytes of an earlier attempt can be wrong. The layer is therefore fetched once
        // more without the kept bytes.
        let may_be_wrong = had > 0 && error.kind() == Kind::DataLoss;
        if !may_be_wrong || std::mem::replace(&mut self.restarted, true) {
            return false;
        }
        log::info!("layer {digest}: {error}; the fetch starts again from the first byte");
        failed.kept.discard();
        true
    }
}

/// Starts a thread that unpacks the bytes from `chunks`, and returns a receiver for the result. Sends
/// the number of bytes from earlier attempts to `send_had`.
fn unpack_chunks(
    chunks: BlobReceiver,
    kept: &PartialName,
    request: &LayerRequest,
    (slot, effort): (&Slot, &Arc<Effort>),
    queues: &Queues,
    send_had: oneshot::Sender<u64>,
) -> Result<oneshot::Receiver<Result<UnpackedLayer, LayerError>>, ImageError> {
    let (request, kept) = (request.clone(), kept.clone());
    let (turns, directories) = (Arc::clone(&queues.turns), Arc::clone(&queues.directories));
    let (gave_way, effort) = (slot.gave_way_flag(), Arc::clone(effort));
    on_a_thread(move || {
        let LayerDescriptor { digest, size, .. } = &request.descriptor;
        let turn = Rc::new(UnpackTurn::new(&turns, format!("layer {digest}"), &effort));
        let partial = Partial::open(&kept);
        let mut blob = BlobReader::new(chunks, Rc::clone(&turn), partial);
        let _ = send_had.send(blob.replay);
        let result = receive(&mut blob, &turn, &request, &directories);
        let gave_way = gave_way.load(Ordering::Relaxed);
        blob.end(result.as_ref().err(), *size, gave_way);
        result
    })
}

/// Makes one attempt to fetch and unpack a layer. On failure, also returns how many bytes from
/// earlier attempts this attempt used.
async fn attempt(
    (source, kept): (&Source, &PartialName),
    request: &LayerRequest,
    (slot, effort): (&Arc<Slot>, &Arc<Effort>),
    watch: &Arc<RateWatch>,
    queues: &Queues,
    progress: impl Fn(u64),
) -> Result<UnpackedLayer, (u64, ImageError)> {
    let LayerDescriptor { digest, size, .. } = &request.descriptor;
    let (to_thread, chunks) = blob_queue(format!("layer {digest}"));
    let (send_had, had) = oneshot::channel();
    let unpacked = unpack_chunks(chunks, kept, request, (slot, effort), queues, send_had);
    let mut unpacked = unpacked.map_err(|error| (0, error))?;
    let had = had.await.unwrap_or(0);
    slot.begins_at(had);
    progress(had);
    let mut ended = None;
    let sent = if had == *size {
        Ok(())
    } else {
        let received = source.blob(digest, *size, had, &to_thread, watch, progress);
        tokio::select! {
            biased;
            sent = received => sent,
            // The layer is invalid or was preempted. The fetch must not wait for further bytes.
            result = &mut unpacked => {
                ended = Some(result);
                Ok(())
            }
        }
    };
    // The layer needs no more data from the registry, so another layer can use the slot.
    slot.leave();
    match &sent {
        Ok(()) => to_thread.finish(),
        Err(_) => drop(to_thread),
    }
    let unpacked = match ended {
        Some(unpacked) => unpacked,
        None => unpacked.await,
    };
    let unpacked = unpacked.unwrap_or_else(|_| Err(ended_early()));
    match (sent, unpacked) {
        (Ok(()), Ok(layer)) => Ok(layer),
        // An error on this node, for example a full disk, also stops the transfer. Report the error
        // on this node, because it caused the error of the transfer.
        (_, Err(error @ (LayerError::System { .. } | LayerError::Bound(_)))) => {
            Err((had, error.into()))
        }
        (Err(error), _) => Err((had, error)),
        (_, Err(error)) => Err((had, error.into())),
    }
}

fn stopped() -> io::Error {
    io::Error::other("the unpacking was stopped")
}

fn ended_early() -> LayerError {
    LayerError::Stream(io::Error::other(
        "the thread that unpacks the layer ended unexpectedly",
    ))
}

/// Runs blocking work on a separate thread, and returns a receiver for the result of the work. If
/// the receiver is dropped early, the result is dropped at the end of the work. Dropping the result
/// removes the unpacked layer.
fn on_a_thread(
    work: impl FnOnce() -> Result<UnpackedLayer, LayerError> + Send + 'static,
) -> Result<oneshot::Receiver<Result<UnpackedLayer, LayerError>>, ImageError> {
    let (done, unpacked) = oneshot::channel();
    std::thread::Builder::new()
        .name("layer".to_owned())
        .stack_size(512 << 10)
        .spawn(move || {
            let _ = done.send(work());
        })
        .map_err(|error| {
            ImageError::new(
                Kind::Internal,
                format!("cannot start a thread to unpack a layer: {error}"),
            )
        })?;
    Ok(unpacked)
}

/// Unpacks a layer. The thread keeps `turn` for at most its time slice, and stops soon after the
/// layer was preempted or the pull was abandoned.
fn receive(
    compressed: impl Read,
    turn: &UnpackTurn,
    request: &LayerRequest,
    directories: &LayerDirectories,
) -> Result<UnpackedLayer, LayerError> {
    let go_on = || go_on(turn);
    let made = directories.make(|into| {
        let LayerRequest {
            descriptor, bounds, ..
        } = request;
        layer::unpack(compressed, into, descriptor, bounds, &go_on).map(Some)
    });
    made?.ok_or_else(ended_early)
}

/// Waits for a turn. Fails if the layer was preempted or the pull was abandoned.
fn go_on(turn: &UnpackTurn) -> io::Result<()> {
    turn.take();
    if turn.effort().is_preempted() {
        return Err(stopped());
    }
    Ok(())
}

/// Creates an image's directory layer, if the image needs one. A directory layer sets the owner and
/// mode of directories, and is placed on top of the layers in `stack`. `stack` lists the uppermost
/// layer first. `pull_name` names the pull in the log.
///
/// For a hostile image, creating the directory layer can be as expensive as unpacking a large
/// layer. Creating the directory layer also needs several open files for each layer of the image.
/// The creation of a directory layer therefore waits in the same queues as unpacking a layer. A
/// separate thread creates the directory layer, and keeps its place until the thread ends. If the
/// pull is abandoned, the thread stops before its next step.
pub(crate) async fn make_directory_layer(
    queues: &Queues,
    stack: &[Layer],
    (pull, pull_name, origin): (u64, &str, &Origin),
) -> Result<Option<UnpackedLayer>, ImageError> {
    let layers: Vec<LowerLayer> = stack
        .iter()
        .map(|layer| LowerLayer {
            path: directory(&queues.directories.root, layer.number).join("fs"),
            unlisted: layer.unlisted,
        })
        .collect();
    let what = "set the owner and mode of directories that the image's layers do not list";
    let whole = format!("pull {pull_name}: {what}");
    let effort = Effort::new(origin.host());
    let _ended = EndOnDrop(&effort);
    loop {
        let place = queues.places.place(pull, &effort);
        granted(&place, &whole).await;
        let turn = UnpackTurn::new(&queues.turns, whole.clone(), &effort);
        let (directories, layers) = (Arc::clone(&queues.directories), layers.clone());
        let made = blocking(whole.clone(), move || {
            let _place = place;
            let go_on = || Ok(go_on(&turn)?);
            directories.make(|into| {
                let (inodes, bytes) = layer::make_directory_layer(&layers, into, go_on)?;
                Ok((inodes > 0).then(|| UnpackSummary {
                    bytes,
                    inodes,
                    ..UnpackSummary::default()
                }))
            })
        });
        match made.await {
            Err(_) if effort.is_preempted() => log_preemption(&whole),
            made => return made.map_err(|error| ImageError::from(error).context(what)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_layer_whose_kept_bytes_are_gone_is_fetched_with_a_slot() {
        let descriptor = LayerDescriptor {
            digest: "sha256:0123".to_owned(),
            size: 1 << 20,
            diff_id: "sha256:4567".to_owned(),
        };
        let root = std::path::Path::new("/no/such/directory");
        let budget = PartialBudget::new(root, 1 << 30);
        let kept = PartialName::new((root, &budget), "r", &descriptor);
        let bounds = Bounds {
            bytes: 1,
            entries: 1,
        };
        let request = LayerRequest { descriptor, bounds };
        let failed = Failed {
            request: &request,
            kept: &kept,
            had: 0,
            gained: 0,
            error: &ImageError::new(Kind::Unavailable, "no slot"),
        };
        let slot = Slots::new(1, 1).slot(1, "layer".to_owned());
        let (mut retries, effort) = (Retries::default(), Effort::default());
        assert!(!retries.follows(&failed, &slot, &effort).await);
        retries.without_slot = true;
        assert!(retries.follows(&failed, &slot, &effort).await);
        assert!(!retries.without_slot);
        effort.preempt();
        assert!(retries.follows(&failed, &slot, &effort).await);
        assert!(
            !retries.without_slot,
            "the file of the layer does not exist"
        );
    }
}
