//! The server's shutdown, which the sessions of clients wait for.

use std::io;

use tokio::sync::watch;

/// The server's shutdown. Whoever sends it can wait until all receivers are gone.
#[derive(Clone)]
pub(crate) struct Shutdown(pub watch::Receiver<bool>);

impl Shutdown {
    /// Waits until it comes, or nobody is left to send it.
    pub(super) async fn begun(&mut self) {
        let _ = self.0.wait_for(|begun| *begun).await;
    }

    /// Serves until then: for a client that cannot be sent a reason.
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
