//! Distribution of container events to the subscribers of GetContainerEvents.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use prost::Message;
use rrun_proto::v1::ContainerEventResponse;
use tokio::sync::broadcast;

/// The number of events that a subscriber can lag behind before it loses events. If kubelet loses
/// events, it lists all containers again.
const MAX_BACKLOG: usize = 256;

/// The maximum number of bytes of all events that not every subscriber has received yet. Further
/// events contain no statuses.
const BACKLOG_BYTES: usize = 32 << 20;

/// The channel to all subscribers of container events.
pub(crate) struct Bus {
    sender: broadcast::Sender<Arc<Event>>,
    /// The number of bytes of all events that exist.
    bytes: Arc<AtomicUsize>,
}

/// An event that waits for its subscribers.
pub(crate) struct Event {
    message: ContainerEventResponse,
    length: usize,
    bytes: Arc<AtomicUsize>,
}

impl Default for Bus {
    fn default() -> Self {
        Bus {
            sender: broadcast::Sender::new(MAX_BACKLOG),
            bytes: Arc::default(),
        }
    }
}

impl Bus {
    /// Sends the event that `event` returns. If there are no subscribers, `event` is not called.
    pub(crate) fn publish(&self, event: impl FnOnce() -> ContainerEventResponse) {
        if self.sender.receiver_count() > 0 {
            let _ = self.sender.send(Arc::new(self.counted(event())));
        }
    }

    /// Counts the event's bytes. If the events have too many bytes, the statuses are removed from
    /// the event. Kubelet ignores such an event, and lists all containers again later.
    fn counted(&self, mut message: ContainerEventResponse) -> Event {
        let mut length = message.encoded_len();
        if self.bytes.load(Ordering::Relaxed).saturating_add(length) > BACKLOG_BYTES {
            message.pod_sandbox_status = None;
            message.containers_statuses = Vec::new();
            length = message.encoded_len();
        }
        self.bytes.fetch_add(length, Ordering::Relaxed);
        Event {
            message,
            length,
            bytes: Arc::clone(&self.bytes),
        }
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.sender.subscribe()
    }
}

impl Event {
    pub(crate) fn message(&self) -> ContainerEventResponse {
        self.message.clone()
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.bytes.fetch_sub(self.length, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::ContainerStatus;

    use super::*;

    #[tokio::test]
    async fn the_backlog_of_events_has_a_limit_in_bytes() {
        let event = || ContainerEventResponse {
            container_id: "c".to_owned(),
            containers_statuses: vec![ContainerStatus {
                message: "x".repeat(1 << 20),
                ..ContainerStatus::default()
            }],
            ..ContainerEventResponse::default()
        };
        let bus = Bus::default();
        let mut slow = bus.subscribe();
        for _ in 0..100 {
            bus.publish(event);
        }
        assert!(bus.bytes.load(Ordering::Relaxed) <= BACKLOG_BYTES);
        let mut complete = 0;
        for _ in 0..100 {
            let message = slow.recv().await.unwrap().message();
            assert_eq!(message.container_id, "c");
            complete += message.containers_statuses.len();
        }
        assert_eq!(complete, 31);
        assert_eq!(bus.bytes.load(Ordering::Relaxed), 0);
        bus.publish(event);
        assert_eq!(slow.recv().await.unwrap().message(), event());
    }
}
