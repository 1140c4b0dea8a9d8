//! A netlink client. The client sends several messages with one `send` call, and reads the kernel's
//! replies.
//!
//! The kernel executes a request inside the `send` call, including any wait for the kernel's RTNL
//! lock. An async socket would therefore also block the sending thread. The client uses a blocking
//! socket, because a blocking socket is faster. Callers open a socket for a few requests and then
//! close it. The client is used for rtnetlink, nf_tables and ctnetlink. See netlink(7) and
//! rtnetlink(7).

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use rustix::net::{RecvFlags, SendFlags, netlink};

use crate::error::NetworkError;

const HEADER_BYTES: usize = 16;
const ALIGNMENT: usize = 4;
const NLA_F_NESTED: u16 = 1 << 15;
/// The mask that removes the flags for nesting and byte order from an attribute's type.
const NLA_TYPE_MASK: u16 = 0x3fff;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLM_F_DUMP_INTR: u16 = 0x10;
/// The flag of an error message that does not contain a copy of the failed request.
const NLM_F_CAPPED: u16 = 0x100;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The size of the receive buffer. For a dump, the kernel usually sends datagrams of at most 32 KiB.
/// If a datagram is longer, the buffer grows and the dump is repeated.
const RECEIVE_BYTES: usize = 32 << 10;

/// The maximum number of messages that one `send` call sends, unless the messages are a transaction.
/// The kernel stores all acknowledgements of a `send` call in the socket's receive buffer before the
/// socket is read. By default, the receive buffer has space for almost 300 acknowledgements. The
/// kernel drops the remaining acknowledgements.
const MESSAGES_AT_ONCE: usize = 100;

/// The maximum number of bytes that one `send` call sends, unless the messages are a transaction.
/// The number is less than the default size of a socket's send buffer.
const BYTES_AT_ONCE: usize = 64 << 10;

/// The maximum number of attempts for a dump. A dump is repeated if the dumped table changes during
/// the dump.
const DUMP_TRIES: usize = 16;

/// The maximum number of datagrams that [`Socket::discard_replies`] reads.
const MAX_DISCARDED: usize = 1000;

/// Messages that the kernel executes in order. A batch is not a transaction, because the kernel also
/// executes the messages after a failed message. [`Socket::execute`] sends a batch in pieces, and
/// [`Socket::execute_whole`] sends all messages with one `send` call.
#[derive(Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    /// The messages. The index of a message is its sequence number.
    messages: Vec<Request>,
}

struct Request {
    /// The description of the action that the message requests. If the kernel reports an error for
    /// the message, the [`NetworkError`] contains this description.
    action: Cow<'static, str>,
    begin: usize,
    /// True if the kernel sends an acknowledgement or the end of a dump, even if the message
    /// succeeds.
    is_answered: bool,
}

impl Batch {
    /// Adds a message of the type `kind`. `flags` are the message's flags in addition to
    /// NLM_F_REQUEST.
    pub(crate) fn message(
        &mut self,
        action: impl Into<Cow<'static, str>>,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut Body),
    ) {
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        let flags = flags | NLM_F_REQUEST;
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        let sequence = u32::try_from(self.messages.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        body(&mut Body(&mut self.bytes));
        let length = u32::try_from(self.bytes.len() - begin).unwrap_or(u32::MAX);
        if let Some(field) = self.bytes.get_mut(begin..begin + 4) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
        self.messages.push(Request {
            action: action.into(),
            begin,
            is_answered: flags & (NLM_F_ACK | NLM_F_DUMP) != 0,
        });
    }

    /// Requests an acknowledgement of the last message.
    pub(crate) fn acknowledge_last(&mut self) {
        let Some(last) = self.messages.last_mut() else {
            return;
        };
        last.is_answered = true;
        // The flags follow the length (4 bytes) and the type (2 bytes) of the message.
        let flags = last.begin + 6..last.begin + 8;
        if let Some(Ok(field)) = self.bytes.get_mut(flags).map(<&mut [u8; 2]>::try_from) {
            *field = (u16::from_ne_bytes(*field) | NLM_F_ACK).to_ne_bytes();
        }
    }

    /// Returns the number of bytes of all messages.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Returns the sequence number of the first message of the piece after the piece that begins
    /// with the message `from`.
    fn end_of_piece(&self, from: usize) -> usize {
        let begin = self.begin_of(from);
        let mut to = from + 1;
        while to < self.messages.len()
            && to - from < MESSAGES_AT_ONCE
            && self.begin_of(to + 1) - begin <= BYTES_AT_ONCE
        {
            to += 1;
        }
        to
    }

    /// Returns the position of the first byte of a message. For the sequence number after the last
    /// message, returns the position after the last byte.
    fn begin_of(&self, message: usize) -> usize {
        let request = self.messages.get(message);
        request.map_or(self.bytes.len(), |request| request.begin)
    }
}

/// The content of a message, which consists of a fixed header and attributes.
pub(crate) struct Body<'a>(pub(crate) &'a mut Vec<u8>);

impl Body<'_> {
    /// Appends the fixed header that precedes the attributes, such as `struct ifinfomsg`.
    pub(crate) fn header(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.pad();
    }

    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |body| body.0.extend_from_slice(value));
    }

    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    /// Appends a number in network byte order as an attribute. nf_tables requires this byte order.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Appends a string with a terminating NUL as an attribute. The kernel requires the NUL.
    pub(crate) fn string(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |body| {
            body.0.extend_from_slice(value.as_bytes());
            body.0.push(0);
        });
    }

    pub(crate) fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Body)) {
        self.attribute(kind | NLA_F_NESTED, inside);
    }

    /// Appends a nested attribute whose content is already encoded.
    pub(crate) fn nested(&mut self, kind: u16, inside: &[u8]) {
        self.nest(kind, |body| body.0.extend_from_slice(inside));
    }

    fn attribute(&mut self, kind: u16, inside: impl FnOnce(&mut Body)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        inside(&mut Body(self.0));
        // The kernel rejects an attribute whose length does not fit into 16 bits. All attributes
        // that this crate sends are much shorter than 64 KiB.
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        if let Some(field) = self.0.get_mut(start..start + 2) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
    }
}

/// A message from the kernel that is neither an acknowledgement, nor an error, nor the end of a
/// dump.
pub(crate) struct Reply {
    body: Vec<u8>,
}

impl Reply {
    /// Returns the first `N` bytes of the message. These bytes are the fixed header before the
    /// attributes.
    pub(crate) fn header<const N: usize>(&self) -> Option<[u8; N]> {
        self.body.first_chunk().copied()
    }

    /// Returns the attributes after a fixed header of `header_bytes` bytes.
    pub(crate) fn attributes(&self, header_bytes: usize) -> Attributes<'_> {
        Attributes(self.body.get(header_bytes..).unwrap_or_default())
    }
}

/// A message that the kernel has sent to all members of a multicast group.
pub(crate) struct Event<'a> {
    pub kind: u16,
    /// The number of the socket that has made the change, see [`Socket::port`].
    pub by: u32,
    /// The fixed header and the attributes.
    pub body: &'a [u8],
}

/// An iterator over netlink attributes. For each attribute, the iterator returns the attribute's
/// type without the flag bits, and the attribute's value.
#[derive(Clone)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Attributes<'a> {
    pub(crate) fn get(&self, wanted: u16) -> Option<&'a [u8]> {
        self.clone()
            .find_map(|(kind, value)| (kind == wanted).then_some(value))
    }

    pub(crate) fn nest(&self, wanted: u16) -> Attributes<'a> {
        Attributes(self.get(wanted).unwrap_or_default())
    }

    pub(crate) fn u32(&self, wanted: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(self.array(wanted)?))
    }

    /// Returns the value of an attribute if the value has exactly `N` bytes.
    pub(crate) fn array<const N: usize>(&self, wanted: u16) -> Option<[u8; N]> {
        self.get(wanted)?.try_into().ok()
    }

    /// Returns the value of an attribute as a string, without the terminating NUL.
    pub(crate) fn string(&self, wanted: u16) -> Option<&'a str> {
        let value = self.get(wanted)?;
        let end = value.iter().position(|byte| *byte == 0);
        std::str::from_utf8(&value[..end.unwrap_or(value.len())]).ok()
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(*self.0.first_chunk()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?);
        let value = self.0.get(4..length)?;
        let next = length.next_multiple_of(ALIGNMENT).min(self.0.len());
        self.0 = self.0.get(next..)?;
        Some((kind & NLA_TYPE_MASK, value))
    }
}

/// A netlink socket in the network namespace of the thread that opened it.
pub(crate) struct Socket {
    fd: OwnedFd,
    buffer: Vec<u8>,
    /// The maximum number of bytes for which the send buffer is certainly large enough.
    send_bytes: usize,
}

/// The kernel's answer to the messages of a `send` call.
enum Answer {
    Success,
    /// The error of the first failed message.
    Failure(NetworkError),
    /// A change of the dumped table interrupted a dump, or a datagram was longer than the buffer.
    Interrupted,
    /// The caller has ended a dump. The socket still has answers that nobody has read.
    Stopped,
}

impl Answer {
    fn of(failure: Option<NetworkError>, interrupted: bool) -> Self {
        match failure {
            Some(error) => Answer::Failure(error),
            None if interrupted => Answer::Interrupted,
            None => Answer::Success,
        }
    }
}

impl Socket {
    /// Opens a netlink socket for requests about links, addresses, routes and traffic control.
    pub(crate) fn route() -> Result<Self, NetworkError> {
        Self::open(None, 0, "open an rtnetlink socket")
    }

    /// Opens a netlink socket for requests to nf_tables and to connection tracking.
    pub(crate) fn netfilter() -> Result<Self, NetworkError> {
        Self::open(Some(netlink::NETFILTER), 0, "open a netfilter socket")
    }

    fn open(
        protocol: Option<rustix::net::Protocol>,
        groups: u32,
        action: &'static str,
    ) -> Result<Self, NetworkError> {
        let fd = rrun_kernel::netlink::open(protocol, groups)
            .map_err(|errno| kernel_error(action, errno))?;
        // With these options, an error message contains an explanation in words, and no copy of the
        // failed request. The socket also works if the kernel does not support the options.
        let _ = set_option(&fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1);
        let _ = set_option(&fd, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1);
        Ok(Socket {
            fd,
            buffer: vec![0; RECEIVE_BYTES],
            send_bytes: BYTES_AT_ONCE,
        })
    }

    /// Opens a netlink socket that receives the events of a multicast group of nfnetlink. The number
    /// of the group must be from 1 to 32.
    pub(crate) fn netfilter_events(group: u32) -> Result<Self, NetworkError> {
        let action = "open a socket for events of netfilter";
        Self::open(Some(netlink::NETFILTER), 1 << (group - 1), action)
    }

    /// Returns the number that identifies this socket in the events about its changes.
    pub(crate) fn port(&self) -> Result<u32, NetworkError> {
        rrun_kernel::netlink::port(&self.fd)
            .map_err(|errno| kernel_error("read the address of a netlink socket", errno))
    }

    /// Reads the events that have arrived, and calls `each` for each of them. Returns the error that
    /// ends the reading. The error EAGAIN means that all events were read. The error ENOBUFS means
    /// that events were lost.
    pub(crate) fn events(&mut self, mut each: impl FnMut(Event)) -> std::io::Error {
        loop {
            let flags = RecvFlags::DONTWAIT;
            let length = match rustix::net::recv(&self.fd, &mut self.buffer[..], flags) {
                Ok((length, _)) => length,
                Err(errno) => return errno.into(),
            };
            for message in Messages(self.buffer.get(..length).unwrap_or_default()) {
                each(Event {
                    kind: message.kind,
                    by: message.port,
                    body: message.body,
                });
            }
        }
    }

    /// Returns the file descriptor, for requests that need ioctl(2).
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Sends the messages and returns the kernel's replies. If messages fail, this function returns
    /// the error of the first failed message.
    pub(crate) fn execute(&mut self, batch: &Batch) -> Result<Vec<Reply>, NetworkError> {
        self.fold(batch, |replies: &mut Vec<Reply>, reply| replies.push(reply))
    }

    /// Sends the messages, and calls `each` for each of the kernel's replies. `each` adds the reply
    /// to the result. If a dump is interrupted, the dump is repeated with a new result.
    pub(crate) fn fold<T: Default>(
        &mut self,
        batch: &Batch,
        mut each: impl FnMut(&mut T, Reply),
    ) -> Result<T, NetworkError> {
        'tries: for _ in 0..DUMP_TRIES {
            let mut result = T::default();
            let mut failure = None;
            let mut from = 0;
            while from < batch.messages.len() {
                let to = batch.end_of_piece(from);
                let add = |reply| {
                    each(&mut result, reply);
                    ControlFlow::Continue(())
                };
                match self.exchange(batch, from..to, add)? {
                    Answer::Success | Answer::Stopped => {}
                    Answer::Failure(error) => drop(failure.get_or_insert(error)),
                    Answer::Interrupted => continue 'tries,
                }
                from = to;
            }
            return failure.map_or(Ok(result), Err);
        }
        Err(NetworkError::kernel(last_action(batch), Errno::EINTR))
    }

    /// Sends the request for a dump in `batch`, and calls `each` for each entry until `each` ends the
    /// dump. After a dump that `each` has ended, the caller must close the socket. If a dump is
    /// interrupted, the dump is repeated, and `each` gets the same entries again.
    pub(crate) fn dump(
        &mut self,
        batch: &Batch,
        mut each: impl FnMut(Reply) -> ControlFlow<()>,
    ) -> Result<(), NetworkError> {
        for _ in 0..DUMP_TRIES {
            match self.exchange(batch, 0..batch.messages.len(), &mut each)? {
                Answer::Success | Answer::Stopped => return Ok(()),
                Answer::Failure(error) => return Err(error),
                Answer::Interrupted => {}
            }
        }
        Err(NetworkError::kernel(last_action(batch), Errno::EINTR))
    }

    /// Sends all messages with one `send` call, as the kernel requires for a transaction. If the
    /// socket's send buffer is too small, this function enlarges it. Without the capability
    /// CAP_NET_ADMIN in the initial user namespace, the size of the buffer is limited. In this case,
    /// the function can fail with the error EMSGSIZE.
    pub(crate) fn execute_whole(&mut self, batch: &Batch) -> Result<(), NetworkError> {
        let ignore = |_| ControlFlow::Continue(());
        match self.exchange(batch, 0..batch.messages.len(), ignore)? {
            Answer::Failure(error) => Err(error),
            Answer::Success | Answer::Interrupted | Answer::Stopped => Ok(()),
        }
    }

    /// Sends the messages with the sequence numbers in `range` with one `send` call, and calls
    /// `each` for each of the kernel's replies until `each` ends the exchange.
    fn exchange(
        &mut self,
        batch: &Batch,
        range: std::ops::Range<usize>,
        mut each: impl FnMut(Reply) -> ControlFlow<()>,
    ) -> Result<Answer, NetworkError> {
        let bytes = batch
            .bytes
            .get(batch.begin_of(range.start)..batch.begin_of(range.end));
        let bytes = bytes.unwrap_or_default();
        self.reserve(bytes.len());
        let failed = |errno| kernel_error(last_action(batch), errno);
        rustix::net::send(&self.fd, bytes, SendFlags::empty()).map_err(failed)?;
        let sent = batch.messages.get(range).unwrap_or_default();
        let mut missing = sent.iter().filter(|request| request.is_answered).count();
        let (mut failure, mut interrupted, mut overrun) = (None, false, false);
        while missing > 0 {
            // The `recv` call never waits, because the kernel has queued the replies during `send`.
            // The kernel queues the next part of a dump whenever the socket is read.
            let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
            let length = match rustix::net::recv(&self.fd, &mut self.buffer[..], flags) {
                Ok((_, length)) => length,
                // The kernel sends no further answer. The loop can end nevertheless, because a
                // message has failed, or because the lost datagram contained the last answer.
                Err(rustix::io::Errno::AGAIN) if failure.is_some() || interrupted => break,
                // The receive buffer was too small for all error messages. The first error messages
                // are in the buffer.
                Err(rustix::io::Errno::NOBUFS) if !overrun => {
                    overrun = true;
                    continue;
                }
                Err(errno) => {
                    self.discard_replies();
                    return Err(failed(errno));
                }
            };
            if length > self.buffer.len() {
                self.buffer.resize(length, 0);
                interrupted = true;
                continue;
            }
            for message in Messages(self.buffer.get(..length).unwrap_or_default()) {
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        missing -= usize::from(message.is_answer_in(batch)).min(missing);
                        if let Some(error) = message.error(batch) {
                            failure.get_or_insert(error);
                        }
                    }
                    _ if each(message.reply()).is_break() => return Ok(Answer::Stopped),
                    _ => {}
                }
            }
        }
        Ok(Answer::of(failure, interrupted))
    }

    /// Reads the queued replies of a request that failed. The next request on this socket would
    /// otherwise get these replies as its own.
    fn discard_replies(&mut self) {
        for _ in 0..MAX_DISCARDED {
            let received = rustix::net::recv(&self.fd, &mut self.buffer[..], RecvFlags::DONTWAIT);
            if received.is_err() {
                return;
            }
        }
    }

    /// Enlarges the send buffer if it may be too small for a message of `bytes` bytes. An error is
    /// ignored, because the following `send` call reports whether the buffer is large enough.
    fn reserve(&mut self, bytes: usize) {
        if bytes <= self.send_bytes {
            return;
        }
        let size = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
        // SO_SNDBUFFORCE needs CAP_NET_ADMIN in the initial user namespace. SO_SNDBUF needs no
        // capability, but the sysctl net.core.wmem_max limits the size.
        if set_option(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, size).is_ok() {
            self.send_bytes = bytes;
        } else {
            let _ = set_option(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, size);
        }
    }
}

/// Parses `received` as messages of the kernel. Returns the errors that the messages report, and all
/// other messages.
#[cfg(feature = "fuzz")]
pub(crate) fn parse_all(received: &[u8]) -> (Vec<NetworkError>, Vec<Reply>) {
    let batch = Batch::default();
    let (mut errors, mut replies) = (Vec::new(), Vec::new());
    for message in Messages(received) {
        match message.kind {
            NLMSG_ERROR | NLMSG_DONE => errors.extend(message.error(&batch)),
            _ => replies.push(message.reply()),
        }
    }
    (errors, replies)
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn kernel_error(action: &str, errno: rustix::io::Errno) -> NetworkError {
    NetworkError::kernel(action, Errno::from_raw(errno.raw_os_error()))
}

fn last_action(batch: &Batch) -> &str {
    let last = batch.messages.last();
    last.map_or("send netlink messages", |request| &request.action)
}

fn set_option(
    fd: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> std::io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    body: &'a [u8],
}

impl Message<'_> {
    fn reply(&self) -> Reply {
        Reply {
            body: self.body.to_vec(),
        }
    }

    /// Returns the message of `batch` to which this message is the answer.
    fn request<'a>(&self, batch: &'a Batch) -> Option<&'a Request> {
        batch.messages.get(usize::try_from(self.sequence).ok()?)
    }

    /// Returns whether this message is the acknowledgement or the end of a dump that `batch` has
    /// requested. The kernel also sends an error message for a failed message without NLM_F_ACK.
    fn is_answer_in(&self, batch: &Batch) -> bool {
        self.request(batch)
            .is_some_and(|request| request.is_answered)
    }

    /// Returns the error in a message of the type NLMSG_ERROR or NLMSG_DONE. Returns `None` if the
    /// message reports success.
    fn error(&self, batch: &Batch) -> Option<NetworkError> {
        let code = i32::from_ne_bytes(*self.body.first_chunk()?);
        if code == 0 {
            return None;
        }
        let request = match (self.kind, self.flags & NLM_F_CAPPED) {
            (NLMSG_DONE, _) => 0,
            (_, 0) => {
                let length = self.body.get(4..8)?.try_into().ok()?;
                usize::try_from(u32::from_ne_bytes(length)).ok()?
            }
            _ => HEADER_BYTES,
        };
        let attributes = Attributes(self.body.get(4 + request..).unwrap_or_default());
        let detail = attributes.string(NLMSGERR_ATTR_MSG);
        let request = self.request(batch);
        let action = request.map_or_else(|| last_action(batch), |request| &request.action);
        Some(NetworkError::Kernel {
            action: action.to_string(),
            errno: Errno::from_raw(code.saturating_neg()),
            detail: detail
                .map(|detail| format!(": {detail}"))
                .unwrap_or_default(),
        })
    }
}

struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let header: &[u8; HEADER_BYTES] = self.0.first_chunk()?;
        let [
            l0,
            l1,
            l2,
            l3,
            k0,
            k1,
            f0,
            f1,
            s0,
            s1,
            s2,
            s3,
            p0,
            p1,
            p2,
            p3,
        ] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let body = self.0.get(HEADER_BYTES..length)?;
        let next = length.next_multiple_of(ALIGNMENT).min(self.0.len());
        self.0 = self.0.get(next..)?;
        Some(Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            port: u32::from_ne_bytes([p0, p1, p2, p3]),
            body,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_can_be_nested() {
        let mut batch = Batch::default();
        batch.message("send a test message", 7, NLM_F_ACK, |body| {
            body.header(&[9]);
            body.string(1, "abcd");
            body.nest(2, |inside| {
                inside.u32(3, 42);
                inside.bytes(4, &[1, 2, 3]);
            });
        });
        assert_eq!(batch.bytes.len() % ALIGNMENT, 0);
        assert!(batch.messages[0].is_answered);
        let message = Messages(&batch.bytes).next();
        let body = message.map(|message| message.body.to_vec());
        let reply = Reply {
            body: body.unwrap_or_default(),
        };
        assert_eq!(reply.header::<4>(), Some([9, 0, 0, 0]));
        let attributes = reply.attributes(4);
        assert_eq!(attributes.string(1), Some("abcd"));
        assert_eq!(attributes.nest(2).u32(3), Some(42));
        assert_eq!(attributes.nest(2).get(4), Some(&[1, 2, 3][..]));
        assert_eq!(attributes.clone().count(), 2);
    }

    #[test]
    fn a_message_or_attribute_with_an_invalid_length_ends_the_iteration() {
        assert_eq!(Attributes(&[3, 0, 1, 0]).next(), None);
        assert_eq!(Attributes(&[200, 0, 1, 0, 0, 0, 0, 0]).next(), None);
        assert_eq!(Attributes(&[4, 0, 1]).next(), None);
        assert!(Messages(&[255; 20]).next().is_none());
        let mut zero_length = [0; 32];
        assert!(Messages(&zero_length).next().is_none());
        zero_length[0] = 15;
        assert!(Messages(&zero_length).next().is_none());
    }

    /// Adds a request for information about the interface `name`.
    fn look_up(batch: &mut Batch, action: String, name: &str) {
        batch.message(action, libc::RTM_GETLINK, NLM_F_ACK, |body| {
            body.header(&[0; 16]);
            body.string(libc::IFLA_IFNAME, name);
        });
    }

    #[test]
    fn a_batch_can_have_thousands_of_messages() -> Result<(), NetworkError> {
        // The kernel's answers to all messages do not fit into the receive buffer at once.
        let mut batch = Batch::default();
        for number in 0..5000 {
            look_up(&mut batch, format!("message {number}"), "no-such-link");
        }
        look_up(&mut batch, "last message".to_owned(), "lo");
        let mut socket = Socket::route()?;
        let mut replies = 0;
        let result = socket.fold(&batch, |(), _| replies += 1);
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with("message 0: "), "{error}");
        assert_eq!(replies, 1, "number of replies to the last message");
        // No answer is left for the next request.
        let mut batch = Batch::default();
        look_up(&mut batch, "next message".to_owned(), "lo");
        assert_eq!(socket.execute(&batch)?.len(), 1);
        Ok(())
    }

    #[test]
    fn a_datagram_can_be_longer_than_the_receive_buffer() -> Result<(), NetworkError> {
        let mut socket = Socket::route()?;
        socket.buffer.truncate(16);
        let mut batch = Batch::default();
        batch.message("list the links", libc::RTM_GETLINK, NLM_F_DUMP, |body| {
            body.header(&[0; 16]);
        });
        assert!(!socket.execute(&batch)?.is_empty());
        assert!(socket.buffer.len() > 16);
        Ok(())
    }
}
