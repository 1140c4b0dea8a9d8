//! Passes the bytes of a layer from the network to the thread that unpacks them.

use std::io::{self, Read};
use std::rc::Rc;

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use crate::layer::LayerError;
use crate::partial::{self, Partial};
use crate::turns::UnpackTurn;

/// A reader for one blob. The reader first returns the bytes that were kept from an earlier attempt
/// to fetch the blob. After the kept bytes, the reader returns the bytes from the network. The
/// reader appends these bytes to the file with the kept bytes.
pub(crate) struct BlobReader {
    chunks: mpsc::Receiver<Bytes>,
    current: Bytes,
    /// The turn of the thread that unpacks the blob. The reader gives the turn back while it waits
    /// for bytes from the network.
    turn: Rc<UnpackTurn>,
    partial: Option<Partial>,
    /// The number of kept bytes from an earlier attempt to fetch the blob.
    pub replay: u64,
    replayed: u64,
    /// The number of bytes received from the network.
    received: u64,
    /// True if no more bytes will arrive from the network.
    ended: bool,
}

impl BlobReader {
    pub(crate) fn new(
        chunks: mpsc::Receiver<Bytes>,
        turn: Rc<UnpackTurn>,
        partial: Option<Partial>,
    ) -> Self {
        BlobReader {
            chunks,
            current: Bytes::new(),
            turn,
            replay: partial.as_ref().map_or(0, Partial::length),
            partial,
            replayed: 0,
            received: 0,
            ended: false,
        }
    }

    /// Ends reading. The received bytes are kept for a later attempt if the transfer broke off and
    /// no local error occurred. In addition, the blob must have at least `MIN_KEPT_BYTES`, or the
    /// fetch must have given its slot to another pull. In all other cases, the received bytes are
    /// removed.
    pub(crate) fn end(self, error: Option<&LayerError>, size: u64, gave_way: bool) {
        let broke_off = self.ended && self.replay + self.received < size;
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
        self.received += self.current.len() as u64;
        if let Some(partial) = &mut self.partial
            && let Err(error) = partial.append(&self.current)
        {
            // The fetch continues without a copy of the received bytes. A disk that is too full for
            // this copy can still have enough space for the unpacked layer.
            log::warn!("cannot keep the received bytes of a layer for a retry: {error}");
            if let Some(partial) = self.partial.take() {
                partial.remove();
            }
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // The rest of an ended layer is not needed. The thread must not wait for it.
        if self.turn.effort().is_ended() {
            return Err(io::Error::other("the unpacking was ended"));
        }
        if self.replayed < self.replay
            && let Some(partial) = &self.partial
        {
            self.turn.take();
            let left = usize::try_from(self.replay - self.replayed).unwrap_or(usize::MAX);
            let most = left.min(buffer.len());
            let count = partial.read_at(&mut buffer[..most], self.replayed)?;
            self.replayed += count as u64;
            self.turn.effort().add_read(count);
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
        self.turn.effort().add_read(count);
        Ok(count)
    }
}
