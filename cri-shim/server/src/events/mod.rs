//! What GetContainerEvents sends.

use rrun_proto::v1::ContainerEventResponse;
use tokio::sync::broadcast;

/// Events that a subscriber may lag behind before it loses some; kubelet then lists anew.
const MAX_BACKLOG: usize = 256;

/// Everyone who listens to container events.
pub(crate) struct Bus {
    sender: broadcast::Sender<ContainerEventResponse>,
}

impl Default for Bus {
    fn default() -> Self {
        Bus {
            sender: broadcast::Sender::new(MAX_BACKLOG),
        }
    }
}

impl Bus {
    /// Sends what `event` makes, which nobody pays for while nobody listens.
    pub(crate) fn publish(&self, event: impl FnOnce() -> ContainerEventResponse) {
        if self.sender.receiver_count() > 0 {
            let _ = self.sender.send(event());
        }
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<ContainerEventResponse> {
        self.sender.subscribe()
    }
}
