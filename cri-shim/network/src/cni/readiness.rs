//! NetworkReady: there is a configuration, its plugins are there, and their STATUS is good.
//!
//! Kubelet asks every few seconds; plugins are asked less often, and one that hangs holds up no
//! answer.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::configuration::{ConfigurationList, Version};
use super::{Cni, chain};
use rrun_calls::lock::lock;

/// How long a plugin may take for STATUS.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an answer counts.
const FRESH_AGE: Duration = Duration::from_secs(5);

/// How long an old answer stands while plugins are asked again.
const STALE_AGE: Duration = Duration::from_secs(30);

/// How long a caller waits for the plugins.
const CALLER_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(super) struct Readiness {
    last: Mutex<LastStatus>,
    answered: Notify,
}

#[derive(Default)]
struct LastStatus {
    /// The configuration that this is of.
    generation: u64,
    verdict: Option<(Instant, Result<(), String>)>,
    asking_since: Option<Instant>,
}

impl LastStatus {
    /// The verdict, if it is no older than that.
    fn verdict(&self, generation: u64, age: Duration) -> Option<Result<(), String>> {
        let (at, verdict) = self.verdict.as_ref()?;
        let counts = self.generation == generation && at.elapsed() <= age;
        counts.then(|| verdict.clone())
    }
}

impl Cni {
    /// A sentence if pods can't be given a network.
    pub(crate) async fn ready(&self) -> Result<(), String> {
        let lists = self.lists().await?;
        if lists.is_empty() {
            return Err(self.inner.none());
        }
        self.inner.all_there(&lists)?;
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
            if last.asking_since.is_none() || last.generation != generation {
                last.generation = generation;
                last.asking_since = Some(Instant::now());
                tokio::spawn(self.clone().ask(generation, lists));
            }
        }
        let answered = async {
            loop {
                // Made before looking, so that an answer in between is noticed.
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
                .asking_since
                .map_or(0, |since| since.elapsed().as_secs());
            Err(format!(
                "CNI plugins were asked for their STATUS {since} s ago and have not answered"
            ))
        })
    }

    async fn ask(self, generation: u64, lists: Arc<Vec<ConfigurationList>>) {
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
                last.asking_since = None;
            }
        }
        readiness.answered.notify_waiters();
    }
}
