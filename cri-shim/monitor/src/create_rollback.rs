//! The rollback of a failed create request. The rollback removes everything that the request
//! created for the container. A log file is removed only if the file is empty.

use std::time::{Duration, Instant};

use super::calls::Purpose;
use super::connection::ClientId;
use super::container::{Container, Rollback};
use super::effect::Effect;
use rrun_kernel::cgroup;
use rrun_protocol::{Failure, Reply};

/// The maximum time for which the answer to a failed create request waits for the removal of the
/// log's file. The time is limited, because the log's file system can hang.
const LOG_REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);

impl Container {
    /// Begins the rollback. The monitor does not rely on the runtime to clean up after a failed
    /// create. For example, a killed runtime cleans up nothing.
    pub(crate) fn begin_rollback(&mut self, client: ClientId, failure: Failure) -> Vec<Effect> {
        self.kill_all();
        self.output.log().discard();
        let serial = self.serial;
        let purpose = Purpose::Rollback {
            serial,
            client,
            failure,
        };
        vec![Effect::run(self.delete_command(), purpose)]
    }

    /// Handles the exit of the runtime's `delete`, or an error that prevented the `delete` from
    /// being run.
    pub(crate) fn rollback_ended(&mut self, client: ClientId, failure: Failure) -> Vec<Effect> {
        let _ = cgroup::kill(&self.spec.cgroup);
        let _ = cgroup::remove_tree(&self.spec.cgroup);
        self.rollback = Some(Rollback {
            client,
            failure,
            deadline: Instant::now() + LOG_REMOVAL_TIMEOUT,
        });
        self.continue_rollback()
    }

    /// Answers the client of the failed create request once the container's log has been removed or
    /// the deadline has passed.
    pub(crate) fn continue_rollback(&mut self) -> Vec<Effect> {
        let log = self.output.log();
        let is_over =
            |rollback: &mut Rollback| log.is_discarded() || Instant::now() >= rollback.deadline;
        match self.rollback.take_if(is_over) {
            Some(rollback) => vec![
                Effect::Reply(rollback.client, Reply::Error(rollback.failure)),
                Effect::Forget(self.serial),
            ],
            None => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rrun_protocol::FailureKind;

    #[test]
    fn a_failed_create_request_is_answered_after_the_runtime_has_cleaned_up() {
        let mut container = Container::for_test("rollback");
        let failure = Failure {
            kind: FailureKind::Runtime,
            message: "disk quota exceeded".into(),
        };
        let effects = container.begin_rollback(3, failure.clone());
        assert!(matches!(
            &effects[..],
            [Effect::Run(_, Purpose::Rollback { client: 3, .. })]
        ));
        let effects = container.rollback_ended(3, failure);
        let [Effect::Reply(3, Reply::Error(failure)), Effect::Forget(1)] = &effects[..] else {
            panic!("{effects:?}");
        };
        assert_eq!(failure.message, "disk quota exceeded");
        std::fs::remove_dir_all(&container.spec.bundle).unwrap();
    }
}
