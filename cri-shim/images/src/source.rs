//! Requests an image from the endpoints of its registry. The endpoints are tried one after the
//! other, in several rounds.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::auth::Auth;
use crate::blob_reader::BlobSender;
use crate::documents::{DOCUMENT_BYTES, DocumentShare, DocumentText};
use crate::error::{ImageError, Kind};
use crate::failure::RequestFailure;
use crate::hosts::Registries;
use crate::layer::digest_of;
use crate::limits::RegistryLimits;
use crate::pace::RateWatch;
use crate::reference::{Name, Target};
use crate::registry::Registry;
use crate::registry::answer::Blob;

/// The pauses before the second and each later round of requests to all endpoints.
const ROUND_DELAYS: [Duration; 3] = [
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(3),
];

/// The maximum number of broken connections for one blob. After one more broken connection, the
/// fetch of the blob fails.
const MAX_RESUMES: usize = 20;

/// The endpoints from which one pull gets its image.
pub(crate) struct Source {
    /// The name of the registry.
    name: String,
    registries: Vec<Arc<Registry>>,
}

impl Source {
    /// Prepares the endpoints of the image's registry. Credentials without a server name are sent
    /// to every endpoint that requests credentials, as in containerd. The operator configured the
    /// endpoints for this registry, so all these endpoints are trusted. Reading the configuration
    /// and the certificates blocks on disk I/O.
    pub(crate) fn open(
        configured: &Registries,
        name: &Name,
        auth: Option<&Auth>,
        limits: RegistryLimits,
        documents: &Arc<DocumentShare>,
    ) -> Result<Self, ImageError> {
        let registries = configured
            .endpoints(&name.registry)?
            .into_iter()
            .map(|endpoint| {
                let auth = auth.filter(|auth| auth.is_for(&endpoint.host, &name.registry));
                let credential = auth.map(|auth| auth.credential.clone());
                Registry::new(
                    endpoint,
                    &name.registry,
                    &name.repository,
                    credential,
                    limits,
                    Arc::clone(documents),
                )
                .map(Arc::new)
            })
            .collect::<Result<_, _>>()?;
        Ok(Source {
            name: name.registry.clone(),
            registries,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the host that probably provides a layer if the first usable endpoint is used.
    pub(crate) fn first_host(&self) -> Option<String> {
        let mut able = self.registries.iter().filter(|r| r.endpoint().pull);
        able.find(|registry| registry.slowness().is_none())
            .map(|registry| registry.layers_come_from())
    }

    /// Fetches the manifest or index that a tag or digest names. Returns the document and its
    /// digest.
    pub(crate) async fn manifest(
        &self,
        target: &Target,
    ) -> Result<(DocumentText, String), ImageError> {
        let (expected, resolve) = match target {
            Target::Tag(tag) => (tag, true),
            Target::Digest(digest) => (digest, false),
        };
        self.round(resolve, |registry| {
            let expected = expected.clone();
            async move {
                let body = registry.manifest(&expected, DOCUMENT_BYTES).await?;
                let (body, digest) = body.read(with_digest).await;
                if !resolve && digest != expected {
                    return Err(mismatch(&registry, "the manifest", &expected, &digest));
                }
                Ok((body, digest))
            }
            .boxed()
        })
        .await
    }

    /// Fetches a small blob and verifies its digest.
    pub(crate) async fn document(
        &self,
        expected: &str,
        size: u64,
    ) -> Result<DocumentText, ImageError> {
        if size > DOCUMENT_BYTES {
            return Err(ImageError::new(
                Kind::DataLoss,
                format!(
                    "the image's configuration has {size} bytes according to the manifest, and the limit is {DOCUMENT_BYTES} bytes"
                ),
            ));
        }
        self.round(false, |registry| {
            let expected = expected.to_owned();
            async move {
                let body = registry.document(&expected, size).await?;
                let (body, digest) = body.read(with_digest).await;
                if digest != expected {
                    return Err(mismatch(
                        &registry,
                        "the image's configuration",
                        &expected,
                        &digest,
                    ));
                }
                Ok(body)
            }
            .boxed()
        })
        .await
    }

    /// Fetches a blob from `offset` to its end, from any endpoint that has the blob. Sends all
    /// bytes to `to`, in the right order and each byte once. If the connection breaks, continues
    /// over a new connection. If the fetch has lost its slot to another pull, returns an error
    /// instead (see [`RateWatch::gave_way`]). Calls `progress` with the size of each chunk that
    /// arrives.
    pub(crate) async fn blob(
        &self,
        digest: &str,
        size: u64,
        mut offset: u64,
        to: &BlobSender,
        watch: &Arc<RateWatch>,
        progress: impl Fn(u64),
    ) -> Result<(), ImageError> {
        for broken in 0.. {
            let begun = offset;
            let rest = self
                .blob_from(digest, size, offset, to, watch, &progress)
                .await;
            let Err((error, reached)) = rest else {
                return Ok(());
            };
            offset = reached;
            if broken >= MAX_RESUMES || offset == begun || watch.gave_way() {
                return Err(error);
            }
            log::info!("{error}; the fetch continues at byte {offset}");
        }
        Ok(())
    }

    /// Fetches a blob from `offset` to its end over one connection. On failure, also returns the
    /// offset that the fetch reached.
    async fn blob_from(
        &self,
        digest: &str,
        size: u64,
        offset: u64,
        to: &BlobSender,
        watch: &Arc<RateWatch>,
        progress: &impl Fn(u64),
    ) -> Result<(), (ImageError, u64)> {
        let connected = self.connect_blob(digest, offset, watch).await;
        let (mut blob, registry) = connected.map_err(|error| (error, offset))?;
        let mut at = offset;
        // A registry without support for range requests sends the blob from its beginning. In this
        // case, the bytes before `offset` are skipped.
        let mut skip = offset.saturating_sub(blob.begins);
        loop {
            let mut chunk = match blob.chunk().await {
                Ok(Some(chunk)) => chunk,
                // An answer without a Content-Length looks complete even if it broke off. The
                // number of received bytes is therefore compared with the blob's size.
                Ok(None) if at < size => {
                    let error = ImageError::new(
                        Kind::DataLoss,
                        format!("the answer ended after {at} of {size} bytes"),
                    );
                    return Err((error, at));
                }
                Ok(None) => return Ok(()),
                Err(failure) => {
                    if failure.slow {
                        registry.is_too_slow(&failure.error);
                    }
                    return Err((failure.error, at));
                }
            };
            let skipped = skip.min(chunk.len() as u64);
            skip -= skipped;
            let _ = chunk.split_to(usize::try_from(skipped).unwrap_or(chunk.len()));
            if chunk.is_empty() {
                continue;
            }
            let length = chunk.len() as u64;
            progress(length);
            // If the layer is invalid, the thread that unpacks the layer drops the receiver and
            // reports the reason itself.
            let sent = watch.pass_on(to, chunk).await;
            if !sent.map_err(|failure| (failure.error, at))? {
                return Ok(());
            }
            at += length;
        }
    }

    /// Requests the bytes of a blob from `offset` to its end. Returns the answer, and the endpoint
    /// that sent the answer.
    async fn connect_blob(
        &self,
        digest: &str,
        offset: u64,
        watch: &Arc<RateWatch>,
    ) -> Result<(Blob, Arc<Registry>), ImageError> {
        self.round(false, |registry| {
            let (digest, watch) = (digest.to_owned(), Arc::clone(watch));
            async move {
                // A fetch that has lost its slot must not use another endpoint.
                if watch.gave_way() {
                    let why = "the layer's download slot was given to another image";
                    return Err(ImageError::new(Kind::Unavailable, why).into());
                }
                let blob = registry.blob(&digest, offset, watch).await?;
                Ok((blob, registry))
            }
            .boxed()
        })
        .await
    }

    /// Calls `ask` for one endpoint after the other until a call succeeds. One call for each
    /// endpoint is a round. If all calls of a round fail and at least one failure can be temporary,
    /// repeats the round after a pause. Skips endpoints that were too slow earlier in this pull.
    async fn round<T>(
        &self,
        resolve: bool,
        ask: impl Fn(Arc<Registry>) -> BoxFuture<'static, Result<T, RequestFailure>>,
    ) -> Result<T, ImageError> {
        let mut pauses = ROUND_DELAYS.iter();
        loop {
            let mut retry = false;
            let mut wait = Duration::ZERO;
            let mut last: Option<ImageError> = None;
            for registry in &self.registries {
                let endpoint = registry.endpoint();
                if !(if resolve {
                    endpoint.resolve
                } else {
                    endpoint.pull
                }) {
                    continue;
                }
                let answer = match registry.slowness() {
                    Some(error) => Err(error.into()),
                    None => ask(Arc::clone(registry)).await,
                };
                match answer {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => {
                        log::debug!("{}", failure.error);
                        if failure.slow {
                            registry.is_too_slow(&failure.error);
                        }
                        retry |= failure.retry;
                        wait = wait.max(failure.wait.unwrap_or_default());
                        // If all endpoints fail, the error of the last endpoint is reported. But a
                        // "not found" error does not replace an earlier error of another kind. A
                        // mirror need not have the image, so its "not found" error is less useful.
                        let outweighs = last.as_ref().is_none_or(|last| {
                            last.kind() == Kind::NotFound || failure.error.kind() != Kind::NotFound
                        });
                        if outweighs {
                            last = Some(failure.error);
                        }
                    }
                }
            }
            let error = last.unwrap_or_else(|| {
                ImageError::new(
                    Kind::InvalidArgument,
                    "hosts.toml lists no host with the required capability",
                )
            });
            match pauses.next() {
                Some(pause) if retry => tokio::time::sleep(wait.max(*pause)).await,
                _ => return Err(error),
            }
        }
    }
}

fn with_digest(document: DocumentText) -> (DocumentText, String) {
    let digest = digest_of(&document);
    (document, digest)
}

fn mismatch(registry: &Registry, what: &str, expected: &str, actual: &str) -> RequestFailure {
    ImageError::new(
        Kind::DataLoss,
        format!(
            "registry {}: {what} has the digest {actual}, not {expected}",
            registry.endpoint().host
        ),
    )
    .into()
}
