// Included by the fuzz target and by tests/spdy.rs, which know `spdy` by different ways.

/// Takes `input` as a connection's bytes, in pieces of the length that its first byte says, and
/// does with them what the streaming server does. Nothing may panic, and memory is bounded.
fn exercise(input: &[u8]) {
    let Some((&size, bytes)) = input.split_first() else {
        return;
    };
    let mut decoder = spdy::Decoder::default();
    let mut session = spdy::Session::default();
    let mut buffer = bytes::BytesMut::new();
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
                Some(spdy::Event::Opened { stream, headers, .. }) => {
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
            // One frame has a short answer; what we write is well-formed.
            assert!(output.len() < 256);
            let (mut ours, mut output) = (spdy::Decoder::default(), bytes::BytesMut::from(&*output));
            ours.expect_no_headers();
            while let Ok(Some(_)) = ours.decode(&mut output) {}
        }
        // A control frame at most waits for its end.
        assert!(buffer.len() <= spdy::MAX_CONTROL_BYTES + 8 + piece.len());
    }
}
