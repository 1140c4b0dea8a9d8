//! New sizes of the client's terminal.

use rustix::termios::Winsize;
use serde::Deserialize;

use crate::descriptor::Descriptor;
use rrun_kernel::errno::describe;

/// The longest resize message.
const MAX_RESIZE_BYTES: usize = 1 << 10;

/// A resize message: `{"Width":80,"Height":25}`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct TerminalSize {
    width: u16,
    height: u16,
}

/// Takes sizes out of what comes on the resize channel, which need not come message by message.
#[derive(Default)]
pub(super) struct ResizeParser {
    unparsed: Vec<u8>,
}

impl ResizeParser {
    /// The last size in JSON objects that stand one after the other.
    pub(super) fn parse(&mut self, bytes: &[u8]) -> Option<Winsize> {
        self.unparsed.extend_from_slice(bytes);
        let mut sizes =
            serde_json::Deserializer::from_slice(&self.unparsed).into_iter::<TerminalSize>();
        let mut last = None;
        let mut parsed = 0;
        while let Some(size) = sizes.next() {
            match size {
                Ok(size) => (last, parsed) = (Some(size), sizes.byte_offset()),
                Err(error) if error.is_eof() => break,
                // Not a size: dropped.
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

/// Sets a terminal's size; the kernel signals the processes on it.
pub fn resize(terminal: &Descriptor, size: Winsize) {
    if let Err(errno) = rustix::termios::tcsetwinsize(terminal, size) {
        log::debug!("resize a terminal: {}", describe(&errno.into()));
    }
}
