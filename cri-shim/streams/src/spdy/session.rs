//! The streams of a SPDY session. A session stores the open streams. For each stream, the session
//! stores which half is closed, and how much data may be sent. Kubernetes' clients (spdystream) do
//! not implement flow control, and never send a WINDOW_UPDATE. A server that waited for a
//! WINDOW_UPDATE would stop after 64 KiB. For this reason, the session at first ignores the flow
//! control windows for the server's data. The session respects these windows after the client has
//! sent a WINDOW_UPDATE or an initial window. The session does not limit the data that the client
//! sends. The modules that read from the session must limit this data, see `backlog`.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::error::SpdyError;
use super::frame::{self, Frame, ResetStatus};
use super::headers::{Deflater, Headers};
use super::limits::MAX_STREAMS;

/// The initial flow control window of both sides in bytes (SPDY draft 3.1, section 2.6.8).
const DEFAULT_WINDOW: i64 = 64 << 10;

/// The flow control window in bytes that the server grants to the client for each stream, in place
/// of [`DEFAULT_WINDOW`].
const STREAM_WINDOW: u32 = 1 << 20;
/// The flow control window for the client's data in the whole session, in bytes. This window
/// replaces [`DEFAULT_WINDOW`].
const SESSION_WINDOW: u32 = 16 << 20;

const MAX_WINDOW: i64 = (1 << 31) - 1;

/// The event that [`Session::receive`] returns for a frame from the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The client opened a stream, and the server has accepted this stream.
    Opened {
        stream: u32,
        headers: Headers,
        /// True if the client sends no data on the stream.
        fin: bool,
    },
    /// A stream's data, the end of the client's half of the stream, or both.
    Data {
        stream: u32,
        bytes: Bytes,
        fin: bool,
    },
    /// The stream was reset, so both halves of the stream are closed.
    Reset { stream: u32 },
    /// The client will not open any more streams.
    GoAway,
}

struct OpenStream {
    /// True once the client has closed its half of the stream.
    received_fin: bool,
    /// True once the server has closed its half of the stream.
    sent_fin: bool,
    send_window: i64,
    /// The number of bytes that the server has processed, but has not reported to the client yet.
    /// The server reports processed bytes in a WINDOW_UPDATE.
    unreported: u32,
}

/// The server's side of a SPDY session.
pub struct Session {
    streams: BTreeMap<u32, OpenStream>,
    last_stream: u32,
    deflater: Deflater,
    /// True if the client implements flow control.
    flow_control: bool,
    initial_window: i64,
    send_window: i64,
    unreported: u32,
    session_window_given: bool,
}

impl Default for Session {
    fn default() -> Self {
        Session {
            streams: BTreeMap::new(),
            last_stream: 0,
            deflater: Deflater::default(),
            flow_control: false,
            initial_window: DEFAULT_WINDOW,
            send_window: DEFAULT_WINDOW,
            unreported: 0,
            session_window_given: false,
        }
    }
}

/// The amount of data that the server may send on a stream now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowance {
    Bytes(usize),
    /// The server must not send data until the client increases a flow control window.
    Wait,
    /// The stream is closed, so the server must not send more data.
    Closed,
}

impl Session {
    /// Processes a client's frame, and appends the server's answers to `output`.
    pub fn receive(
        &mut self,
        frame: Frame,
        output: &mut Vec<u8>,
    ) -> Result<Option<Event>, SpdyError> {
        match frame {
            Frame::SynStream {
                stream,
                fin,
                unidirectional,
                headers,
            } => self.open(stream, fin, unidirectional, headers, output),
            Frame::Data { stream, fin, bytes } => self.data(stream, fin, bytes, output),
            Frame::Headers { stream, fin: true } => self.data(stream, true, Bytes::new(), output),
            Frame::Reset { stream, .. } => {
                let known = self.streams.remove(&stream).is_some();
                Ok(known.then_some(Event::Reset { stream }))
            }
            Frame::Settings { initial_window } => {
                if let Some(window) = initial_window {
                    self.resize_windows(window)?;
                }
                Ok(None)
            }
            Frame::Ping { id } => {
                // The server answers only PINGs with odd numbers. A PING with an even number would
                // answer a PING from the server, but the server sends no PINGs.
                if id % 2 == 1 {
                    frame::ping(output, id);
                }
                Ok(None)
            }
            Frame::WindowUpdate { stream, delta } => self.widen(stream, delta, output),
            Frame::GoAway => Ok(Some(Event::GoAway)),
            Frame::Headers { fin: false, .. } | Frame::SynReply { .. } | Frame::Unknown => Ok(None),
        }
    }

    fn open(
        &mut self,
        stream: u32,
        fin: bool,
        unidirectional: bool,
        headers: Headers,
        output: &mut Vec<u8>,
    ) -> Result<Option<Event>, SpdyError> {
        // The client's streams must have odd, increasing numbers (SPDY draft 3.1, section 2.3.2).
        if stream.is_multiple_of(2) || stream <= self.last_stream {
            return Err(SpdyError::StreamId(stream));
        }
        self.last_stream = stream;
        if self.streams.len() >= MAX_STREAMS {
            frame::reset(output, stream, ResetStatus::RefusedStream);
            return Ok(None);
        }
        let opened = OpenStream {
            received_fin: fin,
            sent_fin: unidirectional,
            send_window: self.initial_window,
            unreported: 0,
        };
        frame::syn_reply(output, stream, &mut self.deflater);
        if !self.session_window_given {
            self.session_window_given = true;
            frame::window_update(output, 0, SESSION_WINDOW - DEFAULT_WINDOW as u32);
        }
        if !fin {
            frame::window_update(output, stream, STREAM_WINDOW - DEFAULT_WINDOW as u32);
        }
        self.streams.insert(stream, opened);
        Ok(Some(Event::Opened {
            stream,
            headers,
            fin,
        }))
    }

    fn data(
        &mut self,
        stream: u32,
        fin: bool,
        bytes: Bytes,
        output: &mut Vec<u8>,
    ) -> Result<Option<Event>, SpdyError> {
        // The server drops data for a closed stream. For the session's flow control window, the
        // dropped data counts as processed.
        let Some(open) = self.streams.get_mut(&stream) else {
            // If the stream was never opened, its number is greater than the number of the last
            // opened stream. Otherwise, the server has already closed the stream. The client sent
            // the data before it received the frame with which the server closed the stream.
            if stream > self.last_stream {
                frame::reset(output, stream, ResetStatus::InvalidStream);
            }
            self.report_session(bytes.len(), output);
            return Ok(None);
        };
        if open.received_fin {
            self.streams.remove(&stream);
            frame::reset(output, stream, ResetStatus::StreamAlreadyClosed);
            self.report_session(bytes.len(), output);
            return Ok(Some(Event::Reset { stream }));
        }
        open.received_fin = fin;
        if fin && open.sent_fin {
            self.streams.remove(&stream);
        }
        Ok(Some(Event::Data { stream, bytes, fin }))
    }

    fn resize_windows(&mut self, window: u32) -> Result<(), SpdyError> {
        let window = i64::from(window);
        if window > MAX_WINDOW {
            return Err(SpdyError::Window);
        }
        self.flow_control = true;
        let change = window - self.initial_window;
        self.initial_window = window;
        for stream in self.streams.values_mut() {
            stream.send_window += change;
            if stream.send_window > MAX_WINDOW {
                return Err(SpdyError::Window);
            }
        }
        Ok(())
    }

    fn widen(
        &mut self,
        stream: u32,
        delta: u32,
        output: &mut Vec<u8>,
    ) -> Result<Option<Event>, SpdyError> {
        self.flow_control = true;
        let delta = i64::from(delta);
        if stream == 0 {
            self.send_window += delta;
            if self.send_window > MAX_WINDOW {
                return Err(SpdyError::Window);
            }
            return Ok(None);
        }
        let Some(open) = self.streams.get_mut(&stream) else {
            return Ok(None);
        };
        open.send_window += delta;
        if open.send_window > MAX_WINDOW {
            self.streams.remove(&stream);
            frame::reset(output, stream, ResetStatus::FlowControlError);
            return Ok(Some(Event::Reset { stream }));
        }
        Ok(None)
    }

    /// Returns how many bytes may be sent on a stream now, at most `wanted`. Reduces the flow
    /// control windows by this number. If the caller sends fewer bytes, it must call
    /// [`Session::give_back`] for the rest.
    pub fn take_allowance(&mut self, stream: u32, wanted: usize) -> Allowance {
        let Some(open) = self.streams.get_mut(&stream).filter(|open| !open.sent_fin) else {
            return Allowance::Closed;
        };
        if !self.flow_control {
            // The client has not used flow control yet, but can begin to use flow control later.
            // Both sides must then have the same windows. For this reason, the server already
            // subtracts the bytes from the windows.
            let sent = i64::try_from(wanted).unwrap_or(MAX_WINDOW);
            open.send_window = (open.send_window - sent).max(-MAX_WINDOW);
            self.send_window = (self.send_window - sent).max(-MAX_WINDOW);
            return Allowance::Bytes(wanted);
        }
        let window = open.send_window.min(self.send_window);
        let allowed = usize::try_from(window).unwrap_or(0).min(wanted);
        if allowed == 0 && wanted > 0 {
            return Allowance::Wait;
        }
        let allowance = i64::try_from(allowed).unwrap_or(0);
        open.send_window -= allowance;
        self.send_window -= allowance;
        Allowance::Bytes(allowed)
    }

    /// Increases the flow control windows by `count` bytes. [`Session::take_allowance`] allowed
    /// these bytes, but the caller did not send them.
    pub(crate) fn give_back(&mut self, stream: u32, count: usize) {
        let count = i64::try_from(count).unwrap_or(0);
        if let Some(open) = self.streams.get_mut(&stream) {
            open.send_window = (open.send_window + count).min(MAX_WINDOW);
        }
        self.send_window = (self.send_window + count).min(MAX_WINDOW);
    }

    /// Closes the server's half of the stream. Returns false if this half was already closed.
    pub fn close(&mut self, stream: u32) -> bool {
        let Some(open) = self.streams.get_mut(&stream).filter(|open| !open.sent_fin) else {
            return false;
        };
        open.sent_fin = true;
        if open.received_fin {
            self.streams.remove(&stream);
        }
        true
    }

    /// Resets the stream if it is still open.
    pub fn reset(&mut self, stream: u32, output: &mut Vec<u8>) {
        if self.streams.remove(&stream).is_some() {
            frame::reset(output, stream, ResetStatus::Cancel);
        }
    }

    /// Records that the server has processed `count` bytes of a stream's data. The client may then
    /// send `count` more bytes.
    pub fn consumed(&mut self, stream: u32, count: usize, output: &mut Vec<u8>) {
        if let Some(open) = self.streams.get_mut(&stream) {
            open.unreported = open
                .unreported
                .saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
            if open.unreported >= STREAM_WINDOW / 2 && !open.received_fin {
                frame::window_update(output, stream, open.unreported);
                open.unreported = 0;
            }
        }
        self.report_session(count, output);
    }

    fn report_session(&mut self, count: usize, output: &mut Vec<u8>) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.unreported = self.unreported.saturating_add(count);
        if self.unreported >= SESSION_WINDOW / 2 {
            frame::window_update(output, 0, self.unreported);
            self.unreported = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(session: &mut Session, stream: u32) -> Result<Option<Event>, SpdyError> {
        let frame = Frame::SynStream {
            stream,
            fin: false,
            unidirectional: false,
            headers: Headers::default(),
        };
        session.receive(frame, &mut Vec::new())
    }

    fn data(stream: u32, fin: bool) -> Frame {
        Frame::Data {
            stream,
            fin,
            bytes: Bytes::from_static(b"x"),
        }
    }

    #[test]
    fn each_half_of_a_stream_closes_independently() {
        let (mut session, mut output) = (Session::default(), Vec::new());
        open(&mut session, 1).unwrap();
        session.receive(data(1, true), &mut output).unwrap();
        assert_eq!(session.take_allowance(1, 9), Allowance::Bytes(9));
        assert!(session.close(1));
        assert!(!session.close(1));
        assert_eq!(session.take_allowance(1, 9), Allowance::Closed);
        assert!(session.streams.is_empty());
        // The server sends no answer to late data for a stream that has been closed.
        output.clear();
        assert_eq!(session.receive(data(1, false), &mut output), Ok(None));
        assert!(output.is_empty());
        // If the client sends data for a stream that was never opened, the server resets this
        // stream.
        session.receive(data(9, false), &mut output).unwrap();
        assert!(!output.is_empty());
    }

    #[test]
    fn stream_numbers_are_odd_and_increase() {
        let mut session = Session::default();
        assert_eq!(open(&mut session, 2), Err(SpdyError::StreamId(2)));
        open(&mut session, 3).unwrap();
        assert_eq!(open(&mut session, 3), Err(SpdyError::StreamId(3)));
        assert_eq!(open(&mut session, 1), Err(SpdyError::StreamId(1)));
    }

    #[test]
    fn data_after_the_end_of_a_stream_resets_the_stream() {
        let mut session = Session::default();
        open(&mut session, 1).unwrap();
        let mut output = Vec::new();
        session.receive(data(1, true), &mut output).unwrap();
        let reset = session.receive(data(1, false), &mut output);
        assert_eq!(reset, Ok(Some(Event::Reset { stream: 1 })));
    }

    #[test]
    fn more_streams_than_the_limit_are_refused() {
        let mut session = Session::default();
        for number in 0..MAX_STREAMS as u32 {
            assert!(open(&mut session, number * 2 + 1).unwrap().is_some());
        }
        let id = MAX_STREAMS as u32 * 2 + 1;
        assert_eq!(open(&mut session, id), Ok(None));
    }

    #[test]
    fn windows_apply_only_to_a_client_with_flow_control() {
        let (mut session, mut output) = (Session::default(), Vec::new());
        open(&mut session, 1).unwrap();
        assert_eq!(
            session.take_allowance(1, 10 << 20),
            Allowance::Bytes(10 << 20)
        );

        let mut session = Session::default();
        let settings = Frame::Settings {
            initial_window: Some(100),
        };
        session.receive(settings, &mut output).unwrap();
        open(&mut session, 1).unwrap();
        assert_eq!(session.take_allowance(1, 60), Allowance::Bytes(60));
        assert_eq!(session.take_allowance(1, 60), Allowance::Bytes(40));
        assert_eq!(session.take_allowance(1, 60), Allowance::Wait);
        assert_eq!(session.take_allowance(1, 0), Allowance::Bytes(0));
        let update = Frame::WindowUpdate {
            stream: 1,
            delta: 5,
        };
        session.receive(update, &mut output).unwrap();
        assert_eq!(session.take_allowance(1, 60), Allowance::Bytes(5));
        session.give_back(1, 3);
        assert_eq!(session.take_allowance(1, 60), Allowance::Bytes(3));
    }

    #[test]
    fn a_window_beyond_the_maximum_ends_the_stream_or_the_session() {
        let mut session = Session::default();
        open(&mut session, 1).unwrap();
        let update = |stream| Frame::WindowUpdate {
            stream,
            delta: 0x7fff_ffff,
        };
        let mut output = Vec::new();
        let reset = session.receive(update(1), &mut output);
        assert_eq!(reset, Ok(Some(Event::Reset { stream: 1 })));
        let ended = session.receive(update(0), &mut output);
        assert_eq!(ended, Err(SpdyError::Window));
    }

    #[test]
    fn consumed_data_is_reported_to_the_client_after_half_a_window() {
        let mut session = Session::default();
        open(&mut session, 1).unwrap();
        let mut output = Vec::new();
        session.consumed(1, STREAM_WINDOW as usize / 2 - 1, &mut output);
        assert!(output.is_empty());
        session.consumed(1, 1, &mut output);
        assert_eq!(output.len(), 16);
    }
}
