//! Brings an image's layers to the disk and makes the image known, whether it is pulled or
//! imported.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{WeakShared, try_join_all};
use tokio::sync::watch;

use crate::catalog::{directory, directory_layer_key, key_of};
use crate::error::{ImageError, Kind};
use crate::fetch::{self, LayerRequest, Origin};
use crate::image_store::ImageStore;
use crate::layer::{self, Bounds, LayerDescriptor};
use crate::pulls_in_progress::{Caller, FetchInProgress, PullResult};
use crate::record::Image;
use crate::reference::Name;
use crate::resolved::ResolvedImage;
use crate::unpacked_layer::remove;
use rrun_calls::lock::lock;
use rrun_calls::wait::blocking;
use rrun_store::{Change, Table};

/// How often a pull's progress is logged at least.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// How often a pull's progress is looked at.
const PROGRESS_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// When a pull's progress is worth a line in the log: after ten seconds, or a tenth of the bytes.
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

    fn passed(&mut self, come: u64, now: Instant) -> bool {
        let (before, then) = self.logged;
        let tenths = |bytes: u64| bytes.saturating_mul(10) / self.total.max(1);
        let passed = tenths(come) > tenths(before) || now.duration_since(then) >= PROGRESS_INTERVAL;
        if passed {
            self.logged = (come, now);
        }
        passed
    }
}

/// Prevents the removal of layers while a pull needs them.
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
        lock(&self.store.catalog).let_go(keys);
    }
}

/// Brings an image's layers and makes it known under `names`, by tag and, where there is one, by
/// the digest of its manifest. `log_name` is its name in the log. `callers` counts the calls that
/// wait, if it can be abandoned.
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
                // The pull counts as its own caller, so that nobody can abandon it while the store
                // writes: the image would be known although the pull has failed.
                let _caller = callers.map(Caller::new);
                publish(store, image, names, digest, &configuration).await
            }
            Err(error) => Err(error),
        }
    };
    if published.is_err() {
        store.release_fetches().await?;
    }
    published
}

/// Brings every layer to the disk; returns the keys of all layers that make up the image's root.
/// `top` is the key of the layer that sets the owner and mode of directories, should the image need
/// one.
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
        ImageError::new(Kind::Internal, "a layer vanished while it was being pulled")
    })?;
    let mut unpacked = keys.to_vec();
    // An image with the same layers needed this one, and so does this image.
    if known {
        unpacked.push(top.clone());
        if recorded {
            return Ok(unpacked);
        }
    }
    let made = if known {
        None
    } else {
        let number = store.next_layer.fetch_add(1, Ordering::Relaxed);
        fetch::make_directory_layer(&store.queues, &store.root, number, &stack, log_name).await?
    };
    // The store may name only layers that are on the disk.
    if !recorded || made.is_some() {
        let root = store.root.clone();
        let what = format!("pull {log_name}: write its layers to the disk");
        blocking(what, move || layer::sync(&root)).await?;
    }
    if let Some(made) = made {
        let mut catalog = lock(&store.catalog);
        // If another pull has added the layer meanwhile, dropping `made` removes ours.
        if catalog.layer(&top).is_none() {
            catalog.add_layer(&top, made.keep());
        }
        unpacked.push(top);
    }
    Ok(unpacked)
}

/// Fetches all the layers at once, and logs the progress.
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
    let all = try_join_all(
        descriptors
            .iter()
            .zip(keys)
            .map(|(descriptor, key)| fetch_layer(store, origin, pull, descriptor, key, &progress)),
    );
    let mut all = std::pin::pin!(all);
    let mut logged = Progress::new(total);
    loop {
        tokio::select! {
            fetched = &mut all => return fetched.map(drop),
            () = tokio::time::sleep(PROGRESS_CHECK_INTERVAL) => {
                let come = progress.load(Ordering::Relaxed);
                if logged.passed(come, Instant::now()) {
                    log::info!(
                        "pull {log_name}: {} layers, {come} of at most {total} bytes have come",
                        descriptors.len(),
                    );
                }
            }
        }
    }
}

/// Brings one layer: it is here, or another pull is fetching it, or this one fetches it.
async fn fetch_layer(
    store: &Arc<ImageStore>,
    origin: &Arc<Origin>,
    pull: u64,
    descriptor: &LayerDescriptor,
    key: &str,
    progress: &Arc<AtomicU64>,
) -> Result<(), ImageError> {
    // Who joined another's fetch, with another's registry and credentials, tries it alone once
    // that has failed.
    loop {
        let (fetching, ours) = {
            // A fetch that ends adds its layer before it leaves this table.
            let mut fetches = lock(&store.fetches);
            let catalog = lock(&store.catalog);
            if catalog.layer(key).is_some() {
                return Ok(());
            }
            match fetches.get(key).and_then(WeakShared::upgrade) {
                Some(fetching) => (fetching, false),
                None => {
                    if catalog.layer(&descriptor.diff_id).is_some() {
                        log::info!(
                            "layer {}: an older version unpacked it for one image alone, so it is fetched again",
                            descriptor.digest
                        );
                    }
                    let fetching = begin_fetch(store, origin, pull, descriptor, key, progress);
                    if let Some(weak) = fetching.downgrade() {
                        fetches.insert(key.to_owned(), weak);
                    }
                    (fetching, true)
                }
            }
        };
        match fetching.await {
            Err(error) if ours => return Err(error),
            Err(error) => log::info!("{error}; tried again for another image"),
            Ok(()) => return Ok(()),
        }
    }
}

fn begin_fetch(
    store: &Arc<ImageStore>,
    origin: &Arc<Origin>,
    pull: u64,
    descriptor: &LayerDescriptor,
    key: &str,
    progress: &Arc<AtomicU64>,
) -> FetchInProgress {
    let origin = Arc::clone(origin);
    let progress = Arc::clone(progress);
    let key = key.to_owned();
    let request = LayerRequest {
        root: store.root.clone(),
        number: store.next_layer.fetch_add(1, Ordering::Relaxed),
        descriptor: descriptor.clone(),
        bounds: Bounds {
            bytes: store.settings.layer_bytes,
            entries: store.settings.layer_files,
        },
    };
    let queues = Arc::clone(&store.queues);
    let store: Weak<ImageStore> = Arc::downgrade(store);
    async move {
        let placed = directory(&request.root, request.number);
        let result = fetch::fetch(origin, request, pull, &queues, move |bytes| {
            progress.fetch_add(bytes, Ordering::Relaxed);
        })
        .await;
        if let Some(store) = store.upgrade() {
            let result = result.map(|layer| lock(&store.catalog).add_layer(&key, layer));
            lock(&store.fetches).remove(&key);
            result
        } else {
            remove(&placed);
            result.map(drop)
        }
    }
    .boxed()
    .shared()
}

async fn publish(
    store: &Arc<ImageStore>,
    image: Image,
    names: &[Name],
    digest: Option<&str>,
    configuration: &[u8],
) -> PullResult {
    // Whole, for people who inspect it; nothing here works from it.
    let whole: serde_json::Value = serde_json::from_slice(configuration).unwrap_or_default();
    let whole = Change::put(Table::CONFIGURATIONS, &image.id, &whole)?;
    let (image, before, written) = {
        let mut catalog = lock(&store.catalog);
        let before = catalog.image(&image.id).cloned();
        let (image, mut changes) = catalog.publish(image, names, digest)?;
        changes.push(whole);
        // Queued under the lock, awaited without it.
        (image, before, store.records.commit(changes))
    };
    if let Err(error) = written.await {
        // What the store does not know must not be seen.
        lock(&store.catalog).restore(&image.id, before);
        return Err(error.into());
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_by_tenths_and_every_ten_seconds() {
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
