//! The condition NetworkReady for CNI. NetworkReady is true if three conditions are met: a CNI
//! configuration exists, its plugins' binaries exist, and the plugins' STATUS commands succeed.
//!
//! Kubelet requests this condition every few seconds. The server does not run STATUS for each of
//! these requests. If the last result is recent, the server returns that result. A plugin that
//! hangs delays the response to kubelet by two seconds at most.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::configuration::{ConfigurationList, Version};
use super::{Cni, chain};
use rrun_calls::lock::lock;

/// The timeout of the STATUS command of a plugin.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// The time for which the server uses a STATUS result. After this time, the server runs STATUS
/// again.
const FRESH_AGE: Duration = Duration::from_secs(5);

/// The maximum age of a STATUS result that the server still returns. The server returns such an
/// older result if a new STATUS command does not finish within [`CALLER_TIMEOUT`].
const STALE_AGE: Duration = Duration::from_secs(30);

/// The maximum time for which [`Cni::ready`] waits for the result of STATUS.
const CALLER_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(super) struct Readiness {
    last: Mutex<LastStatus>,
    answered: Notify,
}

#[derive(Default)]
struct LastStatus {
    /// The generation of the CNI configurations with which STATUS was last run.
    generation: u64,
    verdict: Option<(Instant, Result<(), String>)>,
    running_since: Option<Instant>,
}

impl LastStatus {
    /// Returns the last STATUS result. Returns `None` if the result is older than `age`, or belongs
    /// to another generation of the configurations than `generation`.
    fn verdict(&self, generation: u64, age: Duration) -> Option<Result<(), String>> {
        let (at, verdict) = self.verdict.as_ref()?;
        let counts = self.generation == generation && at.elapsed() <= age;
        counts.then(|| verdict.clone())
    }
}

impl Cni {
    /// Fails if CNI plugins can't connect pods to a network. The error is a sentence.
    pub(crate) async fn ready(&self) -> Result<(), String> {
        let lists = self.lists().await?;
        if lists.is_empty() {
            return Err(self.inner.no_configuration());
        }
        self.inner.check_binaries(&lists)?;
        if lists.iter().all(|list| list.version < Version::V1_1_0) {
            return Ok(());
        }
        let readiness = &self.inner.readiness;
        let generation = lock(&self.inner.configured).generation;
        {
            let mut last = lock(&readiness.last);
            if let Some(verdict) = last.verdict(generation, FRESH_AGE) {
                return verdict;
            }
            if last.running_since.is_none() || last.generation != generation {
                last.generation = generation;
                last.running_since = Some(Instant::now());
                tokio::spawn(self.clone().run_status(generation, lists));
            }
        }
        let answered = async {
            loop {
                // The waiter is created before `last` is checked. A result can arrive directly
                // after the check. A waiter that is created after the check would miss this
                // result's notification.
                let changed = readiness.answered.notified();
                if let Some(verdict) = lock(&readiness.last).verdict(generation, FRESH_AGE) {
                    return verdict;
                }
                changed.await;
            }
        };
        if let Ok(verdict) = timeout(CALLER_TIMEOUT, answered).await {
            return verdict;
        }
        let last = lock(&readiness.last);
        last.verdict(generation, STALE_AGE).unwrap_or_else(|| {
            let since = last
                .running_since
                .map_or(0, |since| since.elapsed().as_secs());
            Err(format!(
                "the CNI plugins have not finished STATUS after {since} s"
            ))
        })
    }

    async fn run_status(self, generation: u64, lists: Arc<Vec<ConfigurationList>>) {
        let mut verdict = Ok(());
        for list in lists.iter() {
            if let Err(error) = chain::status(&self.inner.directories, list, STATUS_TIMEOUT).await {
                verdict = Err(format!("the CNI network {}: {error}", list.name));
                break;
            }
        }
        let readiness = &self.inner.readiness;
        {
            let mut last = lock(&readiness.last);
            if last.generation == generation {
                last.verdict = Some((Instant::now(), verdict));
                last.running_since = None;
            }
        }
        readiness.answered.notify_waiters();
    }
}
