//! As much of D-Bus as it takes to have systemd start and stop a unit.
//!
//! One blocking connection, one call at a time, each with a deadline. Written out, because a
//! D-Bus library brings an executor and threads, and this is in the way of every container's
//! start. The wire format is that of the D-Bus Specification, "Message Protocol"; the calls
//! are those of org.freedesktop.systemd1(5).

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result, refuse};
use crate::log;

/// How long systemd may take to answer a call, or to do a job: as long as systemd itself
/// gives a call.
const REPLY_TIMEOUT: Duration = Duration::from_secs(25);
/// A wait longer than this is told.
const REPLY_WARNING_DELAY: Duration = Duration::from_secs(10);
/// The longest message that is read; the protocol allows 128 MiB.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

const CALL: u8 = 1;
const RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// A value of a unit's property, with its D-Bus type.
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

/// A message's bytes under construction, little-endian.
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

    /// The length before an array does not count the padding up to its first element.
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

/// The arguments of a call.
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

    /// The further units that StartTransientUnit could make.
    pub(crate) fn no_units(mut self) -> Body {
        self.signature.push_str("a(sa(sv))");
        self.writer.array::<()>(&[], 8, |_, ()| {});
        self
    }
}

/// Reads what another wrote; `None` where it ends early.
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

/// A message that came, as far as it is looked at.
struct BusMessage {
    kind: u8,
    reply_to: u32,
    member: String,
    error: String,
    body: Vec<u8>,
}

impl BusMessage {
    fn parse(header: &[u8], fields: &[u8], body: Vec<u8>) -> Option<BusMessage> {
        let mut message = BusMessage {
            kind: *header.get(1)?,
            reply_to: 0,
            member: String::new(),
            error: String::new(),
            body,
        };
        let mut reader = MessageReader {
            bytes: fields,
            at: 0,
        };
        while reader.at < fields.len() {
            // The fields begin at a multiple of eight within the message.
            reader.align(8);
            let code = *reader.take(1)?.first()?;
            match (code, reader.signature()?) {
                (3, "s") => message.member = reader.text()?.to_owned(),
                (4, "s") => message.error = reader.text()?.to_owned(),
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

    /// The first argument, if it is a string or an object's path.
    fn first_text(&self) -> Option<String> {
        self.reader().text().map(str::to_owned)
    }
}

/// An error that systemd answered with.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// As `org.freedesktop.systemd1.NoSuchUnit`.
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

/// A connection to the systemd that manages units here.
pub(crate) struct Bus {
    stream: UnixStream,
    serial: u32,
    /// Jobs that ended, and how, in the order in which that was told.
    ended: VecDeque<(String, String)>,
}

impl Bus {
    /// Connects to systemd's own socket, or through the message bus where that is all there
    /// is. Without root's rights, to the user's systemd.
    ///
    /// # Errors
    /// No systemd here, or none that lets this user in.
    pub(crate) fn connect() -> Result<Bus> {
        let user = !rustix::process::geteuid().is_root();
        let run = if user {
            let directory = std::env::var_os("XDG_RUNTIME_DIR").ok_or_else(|| {
                Error::new("--systemd-cgroup: XDG_RUNTIME_DIR, where the user's systemd listens, is not set")
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
        let doing = |path: &Path| format!("--systemd-cgroup: reach systemd at {}", path.display());
        match UnixStream::connect(&own) {
            Ok(stream) => Bus::authenticate(stream).map_err(|error| error.while_doing(doing(&own))),
            Err(refused) => {
                let Ok(stream) = UnixStream::connect(&shared) else {
                    return Err(refused).doing(|| doing(&own));
                };
                Bus::authenticate(stream)
                    .and_then(Bus::register)
                    .map_err(|error| error.while_doing(doing(&shared)))
            }
        }
    }

    /// Who calls is known from the socket; only the user id's digits, in hexadecimal, have
    /// to be said. See the specification, "Authentication Protocol".
    fn authenticate(stream: UnixStream) -> Result<Bus> {
        let mut bus = Bus {
            stream,
            serial: 0,
            ended: VecDeque::new(),
        };
        let mut hello = b"\0AUTH EXTERNAL ".to_vec();
        for digit in rustix::process::geteuid().as_raw().to_string().bytes() {
            hello.extend(format!("{digit:02x}").bytes());
        }
        // In one go with the rest, and not with the first call: what systemd reads together
        // with BEGIN, it leaves lying until more comes.
        hello.extend(b"\r\nBEGIN\r\n");
        bus.stream.write_all(&hello).doing(|| "authenticate")?;
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") && answer.len() < 512 {
            let mut byte = [0u8; 1];
            bus.read_exact(&mut byte, deadline)?;
            answer.extend(byte);
        }
        if !answer.starts_with(b"OK ") {
            refuse!(
                "authenticate: {}",
                String::from_utf8_lossy(&answer).trim_end()
            );
        }
        Ok(bus)
    }

    /// What a message bus wants besides: a greeting, and to be told what is to be heard.
    fn register(mut self) -> Result<Bus> {
        const DAEMON: (&str, &str, &str) = (
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
        );
        let heard = "type='signal',sender='org.freedesktop.systemd1',member='JobRemoved'";
        let refused = |refusal: Refusal| Error::new(refusal.text);
        self.call_object(DAEMON, "Hello", Body::default())?
            .map_err(refused)?;
        self.call_object(DAEMON, "AddMatch", Body::default().text(heard))?
            .map_err(refused)?;
        self.call("Subscribe", Body::default())?.map_err(refused)?;
        Ok(self)
    }

    /// Calls a method of systemd's manager. Returns the first result, if it is a string.
    pub(crate) fn call(
        &mut self,
        method: &str,
        body: Body,
    ) -> Result<std::result::Result<String, Refusal>> {
        const MANAGER: (&str, &str, &str) = (
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
        );
        self.call_object(MANAGER, method, body)
    }

    /// A property of systemd's manager that is a string.
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
        .ok_or_else(|| Error::new(format!("ask systemd for its {name}: no answer to that")))
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
        let doing = || format!("call {method} of systemd");
        self.stream.write_all(&message.0).doing(doing)?;
        let deadline = Instant::now() + REPLY_TIMEOUT;
        loop {
            let message = self
                .receive(deadline)
                .map_err(|error| error.while_doing(doing()))?;
            if matches!(message.kind, RETURN | ERROR) && message.reply_to == serial {
                return Ok(message);
            }
            self.note_ended_job(&message);
        }
    }

    fn note_ended_job(&mut self, message: &BusMessage) {
        if message.kind == SIGNAL && message.member == "JobRemoved" {
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

    /// Waits for the end of a job that a call started. Returns its result, `done` if it went
    /// well; see the signal JobRemoved.
    pub(crate) fn finished(&mut self, job: &str, what: &str) -> Result<String> {
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
                Ok(message) => self.note_ended_job(&message),
                Err(_) if !warned && Instant::now() >= next => {
                    warned = true;
                    log::warning(&format!(
                        "{what}: has waited {} s",
                        REPLY_WARNING_DELAY.as_secs()
                    ));
                }
                Err(error) => return Err(error.while_doing(what)),
            }
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<BusMessage> {
        let mut header = [0u8; 16];
        self.read_exact(&mut header, deadline)?;
        let number = |at: usize| {
            header
                .get(at..at + 4)
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(0, |bytes| u32::from_le_bytes(bytes) as usize)
        };
        let (body, fields) = (number(4), number(12));
        if header.first() != Some(&b'l') || body > MESSAGE_BYTES_MAX || fields > MESSAGE_BYTES_MAX {
            refuse!("systemd sent what is no message of D-Bus");
        }
        let mut rest = vec![0u8; fields.next_multiple_of(8) + body];
        self.read_exact(&mut rest, deadline)?;
        let body = rest.split_off(fields.next_multiple_of(8));
        rest.truncate(fields);
        BusMessage::parse(&header, &rest, body)
            .ok_or_else(|| Error::new("systemd sent a message of D-Bus that can not be read"))
    }

    /// Reads so many bytes. A message that has begun is waited for longer than one that has
    /// not, since what follows a half one could no longer be understood.
    fn read_exact(&mut self, bytes: &mut [u8], deadline: Instant) -> Result<()> {
        let mut at = 0;
        while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
            let mut left = deadline.saturating_duration_since(Instant::now());
            if at > 0 {
                left = left.max(REPLY_WARNING_DELAY);
            } else if left.is_zero() {
                refuse!("no answer within {} s", REPLY_TIMEOUT.as_secs());
            }
            let doing = || "read systemd's answer";
            self.stream.set_read_timeout(Some(left)).doing(doing)?;
            match self.stream.read(rest) {
                Ok(0) => refuse!("systemd closed the connection"),
                Ok(read) => at += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    refuse!("no answer within {} s", REPLY_TIMEOUT.as_secs());
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
    fn arguments_are_laid_out_as_the_specification_has_it() {
        let body = Body::default()
            .text("a")
            .flag(true)
            .properties(&[("B".to_owned(), BusValue::Rates(vec![("/x".to_owned(), 7)]))]);
        assert_eq!(body.signature, "sba(sv)");
        let expected: &[u8] = &[
            1, 0, 0, 0, b'a', 0, 0, 0, // "a", up to a multiple of four
            1, 0, 0, 0, // true
            40, 0, 0, 0, // bytes of the array
            1, 0, 0, 0, b'B', 0, // the property's name
            5, b'a', b'(', b's', b't', b')', 0, // its type
            0, 0, 0, // up to a multiple of four
            16, 0, 0, 0, 0, 0, 0, 0, // bytes of the inner array, up to eight
            2, 0, 0, 0, b'/', b'x', 0, 0, // the path
            7, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(body.writer.0, expected);
    }

    #[test]
    fn messages_that_end_early_or_lie_are_no_messages() {
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
            // Whole fields are a message of their own; no part of one is.
            let cut = &fields.0[..length];
            let parsed = BusMessage::parse(&[b'l', ERROR], cut, Vec::new());
            assert_eq!(parsed.is_some(), length == 8, "{length}");
        }
        body.0[0] = 200;
        let lie = BusMessage::parse(&[b'l', ERROR], &[], body.0).unwrap();
        assert_eq!(lie.first_text(), None);
    }
}
