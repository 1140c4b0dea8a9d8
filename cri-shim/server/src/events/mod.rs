//! Distribution of container events to the subscribers of GetContainerEvents.

use rrun_proto::v1::ContainerEventResponse;
use tokio::sync::broadcast;

/// The number of events that a subscriber can lag behind before it loses events. If kubelet loses
/// events, it lists all containers again.
const MAX_BACKLOG: usize = 256;

/// The channel to all subscribers of container events.
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
    /// Sends the event that `event` returns. If there are no subscribers, `event` is not called.
    pub(crate) fn publish(&self, event: impl FnOnce() -> ContainerEventResponse) {
        if self.sender.receiver_count() > 0 {
            let _ = self.sender.send(event());
        }
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<ContainerEventResponse> {
        self.sender.subscribe()
    }
}
