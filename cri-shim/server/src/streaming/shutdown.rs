//! The notifications that a session must end although its client is still connected.

use std::io;

use tokio::sync::watch;

/// A receiver of the notifications. A session keeps its receiver until the session ends. The sender
/// of the server's notification can therefore wait for all sessions.
#[derive(Clone)]
pub(crate) struct Shutdown {
    server: watch::Receiver<bool>,
    /// The notification that another session has replaced this session.
    replaced: Option<watch::Receiver<bool>>,
}

/// The reason for the end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    ServerStops,
    /// The limit on sessions is reached, and another session has replaced this session.
    Replaced,
}

impl Shutdown {
    pub(crate) fn of_server(server: watch::Receiver<bool>) -> Self {
        Shutdown {
            server,
            replaced: None,
        }
    }

    /// Returns a receiver that also receives the notification of one session.
    pub(super) fn of_session(&self, replaced: watch::Receiver<bool>) -> Self {
        Shutdown {
            server: self.server.clone(),
            replaced: Some(replaced),
        }
    }

    /// Waits until the session must end. The session must also end if the server's sender is
    /// dropped.
    pub(super) async fn begun(&mut self) -> Reason {
        tokio::select! {
            _ = self.server.wait_for(|begun| *begun) => Reason::ServerStops,
            () = replaced(self.replaced.as_mut()) => Reason::Replaced,
        }
    }

    /// Waits until another session has replaced this session.
    pub(super) async fn replaced(mut self) {
        replaced(self.replaced.as_mut()).await;
    }

    /// Runs the future `served` until it ends or the session must end. This function is for
    /// protocols in which the server can't send a reason for the session's end.
    pub(super) async fn cut(
        &mut self,
        served: impl Future<Output = io::Result<()>>,
    ) -> io::Result<()> {
        tokio::select! {
            served = served => served,
            _ = self.begun() => Ok(()),
        }
    }
}

async fn replaced(notification: Option<&mut watch::Receiver<bool>>) {
    if let Some(notification) = notification
        && notification.wait_for(|replaced| *replaced).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
