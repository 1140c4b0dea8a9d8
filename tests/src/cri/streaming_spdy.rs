//! Clients of every age: the versions of remotecommand over SPDY, of which crictl speaks the last.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use rrun_proto::v1::ExecRequest;

use crate::cri::calls::Calls;
use crate::cri::streaming::waiting;
use crate::support::machine::{Result, deadline};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, on_a_node};
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[
    test!(every_version_of_remotecommand_is_spoken, A_NODE),
    test!(
        a_new_size_does_not_wait_behind_what_nobody_reads,
        A_NODE,
        Need::RrunCri
    ),
    test!(a_terminal_is_resized_since_version_3, A_NODE),
];

const VERSIONS: [&str; 4] = [
    "channel.k8s.io",
    "v2.channel.k8s.io",
    "v3.channel.k8s.io",
    "v4.channel.k8s.io",
];

/// The flag of a stream's last frame.
pub const FIN: u8 = 1;

/// A SPDY/3.1 client, as far as one exec or one forwarded connection needs it.
pub struct Client {
    stream: TcpStream,
    /// Each stream's number by what it is for.
    opened: BTreeMap<&'static str, u32>,
}

impl Client {
    pub fn upgraded(url: &str, version: &str) -> Result<Self> {
        let (host, path) = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split_once('/'))
            .ok_or(format!("not a URL: {url}"))?;
        let mut stream = TcpStream::connect(host)?;
        stream.set_read_timeout(Some(deadline()))?;
        // The first clients named no version.
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
        ensure!(head.starts_with("http/1.1 101"), "the upgrade: {head}");
        let named = named.trim_end().to_ascii_lowercase();
        ensure!(head.contains(&named), "not {version}: {head}");
        Ok(Client {
            stream,
            opened: BTreeMap::new(),
        })
    }

    /// SYN_STREAM. Its headers are a piece of one zlib stream, which need not compress anything
    /// (RFC 1951, section 3.2.4).
    pub fn open(&mut self, kind: &'static str) -> Result {
        self.open_with(kind, &[])
    }

    /// As [`Client::open`], with more headers; their names in the order of the alphabet.
    pub fn open_with(&mut self, kind: &'static str, more: &[(&str, &str)]) -> Result {
        let mut headers = u32::try_from(more.len() + 1)?.to_be_bytes().to_vec();
        let more = more.iter().flat_map(|(name, value)| [*name, *value]);
        for text in more.chain(["streamtype", kind]) {
            headers.extend_from_slice(&u32::try_from(text.len())?.to_be_bytes());
            headers.extend_from_slice(text.as_bytes());
        }
        let id = 2 * u32::try_from(self.opened.len())? + 1;
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

    pub fn sends(&mut self, kind: &str, flags: u8, data: &[u8]) -> Result {
        let id = self.opened.get(kind).ok_or(format!("no stream {kind}"))?;
        self.frame(id.to_be_bytes(), flags, data)
    }

    pub fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// Reads until the server has closed all but stdin and resize: what came on each stream.
    pub fn all(&mut self) -> Result<BTreeMap<&'static str, String>> {
        self.until(|_| false)
    }

    /// As [`Client::all`], or until what has come is enough.
    pub fn until(
        &mut self,
        enough: impl Fn(&BTreeMap<&'static str, String>) -> bool,
    ) -> Result<BTreeMap<&'static str, String>> {
        let mut came: BTreeMap<&'static str, String> = BTreeMap::new();
        let mut open: Vec<&str> = self.opened.keys().copied().collect();
        open.retain(|kind| !matches!(*kind, "stdin" | "resize"));
        // Of everything; what comes now and then never lets a single read fail.
        let give_up = Instant::now() + 10 * deadline();
        while !open.is_empty() && !enough(&came) {
            ensure!(
                Instant::now() < give_up,
                "with {open:?} open and {came:?} come"
            );
            let mut head = [0; 8];
            self.stream
                .read_exact(&mut head)
                .map_err(|error| format!("with {open:?} open and {came:?} come: {error}"))?;
            let [a, b, c, d, flags, x, y, z] = head;
            let mut body = vec![0; usize::try_from(u32::from_be_bytes([0, x, y, z]))?];
            self.stream.read_exact(&mut body)?;
            if a & 0x80 != 0 {
                continue;
            }
            let id = u32::from_be_bytes([a, b, c, d]);
            let kind = self.opened.iter().find(|(_, opened)| **opened == id);
            let (kind, _) = kind.ok_or(format!("data on stream {id}"))?;
            let text = came.entry(kind).or_default();
            text.push_str(&String::from_utf8_lossy(&body));
            if flags & FIN != 0 {
                open.retain(|open| open != kind);
            }
        }
        Ok(came)
    }
}

fn exec_url(calls: &Calls, id: &str, script: &str, tty: bool) -> Result<String> {
    let mut runtime = calls.runtime();
    let request = ExecRequest {
        container_id: id.to_owned(),
        cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    let answer = calls.wait(async move { runtime.exec(request).await })??;
    Ok(answer.into_inner().url)
}

fn every_version_of_remotecommand_is_spoken() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "versions")?;
        let calls = Calls::new(node)?;
        for version in ["", VERSIONS[0], VERSIONS[1], VERSIONS[2], VERSIONS[3]] {
            let url = exec_url(&calls, &id, "cat; echo err >&2; exit 3", false)?;
            let mut client = Client::upgraded(&url, version)?;
            for kind in ["error", "stdin", "stdout", "stderr"] {
                client.open(kind)?;
            }
            client.sends("stdin", FIN, b"typed")?;
            let came = client.all()?;
            let of = |kind| came.get(kind).map(String::as_str).unwrap_or_default();
            ensure_eq!(of("stdout"), "typed", "stdout by {version:?}");
            ensure_eq!(of("stderr"), "err\n", "stderr by {version:?}");
            let status = serde_json::from_str::<serde_json::Value>(of("error"));
            if version == "v4.channel.k8s.io" {
                let code = status?.pointer("/details/causes/0/message").cloned();
                ensure_eq!(code, Some("3".into()), "the code by {version}");
            } else {
                ensure!(
                    status.is_err()
                        && of("error").contains("exit code")
                        && of("error").contains('3'),
                    "the error by {version:?}: {}",
                    of("error")
                );
            }
        }
        Ok(())
    })
}

fn a_new_size_does_not_wait_behind_what_nobody_reads() -> Result {
    /// More than a terminal holds, which is 64 KiB and some.
    const TYPED: usize = 400_000;
    let script = format!(
        "stty raw -echo; echo ready; until [ \"$(stty size)\" = '31 101' ]; do sleep 0.1; done; \
         echo resized; head -c {TYPED} | wc -c"
    );
    on_a_node(|node| {
        let id = waiting(node, "unread")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &script, true)?;
        let mut client = Client::upgraded(&url, "v4.channel.k8s.io")?;
        for kind in ["error", "stdin", "stdout", "resize"] {
            client.open(kind)?;
        }
        let said = |word: &'static str| {
            move |came: &BTreeMap<&'static str, String>| {
                came.get("stdout").is_some_and(|text| text.contains(word))
            }
        };
        client.until(said("ready"))?;
        for _ in 0..TYPED / 20_000 {
            client.sends("stdin", 0, &[b'x'; 20_000])?;
        }
        client.sends("resize", 0, b"{\"Width\":101,\"Height\":31}\n")?;
        let came = client.until(said("resized"))?;
        ensure!(said("resized")(&came), "it ended: {came:?}");
        // What was typed before it is all there.
        let came = client.all()?;
        let read = came.get("stdout").map(|text| text.trim().to_owned());
        ensure_eq!(read, Some(TYPED.to_string()), "what the program read");
        Ok(())
    })
}

fn a_terminal_is_resized_since_version_3() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "sizes")?;
        let calls = Calls::new(node)?;
        for version in VERSIONS {
            let url = exec_url(&calls, &id, "read line; stty size", true)?;
            let mut client = Client::upgraded(&url, version)?;
            for kind in ["error", "stdin", "stdout"] {
                client.open(kind)?;
            }
            let resizes = version.starts_with("v3") || version.starts_with("v4");
            if resizes {
                client.open("resize")?;
                client.sends("resize", 0, b"{\"Width\":101,\"Height\":31}\n")?;
            }
            // What is typed is read after the new size.
            client.sends("stdin", 0, b"go\n")?;
            let came = client.all()?;
            let screen = came.get("stdout").map(String::as_str).unwrap_or_default();
            ensure!(
                screen.contains("go") && screen.contains("31 101") == resizes,
                "the terminal by {version}: {came:?}"
            );
        }
        Ok(())
    })
}
