//! Fuzz targets for what a streaming client sends. `tests/fuzz` runs them.

use ::bytes::BytesMut;

use crate::spdy;

/// The names and functions of the fuzz targets in this crate.
pub const TARGETS: &[(&str, fn(&[u8]))] = &[("spdy", spdy_connection)];

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
