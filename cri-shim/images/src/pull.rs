//! A pull from its beginning to the record in the store.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared, try_join_all};
use tokio::sync::watch;

use super::auth::Auth;
use super::catalog::{directory, key_of, key_of_looks};
use super::error::{ImageError, Kind};
use super::fetch::{self, Origin, Wanted};
use super::manifest::{self, Document, Manifest};
use super::record::{Image, LayerName};
use super::reference::{Name, Target};
use super::registry::Patience;
use super::source::Source;
use super::{Inner, PullEnd, lock};
use crate::layer::{self, Bounds, Promise};
use rrun_calls::wait::blocking;
use rrun_store::{Change, Table};

/// A wait that is worth a line in the log.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a pull's progress is looked at.
const GLANCE: Duration = Duration::from_millis(500);

/// When a pull's progress is worth a line in the log: after ten seconds, or a tenth of the bytes.
struct Milestones {
    total: u64,
    told: (u64, Instant),
}

impl Milestones {
    fn new(total: u64) -> Self {
        Milestones {
            total,
            told: (0, Instant::now()),
        }
    }

    fn passed(&mut self, come: u64, now: Instant) -> bool {
        let (before, then) = self.told;
        let tenths = |bytes: u64| bytes.saturating_mul(10) / self.total.max(1);
        let passed = tenths(come) > tenths(before) || now.duration_since(then) >= PATIENCE;
        if passed {
            self.told = (come, now);
        }
        passed
    }
}

pub(crate) type Pulled = Result<Arc<Image>, ImageError>;

/// One pull that any number of callers wait for.
pub(crate) struct Pulling {
    answer: Shared<BoxFuture<'static, Pulled>>,
    /// How many callers wait.
    callers: Arc<watch::Sender<usize>>,
}

/// A caller that waits for a pull.
struct Caller(Arc<watch::Sender<usize>>);

impl Caller {
    fn new(callers: &Arc<watch::Sender<usize>>) -> Self {
        callers.send_modify(|count| *count += 1);
        Caller(Arc::clone(callers))
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

type Fetched = Shared<BoxFuture<'static, Result<(), ImageError>>>;

/// One layer's fetch; it stops when no pull wants it any more.
pub(crate) type Fetching = WeakShared<BoxFuture<'static, Result<(), ImageError>>>;

/// What makes two pulls the same: with other credentials it is another, or the first to ask
/// would vouch for the second.
pub(crate) type Key = (Name, Option<Auth>);

/// Starts a pull, or joins the one under way, and waits for it.
pub(crate) async fn join(inner: &Arc<Inner>, name: Name, auth: Option<Auth>) -> Pulled {
    let key = (name, auth);
    let (answer, _caller) = {
        let mut pulls = lock(&inner.pulls);
        let pulling = pulls
            .entry(key)
            .or_insert_with_key(|key| start(inner, key.clone()));
        (pulling.answer.clone(), Caller::new(&pulling.callers))
    };
    answer.await
}

fn start(inner: &Arc<Inner>, key: Key) -> Pulling {
    let callers = Arc::new(watch::Sender::new(0));
    let task = tokio::spawn(run(Arc::clone(inner), key, Arc::clone(&callers)));
    let answer = async move {
        task.await.unwrap_or_else(|error| {
            Err(ImageError::new(
                Kind::Internal,
                format!("the pull ended too soon: {error}"),
            ))
        })
    };
    Pulling {
        answer: answer.boxed().shared(),
        callers,
    }
}

async fn run(inner: Arc<Inner>, key: Key, callers: Arc<watch::Sender<usize>>) -> Pulled {
    let reference = key.0.canonical();
    let begun = Instant::now();
    log::info!("pull {reference}: begun");
    let pulled = tokio::select! {
        pulled = pull(&inner, &key, &callers) => Some(pulled),
        () = abandoned(&inner, &key, &callers) => None,
    };
    let result = match pulled {
        Some(pulled) => pulled,
        None => Err(clear(&inner).await),
    };
    let result = result.map_err(|error| error.context(format_args!("pull {reference}")));
    match &result {
        Ok(image) => {
            inner.observe(PullEnd::Pulled {
                bytes: image.size,
                took: begun.elapsed(),
            });
            log::info!(
                "pull {reference}: done in {:.1} s, image {}, {} bytes compressed",
                begun.elapsed().as_secs_f64(),
                image.id,
                image.size
            );
        }
        Err(error) => {
            inner.observe(PullEnd::Failed);
            log::warn!("{error}");
        }
    }
    let mut pulls = lock(&inner.pulls);
    // After an abandoned pull there may be a new one under the same key.
    if pulls
        .get(&key)
        .is_some_and(|pulling| Arc::ptr_eq(&pulling.callers, &callers))
    {
        pulls.remove(&key);
    }
    drop(pulls);
    result
}

/// Returns when no caller has waited for the pull for as long as the configuration allows. A later
/// caller starts a new pull.
async fn abandoned(inner: &Inner, key: &Key, callers: &watch::Sender<usize>) {
    let bound = inner.limits.abandoned_timeout();
    let mut count = callers.subscribe();
    // `wait_for` fails only if the sender is gone, and this function borrows it.
    while count.wait_for(|count| *count == 0).await.is_ok() {
        let back = tokio::time::timeout(bound, count.wait_for(|count| *count > 0));
        if back.await.is_ok_and(|back| back.is_ok()) {
            continue;
        }
        // Callers join under this lock, so none can join between the check and the removal.
        let mut pulls = lock(&inner.pulls);
        if *callers.borrow() == 0 {
            pulls.remove(key);
            return;
        }
    }
}

/// Removes what an abandoned pull has left, and returns the error to report.
async fn clear(inner: &Arc<Inner>) -> ImageError {
    let why = ImageError::new(
        Kind::Unavailable,
        format!(
            "nobody has waited for it for {} s (image.abandoned_seconds), so it ends; a pull within the next hour resumes its large layers",
            inner.limits.abandoned_timeout().as_secs()
        ),
    );
    inner.let_go_of_fetches().await.err().unwrap_or(why)
}

async fn pull(
    inner: &Arc<Inner>,
    (name, auth): &Key,
    callers: &Arc<watch::Sender<usize>>,
) -> Pulled {
    let reference = name.canonical();
    let origin = {
        let (configured, name, auth) = (inner.registries.clone(), name.clone(), auth.clone());
        let patience = Patience {
            silence: inner.limits.silence_timeout(),
            least: inner.limits.least(),
        };
        let opened = tokio::task::spawn_blocking(move || {
            Source::open(&configured, &name, auth.as_ref(), patience)
        });
        let source = opened.await.map_err(|error| {
            ImageError::new(Kind::Internal, format!("read the configuration: {error}"))
        })??;
        Arc::new(Origin::Registry(source))
    };
    let Origin::Registry(source) = &*origin else {
        return Err(ImageError::new(Kind::Internal, "a pull is from a registry"));
    };
    let (top, digest) =
        patiently(&reference, "its manifest", source.manifest(&name.target)).await?;
    let (document, manifest_size) = match manifest::parse(&top)? {
        Document::Image(manifest) => (manifest, top.len()),
        Document::Index(chosen) => {
            let (bytes, _) = patiently(
                &reference,
                "its manifest",
                source.manifest(&Target::Digest(chosen)),
            )
            .await?;
            match manifest::parse(&bytes)? {
                Document::Image(manifest) => (manifest, bytes.len()),
                Document::Index(_) => {
                    return Err(ImageError::new(
                        Kind::DataLoss,
                        "the index names another index",
                    ));
                }
            }
        }
    };
    let descriptor = &document.config;
    let bytes = source.document(&descriptor.digest, descriptor.size);
    let configuration = patiently(&reference, "its configuration", bytes).await?;
    let found = Found::of_manifest(&document, manifest_size as u64, configuration)?;
    let names = std::slice::from_ref(name);
    let published = bring(
        inner,
        &origin,
        found,
        names,
        Some(&digest),
        &reference,
        Some(callers),
    );
    published.await
}

/// An image of which all is known but its layers are yet to come.
pub(crate) struct Found {
    image: Image,
    promises: Vec<Promise>,
    configuration: Bytes,
}

impl Found {
    /// `manifest_size` bytes of manifest count for the image's size.
    pub(crate) fn of_manifest(
        document: &Manifest,
        manifest_size: u64,
        configuration: Bytes,
    ) -> Result<Self, ImageError> {
        let diff_ids = manifest::parse_configuration(&configuration)?.diff_ids;
        let promises = manifest::promises(document, &diff_ids)?;
        let id = document.config.digest.clone();
        Found::new(id, promises, manifest_size, configuration)
    }

    /// `id` is the digest of `configuration`.
    pub(crate) fn new(
        id: String,
        promises: Vec<Promise>,
        manifest_size: u64,
        configuration: Bytes,
    ) -> Result<Self, ImageError> {
        let parsed = manifest::parse_configuration(&configuration)?;
        let image = Image {
            id,
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            size: promises.iter().map(|layer| layer.size).fold(
                manifest_size.saturating_add(configuration.len() as u64),
                u64::saturating_add,
            ),
            config: parsed.config,
            unpacked: Vec::new(),
            layers: promises
                .iter()
                .map(|promise| LayerName {
                    diff_id: promise.diff_id.clone(),
                    digest: promise.digest.clone(),
                    size: promise.size,
                })
                .collect(),
            created: parsed.created,
            pinned: false,
        };
        Ok(Found {
            image,
            promises,
            configuration,
        })
    }
}

/// Prevents the removal of layers while a pull needs them.
struct Hold<'a> {
    inner: &'a Inner,
    keys: Vec<String>,
}

impl<'a> Hold<'a> {
    fn new(inner: &'a Inner, keys: Vec<String>) -> Self {
        lock(&inner.catalog).hold(keys.iter().map(String::as_str));
        Hold { inner, keys }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let keys = self.keys.iter().map(String::as_str);
        lock(&self.inner.catalog).let_go(keys);
    }
}

impl Inner {
    /// Removes the layers of a pull that has failed or was abandoned.
    async fn let_go_of_fetches(self: &Arc<Self>) -> Result<(), ImageError> {
        // Fetches that no pull needs have ended; the sweep removes their layers.
        lock(&self.fetches).retain(|_, fetching| fetching.upgrade().is_some());
        self.sweep_partials_later();
        self.sweep().await
    }
}

/// Brings an image's layers and makes it known under `names`, by tag and, where there is one, by
/// the digest of its manifest. `told` is its name in the log. `callers` counts the calls that wait, if
/// it can be abandoned.
pub(crate) async fn bring(
    inner: &Arc<Inner>,
    origin: &Arc<Origin>,
    found: Found,
    names: &[Name],
    digest: Option<&str>,
    told: &str,
    callers: Option<&Arc<watch::Sender<usize>>>,
) -> Pulled {
    let Found {
        mut image,
        promises,
        configuration,
    } = found;
    let published = {
        let keys: Vec<String> = promises.iter().map(|p| key_of(&p.diff_id)).collect();
        let looks = key_of_looks(&keys);
        let _hold = Hold::new(
            inner,
            [keys.as_slice(), std::slice::from_ref(&looks)].concat(),
        );
        let pull = inner.next_pull.fetch_add(1, Ordering::Relaxed);
        match bring_layers(inner, origin, pull, &promises, &keys, looks, told).await {
            Ok(unpacked) => {
                image.unpacked = unpacked;
                // The pull counts as its own caller, so that nobody can abandon it while the store
                // writes: the image would be known although the pull has failed.
                let _caller = callers.map(Caller::new);
                publish(inner, image, names, digest, &configuration).await
            }
            Err(error) => Err(error),
        }
    };
    if published.is_err() {
        inner.let_go_of_fetches().await?;
    }
    published
}

/// Brings every layer to the disk; returns the keys of all layers that make up the image's root.
async fn bring_layers(
    inner: &Arc<Inner>,
    origin: &Arc<Origin>,
    pull: u64,
    promises: &[Promise],
    keys: &[String],
    looks: String,
    told: &str,
) -> Result<Vec<String>, ImageError> {
    let total = promises
        .iter()
        .fold(0, |sum: u64, layer| sum.saturating_add(layer.size));
    let progress = Arc::new(AtomicU64::new(0));
    let all = try_join_all(
        promises
            .iter()
            .zip(keys)
            .map(|(promise, key)| bring_layer(inner, origin, pull, promise, key, &progress)),
    );
    let mut all = std::pin::pin!(all);
    let mut milestones = Milestones::new(total);
    loop {
        tokio::select! {
            fetched = &mut all => {
                fetched?;
                break;
            }
            () = tokio::time::sleep(GLANCE) => {
                let come = progress.load(Ordering::Relaxed);
                if milestones.passed(come, Instant::now()) {
                    log::info!(
                        "pull {told}: {} layers, {come} of at most {total} bytes have come",
                        promises.len(),
                    );
                }
            }
        }
    }
    let (stack, known, recorded) = {
        let catalog = lock(&inner.catalog);
        let keys = || keys.iter().map(String::as_str);
        let (stack, known) = (catalog.stack(keys()), catalog.layer(&looks).is_some());
        (stack, known, catalog.all_recorded(keys()))
    };
    let stack = stack.ok_or_else(|| {
        ImageError::new(Kind::Internal, "a layer vanished while it was being pulled")
    })?;
    let mut unpacked = keys.to_vec();
    // An image with the same layers needed this one, and so does this image.
    if known {
        unpacked.push(looks.clone());
        if recorded {
            return Ok(unpacked);
        }
    }
    let placed = if known {
        None
    } else {
        let number = inner.next_layer.fetch_add(1, Ordering::Relaxed);
        fetch::make_looks(&inner.queues, &inner.root, number, &stack, told).await?
    };
    // The store may name only layers that are on the disk.
    if !recorded || placed.is_some() {
        let root = inner.root.clone();
        let what = format!("pull {told}: write its layers to the disk");
        blocking(what, move || layer::sync(&root)).await?;
    }
    if let Some(placed) = placed {
        let mut catalog = lock(&inner.catalog);
        // If another pull has added the layer meanwhile, dropping `placed` removes ours.
        if catalog.layer(&looks).is_none() {
            catalog.add_layer(&looks, placed.keep());
        }
        unpacked.push(looks);
    }
    Ok(unpacked)
}

/// Brings one layer: it is here, or another pull is fetching it, or this one fetches it.
async fn bring_layer(
    inner: &Arc<Inner>,
    origin: &Arc<Origin>,
    pull: u64,
    promise: &Promise,
    key: &str,
    progress: &Arc<AtomicU64>,
) -> Result<(), ImageError> {
    // Who joined another's fetch, with another's registry and credentials, tries it alone once
    // that has failed.
    loop {
        let (fetching, ours) = {
            // A fetch that ends adds its layer before it leaves this table.
            let mut fetches = lock(&inner.fetches);
            let catalog = lock(&inner.catalog);
            if catalog.layer(key).is_some() {
                return Ok(());
            }
            match fetches.get(key).and_then(WeakShared::upgrade) {
                Some(fetching) => (fetching, false),
                None => {
                    if catalog.layer(&promise.diff_id).is_some() {
                        log::info!(
                            "layer {}: an older version unpacked it for one image alone, so it is fetched again",
                            promise.digest
                        );
                    }
                    let fetching = begin(inner, origin, pull, promise, key, progress);
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

fn begin(
    inner: &Arc<Inner>,
    origin: &Arc<Origin>,
    pull: u64,
    promise: &Promise,
    key: &str,
    progress: &Arc<AtomicU64>,
) -> Fetched {
    let origin = Arc::clone(origin);
    let progress = Arc::clone(progress);
    let key = key.to_owned();
    let wanted = Wanted {
        root: inner.root.clone(),
        number: inner.next_layer.fetch_add(1, Ordering::Relaxed),
        promise: promise.clone(),
        bounds: Bounds {
            bytes: inner.limits.layer_bytes,
            entries: inner.limits.layer_files,
        },
    };
    let queues = Arc::clone(&inner.queues);
    let inner: Weak<Inner> = Arc::downgrade(inner);
    async move {
        let placed = directory(&wanted.root, wanted.number);
        let result = fetch::fetch(origin, wanted, pull, &queues, move |bytes| {
            progress.fetch_add(bytes, Ordering::Relaxed);
        })
        .await;
        if let Some(inner) = inner.upgrade() {
            let result = result.map(|layer| lock(&inner.catalog).add_layer(&key, layer));
            lock(&inner.fetches).remove(&key);
            result
        } else {
            fetch::remove(&placed);
            result.map(drop)
        }
    }
    .boxed()
    .shared()
}

async fn publish(
    inner: &Arc<Inner>,
    image: Image,
    names: &[Name],
    digest: Option<&str>,
    configuration: &[u8],
) -> Pulled {
    // Whole, for people who inspect it; nothing here works from it.
    let whole: serde_json::Value = serde_json::from_slice(configuration).unwrap_or_default();
    let whole = Change::put(Table::CONFIGURATIONS, &image.id, &whole)?;
    let (image, before, written) = {
        let mut catalog = lock(&inner.catalog);
        let before = catalog.image(&image.id).cloned();
        let (image, mut changes) = catalog.publish(image, names, digest)?;
        changes.push(whole);
        // Queued under the lock, awaited without it.
        (image, before, inner.store.commit(changes))
    };
    if let Err(error) = written.await {
        // What the store does not know must not be seen.
        lock(&inner.catalog).restore(&image.id, before);
        return Err(error.into());
    }
    Ok(image)
}

/// Waits, and says so when it takes long.
async fn patiently<T>(reference: &str, what: &str, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(PATIENCE) => log::info!("pull {reference}: still waiting for {what}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_by_tenths_and_every_ten_seconds() {
        let mut milestones = Milestones::new(1000);
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        assert!(!milestones.passed(99, after(1)));
        assert!(milestones.passed(150, after(2)));
        assert!(!milestones.passed(199, after(3)));
        assert!(milestones.passed(500, after(4)));
        assert!(!milestones.passed(500, after(13)));
        assert!(milestones.passed(500, after(14)));
        assert!(!Milestones::new(0).passed(0, begin));
    }
}
