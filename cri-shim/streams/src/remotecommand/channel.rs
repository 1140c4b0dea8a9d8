//! The channels of a command, and their numbers in the client's protocol.

/// Channels by their numbers on a WebSocket.
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
    /// The channel that a SPDY stream's header `streamType` names.
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

/// What each channel is called in the client's protocol: the number of its SPDY stream, if the
/// client has opened one, or its number on the WebSocket.
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

    /// The channel of this number.
    pub(super) fn find(&self, id: u32) -> Option<Channel> {
        let mut channels = CHANNELS.into_iter();
        channels.find(|channel| self.get(*channel) == Some(id))
    }

    /// The numbers of all channels that there are.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.into_iter().flatten()
    }
}
