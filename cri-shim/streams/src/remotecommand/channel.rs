//! The channels of exec and attach, and their numbers in the client's protocol.

/// A channel of exec or attach. The values are the channels' numbers on a WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
    Error = 3,
    Resize = 4,
}

const CHANNELS: [Channel; 5] = [
    Channel::Stdin,
    Channel::Stdout,
    Channel::Stderr,
    Channel::Error,
    Channel::Resize,
];

impl Channel {
    /// Returns the channel of a SPDY stream whose header `streamType` is `kind`.
    pub(super) fn of_stream(kind: &str) -> Option<Self> {
        Some(match kind {
            "stdin" => Channel::Stdin,
            "stdout" => Channel::Stdout,
            "stderr" => Channel::Stderr,
            "error" => Channel::Error,
            "resize" => Channel::Resize,
            _ => return None,
        })
    }
}

/// The id of each channel in the client's protocol. Over SPDY, the id is the number of the stream
/// that the client has opened for the channel. Over WebSocket, the id is the channel's number.
#[derive(Clone, Copy, Default)]
pub(super) struct ChannelIds([Option<u32>; CHANNELS.len()]);

impl ChannelIds {
    pub(super) fn of_websocket() -> Self {
        ChannelIds(CHANNELS.map(|channel| Some(channel as u32)))
    }

    pub(super) fn get(&self, channel: Channel) -> Option<u32> {
        self.0[channel as usize]
    }

    pub(super) fn set(&mut self, channel: Channel, id: u32) {
        self.0[channel as usize] = Some(id);
    }

    /// Returns the channel with this id.
    pub(super) fn find(&self, id: u32) -> Option<Channel> {
        let mut channels = CHANNELS.into_iter();
        channels.find(|channel| self.get(*channel) == Some(id))
    }

    /// Returns the ids of all open channels.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.into_iter().flatten()
    }
}
