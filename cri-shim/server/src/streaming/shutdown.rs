//! The notification that the server is shutting down. The sessions of clients wait for this
//! notification.

use std::io;

use tokio::sync::watch;

/// A receiver of the shutdown notification. A session keeps its receiver until the session ends.
/// The sender can therefore wait for all sessions.
#[derive(Clone)]
pub(crate) struct Shutdown(pub watch::Receiver<bool>);

impl Shutdown {
    /// Waits until the shutdown begins or the sender is dropped.
    pub(super) async fn begun(&mut self) {
        let _ = self.0.wait_for(|begun| *begun).await;
    }

    /// Runs the future `served` until it ends or the shutdown begins. This function is for
    /// protocols in which the server can't send a reason for the session's end.
    pub(super) async fn cut(
        &mut self,
        served: impl Future<Output = io::Result<()>>,
    ) -> io::Result<()> {
        tokio::select! {
            served = served => served,
            () = self.begun() => Ok(()),
        }
    }
}
