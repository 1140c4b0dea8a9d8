//! The rollback of a create that failed: nothing is left of the container, its empty log included.

use std::time::{Duration, Instant};

use super::calls::Purpose;
use super::connection::ClientId;
use super::container::{Container, Rollback};
use super::effect::Effect;
use rrun_kernel::cgroup;
use rrun_protocol::{Failure, Reply};

/// How long a failed create waits for the removal of its log's file, whose file system may hang.
const LOG_REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);

impl Container {
    /// The runtime's own cleanup after a failed create can't be relied upon, least of all if it
    /// was killed.
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

    /// The runtime's `delete` has ended, or could not be run.
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

    /// Answers the failed create once its log is gone, too.
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
    fn a_failed_create_is_answered_after_the_runtime_has_cleaned_up() {
        let mut container = Container::for_test("rollback");
        let failure = Failure {
            kind: FailureKind::Runtime,
            message: "no such luck".into(),
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
        assert_eq!(failure.message, "no such luck");
        std::fs::remove_dir_all(&container.spec.bundle).unwrap();
    }
}
