//! The messages with which a client resizes a terminal.

use rustix::termios::Winsize;
use serde::Deserialize;

/// The maximum size in bytes of a resize message.
const MAX_RESIZE_BYTES: usize = 1 << 10;

/// A resize message: `{"Width":80,"Height":25}`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct TerminalSize {
    width: u16,
    height: u16,
}

/// Parses the data of the resize channel, in which a message can arrive in several parts.
#[derive(Default)]
pub(crate) struct ResizeParser {
    unparsed: Vec<u8>,
}

impl ResizeParser {
    /// Parses the next bytes of the channel's data, which is a sequence of JSON objects. If these
    /// bytes complete one or more resize messages, returns the size in the last of these messages.
    pub(crate) fn parse(&mut self, bytes: &[u8]) -> Option<Winsize> {
        self.unparsed.extend_from_slice(bytes);
        let mut sizes =
            serde_json::Deserializer::from_slice(&self.unparsed).into_iter::<TerminalSize>();
        let mut last = None;
        let mut parsed = 0;
        while let Some(size) = sizes.next() {
            match size {
                Ok(size) => (last, parsed) = (Some(size), sizes.byte_offset()),
                Err(error) if error.is_eof() => break,
                // The parser drops data that is not a resize message.
                Err(_) => parsed = bytes.len().max(MAX_RESIZE_BYTES),
            }
        }
        self.unparsed.drain(..parsed.min(self.unparsed.len()));
        if self.unparsed.len() > MAX_RESIZE_BYTES {
            self.unparsed.clear();
        }
        last.map(|TerminalSize { width, height }| Winsize {
            ws_col: width,
            ws_row: height,
            ws_xpixel: 0,
            ws_ypixel: 0,
        })
    }
}

/// A terminal whose size a client can change.
pub trait Resizable: Sync {
    /// Sets the terminal's size. A failure has no effect on the session, because programs run with any
    /// size.
    fn resize(&self, size: Winsize) -> impl Future<Output = ()> + Send;
}
