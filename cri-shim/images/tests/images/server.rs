//! A registry whose behaviour a test controls. The registry can break off connections, send wrong
//! data, or refuse requests.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::build::{Failure, Image, digest};

/// One received request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    pub path: String,
    pub range: Option<u64>,
    pub authorization: Option<String>,
    /// All header lines, with names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

pub(crate) struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// The number of bytes after which the connection breaks off. The response head announces more
    /// bytes.
    pub cut: Option<usize>,
    /// The pause after each piece of the answer.
    pub slow: Duration,
    /// The number of bytes in each piece of the answer.
    pub piece: usize,
    /// True if the response head is also sent in pieces.
    pub slow_head: bool,
    /// True if the server never sends this answer. Instead, it sends heads with the status 103 until
    /// the client closes the connection.
    pub endless_heads: bool,
}

impl Answer {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Answer {
            status,
            headers: Vec::new(),
            body: body.into(),
            cut: None,
            slow: Duration::ZERO,
            piece: 16 << 10,
            slow_head: false,
            endless_heads: false,
        }
    }

    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Makes the server send one byte at a time, with a pause after each byte.
    pub(crate) fn dripping(mut self, pause: Duration) -> Self {
        (self.slow, self.piece) = (pause, 1);
        self
    }

    pub(crate) fn ranged(mut self, request: &Request) -> Self {
        if let Some(offset) = request.range {
            self.status = 206;
            self.body = self.body.split_off(offset as usize);
        }
        self
    }
}

type Seen = Arc<Mutex<Vec<Request>>>;

pub(crate) struct Server {
    address: SocketAddr,
    seen: Seen,
    closed: Arc<AtomicUsize>,
}

impl Server {
    /// Starts a server. The server runs until the test's process ends. For each request, the server
    /// calls `answer`. If `answer` returns `None`, the server sends the requested manifest or blob
    /// of `images`. The server provides each image under its name in `images` with the tag 1.
    pub(crate) fn start(
        images: &[(&str, &Image)],
        answer: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        Self::at("127.0.0.1", images, answer)
    }

    /// Starts a server at another address of this machine.
    pub(crate) fn at(
        address: &str,
        images: &[(&str, &Image)],
        answer: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let listener = TcpListener::bind((address, 0))?;
        let address = listener.local_addr()?;
        let mut content = HashMap::new();
        for (name, image) in images {
            for blob in &image.blobs {
                content.insert(format!("/v2/{name}/blobs/{}", digest(blob)), blob.clone());
            }
            let manifest = image.blobs.last().ok_or("the image has no manifest")?;
            for target in ["1", image.manifest.as_str()] {
                content.insert(format!("/v2/{name}/manifests/{target}"), manifest.clone());
            }
        }
        let seen = Seen::default();
        let (content, answer) = (Arc::new(content), Arc::new(answer));
        let log = Arc::clone(&seen);
        let closed = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&closed);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (content, answer, log) = (content.clone(), answer.clone(), log.clone());
                let count = Arc::clone(&count);
                std::thread::spawn(move || {
                    let Some(request) = read(&stream) else {
                        return;
                    };
                    if let Ok(mut log) = log.lock() {
                        log.push(request.clone());
                    }
                    let path = request.path.split('?').next().unwrap_or_default();
                    let answer = answer(&request).unwrap_or_else(|| match content.get(path) {
                        Some(body) => Answer::new(200, body.clone()).ranged(&request),
                        None => Answer::new(
                            404,
                            r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
                        ),
                    });
                    let _ = write(stream, &answer);
                    count.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        Ok(Server {
            address,
            seen,
            closed,
        })
    }

    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen
            .lock()
            .map(|seen| seen.clone())
            .unwrap_or_default()
    }

    /// Returns the number of requests whose connections are still open.
    pub(crate) fn open(&self) -> usize {
        let closed = self.closed.load(Ordering::Relaxed);
        self.seen().len().saturating_sub(closed)
    }

    pub(crate) fn count(&self, part: &str) -> usize {
        self.seen().iter().filter(|r| r.path.contains(part)).count()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut request = Request::default();
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    reader.read_line(&mut first).ok()?;
    request.path = first.split(' ').nth(1)?.to_owned();
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        let name = name.to_ascii_lowercase();
        request
            .headers
            .push((name.clone(), value.trim().to_owned()));
        match name.as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "range" => {
                let start = value.trim().strip_prefix("bytes=")?.strip_suffix('-')?;
                request.range = start.parse().ok();
            }
            "authorization" => request.authorization = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    reader.take(length).read_to_string(&mut request.body).ok()?;
    Some(request)
}

fn write(mut stream: TcpStream, answer: &Answer) -> std::io::Result<()> {
    if answer.endless_heads {
        // A debug build needs more than ten seconds for as many shorter heads as it reads at once.
        let head = format!("HTTP/1.1 103 E\r\nLink: {}\r\n\r\n", "a".repeat(200));
        let heads = head.repeat(5000).into_bytes();
        loop {
            stream.write_all(&heads)?;
        }
    }
    let mut head = format!(
        "HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n",
        answer.status,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    let end = answer
        .cut
        .unwrap_or(answer.body.len())
        .min(answer.body.len());
    let mut send = |bytes: &[u8], slow: Duration| {
        for piece in bytes.chunks(if slow.is_zero() {
            16 << 10
        } else {
            answer.piece
        }) {
            stream.write_all(piece)?;
            if !slow.is_zero() {
                std::thread::sleep(slow);
            }
        }
        Ok(())
    };
    if answer.slow_head {
        send(head.as_bytes(), answer.slow)?
    } else {
        send(head.as_bytes(), Duration::ZERO)?
    }
    send(&answer.body[..end], answer.slow)
}
