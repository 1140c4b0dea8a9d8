//! The seccomp agent, a process outside the container. The agent decides about the system calls for
//! which the profile specifies the action SCMP_ACT_NOTIFY. See config-linux.md of the runtime
//! specification, "The Container Process State".

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::FileType;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use serde::{Deserialize, Serialize};

use super::shared_page::Report;
use crate::config::spec::{OCI_VERSION, OciState};
use crate::error::{Context, Error, Result, refuse};
use crate::sys::unix_socket::send_descriptor;

/// The target of the link in /proc/self/fd for a descriptor of a seccomp listener. The link of an
/// ordinary file has a target that begins with `/`, so a file cannot be mistaken for a listener.
const LISTENER: &[u8] = b"anon_inode:seccomp notify";

/// The time for which rrun waits for the agent to accept a connection, or to read a part of the
/// message.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);

/// The interval at which rrun checks whether it must end the wait for the agent.
const AGENT_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The address of the seccomp agent, and the metadata that rrun sends to the agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Listener {
    /// The path of the agent's unix socket on the host.
    pub(crate) path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) metadata: Option<String>,
}

/// A connection to the seccomp agent. rrun uses each connection for a single process.
pub(crate) struct Agent<'a> {
    listener: &'a Listener,
    connection: OwnedFd,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ProcessState<'a> {
    oci_version: &'a str,
    fds: [&'a str; 1],
    pid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a str>,
    state: OciState<'a>,
}

impl Listener {
    pub(crate) fn connect(&self) -> Result<Agent<'_>> {
        let doing = || format!("connect to linux.seccomp.listenerPath {}", self.path);
        let connection = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .doing(doing)?;
        // A running agent reads its socket. Without the timeout, rrun would wait forever for an
        // agent that does not accept or read.
        set_socket_timeout(&connection, Timeout::Send, Some(AGENT_TIMEOUT)).doing(doing)?;
        let address = SocketAddrUnix::new(&*self.path).doing(doing)?;
        by_agent(connect(&connection, &address), doing)?;
        Ok(Agent {
            listener: self,
            connection,
        })
    }

    /// Checks that the agent's socket exists, because `start` will connect to the socket later.
    pub(crate) fn check(&self) -> Result<()> {
        let doing = || format!("check linux.seccomp.listenerPath {}", self.path);
        let stat = rustix::fs::stat(&*self.path).doing(doing)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket => Ok(()),
            _ => refuse!("{}: it is not a socket", doing()),
        }
    }
}

/// Returns the result of a call that waits for the agent. EAGAIN means that the timeout of the
/// connection has passed.
fn by_agent(result: std::result::Result<(), Errno>, doing: impl FnOnce() -> String) -> Result<()> {
    match result {
        Err(Errno::AGAIN) => refuse!(
            "{}: the agent did not accept or read within {} s",
            doing(),
            AGENT_TIMEOUT.as_secs()
        ),
        result => result.doing(doing),
    }
}

impl Agent<'_> {
    /// Waits until the process has loaded its filter, sends the filter's listener to the agent, and
    /// lets the process continue. While this function waits for the process, it calls `check`, which
    /// can end the wait with an error.
    pub(crate) fn serve(
        self,
        report: &Report,
        process: &OwnedFd,
        pid: i32,
        state: OciState<'_>,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let Some(number) = report.await_listener(process, &mut check)? else {
            // The process failed before it loaded the filter, and reports the reason itself.
            return Ok(());
        };
        let sent = self.send_listener(process.as_fd(), pid, number, state, check);
        let answered = report.answer(sent.is_ok());
        sent.and(answered)
    }

    /// Copies the listener from the process that loaded its filter, and sends the copy to the
    /// agent. `number` is the number that the listener's descriptor has in that process.
    ///
    /// The process cannot send the listener itself. If the filter passes sendmsg(2) to the agent,
    /// this call waits for the agent's decision. The agent does not have the listener yet, so the
    /// call would wait forever.
    fn send_listener(
        self,
        process: BorrowedFd<'_>,
        pid: i32,
        number: i32,
        state: OciState<'_>,
        check: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let doing = || format!("send the seccomp listener to {}", self.listener.path);
        let descriptor = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).doing(doing)?;
        // rrun checks that the descriptor is a listener. Another process in the same PID namespace
        // can write a wrong number into the shared page.
        let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        let what = rustix::fs::readlink(&link, Vec::new()).doing(doing)?;
        if what.as_bytes() != LISTENER {
            refuse!(
                "{}: descriptor {number} of the process is {}, not a seccomp listener",
                doing(),
                what.to_string_lossy()
            );
        }
        let message = serde_json::to_vec(&ProcessState {
            oci_version: OCI_VERSION,
            fds: ["seccompFd"],
            pid,
            metadata: self.listener.metadata.as_deref(),
            state,
        })
        .map_err(|error| Error::new(format!("{}: {error}", doing())))?;
        self.send(&message, descriptor.as_fd(), check, doing)
    }

    /// Sends the message with the descriptor. Fails if the agent reads nothing for
    /// [`AGENT_TIMEOUT`], or with the error of `check`.
    fn send(
        &self,
        message: &[u8],
        descriptor: BorrowedFd<'_>,
        mut check: impl FnMut() -> Result<()>,
        doing: impl Fn() -> String,
    ) -> Result<()> {
        let socket = &self.connection;
        set_socket_timeout(socket, Timeout::Send, Some(AGENT_CHECK_INTERVAL)).doing(&doing)?;
        let (mut sent, mut progress) = (0, Instant::now());
        while let Some(rest) = message.get(sent..).filter(|rest| !rest.is_empty()) {
            let result = match sent {
                0 => send_descriptor(socket.as_fd(), descriptor, rest),
                _ => retry_on_intr(|| send(socket, rest, SendFlags::NOSIGNAL)),
            };
            match result {
                Ok(length) => (sent, progress) = (sent + length, Instant::now()),
                Err(Errno::AGAIN) if progress.elapsed() < AGENT_TIMEOUT => check()?,
                Err(errno) => return by_agent(Err(errno), doing),
            }
        }
        Ok(())
    }
}
