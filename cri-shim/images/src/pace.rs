//! Measures how fast a registry's answer arrives.
//!
//! Only time spent waiting for the network counts. A slow disk, or a wait for a turn to unpack, is
//! not the registry's fault.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{ImageError, Kind};
use crate::failure::RequestFailure;
use crate::limits::MinRate;
use crate::slots::Slot;
use rrun_calls::lock::lock;

/// How often a wait is checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// An answer stands still if fewer than [`STALL_BYTES`] arrive within this time.
const STALL_TIME: Duration = Duration::from_secs(10);
const STALL_BYTES: u64 = 512;

/// The same before the first byte, since a slow line makes DNS, TCP and TLS slow as well.
const HEAD_STALL_TIME: Duration = Duration::from_secs(20);

/// Watches the answers that bring one layer or document.
pub(crate) struct RateWatch {
    min_rate: MinRate,
    /// The slot of a layer; documents are small and need none.
    slot: Option<Arc<Slot>>,
    pace: Mutex<Pace>,
}

#[derive(Default)]
struct Pace {
    /// Since the rate was last checked and sufficient.
    waited: Duration,
    came: u64,
    /// Since `still` was last set.
    lately_waited: Duration,
    lately_came: u64,
    still: bool,
    checked: Option<Instant>,
}

/// The purpose of a wait.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// A connection and the head of an answer; reqwest limits the time for both together.
    Head,
    Body,
}

impl RateWatch {
    pub(crate) fn new(min_rate: MinRate, slot: Option<Arc<Slot>>) -> Self {
        RateWatch {
            min_rate,
            slot,
            pace: Mutex::default(),
        }
    }

    /// Waits for `work`, which waits for the network. Fails if the answer is too slow, or if the
    /// slot goes to another layer meanwhile.
    pub(crate) async fn wait<T>(
        &self,
        phase: Phase,
        work: impl Future<Output = T>,
    ) -> Result<T, RequestFailure> {
        let mut work = pin!(work);
        loop {
            let begun = Instant::now();
            let done = tokio::select! {
                biased;
                done = &mut work => Some(done),
                () = tokio::time::sleep(CHECK_INTERVAL) => None,
            };
            self.add(phase, begun.elapsed(), 0);
            match done {
                Some(done) => return Ok(done),
                None => self.check(phase)?,
            }
        }
    }

    /// Counts bytes of an answer that have arrived.
    pub(crate) fn came(&self, bytes: u64) -> Result<(), RequestFailure> {
        if let Some(slot) = &self.slot {
            slot.came(bytes);
        }
        self.add(Phase::Body, Duration::ZERO, bytes);
        self.check(Phase::Body)
    }

    /// Notes that the answer comes from `host`. Fails if too many layers come from there already.
    pub(crate) fn comes_from(&self, host: &str) -> Result<(), RequestFailure> {
        match &self.slot {
            Some(slot) if !slot.moves_to(host) => {
                let why =
                    format!("it comes from {host}, and no further layer may come from there now");
                Err(ImageError::new(Kind::Unavailable, why).into())
            }
            _ => Ok(()),
        }
    }

    /// Whether the slot went to another layer. The rest is then fetched in the next turn.
    pub(crate) fn gave_way(&self) -> bool {
        self.slot.as_ref().is_some_and(|slot| slot.gave_way())
    }

    fn add(&self, phase: Phase, waited: Duration, came: u64) {
        let mut pace = lock(&self.pace);
        if phase == Phase::Body {
            pace.waited += waited;
        }
        pace.lately_waited += waited;
        pace.came += came;
        pace.lately_came += came;
    }

    fn check(&self, phase: Phase) -> Result<(), RequestFailure> {
        let still = {
            let mut pace = lock(&self.pace);
            let MinRate { rate, over } = self.min_rate;
            if rate > 0 && pace.waited >= over {
                let seconds = pace.waited.as_secs();
                if pace.came < rate.saturating_mul(seconds) {
                    return Err(too_slow(pace.came, seconds, rate));
                }
                (pace.waited, pace.came) = (Duration::ZERO, 0);
            }
            let stall_time = match phase {
                Phase::Head => HEAD_STALL_TIME,
                Phase::Body => STALL_TIME,
            };
            if pace.lately_came >= STALL_BYTES || pace.lately_waited >= stall_time {
                pace.still = pace.lately_came < STALL_BYTES;
                (pace.lately_waited, pace.lately_came) = (Duration::ZERO, 0);
            }
            let now = Instant::now();
            if pace
                .checked
                .is_some_and(|then| now.duration_since(then) < CHECK_INTERVAL)
            {
                return Ok(());
            }
            pace.checked = Some(now);
            pace.still
        };
        match &self.slot {
            Some(slot) if slot.gives_way(still) => Err(gave_way(still)),
            _ => Ok(()),
        }
    }
}

fn too_slow(came: u64, seconds: u64, least: u64) -> RequestFailure {
    let what = format!(
        "{came} bytes came in {seconds} s, where image.least_rate wants {least} bytes a second"
    );
    RequestFailure {
        slow: true,
        ..ImageError::new(Kind::Unavailable, what).into()
    }
}

fn gave_way(still: bool) -> RequestFailure {
    let why = if still {
        "almost no bytes arrive, and another image waits"
    } else {
        "it has had its turn, and another image waits"
    };
    ImageError::new(Kind::Unavailable, why).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(rate: u64, seconds: u64) -> RateWatch {
        let over = Duration::from_secs(seconds);
        RateWatch::new(MinRate { rate, over }, None)
    }

    fn after(watch: &RateWatch, phase: Phase, seconds: u64, bytes: u64) -> Result<(), String> {
        watch.add(phase, Duration::from_secs(seconds), bytes);
        watch
            .check(phase)
            .map_err(|failure| failure.error.to_string())
    }

    #[test]
    fn a_rate_below_the_least_fails_with_its_numbers() {
        let watch = watch(100, 60);
        assert_eq!(after(&watch, Phase::Body, 59, 12), Ok(()));
        let told = after(&watch, Phase::Body, 1, 0);
        assert!(
            told.as_ref()
                .is_err_and(|told| told.contains("12 bytes came in 60 s")
                    && told.contains("100 bytes a second")),
            "{told:?}"
        );
    }

    #[test]
    fn a_slow_line_that_moves_is_good_for_ever() {
        let watch = watch(100, 60);
        for _ in 0..1000 {
            assert_eq!(after(&watch, Phase::Body, 10, 1000), Ok(()));
        }
    }

    #[test]
    fn the_rate_counts_neither_heads_nor_without_a_bound() {
        assert_eq!(after(&watch(100, 60), Phase::Head, 600, 0), Ok(()));
        assert_eq!(after(&watch(0, 60), Phase::Body, 600, 0), Ok(()));
    }
}
