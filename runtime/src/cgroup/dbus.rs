//! The part of D-Bus that rrun needs to start and stop a unit through systemd.
//!
//! A [`Bus`] is a blocking connection that makes one method call at a time. Each method call has a
//! deadline. rrun does not use a D-Bus library. Such a library starts an executor and threads, and
//! would delay the start of every container. The D-Bus Specification, "Message Protocol", defines
//! the wire format. org.freedesktop.systemd1(5) describes systemd's methods.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result, refuse};
use crate::log;

/// The time limit for systemd to answer a D-Bus call or to finish a job. systemd uses the same time
/// limit for its own D-Bus calls.
const REPLY_TIMEOUT: Duration = Duration::from_secs(25);
/// The time after which rrun logs a warning that systemd has not finished a job.
const REPLY_WARNING_DELAY: Duration = Duration::from_secs(10);
/// The size limit for the header fields and for the body of a received message. The D-Bus protocol
/// allows messages of up to 128 MiB.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

const CALL: u8 = 1;
const RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// The destination, path and interface of systemd's manager object.
const MANAGER: (&str, &str, &str) = (
    "org.freedesktop.systemd1",
    "/org/freedesktop/systemd1",
    "org.freedesktop.systemd1.Manager",
);

/// The value of a unit's property, with the D-Bus type of the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BusValue {
    Bool(bool),
    I32(i32),
    U32(u32),
    I64(i64),
    U64(u64),
    Text(String),
    Texts(Vec<String>),
    Bytes(Vec<u8>),
    U32s(Vec<u32>),
    Pairs(Vec<(String, String)>),
    Rates(Vec<(String, u64)>),
}

pub(crate) type Property = (String, BusValue);

impl BusValue {
    fn signature(&self) -> &'static str {
        match self {
            BusValue::Bool(_) => "b",
            BusValue::I32(_) => "i",
            BusValue::U32(_) => "u",
            BusValue::I64(_) => "x",
            BusValue::U64(_) => "t",
            BusValue::Text(_) => "s",
            BusValue::Texts(_) => "as",
            BusValue::Bytes(_) => "ay",
            BusValue::U32s(_) => "au",
            BusValue::Pairs(_) => "a(ss)",
            BusValue::Rates(_) => "a(st)",
        }
    }
}

/// The bytes of a D-Bus message that is being built, in little-endian order.
#[derive(Default)]
struct MessageWriter(Vec<u8>);

impl MessageWriter {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.align(8);
        self.0.extend(value.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u32(text.len() as u32);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.0.push(text.len() as u8);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// Appends an array. The length in front of the array does not include the padding before the
    /// array's first element.
    fn array<T>(&mut self, items: &[T], alignment: usize, put: impl Fn(&mut MessageWriter, &T)) {
        self.u32(0);
        let length_at = self.0.len() - 4;
        self.align(alignment);
        let start = self.0.len();
        for item in items {
            put(self, item);
        }
        let length = (self.0.len() - start) as u32;
        if let Some(place) = self.0.get_mut(length_at..length_at + 4) {
            place.copy_from_slice(&length.to_le_bytes());
        }
    }

    fn variant(&mut self, value: &BusValue) {
        self.signature(value.signature());
        match value {
            BusValue::Bool(value) => self.u32(u32::from(*value)),
            BusValue::I32(value) => self.u32(*value as u32),
            BusValue::U32(value) => self.u32(*value),
            BusValue::I64(value) => self.u64(*value as u64),
            BusValue::U64(value) => self.u64(*value),
            BusValue::Text(text) => self.text(text),
            BusValue::Texts(all) => self.array(all, 4, |writer, text| writer.text(text)),
            BusValue::Bytes(all) => self.array(all, 1, |writer, byte| writer.0.push(*byte)),
            BusValue::U32s(all) => self.array(all, 4, |writer, value| writer.u32(*value)),
            BusValue::Pairs(all) => self.array(all, 8, |writer, (first, second)| {
                writer.align(8);
                writer.text(first);
                writer.text(second);
            }),
            BusValue::Rates(all) => self.array(all, 8, |writer, (first, second)| {
                writer.align(8);
                writer.text(first);
                writer.u64(*second);
            }),
        }
    }
}

/// The arguments of a D-Bus method call.
#[derive(Default)]
pub(crate) struct Body {
    writer: MessageWriter,
    signature: String,
}

impl Body {
    pub(crate) fn text(mut self, text: &str) -> Body {
        self.signature.push('s');
        self.writer.text(text);
        self
    }

    pub(crate) fn flag(mut self, value: bool) -> Body {
        self.signature.push('b');
        self.writer.u32(u32::from(value));
        self
    }

    pub(crate) fn properties(mut self, properties: &[Property]) -> Body {
        self.signature.push_str("a(sv)");
        self.writer.array(properties, 8, |writer, (name, value)| {
            writer.align(8);
            writer.text(name);
            writer.variant(value);
        });
        self
    }

    /// Appends an empty list for the auxiliary units that StartTransientUnit can create.
    pub(crate) fn no_units(mut self) -> Body {
        self.signature.push_str("a(sa(sv))");
        self.writer.array::<()>(&[], 8, |_, ()| {});
        self
    }
}

/// A reader of the bytes of a received D-Bus message. The methods of the reader return `None` if
/// the bytes end too early.
struct MessageReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> MessageReader<'a> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(length)?)?;
        self.at += length;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.align(4);
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn text(&mut self) -> Option<&'a str> {
        let length = self.u32()? as usize;
        let text = std::str::from_utf8(self.take(length)?).ok()?;
        self.take(1)?;
        Some(text)
    }

    fn signature(&mut self) -> Option<&'a str> {
        let length = *self.take(1)?.first()? as usize;
        let text = std::str::from_utf8(self.take(length)?).ok()?;
        self.take(1)?;
        Some(text)
    }
}

/// A received D-Bus message, reduced to the parts that rrun uses.
struct BusMessage {
    kind: u8,
    reply_to: u32,
    member: String,
    error: String,
    /// The unique name of the sender on the message bus. Empty on systemd's private socket.
    sender: String,
    body: Vec<u8>,
}

impl BusMessage {
    fn parse(header: &[u8], fields: &[u8], body: Vec<u8>) -> Option<BusMessage> {
        let mut message = BusMessage {
            kind: *header.get(1)?,
            reply_to: 0,
            member: String::new(),
            error: String::new(),
            sender: String::new(),
            body,
        };
        let mut reader = MessageReader {
            bytes: fields,
            at: 0,
        };
        while reader.at < fields.len() {
            // Each header field begins at a multiple of eight bytes within the message.
            reader.align(8);
            let code = *reader.take(1)?.first()?;
            match (code, reader.signature()?) {
                (3, "s") => message.member = reader.text()?.to_owned(),
                (4, "s") => message.error = reader.text()?.to_owned(),
                (7, "s") => message.sender = reader.text()?.to_owned(),
                (5, "u") => message.reply_to = reader.u32()?,
                (_, "s" | "o") => {
                    reader.text()?;
                }
                (_, "g") => {
                    reader.signature()?;
                }
                (_, "u") => {
                    reader.u32()?;
                }
                _ => return None,
            }
        }
        Some(message)
    }

    fn reader(&self) -> MessageReader<'_> {
        MessageReader {
            bytes: &self.body,
            at: 0,
        }
    }

    /// Returns the first argument in the message's body, if the argument is a string or an object
    /// path.
    fn first_text(&self) -> Option<String> {
        self.reader().text().map(str::to_owned)
    }
}

/// Parses `input` as a D-Bus message: sixteen bytes of the fixed header, one byte with the length of
/// the header fields, and the fields and the body.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_message(input: &[u8]) {
    let (Some(header), Some(length), Some(rest)) =
        (input.get(..16), input.get(16), input.get(17..))
    else {
        return;
    };
    let (fields, body) = rest.split_at(usize::from(*length).min(rest.len()));
    if let Some(message) = BusMessage::parse(header, fields, body.to_vec()) {
        let _ = message.first_text();
        let mut reader = message.reader();
        while reader.signature().is_some() && reader.text().is_some() {}
    }
}

/// An error that systemd sent in reply to a method call.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// The D-Bus name of the error, such as `org.freedesktop.systemd1.NoSuchUnit`.
    pub(crate) name: String,
    pub(crate) text: String,
}

impl Refusal {
    pub(crate) fn is(&self, name: &str) -> bool {
        self.name
            .strip_prefix("org.freedesktop.systemd1.")
            .is_some_and(|own| own == name)
    }
}

/// The program at the other end of a [`Bus`].
#[derive(PartialEq, Eq)]
enum Peer {
    /// systemd itself, at its private socket.
    Systemd,
    /// A message bus. Every user of the node can send messages to rrun through the system's bus.
    MessageBus {
        /// The unique name of systemd. `None` until systemd has replied.
        systemd: Option<String>,
    },
}

/// A connection to the systemd instance that manages the units of rrun's caller.
pub(crate) struct Bus {
    stream: UnixStream,
    serial: u32,
    peer: Peer,
    /// The finished jobs, each with its result, in the order in which systemd reported them as
    /// finished.
    ended: VecDeque<(String, String)>,
}

impl Bus {
    /// Connects to systemd's private socket, or to the message bus if the private socket is not
    /// available. If rrun's caller is not root, this function connects to the user's own systemd.
    ///
    /// # Errors
    /// Fails if systemd is not running, or if systemd rejects the user of rrun's caller.
    pub(crate) fn connect() -> Result<Bus> {
        let user = !rustix::process::geteuid().is_root();
        let run = if user {
            let directory = std::env::var_os("XDG_RUNTIME_DIR").ok_or_else(|| {
                Error::new("--systemd-cgroup: XDG_RUNTIME_DIR, the directory of the user's systemd socket, is not set")
            })?;
            PathBuf::from(directory)
        } else {
            PathBuf::from("/run")
        };
        let own = run.join("systemd/private");
        let shared = if user {
            run.join("bus")
        } else {
            run.join("dbus/system_bus_socket")
        };
        let doing =
            |path: &Path| format!("--systemd-cgroup: connect to systemd at {}", path.display());
        match UnixStream::connect(&own) {
            Ok(stream) => Bus::authenticate(stream, Peer::Systemd)
                .map_err(|error| error.while_doing(doing(&own))),
            Err(refused) => {
                let Ok(stream) = UnixStream::connect(&shared) else {
                    return Err(refused).doing(|| doing(&own));
                };
                Bus::authenticate(stream, Peer::MessageBus { systemd: None })
                    .and_then(Bus::register)
                    .map_err(|error| error.while_doing(doing(&shared)))
            }
        }
    }

    /// Authenticates rrun with the mechanism EXTERNAL. The server reads the client's user id from
    /// the socket. The client also sends its user id, with each decimal digit as a hexadecimal
    /// ASCII code. See the D-Bus Specification, "Authentication Protocol".
    fn authenticate(stream: UnixStream, peer: Peer) -> Result<Bus> {
        let mut bus = Bus {
            stream,
            serial: 0,
            peer,
            ended: VecDeque::new(),
        };
        let mut hello = b"\0AUTH EXTERNAL ".to_vec();
        for digit in rustix::process::geteuid().as_raw().to_string().bytes() {
            hello.extend(format!("{digit:02x}").bytes());
        }
        // rrun sends BEGIN together with AUTH, and sends the first method call later. If a single
        // read(2) returns both BEGIN and a method call, systemd does not process the method call
        // until more bytes arrive.
        hello.extend(b"\r\nBEGIN\r\n");
        bus.stream.write_all(&hello).doing(|| "authenticate")?;
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut reply = Vec::new();
        while !reply.ends_with(b"\r\n") && reply.len() < 512 {
            let mut byte = [0u8; 1];
            bus.read_exact(&mut byte, deadline)?;
            reply.extend(byte);
        }
        if !reply.starts_with(b"OK ") {
            refuse!(
                "authenticate: {}",
                String::from_utf8_lossy(&reply).trim_end()
            );
        }
        Ok(bus)
    }

    /// Registers this connection with a message bus. This function sends the required greeting
    /// (`Hello`), and subscribes to the signal JobRemoved.
    fn register(mut self) -> Result<Bus> {
        const DAEMON: (&str, &str, &str) = (
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
        );
        let match_rule = "type='signal',sender='org.freedesktop.systemd1',member='JobRemoved'";
        let refused = |refusal: Refusal| Error::new(refusal.text);
        self.call_object(DAEMON, "Hello", Body::default())?
            .map_err(refused)?;
        self.call_object(DAEMON, "AddMatch", Body::default().text(match_rule))?
            .map_err(refused)?;
        let reply = self.call_and_receive(MANAGER, "Subscribe", Body::default())?;
        if reply.kind == ERROR {
            refuse!("{}", reply.first_text().unwrap_or_default());
        }
        self.peer = Peer::MessageBus {
            systemd: Some(reply.sender),
        };
        Ok(self)
    }

    /// Calls a method of systemd's manager object. Returns the first value in the reply, or an
    /// empty string if this value is not a string.
    pub(crate) fn call(
        &mut self,
        method: &str,
        body: Body,
    ) -> Result<std::result::Result<String, Refusal>> {
        self.call_object(MANAGER, method, body)
    }

    /// Returns the value of a string property of systemd's manager object.
    pub(crate) fn property(&mut self, name: &str) -> Result<String> {
        const PROPERTIES: (&str, &str, &str) = (
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.DBus.Properties",
        );
        let body = Body::default()
            .text("org.freedesktop.systemd1.Manager")
            .text(name);
        let reply = self.call_and_receive(PROPERTIES, "Get", body)?;
        let mut reader = reply.reader();
        match (reply.kind, reader.signature()) {
            (RETURN, Some("s")) => reader.text(),
            _ => None,
        }
        .map(str::to_owned)
        .ok_or_else(|| {
            Error::new(format!(
                "read the property {name} of systemd: the reply does not contain a string"
            ))
        })
    }

    fn call_object(
        &mut self,
        object: (&str, &str, &str),
        method: &str,
        body: Body,
    ) -> Result<std::result::Result<String, Refusal>> {
        let reply = self.call_and_receive(object, method, body)?;
        let text = reply.first_text().unwrap_or_default();
        Ok(match reply.kind {
            RETURN => Ok(text),
            _ => Err(Refusal {
                name: reply.error,
                text,
            }),
        })
    }

    fn call_and_receive(
        &mut self,
        (destination, path, interface): (&str, &str, &str),
        method: &str,
        body: Body,
    ) -> Result<BusMessage> {
        self.serial += 1;
        let serial = self.serial;
        let mut message = MessageWriter(vec![b'l', CALL, 0, 1]);
        message.u32(body.writer.0.len() as u32);
        message.u32(serial);
        let fields: [(u8, &str, &str); 5] = [
            (1, "o", path),
            (2, "s", interface),
            (3, "s", method),
            (6, "s", destination),
            (8, "g", &body.signature),
        ];
        let used = if body.signature.is_empty() { 4 } else { 5 };
        message.array(
            fields.get(..used).unwrap_or_default(),
            8,
            |writer, (code, kind, text)| {
                writer.align(8);
                writer.0.push(*code);
                writer.signature(kind);
                match *kind {
                    "g" => writer.signature(text),
                    _ => writer.text(text),
                }
            },
        );
        message.align(8);
        message.0.extend(&body.writer.0);
        let doing = || format!("call the method {method} of systemd");
        self.stream.write_all(&message.0).doing(doing)?;
        let deadline = Instant::now() + REPLY_TIMEOUT;
        loop {
            let message = self
                .receive(deadline)
                .map_err(|error| error.while_doing(doing()))?;
            let Some(message) = message else { continue };
            if matches!(message.kind, RETURN | ERROR) && message.reply_to == serial {
                return Ok(message);
            }
            self.note_ended_job(&message);
        }
    }

    fn note_ended_job(&mut self, message: &BusMessage) {
        let is_systemd = match &self.peer {
            Peer::Systemd => true,
            Peer::MessageBus { systemd } => systemd.as_ref() == Some(&message.sender),
        };
        if is_systemd && message.kind == SIGNAL && message.member == "JobRemoved" {
            let mut reader = message.reader();
            let ended = (|| {
                reader.u32()?;
                let job = reader.text()?.to_owned();
                reader.text()?;
                Some((job, reader.text()?.to_owned()))
            })();
            self.ended.extend(ended);
        }
    }

    /// Waits until systemd has finished a job that an earlier D-Bus call started. Returns the job's
    /// result, which is `done` on success. systemd sends the result in the signal JobRemoved.
    pub(crate) fn await_job(&mut self, job: &str, what: &str) -> Result<String> {
        let started = Instant::now();
        let deadline = started + REPLY_TIMEOUT;
        let mut warned = false;
        loop {
            while let Some((ended, result)) = self.ended.pop_front() {
                if ended == job {
                    return Ok(result);
                }
            }
            let next = if warned {
                deadline
            } else {
                started + REPLY_WARNING_DELAY
            };
            match self.receive(next) {
                Ok(Some(message)) => self.note_ended_job(&message),
                Ok(None) => {}
                Err(_) if !warned && Instant::now() >= next => {
                    warned = true;
                    log::warning(&format!(
                        "{what}: systemd has not finished the job after {} s",
                        REPLY_WARNING_DELAY.as_secs()
                    ));
                }
                Err(error) => return Err(error.while_doing(what)),
            }
        }
    }

    /// Receives a message. Returns `None` for a message that rrun cannot parse, and that another
    /// program than systemd can have sent.
    fn receive(&mut self, deadline: Instant) -> Result<Option<BusMessage>> {
        let mut header = [0u8; 16];
        self.read_exact(&mut header, deadline)?;
        let is_little_endian = header.first() == Some(&b'l');
        let number = |at: usize| {
            let bytes = header.get(at..at + 4).and_then(|it| it.try_into().ok());
            let bytes = bytes.unwrap_or_default();
            if is_little_endian {
                u32::from_le_bytes(bytes) as usize
            } else {
                u32::from_be_bytes(bytes) as usize
            }
        };
        let (body, fields) = (number(4), number(12));
        let is_short = body <= MESSAGE_BYTES_MAX && fields <= MESSAGE_BYTES_MAX;
        let length = fields.saturating_add(7) / 8 * 8 + body;
        if !is_little_endian || !is_short {
            if self.peer == Peer::Systemd {
                refuse!("systemd sent bytes that are not a D-Bus message");
            }
            self.skip(length, deadline)?;
            return Ok(None);
        }
        let mut rest = vec![0u8; length];
        self.read_exact(&mut rest, deadline)?;
        let body = rest.split_off(length - body);
        rest.truncate(fields);
        match BusMessage::parse(&header, &rest, body) {
            None if self.peer == Peer::Systemd => {
                refuse!("systemd sent a D-Bus message that rrun cannot parse")
            }
            parsed => Ok(parsed),
        }
    }

    fn skip(&mut self, mut length: usize, deadline: Instant) -> Result<()> {
        let mut skipped = vec![0u8; 64 << 10];
        while length > 0 {
            let part = length.min(skipped.len());
            self.read_exact(skipped.get_mut(..part).unwrap_or_default(), deadline)?;
            length -= part;
        }
        Ok(())
    }

    /// Fills `bytes` with data from the connection. Once the first bytes have arrived, this
    /// function waits for the remaining bytes even beyond the deadline. If this function returned
    /// earlier, rrun could not find the start of the next message.
    fn read_exact(&mut self, bytes: &mut [u8], deadline: Instant) -> Result<()> {
        let mut at = 0;
        while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
            let mut left = deadline.saturating_duration_since(Instant::now());
            if at > 0 {
                left = left.max(REPLY_WARNING_DELAY);
            } else if left.is_zero() {
                refuse!("systemd did not reply within {} s", REPLY_TIMEOUT.as_secs());
            }
            let doing = || "read systemd's reply";
            self.stream.set_read_timeout(Some(left)).doing(doing)?;
            match self.stream.read(rest) {
                Ok(0) => refuse!("systemd closed the connection"),
                Ok(read) => at += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    refuse!("systemd did not reply within {} s", REPLY_TIMEOUT.as_secs());
                }
                Err(error) => return Err(error).doing(doing),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_encoded_as_the_specification_requires() {
        let body = Body::default()
            .text("a")
            .flag(true)
            .properties(&[("B".to_owned(), BusValue::Rates(vec![("/x".to_owned(), 7)]))]);
        assert_eq!(body.signature, "sba(sv)");
        let expected: &[u8] = &[
            1, 0, 0, 0, b'a', 0, 0, 0, // "a", padded to a multiple of four bytes
            1, 0, 0, 0, // true
            40, 0, 0, 0, // the length of the array in bytes
            1, 0, 0, 0, b'B', 0, // the property's name
            5, b'a', b'(', b's', b't', b')', 0, // its type
            0, 0, 0, // padding to a multiple of four bytes
            16, 0, 0, 0, 0, 0, 0, 0, // the length of the inner array, padded to eight bytes
            2, 0, 0, 0, b'/', b'x', 0, 0, // the path
            7, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(body.writer.0, expected);
    }

    #[test]
    fn messages_that_end_early_or_have_a_wrong_length_are_rejected() {
        let mut fields = MessageWriter::default();
        fields.0.extend([5, 1, b'u', 0]);
        fields.u32(9);
        fields.align(8);
        fields.0.extend([4, 1, b's', 0]);
        fields.text("org.freedesktop.systemd1.NoSuchUnit");
        let mut body = MessageWriter::default();
        body.text("Unit x.scope not loaded.");
        let message = BusMessage::parse(&[b'l', ERROR], &fields.0, body.0.clone()).unwrap();
        assert_eq!(message.reply_to, 9);
        assert_eq!(message.error, "org.freedesktop.systemd1.NoSuchUnit");
        assert_eq!(
            message.first_text().as_deref(),
            Some("Unit x.scope not loaded.")
        );
        for length in 1..fields.0.len() {
            // Parsing must succeed if `length` is the end of a field, and fail if `length` is
            // inside a field.
            let cut = &fields.0[..length];
            let parsed = BusMessage::parse(&[b'l', ERROR], cut, Vec::new());
            assert_eq!(parsed.is_some(), length == 8, "{length}");
        }
        body.0[0] = 200;
        let wrong = BusMessage::parse(&[b'l', ERROR], &[], body.0).unwrap();
        assert_eq!(wrong.first_text(), None);
    }

    #[test]
    fn messages_of_other_programs_on_the_message_bus_are_ignored() {
        let signal = |sender: &str, result: &str| {
            let mut fields = MessageWriter::default();
            for (code, text) in [(3, "JobRemoved"), (7, sender)] {
                fields.align(8);
                fields.0.extend([code, 1, b's', 0]);
                fields.text(text);
            }
            let mut body = MessageWriter::default();
            body.u32(1);
            for text in ["/job/1", "x.scope", result] {
                body.text(text);
            }
            let mut message = MessageWriter(vec![b'l', SIGNAL, 0, 1]);
            message.u32(body.0.len() as u32);
            message.u32(1);
            message.u32(fields.0.len() as u32);
            message.0.extend(&fields.0);
            message.align(8);
            message.0.extend(&body.0);
            message.0
        };
        let (stream, mut systemd) = UnixStream::pair().unwrap();
        let mut bus = Bus {
            stream,
            serial: 0,
            peer: Peer::MessageBus {
                systemd: Some(":1.1".to_owned()),
            },
            ended: VecDeque::new(),
        };
        systemd.write_all(&signal(":1.7", "failed")).unwrap();
        // A big-endian message with five bytes.
        let big = [b'B', SIGNAL, 0, 1, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0];
        systemd.write_all(&big).unwrap();
        systemd.write_all(&[0; 5]).unwrap();
        systemd.write_all(&signal(":1.1", "done")).unwrap();
        assert_eq!(bus.await_job("/job/1", "start").unwrap(), "done");
    }
}
