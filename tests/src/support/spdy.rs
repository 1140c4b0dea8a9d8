//! A client for streams over SPDY/3.1. The client builds the frames itself, without a library.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use crate::ensure;
use crate::support::machine::{Result, deadline};

/// The SPDY flag FLAG_FIN, which marks a stream's last frame.
pub(crate) const FIN: u8 = 1;

/// A SPDY/3.1 client with the features that one exec session or one forwarded connection needs.
pub(crate) struct SpdyClient {
    stream: TcpStream,
    /// The SPDY stream id of each stream type.
    opened: BTreeMap<&'static str, u32>,
    /// The SPDY stream id of the next stream.
    next: u32,
}

impl SpdyClient {
    pub(crate) fn upgraded(url: &str, version: &str) -> Result<Self> {
        let (host, path) = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split_once('/'))
            .ok_or(format!("{url} is not an http URL"))?;
        let mut stream = TcpStream::connect(host)?;
        stream.set_read_timeout(Some(deadline()))?;
        // If `version` is empty, the client sends no version header, like the first versions of
        // kubectl.
        let named = match version {
            "" => String::new(),
            version => format!("X-Stream-Protocol-Version: {version}\r\n"),
        };
        write!(
            stream,
            "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n\
             Upgrade: SPDY/3.1\r\nContent-Length: 0\r\n{named}\r\n"
        )?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.extend_from_slice(&byte);
        }
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        ensure!(
            head.starts_with("http/1.1 101"),
            "the server refused the upgrade to SPDY/3.1: {head}"
        );
        let named = named.trim_end().to_ascii_lowercase();
        ensure!(
            head.contains(&named),
            "the server did not choose the protocol version {version:?}; the head of the server's response: {head}"
        );
        Ok(SpdyClient {
            stream,
            opened: BTreeMap::new(),
            next: 1,
        })
    }

    /// Opens a stream with SYN_STREAM. The headers of all frames form one zlib stream. This client
    /// does not compress the headers, but writes them as stored blocks (RFC 1951, section 3.2.4).
    pub(crate) fn open(&mut self, kind: &'static str) -> Result {
        self.open_with(kind, &[])
    }

    /// Like [`SpdyClient::open`], but with the additional headers `more`. The names of these
    /// headers must be in alphabetical order.
    pub(crate) fn open_with(&mut self, kind: &'static str, more: &[(&str, &str)]) -> Result {
        let mut headers = u32::try_from(more.len() + 1)?.to_be_bytes().to_vec();
        let more = more.iter().flat_map(|(name, value)| [*name, *value]);
        for text in more.chain(["streamtype", kind]) {
            headers.extend_from_slice(&u32::try_from(text.len())?.to_be_bytes());
            headers.extend_from_slice(text.as_bytes());
        }
        let id = self.next;
        self.next += 2;
        let length = u16::try_from(headers.len())?;
        let mut body = id.to_be_bytes().to_vec();
        body.extend_from_slice(&[0; 6]);
        if self.opened.is_empty() {
            body.extend_from_slice(&[0x78, 0x01]);
        }
        body.push(0);
        body.extend_from_slice(&length.to_le_bytes());
        body.extend_from_slice(&(!length).to_le_bytes());
        body.extend_from_slice(&headers);
        self.opened.insert(kind, id);
        self.frame([0x80, 3, 0, 1], 0, &body)
    }

    fn frame(&mut self, head: [u8; 4], flags: u8, body: &[u8]) -> Result {
        let length = u32::try_from(body.len())? | u32::from(flags) << 24;
        let frame = [&head, &length.to_be_bytes(), body].concat();
        Ok(self.stream.write_all(&frame)?)
    }

    pub(crate) fn sends(&mut self, kind: &str, flags: u8, data: &[u8]) -> Result {
        let id = self
            .opened
            .get(kind)
            .ok_or(format!("the client has not opened the stream {kind}"))?;
        self.frame(id.to_be_bytes(), flags, data)
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// Reads until the server has closed all streams except stdin and resize. Returns the data of
    /// each stream.
    pub(crate) fn all(&mut self) -> Result<BTreeMap<&'static str, String>> {
        self.until(|_| false)
    }

    /// Like [`SpdyClient::all`], but also stops when `enough` returns true for the received data.
    pub(crate) fn until(
        &mut self,
        enough: impl Fn(&BTreeMap<&'static str, String>) -> bool,
    ) -> Result<BTreeMap<&'static str, String>> {
        let mut came: BTreeMap<&'static str, String> = BTreeMap::new();
        let mut open: Vec<&str> = self.opened.keys().copied().collect();
        open.retain(|kind| !matches!(*kind, "stdin" | "resize"));
        // This deadline applies to all reads together. If a server sends a little data from time to
        // time, no single read times out. Without the deadline, the test could then wait forever.
        let give_up = Instant::now() + 10 * deadline();
        while !open.is_empty() && !enough(&came) {
            ensure!(
                Instant::now() < give_up,
                "timeout: the streams {open:?} are still open, and the client received {came:?}"
            );
            let mut head = [0; 8];
            self.stream.read_exact(&mut head).map_err(|error| {
                format!(
                    "cannot read from the server: {error} (the streams {open:?} are still open, and the client has received {came:?})"
                )
            })?;
            let [a, b, c, d, flags, x, y, z] = head;
            let mut body = vec![0; usize::try_from(u32::from_be_bytes([0, x, y, z]))?];
            self.stream.read_exact(&mut body)?;
            if a & 0x80 != 0 {
                continue;
            }
            let id = u32::from_be_bytes([a, b, c, d]);
            let kind = self.opened.iter().find(|(_, opened)| **opened == id);
            let (kind, _) =
                kind.ok_or(format!("the server sent data on the unknown stream {id}"))?;
            let text = came.entry(kind).or_default();
            text.push_str(&String::from_utf8_lossy(&body));
            if flags & FIN != 0 {
                open.retain(|open| open != kind);
            }
        }
        Ok(came)
    }
}
