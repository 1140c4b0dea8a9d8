//! The check for the CRI condition NetworkReady.
//!
//! The check sends requests to the kernel, which wait for a lock of the kernel that all network
//! namespaces share (RTNL). A process of a container can hold this lock for a long time, for example
//! with ioctls that copy data to slow memory. kubelet must get an answer nevertheless, because it
//! otherwise reports that the node is not ready.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::finish;
use crate::error::NetworkError;
use rrun_calls::wait::blocking;

/// The time after which a caller gets the result of the check before.
const MAX_WAIT: Duration = Duration::from_secs(1);

/// The time after which a caller gets an error if there was no check before.
const MAX_FIRST_WAIT: Duration = Duration::from_secs(10);

/// The progress of the checks. At most one check runs at a time.
#[derive(Clone)]
pub(super) struct BridgeCheck(Arc<watch::Sender<Checks>>);

#[derive(Default)]
struct Checks {
    is_running: bool,
    /// The result of the last complete check.
    last: Option<Result<(), String>>,
}

impl BridgeCheck {
    pub(super) fn new() -> Self {
        BridgeCheck(Arc::new(watch::Sender::new(Checks::default())))
    }

    /// Calls `check`, unless another caller's check is running. Returns the result of the check that
    /// is running or, after [`MAX_WAIT`], the result of the check before.
    pub(super) async fn get(
        &self,
        check: impl FnOnce() -> Result<(), NetworkError> + Send + 'static,
    ) -> Result<(), String> {
        let mut checks = self.0.subscribe();
        let begin = |checks: &mut Checks| !std::mem::replace(&mut checks.is_running, true);
        if self.0.send_if_modified(begin) {
            let sender = Arc::clone(&self.0);
            tokio::spawn(async move {
                let what = "check the embedded network's bridge and nftables rules";
                let result = finish(blocking(what, check)).await;
                sender.send_replace(Checks {
                    is_running: false,
                    last: Some(result.map_err(|error| error.to_string())),
                });
            });
        }
        let ended = checks.wait_for(|checks| !checks.is_running);
        let _ = tokio::time::timeout(MAX_WAIT, ended).await;
        let known = checks.wait_for(|checks| checks.last.is_some());
        let known = tokio::time::timeout(MAX_FIRST_WAIT, known).await;
        let last = known.ok().and_then(|known| known.ok()?.last.clone());
        last.unwrap_or_else(|| {
            Err(format!(
                "the check of the embedded network's bridge and nftables rules has not ended within {} s",
                MAX_FIRST_WAIT.as_secs()
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_check_that_hangs_is_not_repeated_and_the_last_result_is_returned() {
        let bridge = BridgeCheck::new();
        assert_eq!(bridge.get(|| Ok(())).await, Ok(()));
        let (end, ended) = mpsc::channel::<()>();
        let hangs = move || {
            let _ = ended.recv();
            Err(NetworkError::ThreadDied)
        };
        assert_eq!(bridge.get(hangs).await, Ok(()));
        let repeated = || unreachable!("the check runs twice");
        assert_eq!(bridge.get(repeated).await, Ok(()));
        drop(end);
        let mut checks = bridge.0.subscribe();
        checks.wait_for(|checks| !checks.is_running).await.unwrap();
        assert!(checks.borrow().last.as_ref().unwrap().is_err());
        assert_eq!(bridge.get(|| Ok(())).await, Ok(()));
    }
}
