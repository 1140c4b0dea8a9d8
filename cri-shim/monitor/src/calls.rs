//! The runtime calls that are under way, and what each is for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::connection::ClientId;
use super::own_log;
use super::runtime::{Call, CallCheck};
use rrun_protocol::Failure;

/// How long a runtime may still take to start a container whose first process has ended.
const ENDED_START_TIMEOUT: Duration = Duration::from_secs(10);

/// What a runtime call is for, and who waits for it. Containers and execs go by their serial
/// numbers here, since an id can come back.
#[derive(Debug)]
pub(crate) enum Purpose {
    Create {
        serial: u64,
        client: ClientId,
    },
    /// The removal of what a failed create left.
    Rollback {
        serial: u64,
        client: ClientId,
        failure: Failure,
    },
    Start {
        serial: u64,
        client: ClientId,
    },
    /// Kill and update: the result changes nothing, and is the client's alone.
    Request {
        client: ClientId,
    },
    Exec {
        number: u64,
    },
    /// The runtime's cleanup after a container's end.
    Delete {
        serial: u64,
    },
}

/// Calls by the runtime's pid.
#[derive(Default)]
pub(crate) struct Calls(BTreeMap<i32, (Call, Purpose)>);

impl Calls {
    pub(crate) fn add(&mut self, call: Call, purpose: Purpose) {
        self.0.insert(call.pid, (call, purpose));
    }

    /// Takes the call whose runtime this is.
    pub(crate) fn remove(&mut self, pid: i32) -> Option<(Call, Purpose)> {
        self.0.remove(&pid)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// When [`Calls::check`] has something to do.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        self.0
            .values()
            .filter_map(|(call, _)| call.next_check())
            .min()
    }

    /// Logs the calls that are slow, and kills the runtimes whose time is up.
    pub(crate) fn check(&mut self, now: Instant) {
        for (call, _) in self.0.values_mut() {
            let (check, pid, what) = (call.check(now), call.pid, call.what());
            match check {
                CallCheck::InTime => {}
                CallCheck::Slow(seconds) => {
                    own_log::write(&format!(
                        "{what}: waiting for the runtime, process {pid}, for {seconds} s"
                    ));
                }
                CallCheck::TimedOut(seconds) => {
                    own_log::write(&format!(
                        "{what}: killed the runtime, process {pid}, after {seconds} s"
                    ));
                }
            }
        }
    }

    /// The start of this container has little time left: its first process has ended.
    pub(crate) fn shorten_start(&mut self, container: u64) {
        for (call, purpose) in self.0.values_mut() {
            if matches!(purpose, Purpose::Start { serial, .. } if *serial == container) {
                call.shorten(ENDED_START_TIMEOUT);
            }
        }
    }
}
