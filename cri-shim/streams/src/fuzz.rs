//! Fuzz targets for what a streaming client sends. `tests/fuzz` runs them.

use ::bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use crate::remotecommand::ResizeParser;
use crate::spdy;
use crate::upgrade::{Purpose, negotiate};
use crate::websocket::{self, Codec};

/// The name and the function of a fuzz target.
pub type FuzzTarget = (&'static str, fn(&[u8]));

/// The fuzz targets in this crate.
pub const TARGETS: &[FuzzTarget] = &[
    ("resize", resize),
    ("spdy", spdy_connection),
    ("upgrade", upgrade),
    ("websocket", websocket),
];

/// Parses the data of the resize channel in pieces. The first byte of `input` is the length of the
/// pieces.
fn resize(input: &[u8]) {
    let Some((&size, bytes)) = input.split_first() else {
        return;
    };
    let mut parser = ResizeParser::default();
    for piece in bytes.chunks(usize::from(size).max(1)) {
        let _ = parser.parse(piece);
    }
}

/// Negotiates a protocol with the headers of a request. Each line of `input` is one header.
fn upgrade(input: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in input.split(|byte| *byte == b'\n').take(200) {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = HeaderName::from_bytes(parts.next().unwrap_or_default());
        let value = HeaderValue::from_bytes(parts.next().unwrap_or_default().trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    for purpose in [Purpose::Command, Purpose::PortForward] {
        match negotiate(purpose, &headers) {
            Ok((_, response)) => assert_eq!(response.status(), 101),
            Err(response) => assert!(response.status().is_client_error()),
        }
    }
}

/// Reads the messages of a WebSocket. The first byte of `input` selects the encoding of the
/// channels.
fn websocket(input: &[u8]) {
    let Some((&first, bytes)) = input.split_first() else {
        return;
    };
    let codec = match first % 3 {
        0 => Codec::Binary { close: false },
        1 => Codec::Binary { close: true },
        _ => Codec::Base64,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(async {
        let read = Bytes::copy_from_slice(bytes);
        let mut stream = websocket::serve(tokio::io::empty(), read).await;
        while let Some(Ok(message)) = stream.next().await {
            let length = message.len();
            if let Ok(Some(websocket::ChannelMessage::Data(_, data))) =
                codec.decode(message.into_data())
            {
                assert!(data.len() < length);
            }
        }
    });
}

/// Parses `input` as the bytes that a client sends on a connection. The first byte of `input` is
/// the length of the pieces in which the other bytes arrive. For each parsed frame, calls the
/// session's functions in the order in which the streaming server calls them. No call may panic,
/// and the used memory must remain limited.
fn spdy_connection(input: &[u8]) {
    let Some((&size, bytes)) = input.split_first() else {
        return;
    };
    let mut decoder = spdy::Decoder::default();
    let mut session = spdy::Session::default();
    let mut buffer = BytesMut::new();
    for piece in bytes.chunks(usize::from(size).max(1)) {
        buffer.extend_from_slice(piece);
        loop {
            let frame = match decoder.decode(&mut buffer) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(_) => return,
            };
            let mut output = Vec::new();
            let Ok(event) = session.receive(frame, &mut output) else {
                return;
            };
            match event {
                Some(spdy::Event::Opened {
                    stream, headers, ..
                }) => {
                    let _ = (headers.get("streamtype"), headers.get("port"));
                    let _ = session.take_allowance(stream, 1000);
                    if stream % 8 == 7 {
                        session.reset(stream, &mut output);
                    }
                }
                Some(spdy::Event::Data { stream, bytes, fin }) => {
                    session.consumed(stream, bytes.len(), &mut output);
                    let _ = session.take_allowance(stream, bytes.len());
                    if fin {
                        session.close(stream);
                    }
                }
                Some(spdy::Event::Reset { stream }) => assert!(!session.close(stream)),
                Some(spdy::Event::GoAway) | None => {}
            }
            // The session's answer to one frame is short, and parsing the answer causes no panic.
            assert!(output.len() < 256);
            let (mut ours, mut output) = (spdy::Decoder::default(), BytesMut::from(&*output));
            ours.expect_no_headers();
            while let Ok(Some(_)) = ours.decode(&mut output) {}
        }
        // The buffer keeps at most one incomplete control frame.
        assert!(buffer.len() <= spdy::MAX_CONTROL_BYTES + 8 + piece.len());
    }
}
