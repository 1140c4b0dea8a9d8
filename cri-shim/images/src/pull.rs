//! Performs one pull, from the request for the manifest to the image's record in the store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::watch;

use crate::auth::Auth;
use crate::documents::{DocumentShare, DocumentText};
use crate::error::{ImageError, Kind};
use crate::fetch::Origin;
use crate::image_store::{ImageStore, PullEnd};
use crate::install::install;
use crate::limits::RegistryLimits;
use crate::manifest::{self, Document, Manifest};
use crate::pulls_in_progress::{Caller, PullInProgress, PullKey, PullResult};
use crate::reference::{Name, Target};
use crate::resolved::ResolvedImage;
use crate::source::Source;
use rrun_calls::lock::lock;
use rrun_calls::wait::slow;

/// Starts a pull, or joins a pull in progress with the same name and credentials, and waits for the
/// result.
pub(crate) async fn join(store: &Arc<ImageStore>, name: Name, auth: Option<Auth>) -> PullResult {
    let key = (name, auth);
    let (answer, _caller) = {
        let mut pulls = lock(&store.pulls);
        let pulling = pulls
            .entry(key)
            .or_insert_with_key(|key| start(store, key.clone()));
        (pulling.answer.clone(), Caller::new(&pulling.callers))
    };
    answer.await
}

fn start(store: &Arc<ImageStore>, key: PullKey) -> PullInProgress {
    let callers = Arc::new(watch::Sender::new(0));
    let task = tokio::spawn(run(Arc::clone(store), key, Arc::clone(&callers)));
    let answer = async move {
        task.await.unwrap_or_else(|error| {
            Err(ImageError::new(
                Kind::Internal,
                format!("the pull's task ended unexpectedly: {error}"),
            ))
        })
    };
    PullInProgress {
        answer: answer.boxed().shared(),
        callers,
    }
}

async fn run(
    store: Arc<ImageStore>,
    key: PullKey,
    callers: Arc<watch::Sender<usize>>,
) -> PullResult {
    let reference = key.0.canonical();
    let begun = Instant::now();
    log::info!("pull {reference}: started");
    let result = pull(&store, &key, &callers).await;
    let result = result.map_err(|error| error.context(format_args!("pull {reference}")));
    match &result {
        Ok(image) => {
            store.observe(PullEnd::Pulled {
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
            store.observe(PullEnd::Failed);
            log::warn!("{error}");
        }
    }
    let mut pulls = lock(&store.pulls);
    // If this pull was abandoned, the entry with this key can belong to a new pull. The entry of a
    // new pull must remain in the table.
    if pulls
        .get(&key)
        .is_some_and(|pulling| Arc::ptr_eq(&pulling.callers, &callers))
    {
        pulls.remove(&key);
    }
    drop(pulls);
    result
}

/// Waits until the pull has no caller for the time `timeout`. Then removes the pull from the table of
/// pulls. A later caller starts a new pull.
async fn abandoned(
    store: &ImageStore,
    key: &PullKey,
    callers: &watch::Sender<usize>,
    timeout: Duration,
) {
    let mut count = callers.subscribe();
    // `wait_for` fails only if the sender is dropped. The sender can't be dropped here, because
    // this function borrows it.
    while count.wait_for(|count| *count == 0).await.is_ok() {
        let back = tokio::time::timeout(timeout, count.wait_for(|count| *count > 0));
        if back.await.is_ok_and(|back| back.is_ok()) {
            continue;
        }
        // Callers join a pull under this lock. No caller can therefore join between the check of
        // `callers` and the removal of the pull.
        let mut pulls = lock(&store.pulls);
        if *callers.borrow() == 0 {
            pulls.remove(key);
            return;
        }
    }
}

/// The reason why a pull is stopped.
enum Stop {
    Abandoned,
    /// The documents of other pulls need the memory.
    Memory(ImageError),
}

/// Performs `work` until it ends or the pull is stopped. The pull is stopped if it has no caller for
/// the time `timeout`, or if its documents must give up their memory.
async fn unless_stopped<T>(
    work: impl Future<Output = T>,
    (store, key, callers): (&ImageStore, &PullKey, &watch::Sender<usize>),
    timeout: Duration,
    documents: &DocumentShare,
) -> Result<T, Stop> {
    tokio::select! {
        done = work => Ok(done),
        () = abandoned(store, key, callers, timeout) => Err(Stop::Abandoned),
        error = documents.stopped() => Err(Stop::Memory(error)),
    }
}

async fn pull(
    store: &Arc<ImageStore>,
    key: &PullKey,
    callers: &Arc<watch::Sender<usize>>,
) -> PullResult {
    let (name, auth) = key;
    let reference = name.canonical();
    let documents = store.documents.share(&name.registry);
    let of_pull = (&**store, key, &**callers);
    let resolving = async {
        let source = open_source(store, name, auth, &documents).await?;
        let (digest, image) = resolve(&source, name, &reference).await?;
        Ok::<_, ImageError>((source, digest, image))
    };
    // Until the image's layers are known, the pull has nothing that a retry must not fetch again.
    // Without a caller, it therefore ends immediately.
    let resolved = unless_stopped(resolving, of_pull, Duration::ZERO, &documents).await;
    let (source, digest, image) = resolved.map_err(|stop| match stop {
        Stop::Abandoned => ImageError::new(
            Kind::Unavailable,
            "no caller waits for this pull, and the image's manifest and configuration have not arrived, so it was stopped",
        ),
        Stop::Memory(error) => error,
    })??;
    let origin = Arc::new(Origin::Registry(source));
    let installing = install(
        store,
        &origin,
        image,
        std::slice::from_ref(name),
        Some(&digest),
        &reference,
        Some(callers),
    );
    let timeout = store.settings.abandoned_timeout();
    match unless_stopped(installing, of_pull, timeout, &documents).await {
        Ok(published) => published,
        Err(stop) => Err(clear(store, stop).await),
    }
}

/// Removes the layers of a stopped pull, and returns the error with which the pull fails.
async fn clear(store: &Arc<ImageStore>, stop: Stop) -> ImageError {
    let why = match stop {
        Stop::Abandoned => ImageError::new(
            Kind::Unavailable,
            format!(
                "no caller has waited for this pull for {} s (image.abandoned_seconds), so it was stopped; a new pull within the next hour resumes the download of its large layers",
                store.settings.abandoned_timeout().as_secs()
            ),
        ),
        Stop::Memory(error) => error,
    };
    store.release_fetches().await.err().unwrap_or(why)
}

async fn open_source(
    store: &ImageStore,
    name: &Name,
    auth: &Option<Auth>,
    documents: &Arc<DocumentShare>,
) -> Result<Source, ImageError> {
    let (registries, name, auth) = (store.registries.clone(), name.clone(), auth.clone());
    let limits = RegistryLimits {
        silence: store.settings.silence_timeout(),
        min_rate: store.settings.min_rate(),
        document: store.settings.document_timeout(),
        permissions: store.settings.permissions(),
    };
    let documents = Arc::clone(documents);
    let opened = tokio::task::spawn_blocking(move || {
        Source::open(&registries, &name, auth.as_ref(), limits, &documents)
    });
    opened.await.map_err(|error| {
        ImageError::new(
            Kind::Internal,
            format!("the task that reads the registry configuration failed: {error}"),
        )
    })?
}

/// Fetches an image's manifest and configuration. Returns the image, and the digest of the manifest
/// or index that `name` refers to.
async fn resolve(
    source: &Source,
    name: &Name,
    reference: &str,
) -> Result<(String, ResolvedImage), ImageError> {
    let (top, digest) = manifest_of(source, &name.target, reference).await?;
    // The text of a document is dropped when the document is parsed.
    let (document, manifest_size) = match top.read(parse).await? {
        (Document::Image(manifest), size) => (manifest, size),
        (Document::Index(chosen), _) => {
            chosen_manifest(source, Target::Digest(chosen), reference).await?
        }
    };
    let descriptor = &document.config;
    let bytes = source.document(&descriptor.digest, descriptor.size);
    let configuration = slow(
        format!("pull {reference}: fetch the image's configuration"),
        bytes,
    )
    .await?;
    let image = configuration.read(move |configuration| {
        ResolvedImage::of_manifest(&document, manifest_size, configuration)
    });
    Ok((digest, image.await?))
}

/// Parses a manifest or an index. Also returns its size in bytes.
fn parse(text: DocumentText) -> Result<(Document, u64), ImageError> {
    Ok((manifest::parse(&text)?, text.len() as u64))
}

async fn manifest_of(
    source: &Source,
    target: &Target,
    reference: &str,
) -> Result<(DocumentText, String), ImageError> {
    let what = format!("pull {reference}: fetch the image's manifest");
    slow(what, source.manifest(target)).await
}

/// Fetches the manifest that an index lists for this machine. Returns the manifest and its size in
/// bytes.
async fn chosen_manifest(
    source: &Source,
    chosen: Target,
    reference: &str,
) -> Result<(Manifest, u64), ImageError> {
    let (bytes, _) = manifest_of(source, &chosen, reference).await?;
    match bytes.read(parse).await? {
        (Document::Image(manifest), size) => Ok((manifest, size)),
        (Document::Index(_), _) => Err(ImageError::new(
            Kind::DataLoss,
            "the index refers to another index",
        )),
    }
}
