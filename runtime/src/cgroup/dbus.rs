//! The part of D-Bus that rrun needs to start and stop a unit through systemd.
//!
//! A [`Bus`] is a blocking connection that makes one method call at a time. Each method call has a
//! deadline. rrun does not use a D-Bus library. Such a library starts an executor and threads, and
//! would delay the start of every container. org.freedesktop.systemd1(5) describes systemd's methods.

mod message;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use self::message::{BusMessage, ERROR, RETURN, SIGNAL};
use crate::error::{Context, Error, Result, refuse};
use crate::log;

#[cfg(feature = "fuzz")]
pub(crate) use self::message::fuzz_message;
pub(crate) use self::message::{Body, BusValue, Property};

/// The time limit for systemd to answer a D-Bus call or to finish a job. systemd uses the same time
/// limit for its own D-Bus calls.
const REPLY_TIMEOUT: Duration = Duration::from_secs(25);
/// The time after which rrun logs a warning that systemd has not finished a job.
const REPLY_WARNING_DELAY: Duration = Duration::from_secs(10);
/// The size limit for the header fields and for the body of a received message. The D-Bus protocol
/// allows messages of up to 128 MiB.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// The destination, path and interface of systemd's manager object.
const MANAGER: (&str, &str, &str) = (
    "org.freedesktop.systemd1",
    "/org/freedesktop/systemd1",
    "org.freedesktop.systemd1.Manager",
);

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
        object: (&str, &str, &str),
        method: &str,
        body: Body,
    ) -> Result<BusMessage> {
        self.serial += 1;
        let serial = self.serial;
        let call = body.into_call(serial, object, method);
        let doing = || format!("call the method {method} of systemd");
        self.stream.write_all(&call).doing(doing)?;
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
    use super::message::MessageWriter;
    use super::*;

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
