//! Each ADD meets its DEL.
//!
//! A DEL that fails is kubelet's to repeat: StopPodSandbox fails and comes again. But a plugin that
//! is never coming back must not hold a pod, and with it a node's draining, for ever: after a
//! while, or at once where the binary is gone, the pod is let go, its namespace and the interfaces
//! in it end, and a task of its own goes on with the DEL, since addresses and rules outside may
//! depend on it. The store keeps it until it has succeeded, over restarts too.

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

/// How long the task of an orphan waits after a failure, and at most.
const RETRY_DELAY: Duration = Duration::from_secs(1);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(300);

/// Who repeats a DEL that has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryBy {
    /// The caller, who gets the error and calls again.
    Caller,
    /// The server, in a task of its own: the caller will not call again.
    Server,
}

/// What has become of a pod's networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetachOutcome {
    /// Nothing of them needs the namespace any more.
    Done,
    /// Their DEL is still to come, and the namespace's end with it.
    Pending,
}

impl Cni {
    /// DELs the pod from the networks that it was ADDed to, as they were then. Right also when it
    /// was ADDed to none, when ADD failed half-way, and when its namespace is lost.
    pub(crate) async fn detach(&self, pod: &str, retry_by: RetryBy) -> Result<DetachOutcome> {
        if retry_by == RetryBy::Server && !self.inner.started.load(Ordering::Acquire) {
            // Of an earlier life: no plugin that hangs may keep the server from its start.
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
        let Err(error) = self.take_away(pod).await else {
            return Ok(DetachOutcome::Done);
        };
        let sentence = error.to_string();
        if retry_by == RetryBy::Server {
            log::warn!("pod {pod}: {sentence}; it is tried again");
            self.adopt(pod);
            return Ok(DetachOutcome::Pending);
        }
        let failing = match lock(&self.inner.attachments).get_mut(pod) {
            Some(one) => one.failing_since.get_or_insert_with(Instant::now).elapsed(),
            None => return Ok(DetachOutcome::Done),
        };
        if error.is_missing() || failing >= self.inner.settings.teardown_timeout() {
            log::error!(
                "pod {pod}: {sentence}; it is let go without, and what its network has outside of \
                 the pod stays until the DEL succeeds, which is tried again"
            );
            self.adopt(pod);
            return Ok(DetachOutcome::Done);
        }
        Err(Error::new(error.code(), sentence))
    }

    /// Gives the pod's DEL to a task of its own.
    pub(super) fn adopt(&self, pod: &str) {
        let mut attachments = lock(&self.inner.attachments);
        let Some(attachment) = attachments.get_mut(pod) else {
            return;
        };
        if !std::mem::replace(&mut attachment.orphan, true) {
            tokio::spawn(self.clone().see_to(pod.to_owned()));
        }
    }

    async fn see_to(self, pod: String) {
        let path = self.inner.namespaces.of(&pod);
        let begin = Instant::now();
        let mut delay = RETRY_DELAY;
        let mut logged = String::new();
        loop {
            // Made before trying, so that a change meanwhile is noticed.
            let changed = self.inner.changed.notified();
            match self.take_away(&pod).await {
                Ok(()) => break,
                Err(error) => {
                    if error.is_missing()
                        || begin.elapsed() >= self.inner.settings.teardown_timeout()
                    {
                        // It is not kept for a plugin that may never come.
                        if let Err(error) = namespace::remove(&path) {
                            log::error!("pod {pod}: {error}");
                        }
                    }
                    let error = error.to_string();
                    if error != logged {
                        log::warn!("pod {pod}: {error}; it is tried again");
                        logged = error;
                    }
                }
            }
            let _ = tokio::time::timeout(delay, changed).await;
            delay = (delay * 2).min(MAX_RETRY_DELAY);
        }
        match namespace::remove(&path) {
            Ok(()) => log::info!("pod {pod}: its CNI networks are taken away"),
            Err(error) => log::error!("pod {pod}: {error}"),
        }
    }

    async fn take_away(&self, pod: &str) -> std::result::Result<(), DelFailure> {
        let inner = &self.inner;
        let plugin_lock = match lock(&inner.attachments).get(pod) {
            Some(attachment) => Arc::clone(&attachment.plugin_lock),
            None => return Ok(()),
        };
        let _plugins = slow(format!("pod {pod}: its CNI plugins"), plugin_lock.lock()).await;
        let inherited = match lock(&inner.attachments).get(pod) {
            Some(attachment) => attachment.inherited,
            // Whoever had the lock before has done it.
            None => return Ok(()),
        };
        if inherited {
            // An ADD that still runs would make anew what DEL takes away.
            leftover::end(pod).await;
            if let Some(attachment) = lock(&inner.attachments).get_mut(pod) {
                attachment.inherited = false;
            }
        }
        let record = inner.record(pod).await.map_err(DelFailure::Store)?;
        let mut first = Ok(());
        if let Some(record) = record {
            let _at_work = inner.at_work.read().await;
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
        let gone = inner
            .store
            .commit(vec![Change::delete(Table::ATTACHMENTS, pod)]);
        let gone = gone.await.map_err(|error| DelFailure::Store(error.into()));
        gone?;
        lock(&inner.attachments).remove(pod);
        Ok(())
    }
}

/// Why a DEL has not succeeded.
#[derive(Debug, thiserror::Error)]
enum DelFailure {
    #[error("take it out of the CNI network {0}: {1}")]
    Plugin(String, PluginError),
    #[error("take away its CNI networks: {0}")]
    Store(Error),
}

impl DelFailure {
    fn code(&self) -> Code {
        match self {
            DelFailure::Plugin(..) => Code::Internal,
            DelFailure::Store(error) => error.code(),
        }
    }

    /// Whether a plugin's binary is not there.
    fn is_missing(&self) -> bool {
        matches!(self, DelFailure::Plugin(_, PluginError::Missing { .. }))
    }
}
