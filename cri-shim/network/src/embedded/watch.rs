//! Restores the nftables tables whenever another program deletes or changes them. For example, some
//! firewalls delete all tables of the node (`nft flush ruleset`) when their configuration changes.
//!
//! The watch waits for an event of the kernel, and needs no processor time meanwhile. It restores
//! the tables immediately. If a program deletes the tables again and again, the watch waits longer
//! before each restoration, so that the two programs do not occupy a processor.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::state::EmbeddedState;
use crate::nftables::{Change, Watch};
use rrun_calls::wait::blocking;

/// The time after the last restoration after which the next restoration is immediate again.
const CALM: Duration = Duration::from_secs(60);
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LAST_DELAY: Duration = Duration::from_secs(30);

/// Starts the watch as a task of the async runtime, unless the watch runs already. Before the server
/// has created the tables, this function does nothing. The task ends when `state` is dropped.
pub(super) fn start(state: &Arc<EmbeddedState>) {
    if state.is_watched.load(Ordering::Relaxed) || !state.bridge().has_tables() {
        return;
    }
    if state.is_watched.swap(true, Ordering::Relaxed) {
        return;
    }
    match state.bridge().watch() {
        Ok(watch) => drop(tokio::spawn(run(watch, Arc::downgrade(state)))),
        Err(error) => log::warn!(
            "{error}; if another program deletes the nftables rules of the embedded network, the \
             server restores them only at the next request"
        ),
    }
}

/// Waits for changes by other programs. This function keeps no reference to the state while it waits,
/// so that the watch does not prevent the end of the embedded network.
async fn run(mut watch: Watch, state: Weak<EmbeddedState>) {
    let mut pace = Pace::default();
    loop {
        match watch.changed().await {
            Ok(Change::Others(generation)) => {
                let Some(state) = state.upgrade() else {
                    return;
                };
                state.bridge().pass_over(generation);
            }
            Ok(Change::Ours(program)) => restore(&state, &program, &mut pace).await,
            Err(error) => {
                log::error!(
                    "{error}; the server detects deleted nftables rules again after the next pod"
                );
                if let Some(state) = state.upgrade() {
                    state.is_watched.store(false, Ordering::Relaxed);
                }
                return;
            }
        }
    }
}

/// Restores the tables if the change by `program` made this necessary. If a restoration fails, this
/// function retries it.
async fn restore(state: &Weak<EmbeddedState>, program: &str, pace: &mut Pace) {
    loop {
        let delay = pace.delay();
        if delay >= Duration::from_secs(1) {
            log::warn!(
                "the nftables rules of the embedded network were deleted again and again, most \
                 recently by {program}; the server checks and restores them in {} s",
                delay.as_secs()
            );
        }
        tokio::time::sleep(delay).await;
        let Some(state) = state.upgrade() else {
            return;
        };
        let what = "check the nftables rules of the embedded network";
        let restored = blocking(what, move || state.bridge().restore(&*state)).await;
        pace.checked(!matches!(restored, Ok(false)));
        match restored {
            Ok(false) => return,
            Ok(true) => {
                log::warn!(
                    "{program} deleted or changed the nftables rules of the embedded network; the \
                     server has restored them"
                );
                return;
            }
            Err(error) => {
                log::error!("restore the nftables rules of the embedded network: {error}");
            }
        }
    }
}

/// The pace of the restorations.
#[derive(Default)]
struct Pace {
    last: Option<Instant>,
    /// The delay before the next restoration.
    delay: Duration,
}

impl Pace {
    fn delay(&mut self) -> Duration {
        if self.last.is_none_or(|last| last.elapsed() > CALM) {
            self.delay = Duration::ZERO;
        }
        self.delay
    }

    /// Records that the tables were checked. `was_necessary` is true if the tables had to be
    /// restored.
    fn checked(&mut self, was_necessary: bool) {
        self.last = Some(Instant::now());
        let delay = if was_necessary {
            self.delay * 2
        } else {
            self.delay
        };
        self.delay = delay.clamp(FIRST_DELAY, LAST_DELAY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_restorations_become_rarer() {
        let mut pace = Pace::default();
        assert_eq!(pace.delay(), Duration::ZERO);
        pace.checked(false);
        pace.checked(false);
        assert_eq!(pace.delay(), FIRST_DELAY);
        pace.checked(true);
        assert_eq!(pace.delay(), FIRST_DELAY * 2);
        for _ in 0..100 {
            pace.checked(true);
        }
        assert_eq!(pace.delay(), LAST_DELAY);
        pace.last = None;
        assert_eq!(pace.delay(), Duration::ZERO);
    }
}
