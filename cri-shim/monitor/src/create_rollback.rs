//! What becomes of a container whose create failed: nothing is left of it, its empty log included.

use std::time::{Duration, Instant};

use super::cgroup;
use super::connection::ClientId;
use super::serve::{Monitor, Purpose};
use rrun_protocol::{Failure, Reply};

/// How long a failed create waits for its log's file to be removed, whose file system may hang.
const LOG_GONE_WITHIN: Duration = Duration::from_secs(5);

/// A create that failed and left nothing but, perhaps, an empty log.
pub(super) struct Undone {
    client: ClientId,
    failure: Failure,
    /// When its client is answered though the log is still there.
    give_up: Instant,
}

impl Undone {
    pub(super) fn give_up(&self) -> Instant {
        self.give_up
    }
}

impl Monitor {
    /// After a failed create: the runtime's own cleaning up can't be relied upon, least of all
    /// if it was killed.
    pub(super) fn undo_create(&mut self, serial: u64, client: ClientId, failure: Failure) {
        let timeout = self.timeout;
        let Some(container) = self.container(serial) else {
            return;
        };
        container.kill_all();
        container.output.log.discard();
        match container.delete_call(timeout) {
            Ok(call) => {
                let purpose = Purpose::Undo {
                    serial,
                    client,
                    failure,
                };
                self.calls.insert(call.pid, (call, purpose));
            }
            Err(_) => self.undo_ended(serial, client, failure),
        }
    }

    pub(super) fn undo_ended(&mut self, serial: u64, client: ClientId, failure: Failure) {
        let Some(container) = self.container(serial) else {
            return;
        };
        let _ = cgroup::kill(&container.spec.cgroup);
        let _ = cgroup::remove(&container.spec.cgroup);
        container.undone = Some(Undone {
            client,
            failure,
            give_up: Instant::now() + LOG_GONE_WITHIN,
        });
        self.continue_undoing(serial);
    }

    /// Answers to a create that was undone, once its log is gone, too.
    pub(super) fn continue_undoing(&mut self, serial: u64) {
        let Some(container) = self.container(serial) else {
            return;
        };
        let log = &container.output.log;
        let is_over = |undone: &mut Undone| log.is_discarded() || Instant::now() >= undone.give_up;
        if let Some(undone) = container.undone.take_if(is_over) {
            self.reply(undone.client, &Reply::Error(undone.failure));
            self.forget(serial);
        }
    }
}
