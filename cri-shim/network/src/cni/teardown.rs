//! Ensures that each ADD is followed by a DEL when the pod ends.
//!
//! If a DEL fails, StopPodSandbox also fails, and kubelet retries StopPodSandbox. However, a
//! permanently failing plugin must not prevent the stop of a pod or the drain of a node. For this
//! reason, StopPodSandbox ignores a failed DEL after a timeout, or if the plugin's binary is
//! missing. The server then removes the pod's network namespace and the interfaces in this
//! namespace. A background task retries the DEL, because only the DEL releases the addresses and
//! rules outside the pod. The store keeps the pod's record until the DEL has succeeded, also across
//! restarts of the server.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::plugin::PluginError;
use super::{Cni, chain, leftover};
use crate::namespace;
use rrun_calls::error::{Code, Error, Result};
use rrun_calls::lock::lock;
use rrun_calls::wait::slow;
use rrun_store::{Change, Table};

/// The delay before the background task first retries a failed DEL, and the maximum delay between
/// two retries.
const RETRY_DELAY: Duration = Duration::from_secs(1);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(300);

/// Specifies whether the caller or the server retries a failed DEL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryBy {
    /// The caller of `detach` gets the error and calls `detach` again.
    Caller,
    /// The server retries the DEL in a background task, because the caller does not call `detach`
    /// again.
    Server,
}

/// The state of a pod's networks after a detach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetachOutcome {
    /// The pod's network namespace can be removed, because plugins do not need it any more.
    Done,
    /// The DEL has not succeeded yet. A background task retries the DEL, and removes the network
    /// namespace after the DEL has succeeded.
    Pending,
}

impl Cni {
    /// Runs DEL for the pod in all networks in which ADD was run. DEL gets the same configuration
    /// as ADD. The call succeeds without a DEL if the pod has no network. DEL also runs if ADD
    /// failed for some plugins, or if the pod's network namespace no longer exists.
    pub(crate) async fn detach(&self, pod: &str, retry_by: RetryBy) -> Result<DetachOutcome> {
        if retry_by == RetryBy::Server && !self.inner.started.load(Ordering::Acquire) {
            // This server process has not called [`Cni::start`] yet. The pod was therefore attached
            // by an earlier server process. [`Cni::start`] retries the DEL. No plugin is run now,
            // because a hanging plugin must not delay the server's start.
            return Ok(if self.has(pod) {
                DetachOutcome::Pending
            } else {
                DetachOutcome::Done
            });
        }
        if lock(&self.inner.attachments)
            .get(pod)
            .is_some_and(|one| one.orphan)
        {
            return Ok(DetachOutcome::Pending);
        }
        let Err(error) = self.del_all(pod).await else {
            return Ok(DetachOutcome::Done);
        };
        let sentence = error.to_string();
        if retry_by == RetryBy::Server {
            log::warn!("pod {pod}: {sentence}; the server retries the DEL");
            self.adopt(pod);
            return Ok(DetachOutcome::Pending);
        }
        let failing = match lock(&self.inner.attachments).get_mut(pod) {
            Some(one) => one.failing_since.get_or_insert_with(Instant::now).elapsed(),
            None => return Ok(DetachOutcome::Done),
        };
        if error.is_missing() || failing >= self.inner.settings.teardown_timeout() {
            log::error!(
                "pod {pod}: {sentence}; the server stops the pod without the DEL and retries the DEL. \
                 Until the DEL succeeds, addresses and rules of the pod's network remain on the node"
            );
            self.adopt(pod);
            return Ok(DetachOutcome::Done);
        }
        Err(Error::new(error.code(), sentence))
    }

    /// Starts a background task that retries the pod's DEL.
    pub(super) fn adopt(&self, pod: &str) {
        let mut attachments = lock(&self.inner.attachments);
        let Some(attachment) = attachments.get_mut(pod) else {
            return;
        };
        if !std::mem::replace(&mut attachment.orphan, true) {
            tokio::spawn(self.clone().retry_del(pod.to_owned()));
        }
    }

    async fn retry_del(self, pod: String) {
        let path = self.inner.namespaces.of(&pod);
        let begin = Instant::now();
        let mut delay = RETRY_DELAY;
        let mut logged = String::new();
        loop {
            // The waiter is created before the DEL. It therefore also gets the notification of a
            // configuration change during the DEL.
            let changed = self.inner.changed.notified();
            match self.del_all(&pod).await {
                Ok(()) => break,
                Err(error) => {
                    if error.is_missing()
                        || begin.elapsed() >= self.inner.settings.teardown_timeout()
                    {
                        // The network namespace is removed without the DEL, because the DEL may
                        // never succeed.
                        if let Err(error) = namespace::remove(&path) {
                            log::error!("pod {pod}: {error}");
                        }
                    }
                    let error = error.to_string();
                    if error != logged {
                        log::warn!("pod {pod}: {error}; the server retries the DEL");
                        logged = error;
                    }
                }
            }
            let _ = tokio::time::timeout(delay, changed).await;
            delay = (delay * 2).min(MAX_RETRY_DELAY);
        }
        match namespace::remove(&path) {
            Ok(()) => log::info!("pod {pod}: the server has removed its CNI networks"),
            Err(error) => log::error!("pod {pod}: {error}"),
        }
    }

    async fn del_all(&self, pod: &str) -> std::result::Result<(), DelFailure> {
        let inner = &self.inner;
        let plugin_lock = match lock(&inner.attachments).get(pod) {
            Some(attachment) => Arc::clone(&attachment.plugin_lock),
            None => return Ok(()),
        };
        let _plugins = slow(
            format!("pod {pod}: wait until its CNI plugins end"),
            plugin_lock.lock(),
        )
        .await;
        let inherited = match lock(&inner.attachments).get(pod) {
            Some(attachment) => attachment.inherited,
            // While this call waited for the lock, another call completed the DEL.
            None => return Ok(()),
        };
        if inherited {
            // The earlier server process started a plugin for ADD, and this plugin may still be
            // running. The server kills the plugin before the DEL, because the plugin could
            // otherwise create objects after the DEL.
            leftover::end(pod).await;
            if let Some(attachment) = lock(&inner.attachments).get_mut(pod) {
                attachment.inherited = false;
            }
        }
        let record = inner.record(pod).await.map_err(DelFailure::Store)?;
        let mut first = Ok(());
        if let Some(record) = record {
            let _gc_lock = inner.gc_lock.read().await;
            let netns = inner.pinned(pod);
            let deadline = Instant::now() + inner.settings.timeout();
            for network in record.networks.iter().rev() {
                let target = record.target(network, pod, &netns);
                let (list, result) = (&network.list, network.result.as_ref());
                let done = chain::del(&inner.directories, list, target, result, deadline).await;
                let done = done.map_err(|error| DelFailure::Plugin(list.name.clone(), error));
                first = first.and(done);
            }
        }
        first?;
        let deleted = inner
            .store
            .commit(vec![Change::delete(Table::ATTACHMENTS, pod)]);
        let deleted = deleted
            .await
            .map_err(|error| DelFailure::Store(error.into()));
        deleted?;
        lock(&inner.attachments).remove(pod);
        Ok(())
    }
}

/// The reason why a DEL has not succeeded.
#[derive(Debug, thiserror::Error)]
enum DelFailure {
    #[error("remove the pod from the CNI network {0}: {1}")]
    Plugin(String, PluginError),
    #[error("remove the pod's CNI networks: {0}")]
    Store(Error),
}

impl DelFailure {
    fn code(&self) -> Code {
        match self {
            DelFailure::Plugin(..) => Code::Internal,
            DelFailure::Store(error) => error.code(),
        }
    }

    /// Returns whether the DEL failed because a plugin's binary is missing.
    fn is_missing(&self) -> bool {
        matches!(self, DelFailure::Plugin(_, PluginError::Missing { .. }))
    }
}
