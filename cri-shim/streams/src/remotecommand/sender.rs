//! The sending side of exec and attach, which sends output to the client.

use std::io;
use std::sync::Arc;

use super::channel::{Channel, ChannelIds};
use super::outcome::Outcome;
use super::receiver::ClientReceiver;
use crate::channels::Channels;
use crate::descriptor::{Descriptor, READ_BYTES};
use crate::pipe::Pipe;
use crate::upgrade::Version;
use crate::watch::Watch;

/// The sender of the output and the outcome of one exec or attach.
pub struct ClientSender {
    channels: Channels,
    ids: ChannelIds,
    version: Version,
    watch: Arc<Watch>,
}

impl ClientSender {
    pub(super) fn new(
        channels: Channels,
        ids: ChannelIds,
        version: Version,
        watch: Arc<Watch>,
    ) -> Self {
        ClientSender {
            channels,
            ids,
            version,
            watch,
        }
    }

    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Sends data, and waits while the client does not read. Data for a channel that the client has
    /// not opened is dropped.
    pub async fn send(&self, channel: Channel, data: &[u8]) -> io::Result<()> {
        match self.ids.get(channel) {
            Some(id) => self.channels.send(id, data).await,
            None => Ok(()),
        }
    }

    /// Sends the data that can be read from `from` now, at most `most` bytes. Returns the number of
    /// sent bytes, which is 0 at the end of the data. Returns `None` if no data is available now.
    /// The caller passes the same `buffer` to each call. When no data is available, `pass` frees
    /// the memory of `buffer`.
    pub(super) async fn pass(
        &self,
        channel: Channel,
        from: &Descriptor,
        buffer: &mut Vec<u8>,
        most: usize,
    ) -> io::Result<Option<usize>> {
        let id = self.ids.get(channel);
        let splices = !from.is_terminal() && self.channels.splices();
        if let Some(id) = id.filter(|_| splices) {
            let fill = |pipe: &mut Pipe, room: usize| from.splice(pipe, room.min(most));
            return match self.channels.splice(id, fill).await {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                spliced => spliced.map(Some),
            };
        }
        if buffer.is_empty() {
            buffer.resize(READ_BYTES, 0);
        }
        let room = most.min(buffer.len());
        let count = from.try_read(buffer.get_mut(..room).unwrap_or_default())?;
        match count {
            None => *buffer = Vec::new(),
            Some(count) => {
                let data = buffer.get(..count).unwrap_or_default();
                if !data.is_empty() {
                    self.send(channel, data).await?;
                }
            }
        }
        Ok(count)
    }

    /// Sends the command's outcome and closes the channels. Then waits until the client has read
    /// all data and disconnected, but only for a limited time.
    pub async fn finish(&self, outcome: &Outcome, receiver: &mut ClientReceiver) -> io::Result<()> {
        let text = if self.version >= Version::V4 {
            outcome.status()
        } else {
            outcome.sentence()
        };
        if !text.is_empty() {
            // A failure is ignored, because the client is allowed to reset its error stream.
            let _ = self.send(Channel::Error, text.as_bytes()).await;
        }
        for id in self.ids.iter() {
            self.channels.close(id).await?;
        }
        let reading = async { while let Ok(Some(_)) = receiver.next().await {} };
        self.channels.finish(reading).await
    }
}
