//! NetworkReady: there is a configuration, its plugins are there, and their STATUS is good.
//!
//! Kubelet asks every few seconds; plugins are asked less often, and one that hangs holds up no
//! answer.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::super::lock;
use super::configuration::{List, Version};
use super::{Cni, chain};

/// How long a plugin may take for STATUS.
const STATUS: Duration = Duration::from_secs(10);

/// How long an answer counts.
const FRESH: Duration = Duration::from_secs(5);

/// How long an old answer stands while plugins are asked again.
const STALE: Duration = Duration::from_secs(30);

/// How long who asks waits for the plugins.
const WAIT: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(super) struct Readiness {
    state: Mutex<State>,
    told: Notify,
}

#[derive(Default)]
struct State {
    /// The configuration that this is of.
    generation: u64,
    verdict: Option<(Instant, Result<(), String>)>,
    asked: Option<Instant>,
}

impl State {
    /// The verdict, if it is no older than that.
    fn verdict(&self, generation: u64, age: Duration) -> Option<Result<(), String>> {
        let (at, verdict) = self.verdict.as_ref()?;
        let counts = self.generation == generation && at.elapsed() <= age;
        counts.then(|| verdict.clone())
    }
}

impl Cni {
    /// A sentence if pods can't be given a network.
    pub async fn ready(&self) -> Result<(), String> {
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
            let mut state = lock(&readiness.state);
            if let Some(verdict) = state.verdict(generation, FRESH) {
                return verdict;
            }
            if state.asked.is_none() || state.generation != generation {
                state.generation = generation;
                state.asked = Some(Instant::now());
                tokio::spawn(self.clone().ask(generation, lists));
            }
        }
        let answered = async {
            loop {
                // Made before looking, so that an answer in between is noticed.
                let told = readiness.told.notified();
                if let Some(verdict) = lock(&readiness.state).verdict(generation, FRESH) {
                    return verdict;
                }
                told.await;
            }
        };
        if let Ok(verdict) = timeout(WAIT, answered).await {
            return verdict;
        }
        let state = lock(&readiness.state);
        state.verdict(generation, STALE).unwrap_or_else(|| {
            let since = state.asked.map_or(0, |asked| asked.elapsed().as_secs());
            Err(format!(
                "CNI plugins were asked for their STATUS {since} s ago and have not answered"
            ))
        })
    }

    async fn ask(self, generation: u64, lists: Arc<Vec<List>>) {
        let mut verdict = Ok(());
        for list in lists.iter() {
            if let Err(error) = chain::status(&self.inner.directories, list, STATUS).await {
                verdict = Err(format!("the CNI network {}: {error}", list.name));
                break;
            }
        }
        let readiness = &self.inner.readiness;
        {
            let mut state = lock(&readiness.state);
            if state.generation == generation {
                state.verdict = Some((Instant::now(), verdict));
                state.asked = None;
            }
        }
        readiness.told.notify_waiters();
    }
}
