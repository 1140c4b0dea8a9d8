//! All the endpoints that may have an image, asked in their order, again and again for a while.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use crate::auth::Auth;
use crate::error::{ImageError, Kind};
use crate::failure::RequestFailure;
use crate::hosts::Registries;
use crate::layer::digest_of;
use crate::limits::RegistryLimits;
use crate::manifest::DOCUMENT_BYTES;
use crate::pace::RateWatch;
use crate::reference::{Name, Target};
use crate::registry::{Blob, Registry};

/// Pauses before the second and each later round over all endpoints.
const ROUND_DELAYS: [Duration; 3] = [
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(3),
];

/// How often a blob may break off altogether.
const MAX_RESUMES: usize = 20;

/// Where one pull gets its image from.
pub(crate) struct Source {
    registries: Vec<Arc<Registry>>,
}

impl Source {
    /// Credentials that name no server are shown to every endpoint that asks for them, as
    /// containerd does it: a mirror is where the operator says the registry is. Blocks on the disk:
    /// configuration and certificates.
    pub(crate) fn open(
        configured: &Registries,
        name: &Name,
        auth: Option<&Auth>,
        limits: RegistryLimits,
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
                )
                .map(Arc::new)
            })
            .collect::<Result<_, _>>()?;
        Ok(Source { registries })
    }

    /// The host that a layer is expected to come from: that of the first endpoint in use.
    pub(crate) fn first_host(&self) -> Option<String> {
        let mut able = self.registries.iter().filter(|r| r.endpoint().pull);
        able.find(|registry| registry.slowness().is_none())
            .map(|registry| registry.layers_come_from())
    }

    /// The manifest or index that a tag or digest names, with its digest.
    pub(crate) async fn manifest(&self, target: &Target) -> Result<(Bytes, String), ImageError> {
        let (wanted, resolve) = match target {
            Target::Tag(tag) => (tag, true),
            Target::Digest(digest) => (digest, false),
        };
        self.round(resolve, |registry| {
            let wanted = wanted.clone();
            async move {
                let body = registry.manifest(&wanted, DOCUMENT_BYTES).await?;
                let digest = digest_of(&body);
                if !resolve && digest != wanted {
                    return Err(mismatch(&registry, "the manifest", &wanted, &digest));
                }
                Ok((body, digest))
            }
            .boxed()
        })
        .await
    }

    /// A small blob, verified.
    pub(crate) async fn document(&self, wanted: &str, size: u64) -> Result<Bytes, ImageError> {
        if size > DOCUMENT_BYTES {
            return Err(ImageError::new(
                Kind::DataLoss,
                format!(
                    "the image's configuration is to have {size} bytes, of which {DOCUMENT_BYTES} are the most that is read"
                ),
            ));
        }
        self.round(false, |registry| {
            let wanted = wanted.to_owned();
            async move {
                let body = registry.document(&wanted, size).await?;
                let digest = digest_of(&body);
                if digest != wanted {
                    return Err(mismatch(
                        &registry,
                        "the image's configuration",
                        &wanted,
                        &digest,
                    ));
                }
                Ok(body)
            }
            .boxed()
        })
        .await
    }

    /// Sends a blob's bytes from `offset` on to `to`, each once and in order, from wherever they
    /// can be had. Goes on where a connection broke off, unless the slot of `watch` has been given
    /// away. Calls `progress` with the number of bytes that arrived.
    pub(crate) async fn blob(
        &self,
        digest: &str,
        size: u64,
        mut offset: u64,
        to: &mpsc::Sender<Bytes>,
        watch: &Arc<RateWatch>,
        progress: impl Fn(u64),
    ) -> Result<(), ImageError> {
        for broken in 0.. {
            let begun = offset;
            let rest = self
                .blob_from(digest, size, offset, to, watch, &progress)
                .await;
            let Err((error, came)) = rest else {
                return Ok(());
            };
            offset = came;
            if broken >= MAX_RESUMES || offset == begun || watch.gave_way() {
                return Err(error);
            }
            log::info!("{error}; goes on at byte {offset}");
        }
        Ok(())
    }

    /// One round of connections for the rest of a blob; on failure tells how far it came.
    async fn blob_from(
        &self,
        digest: &str,
        size: u64,
        offset: u64,
        to: &mpsc::Sender<Bytes>,
        watch: &Arc<RateWatch>,
        progress: &impl Fn(u64),
    ) -> Result<(), (ImageError, u64)> {
        let connected = self.connect_blob(digest, offset, watch).await;
        let (mut blob, registry) = connected.map_err(|error| (error, offset))?;
        let mut at = offset;
        // A registry without ranges begins anew.
        let mut skip = offset.saturating_sub(blob.begins);
        loop {
            let mut chunk = match blob.chunk().await {
                Ok(Some(chunk)) => chunk,
                // An answer without a length just ends when it breaks off.
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
            at += chunk.len() as u64;
            progress(chunk.len() as u64);
            // The receiver has gone when the layer proved bad: it knows why.
            if to.send(chunk).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Asks for a blob from `offset` on; returns with it the registry that answers.
    async fn connect_blob(
        &self,
        digest: &str,
        offset: u64,
        watch: &Arc<RateWatch>,
    ) -> Result<(Blob, Arc<Registry>), ImageError> {
        self.round(false, |registry| {
            let (digest, watch) = (digest.to_owned(), Arc::clone(watch));
            async move {
                // Without its slot the fetch must not use another endpoint.
                if watch.gave_way() {
                    let why = "another image has its turn";
                    return Err(ImageError::new(Kind::Unavailable, why).into());
                }
                let blob = registry.blob(&digest, offset, watch).await?;
                Ok((blob, registry))
            }
            .boxed()
        })
        .await
    }

    /// Asks each endpoint in turn, and all of them again after a pause as long as one of them
    /// failed in a way that may pass. An endpoint that has proved too slow is skipped.
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
                        // What the registry itself says outweighs a mirror that lacks the image.
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
                    "hosts.toml names no host with the capability that is needed",
                )
            });
            match pauses.next() {
                Some(pause) if retry => tokio::time::sleep(wait.max(*pause)).await,
                _ => return Err(error),
            }
        }
    }
}

fn mismatch(registry: &Registry, what: &str, wanted: &str, came: &str) -> RequestFailure {
    ImageError::new(
        Kind::DataLoss,
        format!(
            "registry {}: {what} has the digest {came}, not {wanted}",
            registry.endpoint().host
        ),
    )
    .into()
}
