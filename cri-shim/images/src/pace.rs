//! Measures how fast a registry's answer arrives.
//!
//! Only the time spent waiting for the network is measured. A slow disk, or a wait until the thread
//! may unpack, must not count against the registry.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::blob_reader::BlobSender;
use crate::error::{ImageError, Kind};
use crate::failure::RequestFailure;
use crate::limits::MinRate;
use crate::slots::Slot;
use rrun_calls::lock::lock;

/// The interval at which the rate is checked during a wait for the network.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// If fewer than [`STALL_BYTES`] bytes arrive within this time, the answer counts as stalled.
const STALL_TIME: Duration = Duration::from_secs(10);
const STALL_BYTES: u64 = 512;

/// If no first byte arrives within this time, the answer counts as stalled. `HEAD_STALL_TIME` is
/// longer than [`STALL_TIME`], because it also covers the DNS lookup and the TCP and TLS
/// handshakes.
const HEAD_STALL_TIME: Duration = Duration::from_secs(20);

/// Watches the rate at which one layer or document arrives.
pub(crate) struct RateWatch {
    min_rate: MinRate,
    /// The slot of the layer, or `None` for a document, which is small and needs no slot.
    slot: Option<Arc<Slot>>,
    pace: Mutex<Pace>,
}

#[derive(Default)]
struct Pace {
    /// The time spent waiting for the network since the last check at which the rate was
    /// sufficient.
    waited: Duration,
    received: u64,
    /// The time spent waiting for the network since `stalled` was last updated.
    recently_waited: Duration,
    recently_received: u64,
    stalled: bool,
    checked: Option<Instant>,
}

/// The part of an answer for which a request waits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The phase from the connection attempt to the end of the response head. The HTTP client
    /// (reqwest) has one time limit for the whole phase.
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

    /// Waits for `work`, an operation on the network. Fails if the answer is too slow, or if
    /// another pull gets this fetch's slot during the wait.
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

    /// Passes `chunk` to the thread that unpacks the layer, and returns whether the thread still
    /// receives. Fails if another pull gets this fetch's slot during the wait. A few bytes can
    /// decompress to gigabytes, so the thread can need hours for the chunks in its queue.
    pub(crate) async fn pass_on(
        &self,
        to: &BlobSender,
        chunk: Bytes,
    ) -> Result<bool, RequestFailure> {
        let mut sent = pin!(to.send(chunk));
        loop {
            match tokio::time::timeout(CHECK_INTERVAL, &mut sent).await {
                Ok(sent) => return Ok(sent),
                Err(_) => self.check(Phase::Body)?,
            }
        }
    }

    /// Adds `bytes` to the number of received bytes. Fails if the answer is too slow, or if another
    /// pull gets this fetch's slot.
    pub(crate) fn count_received(&self, bytes: u64) -> Result<(), RequestFailure> {
        if let Some(slot) = &self.slot {
            slot.count_received(bytes);
        }
        self.add(Phase::Body, Duration::ZERO, bytes);
        self.check(Phase::Body)
    }

    /// Records that `host` sends the layer. Fails if the maximum number of layers is already being
    /// fetched from `host`.
    pub(crate) fn comes_from(&self, host: &str) -> Result<(), RequestFailure> {
        match &self.slot {
            Some(slot) if !slot.moves_to(host) => {
                let why = format!(
                    "{host} sends the layer, but the maximum number of layers is already being fetched from this host"
                );
                Err(ImageError::new(Kind::Unavailable, why).into())
            }
            _ => Ok(()),
        }
    }

    /// Returns whether the slot was given to another pull. If so, the fetch receives the rest of
    /// the layer in its next turn.
    pub(crate) fn gave_way(&self) -> bool {
        self.slot.as_ref().is_some_and(|slot| slot.gave_way())
    }

    fn add(&self, phase: Phase, waited: Duration, received: u64) {
        let mut pace = lock(&self.pace);
        if phase == Phase::Body {
            pace.waited += waited;
        }
        pace.recently_waited += waited;
        pace.received += received;
        pace.recently_received += received;
    }

    fn check(&self, phase: Phase) -> Result<(), RequestFailure> {
        let stalled = {
            let mut pace = lock(&self.pace);
            let MinRate { rate, over } = self.min_rate;
            if rate > 0 && pace.waited >= over {
                let seconds = pace.waited.as_secs();
                if pace.received < rate.saturating_mul(seconds) {
                    return Err(too_slow(pace.received, seconds, rate));
                }
                (pace.waited, pace.received) = (Duration::ZERO, 0);
            }
            let stall_time = match phase {
                Phase::Head => HEAD_STALL_TIME,
                Phase::Body => STALL_TIME,
            };
            if pace.recently_received >= STALL_BYTES || pace.recently_waited >= stall_time {
                pace.stalled = pace.recently_received < STALL_BYTES;
                (pace.recently_waited, pace.recently_received) = (Duration::ZERO, 0);
            }
            let now = Instant::now();
            if pace
                .checked
                .is_some_and(|then| now.duration_since(then) < CHECK_INTERVAL)
            {
                return Ok(());
            }
            pace.checked = Some(now);
            pace.stalled
        };
        match &self.slot {
            Some(slot) if slot.gives_way(stalled) => Err(gave_way(stalled)),
            _ => Ok(()),
        }
    }
}

fn too_slow(received: u64, seconds: u64, least: u64) -> RequestFailure {
    let what = format!(
        "{received} bytes arrived in {seconds} s; image.least_rate requires {least} bytes a second"
    );
    RequestFailure {
        slow: true,
        ..ImageError::new(Kind::Unavailable, what).into()
    }
}

fn gave_way(stalled: bool) -> RequestFailure {
    let why = if stalled {
        "almost no data arrives, and another image waits for the layer's download slot"
    } else {
        "the layer has used its download slot for its full time, and another image waits for the layer's download slot"
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
    fn a_rate_below_the_minimum_fails_and_the_message_contains_both_rates() {
        let watch = watch(100, 60);
        assert_eq!(after(&watch, Phase::Body, 59, 12), Ok(()));
        let result = after(&watch, Phase::Body, 1, 0);
        assert!(
            result
                .as_ref()
                .is_err_and(|message| message.contains("12 bytes arrived in 60 s")
                    && message.contains("100 bytes a second")),
            "{result:?}"
        );
    }

    #[test]
    fn a_slow_line_above_the_minimum_rate_never_fails() {
        let watch = watch(100, 60);
        for _ in 0..1000 {
            assert_eq!(after(&watch, Phase::Body, 10, 1000), Ok(()));
        }
    }

    #[test]
    fn the_rate_is_checked_only_for_bodies_and_only_if_a_minimum_is_set() {
        assert_eq!(after(&watch(100, 60), Phase::Head, 600, 0), Ok(()));
        assert_eq!(after(&watch(0, 60), Phase::Body, 600, 0), Ok(()));
    }
}
