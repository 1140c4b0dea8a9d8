//! Fetches and unpacks an image's layers, and records the image. Both pulls and imports use this
//! module.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures_util::{FutureExt, StreamExt, TryStreamExt};
use serde_json::value::RawValue;
use tokio::sync::watch;

use crate::catalog::{Catalog, directory_layer_key, key_of};
use crate::documents::DocumentText;
use crate::error::{ImageError, Kind};
use crate::fetch::{self, LayerRequest, Origin};
use crate::image_store::ImageStore;
use crate::layer::{self, Bounds, LayerDescriptor, LayerError};
use crate::pulls_in_progress::{
    Caller, FetchInProgress, FetchKey, FetchState, PullResult, WeakFetch,
};
use crate::record::Image;
use crate::reference::Name;
use crate::resolved::ResolvedImage;
use crate::turns::Effort;
use crate::unpacked_layer::UnpackedLayer;
use rrun_calls::lock::lock;
use rrun_calls::wait::blocking;
use rrun_store::{Change, Table};

/// The maximum interval between two progress lines of a pull in the log.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// The interval at which a pull's progress is checked.
const PROGRESS_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Decides when a pull's progress is logged: every ten seconds, and after each tenth of the bytes.
struct Progress {
    total: u64,
    logged: (u64, Instant),
}

impl Progress {
    fn new(total: u64) -> Self {
        Progress {
            total,
            logged: (0, Instant::now()),
        }
    }

    fn passed(&mut self, received: u64, now: Instant) -> bool {
        let (before, then) = self.logged;
        let tenths = |bytes: u64| bytes.saturating_mul(10) / self.total.max(1);
        let passed =
            tenths(received) > tenths(before) || now.duration_since(then) >= PROGRESS_INTERVAL;
        if passed {
            self.logged = (received, now);
        }
        passed
    }
}

/// A guard that keeps a pull's layers from being removed during the pull.
struct LayerHold<'a> {
    store: &'a ImageStore,
    keys: Vec<String>,
}

impl<'a> LayerHold<'a> {
    fn new(store: &'a ImageStore, keys: Vec<String>) -> Self {
        lock(&store.catalog).hold(keys.iter().map(String::as_str));
        LayerHold { store, keys }
    }
}

impl Drop for LayerHold<'_> {
    fn drop(&mut self) {
        let keys = self.keys.iter().map(String::as_str);
        lock(&self.store.catalog).release_hold(keys);
    }
}

/// Fetches and unpacks an image's layers, and records the image under `names`. If `digest` (the
/// digest of the manifest) is given, the image also gets a digest reference for each name.
/// `log_name` is the image's name in the log. `callers` is the number of callers of the pull, or
/// `None` if the image is imported from an archive.
pub(crate) async fn install(
    store: &Arc<ImageStore>,
    origin: &Arc<Origin>,
    image: ResolvedImage,
    names: &[Name],
    digest: Option<&str>,
    log_name: &str,
    callers: Option<&Arc<watch::Sender<usize>>>,
) -> PullResult {
    let ResolvedImage {
        mut image,
        descriptors,
        configuration,
    } = image;
    check_count(descriptors.len(), store.settings.layers)?;
    check_configuration(&image, store.settings.configuration_bytes)?;
    check_sizes(&descriptors, store.settings.layer_bytes)?;
    let published = {
        let keys: Vec<String> = descriptors.iter().map(|p| key_of(&p.diff_id)).collect();
        let top = directory_layer_key(&keys);
        let _hold = LayerHold::new(
            store,
            [keys.as_slice(), std::slice::from_ref(&top)].concat(),
        );
        let pull = store.next_pull.fetch_add(1, Ordering::Relaxed);
        match bring_layers(store, origin, pull, &descriptors, &keys, top, log_name).await {
            Ok(unpacked) => {
                image.unpacked = unpacked;
                // If the pull were abandoned during this write, the pull would fail although the
                // image is recorded. `_caller` counts as a caller of the pull, and a pull with a
                // caller can't be abandoned.
                let _caller = callers.map(Caller::new);
                match configuration.finish() {
                    Ok(()) => publish(store, image, names, digest, configuration).await,
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    };
    if published.is_err() {
        store.release_fetches().await?;
    }
    published
}

/// Refuses an image with too many layers.
fn check_count(layers: usize, limit: usize) -> Result<(), ImageError> {
    if layers <= limit {
        return Ok(());
    }
    Err(ImageError::new(
        Kind::ResourceExhausted,
        format!("the image has {layers} layers, and the limit is {limit} layers (image.layers)"),
    ))
}

/// Refuses an image whose configuration needs too much memory.
fn check_configuration(image: &Image, limit: usize) -> Result<(), ImageError> {
    let bytes = image.config.memory();
    if bytes <= limit {
        return Ok(());
    }
    Err(ImageError::new(
        Kind::ResourceExhausted,
        format!(
            "the arguments, variables and volumes in the image's configuration need {bytes} bytes of memory, and the limit is {limit} bytes (image.configuration_bytes)"
        ),
    ))
}

/// Refuses a blob that would unpack to more than the limit. A compressed blob can be slightly
/// longer than its unpacked content, but not twice as long. A blob that is more than twice as long
/// as the limit is therefore refused.
fn check_sizes(descriptors: &[LayerDescriptor], limit: u64) -> Result<(), ImageError> {
    let Some(LayerDescriptor { digest, size, .. }) =
        descriptors.iter().find(|layer| layer.size / 2 > limit)
    else {
        return Ok(());
    };
    let error = LayerError::Bound(format!(
        "the blob has {size} bytes, but the limit for an unpacked layer is {limit} bytes"
    ));
    Err(ImageError::from(error).context(format_args!("layer {digest}")))
}

/// Fetches and unpacks every layer, and creates the image's directory layer if the image needs one.
/// Returns the keys of all layers that form the image's root file system. `top` is the key of the
/// directory layer, which sets the owner and mode of directories.
async fn bring_layers(
    store: &Arc<ImageStore>,
    origin: &Arc<Origin>,
    pull: u64,
    descriptors: &[LayerDescriptor],
    keys: &[String],
    top: String,
    log_name: &str,
) -> Result<Vec<String>, ImageError> {
    fetch_layers(store, origin, pull, descriptors, keys, log_name).await?;
    let (stack, known, recorded) = {
        let catalog = lock(&store.catalog);
        let keys = || keys.iter().map(String::as_str);
        let (stack, known) = (catalog.stack(keys()), catalog.layer(&top).is_some());
        (stack, known, catalog.all_recorded(keys()))
    };
    let stack = stack.ok_or_else(|| {
        ImageError::new(
            Kind::Internal,
            "a layer was removed while it was being pulled",
        )
    })?;
    let mut unpacked = keys.to_vec();
    // If the directory layer exists, another image with the same layers needed it, so this image
    // needs it, too.
    if known {
        unpacked.push(top.clone());
        if recorded {
            return Ok(unpacked);
        }
    }
    let made = if known {
        None
    } else {
        fetch::make_directory_layer(&store.queues, &stack, (pull, log_name, &**origin)).await?
    };
    // The layers must be on the disk before the store lists them.
    if !recorded || made.is_some() {
        let root = store.root.clone();
        let what = format!("pull {log_name}: sync the image's layers to the disk");
        blocking(what, move || layer::sync(&root)).await?;
    }
    if let Some(made) = made {
        let mut catalog = lock(&store.catalog);
        // If another pull has already added the directory layer, dropping `made` removes this
        // pull's copy.
        if catalog.layer(&top).is_none() {
            catalog.add_layer(&top, made.keep());
        }
        unpacked.push(top);
    }
    Ok(unpacked)
}

/// Fetches the layers in parallel, and logs the progress. Only as many layers as can be fetched and
/// unpacked at the same time wait in the queues. Each decision of a queue examines all waiting
/// layers, so the layers of many images could otherwise occupy a processor.
async fn fetch_layers(
    store: &Arc<ImageStore>,
    origin: &Arc<Origin>,
    pull: u64,
    descriptors: &[LayerDescriptor],
    keys: &[String],
    log_name: &str,
) -> Result<(), ImageError> {
    let total = descriptors
        .iter()
        .fold(0, |sum: u64, layer| sum.saturating_add(layer.size));
    let progress = Arc::new(AtomicU64::new(0));
    let fetches = (0..descriptors.len()).filter_map(|at| {
        let (descriptor, key) = (descriptors.get(at)?, keys.get(at)?);
        Some(fetch_layer(store, origin, pull, descriptor, key, &progress))
    });
    // Each fetch begins only when the stream polls it for the first time.
    let all = futures_util::stream::iter(fetches)
        .buffer_unordered(store.settings.layers_per_pull())
        .try_collect::<()>();
    let mut all = std::pin::pin!(all);
    let mut logged = Progress::new(total);
    loop {
        tokio::select! {
            fetched = &mut all => return fetched,
            () = tokio::time::sleep(PROGRESS_CHECK_INTERVAL) => {
                let received = progress.load(Ordering::Relaxed);
                if logged.passed(received, Instant::now()) {
                    log::info!(
                        "pull {log_name}: {} layers, {received} of at most {total} bytes received",
                        descriptors.len(),
                    );
                }
            }
        }
    }
}

/// Fetches and unpacks one layer, unless the catalog already contains the layer from the same blob.
/// If another pull is already fetching the same layer from the same registry, joins that fetch.
async fn fetch_layer(
    store: &Arc<ImageStore>,
    origin: &Arc<Origin>,
    pull: u64,
    descriptor: &LayerDescriptor,
    key: &str,
    progress: &Arc<AtomicU64>,
) -> Result<(), ImageError> {
    let key = FetchKey {
        registry: origin.registry().map(str::to_owned),
        digest: descriptor.digest.clone(),
        size: descriptor.size,
        layer: key.to_owned(),
    };
    let rate = store.settings.join_rate;
    let mut left = None;
    // A joined fetch uses the credentials and the turns of another pull. If a joined fetch fails or
    // is slow, this loop fetches the layer with this pull's credentials and turns.
    loop {
        let begin = || begin_fetch(store, origin, pull, descriptor, &key, progress);
        let fetching = match join_or_begin(store, &key, &descriptor.diff_id, left.as_ref(), begin) {
            LayerState::Unpacked => return Ok(()),
            LayerState::Begun(fetching) => return fetching.result.await,
            LayerState::Joined(fetching) => fetching,
        };
        // An image can contain a layer twice. A pull has only one fetch for such a layer.
        let rate = if fetching.state.pull == pull { 0 } else { rate };
        match fetching.join(descriptor.size, rate).await {
            Some(Ok(())) => return Ok(()),
            Some(Err(error)) => {
                log::info!("{error}; another pull needs the layer, so it fetches the layer again")
            }
            None => {
                log::info!(
                    "layer {}: the pull that fetches the layer receives less than {rate} bytes of it per second (image.join_rate) or has not unpacked any of it for a while, so another pull fetches the layer, too",
                    descriptor.digest
                );
                left = Some(fetching.state);
            }
        }
    }
}

enum LayerState {
    Unpacked,
    /// The fetch of another pull.
    Joined(FetchInProgress),
    Begun(FetchInProgress),
}

/// Looks for a layer in the catalog and in the table of fetches. Ignores the fetch `left` in the
/// table. If the layer is in neither of them, calls `begin` and adds the new fetch to the table.
fn join_or_begin(
    store: &ImageStore,
    key: &FetchKey,
    diff_id: &str,
    left: Option<&Arc<FetchState>>,
    begin: impl FnOnce() -> FetchInProgress,
) -> LayerState {
    // After success, a fetch first adds its layer to the catalog, and then removes itself from the
    // table of fetches. If a fetched layer is not in the locked table, it is therefore in the
    // catalog.
    let mut fetches = lock(&store.fetches);
    let catalog = lock(&store.catalog);
    if is_unpacked(&catalog, key) {
        return LayerState::Unpacked;
    }
    let fetching = fetches.get(key).and_then(WeakFetch::upgrade);
    let is_left =
        |fetching: &FetchInProgress| left.is_some_and(|left| Arc::ptr_eq(left, &fetching.state));
    if let Some(fetching) = fetching.filter(|fetching| !is_left(fetching)) {
        return LayerState::Joined(fetching);
    }
    if catalog.layer(diff_id).is_some() {
        log::info!(
            "layer {}: an older version of rrun-cri unpacked it for one image only, so the server fetches the layer again",
            key.digest
        );
    }
    if catalog.layer(&key.layer).is_some() {
        log::info!(
            "layer {}: the layer was unpacked from another blob, so the server fetches this blob to verify it",
            key.digest
        );
    }
    let fetching = begin();
    if let Some(weak) = fetching.downgrade() {
        fetches.insert(key.clone(), weak);
    }
    LayerState::Begun(fetching)
}

/// Returns whether the catalog contains the layer, and the layer was unpacked from the same blob.
fn is_unpacked(catalog: &Catalog, key: &FetchKey) -> bool {
    catalog.has_blob(&key.layer, &key.digest, key.size)
}

fn begin_fetch(
    store: &Arc<ImageStore>,
    origin: &Arc<Origin>,
    pull: u64,
    descriptor: &LayerDescriptor,
    key: &FetchKey,
    progress: &Arc<AtomicU64>,
) -> FetchInProgress {
    let origin = Arc::clone(origin);
    let progress = Arc::clone(progress);
    let state = Arc::new(FetchState {
        pull,
        received: AtomicU64::new(0),
        effort: Effort::new(origin.host()),
    });
    let ours = Arc::clone(&state);
    let key = key.clone();
    let request = LayerRequest {
        descriptor: descriptor.clone(),
        bounds: Bounds {
            bytes: store.settings.layer_bytes,
            entries: store.settings.layer_files,
        },
    };
    let queues = Arc::clone(&store.queues);
    let store: Weak<ImageStore> = Arc::downgrade(store);
    let result = async move {
        let pull_and_effort = (pull, &ours.effort);
        let count = |bytes| {
            progress.fetch_add(bytes, Ordering::Relaxed);
            ours.received.fetch_add(bytes, Ordering::Relaxed);
        };
        let fetched = tokio::select! {
            fetched = fetch::fetch(origin, request, pull_and_effort, &queues, count) => Some(fetched),
            () = unpacked_elsewhere(&store, &key) => None,
        };
        end_fetch(&store, &key, &ours, fetched)
    };
    FetchInProgress {
        result: result.boxed().shared(),
        state,
    }
}

/// Adds the fetched layer to the catalog, and removes the fetch from the table of fetches. `fetched`
/// is `None` if another fetch has added the layer.
fn end_fetch(
    store: &Weak<ImageStore>,
    key: &FetchKey,
    state: &Arc<FetchState>,
    fetched: Option<Result<UnpackedLayer, ImageError>>,
) -> Result<(), ImageError> {
    let Some(store) = store.upgrade() else {
        return fetched.map_or(Ok(()), |fetched| fetched.map(drop));
    };
    let result = match fetched {
        Some(fetched) => fetched.map(|layer| add(&store, key, layer)),
        None => {
            // The received bytes of a large blob are kept, although no pull may need them.
            store.sweep_partials_later();
            Ok(())
        }
    };
    let mut fetches = lock(&store.fetches);
    // A pull that does not join a slow fetch replaces the entry of this fetch.
    if fetches
        .get(key)
        .is_some_and(|entry| Arc::ptr_eq(&entry.state, state))
    {
        fetches.remove(key);
    }
    result
}

/// Waits until another fetch has added the same layer from the same blob to the catalog.
async fn unpacked_elsewhere(store: &Weak<ImageStore>, key: &FetchKey) {
    let is_here = || {
        let store = store.upgrade();
        store.is_some_and(|store| is_unpacked(&lock(&store.catalog), key))
    };
    while !is_here() {
        tokio::time::sleep(PROGRESS_CHECK_INTERVAL).await;
    }
}

/// Adds an unpacked layer to the catalog. If another fetch has already added the layer, removes this
/// copy.
fn add(store: &ImageStore, key: &FetchKey, layer: UnpackedLayer) {
    let mut catalog = lock(&store.catalog);
    catalog.add_blob(&key.layer, &key.digest, key.size);
    if catalog.layer(&key.layer).is_none() {
        catalog.add_layer(&key.layer, layer.keep());
    }
}

async fn publish(
    store: &Arc<ImageStore>,
    mut image: Image,
    names: &[Name],
    digest: Option<&str>,
    configuration: DocumentText,
) -> PullResult {
    // The complete configuration answers CRI requests that inspect the image, and contains the
    // strings of a large configuration for new containers. It is stored as text: a
    // `serde_json::Value` can need forty times as much memory.
    image.drop_large_config();
    let id = image.id.clone();
    let whole = configuration.read(move |configuration| {
        let whole: Option<&RawValue> = serde_json::from_slice(&configuration).ok();
        Change::put(Table::CONFIGURATIONS, &id, &whole)
    });
    let whole = whole.await?;
    let (image, before, written) = {
        let mut catalog = lock(&store.catalog);
        let before = catalog.image(&image.id).cloned();
        let (image, mut changes) = catalog.publish(image, names, digest)?;
        changes.push(whole);
        // Queue the changes under the catalog's lock. The store then receives all changes in the
        // same order as the catalog. Await the commit without the lock.
        (image, before, store.records.commit(changes))
    };
    if let Err(error) = written.await {
        // The image's record is not in the store, so the catalog must not contain the image either.
        lock(&store.catalog).restore(&image.id, before);
        return Err(error.into());
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::documents::DocumentBudget;
    use crate::hosts::Registries;
    use crate::images::Images;
    use crate::limits::RegistryLimits;
    use crate::settings::ImageSettings;
    use crate::source::Source;

    #[tokio::test]
    async fn only_a_few_layers_of_one_image_wait_in_the_queues()
    -> Result<(), Box<dyn std::error::Error>> {
        let root = std::env::temp_dir().join(format!("rrun-layers-{}", std::process::id()));
        std::fs::create_dir_all(&root)?;
        let store = rrun_store::Store::open(&root.join("meta.redb"))?;
        let registries = Registries::new(&root.join("certs.d"));
        let settings = ImageSettings::default();
        let most = settings.layers_per_pull();
        let limits = RegistryLimits {
            silence: settings.silence_timeout(),
            min_rate: settings.min_rate(),
            document: settings.document_timeout(),
            permissions: settings.permissions(),
        };
        // Nothing is sent to the registry before the first `await` of the test.
        let name = Name::parse("registry.invalid/app:1")?;
        let share = DocumentBudget::new(settings.document_bytes).share("registry.invalid");
        let source = Source::open(&registries, &name, None, limits, &share)?;
        let images = Images::open(&root, store, registries, settings)?;
        let layer = |number: u64| LayerDescriptor {
            digest: format!("sha256:{number:064x}"),
            size: 1,
            diff_id: format!("sha256:{number:064x}"),
        };
        let layers: Vec<_> = (0..498).map(layer).collect();
        let keys: Vec<_> = layers.iter().map(|layer| key_of(&layer.diff_id)).collect();
        let origin = Arc::new(Origin::Registry(source));
        let mut fetched = Box::pin(fetch_layers(
            &images.store,
            &origin,
            1,
            &layers,
            &keys,
            "app",
        ));
        assert!((&mut fetched).now_or_never().is_none());
        let (fetching, waiting) = images.store.queues.slots.counts();
        assert_eq!(fetching + waiting, most);
        drop(fetched);
        // A thread of the dropped fetches can still create a file during the removal.
        while let Err(error) = std::fs::remove_dir_all(&root) {
            if error.kind() != std::io::ErrorKind::DirectoryNotEmpty {
                return Err(error.into());
            }
        }
        Ok(())
    }

    #[test]
    fn progress_is_logged_after_every_tenth_of_the_bytes_and_every_ten_seconds() {
        let mut logged = Progress::new(1000);
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        assert!(!logged.passed(99, after(1)));
        assert!(logged.passed(150, after(2)));
        assert!(!logged.passed(199, after(3)));
        assert!(logged.passed(500, after(4)));
        assert!(!logged.passed(500, after(13)));
        assert!(logged.passed(500, after(14)));
        assert!(!Progress::new(0).passed(0, begin));
    }
}
