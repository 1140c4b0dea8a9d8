//! The runtime calls that are in progress, and the purpose of each call.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::connection::ClientId;
use super::own_log;
use super::runtime::{Call, CallCheck};
use rrun_protocol::Failure;

/// The timeout for a runtime's `start` call, counted from the exit of the container's first
/// process.
const START_TIMEOUT_AFTER_EXIT: Duration = Duration::from_secs(10);

/// The purpose of a runtime call, and the client that waits for the result. A purpose identifies a
/// container or an exec by its serial number, because a container's id can be reused.
#[derive(Debug)]
pub(crate) enum Purpose {
    Create {
        serial: u64,
        client: ClientId,
    },
    /// The removal of everything that a failed `create` left behind.
    Rollback {
        serial: u64,
        client: ClientId,
        failure: Failure,
    },
    Start {
        serial: u64,
        client: ClientId,
    },
    /// The runtime's `kill` or `update`. The monitor sends the result of this call to the client.
    /// The result does not change the monitor's state.
    Request {
        client: ClientId,
    },
    Exec {
        number: u64,
    },
    /// The runtime's `delete` after a container's exit.
    Delete {
        serial: u64,
    },
}

/// The runtime calls in progress, with the pid of the runtime process as the key.
#[derive(Default)]
pub(crate) struct Calls(BTreeMap<i32, (Call, Purpose)>);

impl Calls {
    pub(crate) fn add(&mut self, call: Call, purpose: Purpose) {
        self.0.insert(call.pid, (call, purpose));
    }

    /// Removes and returns the runtime call whose process has this pid.
    pub(crate) fn remove(&mut self, pid: i32) -> Option<(Call, Purpose)> {
        self.0.remove(&pid)
    }

    /// Returns the runtime call of the exec with this number.
    pub(crate) fn of_exec(&self, exec: u64) -> Option<&Call> {
        let is_it =
            |purpose: &Purpose| matches!(purpose, Purpose::Exec { number } if *number == exec);
        let found = self.0.values().find(|(_, purpose)| is_it(purpose));
        found.map(|(call, _)| call)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the pids of the runtime processes.
    pub(crate) fn pids(&self) -> impl Iterator<Item = i32> {
        self.0.keys().copied()
    }

    /// Returns the time at which [`Calls::check`] must be called again.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        self.0
            .values()
            .filter_map(|(call, _)| call.next_check())
            .min()
    }

    /// Logs the runtime calls that are slow, and kills the runtimes whose deadline has passed.
    pub(crate) fn check(&mut self, now: Instant) {
        for (call, _) in self.0.values_mut() {
            let (check, pid, what) = (call.check(now), call.pid, call.what());
            match check {
                CallCheck::InTime => {}
                CallCheck::Slow(seconds) => {
                    own_log::write(&format!(
                        "{what}: the runtime, process {pid}, has not finished after {seconds} s"
                    ));
                }
                CallCheck::TimedOut(seconds) => {
                    own_log::write(&format!(
                        "{what}: the monitor killed the runtime, process {pid}, after {seconds} s"
                    ));
                }
            }
        }
    }

    /// Shortens the deadline of the `start` call for the container with this serial number, whose
    /// first process has exited.
    pub(crate) fn shorten_start(&mut self, container: u64) {
        for (call, purpose) in self.0.values_mut() {
            if matches!(purpose, Purpose::Start { serial, .. } if *serial == container) {
                call.shorten(START_TIMEOUT_AFTER_EXIT);
            }
        }
    }
}
