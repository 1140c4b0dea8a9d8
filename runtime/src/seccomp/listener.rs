//! The agent that decides about the calls with SCMP_ACT_NOTIFY.
//! See config-linux.md of the runtime specification, "The Container Process State".

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::FileType;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use serde::{Deserialize, Serialize};

use super::shared_page::Report;
use crate::config::spec::{OCI_VERSION, OciState};
use crate::error::{Context, Error, Result, refuse};
use crate::sys::unix_socket::send_descriptor;

/// The target of a listener's link in /proc/self/fd. The target of a file's link begins with `/`, so
/// no file can pass for a listener.
const LISTENER: &[u8] = b"anon_inode:seccomp notify";

/// Where the agent listens, and what it is sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Listener {
    /// Path of a unix socket on the host.
    pub(crate) path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) metadata: Option<String>,
}

/// A connection to the agent, good for one process.
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
        let address = SocketAddrUnix::new(&*self.path).doing(doing)?;
        connect(&connection, &address).doing(doing)?;
        Ok(Agent {
            listener: self,
            connection,
        })
    }

    /// Checks that the agent's socket exists, for a container whose `start` will connect to it.
    pub(crate) fn check(&self) -> Result<()> {
        let doing = || format!("look for linux.seccomp.listenerPath {}", self.path);
        let stat = rustix::fs::stat(&*self.path).doing(doing)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket => Ok(()),
            _ => refuse!("{}: it is not a socket", doing()),
        }
    }
}

impl Agent<'_> {
    /// Waits until the process has loaded its filter, hands the filter's listener to the agent, and
    /// lets the process go on.
    pub(crate) fn serve(
        self,
        report: &Report,
        process: &OwnedFd,
        pid: i32,
        state: OciState<'_>,
    ) -> Result<()> {
        let Some(number) = report.await_listener(process) else {
            // The process failed before that, and reports the reason itself.
            return Ok(());
        };
        let sent = self.send_listener(process.as_fd(), pid, number, state);
        report.answer(sent.is_ok());
        sent
    }

    /// Takes the listener out of the process that loaded its filter, where it has that
    /// number, and hands it to the agent.
    ///
    /// The process itself could not send it: the filter may ask the agent about that.
    fn send_listener(
        self,
        process: BorrowedFd<'_>,
        pid: i32,
        number: i32,
        state: OciState<'_>,
    ) -> Result<()> {
        let doing = || format!("hand the seccomp listener to {}", self.listener.path);
        let descriptor = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).doing(doing)?;
        // A process in the same PID namespace may have written another number into the shared page.
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
        send_descriptor(self.connection.as_fd(), descriptor.as_fd(), &message).doing(doing)
    }
}
