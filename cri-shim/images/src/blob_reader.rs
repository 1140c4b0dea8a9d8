//! The bytes of a layer on their way from the network to the thread that unpacks them.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use crate::layer::LayerError;
use crate::partial::{self, Partial};
use crate::turns::UnpackTurn;

/// A blob as it comes: first what was kept of it, then what the network brings, kept as well.
pub(crate) struct BlobReader {
    chunks: mpsc::Receiver<Bytes>,
    current: Bytes,
    /// Held while there are bytes to unpack.
    turn: UnpackTurn,
    partial: Option<Partial>,
    /// Bytes that an earlier try left.
    pub replay: u64,
    replayed: u64,
    /// Bytes from the network.
    came: u64,
    /// The network has no more.
    ended: bool,
}

impl BlobReader {
    pub(crate) fn new(
        chunks: mpsc::Receiver<Bytes>,
        turn: UnpackTurn,
        partial: Option<Partial>,
    ) -> Self {
        BlobReader {
            chunks,
            current: Bytes::new(),
            turn,
            replay: partial.as_ref().map_or(0, Partial::length),
            partial,
            replayed: 0,
            came: 0,
            ended: false,
        }
    }

    /// Keeps the bytes that have arrived, if the only error is that the rest has not. A large blob
    /// is kept for a later pull. A blob of any size is kept if the fetch gave its slot away.
    pub(crate) fn end(self, error: Option<&LayerError>, size: u64, gave_way: bool) {
        let broke_off = self.ended && self.replay + self.came < size;
        let ours = matches!(
            error,
            Some(LayerError::System { .. } | LayerError::Bound(_))
        );
        let worth = gave_way || size >= partial::MIN_KEPT_BYTES;
        let keep = error.is_some() && broke_off && !ours && worth;
        if let Some(partial) = self
            .partial
            .filter(|partial| !keep || partial.length() == 0)
        {
            partial.remove();
        }
    }

    fn keep(&mut self) {
        self.came += self.current.len() as u64;
        if let Some(partial) = &mut self.partial
            && let Err(error) = partial.append(&self.current)
        {
            // The layer itself may still find room.
            log::warn!("keep what has come of a layer: {error}");
            if let Some(partial) = self.partial.take() {
                partial.remove();
            }
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.replayed < self.replay
            && let Some(partial) = &self.partial
        {
            self.turn.take();
            let left = usize::try_from(self.replay - self.replayed).unwrap_or(usize::MAX);
            let most = left.min(buffer.len());
            let count = partial.read_at(&mut buffer[..most], self.replayed)?;
            self.replayed += count as u64;
            return Ok(count);
        }
        while self.current.is_empty() {
            let chunk = match self.chunks.try_recv() {
                Ok(chunk) => Some(chunk),
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => {
                    self.turn.give_back();
                    self.chunks.blocking_recv()
                }
            };
            self.turn.take();
            match chunk {
                Some(chunk) => {
                    self.current = chunk;
                    self.keep();
                }
                None => {
                    self.ended = true;
                    return Ok(0);
                }
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
