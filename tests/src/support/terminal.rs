//! Terminals: an interactive terminal, which tmux provides, and the terminals that the runtime sends
//! to a console socket.

use std::io::{IoSliceMut, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::ensure;
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::Need;

pub(crate) const TMUX: Need = Need::Program("tmux");

/// An interactive terminal that a test types into and reads from.
pub(crate) struct Terminal(PathBuf);

impl Terminal {
    /// Opens a terminal that runs `shell_command`. For each terminal, the function starts a
    /// separate tmux server with its own socket next to the path `socket`. A common tmux server
    /// would exit after its last session. An exiting server accepts no new session, and the test
    /// cannot detect when the server has exited.
    pub(crate) fn open(socket: PathBuf, shell_command: &str) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let terminal = Terminal(socket.with_extension(number.to_string()));
        terminal.tmux(&["new-session", "-d", "-x", "80", "-y", "24", shell_command])?;
        Ok(terminal)
    }

    pub(crate) fn tmux(&self, args: &[&str]) -> Result<String> {
        let run = command("tmux", ["-f", "/dev/null", "-S"])
            .arg(&self.0)
            .args(args);
        Ok(run.ok()?.stdout)
    }

    pub(crate) fn types(&self, line: &str) -> Result {
        self.tmux(&["send-keys", line, "Enter"]).map(|_| ())
    }

    pub(crate) fn shows(&self, what: &str) -> Result {
        wait_for(&format!("the terminal to show {what:?}"), || {
            let screen = self.tmux(&["capture-pane", "-p"])?;
            ensure!(
                screen.lines().any(|line| line.trim() == what),
                "the terminal does not show {what:?}:\n{screen}"
            );
            Ok(Some(()))
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

/// Accepts a connection from the runtime, and returns the descriptor that the runtime sends. On a
/// console socket, the descriptor is the terminal's master.
pub(crate) fn receive_terminal(listener: &UnixListener) -> Result<std::fs::File> {
    listener.set_nonblocking(true)?;
    let stream = wait_for(
        "the runtime to connect to the console socket",
        || match listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        },
    )?;
    let mut name = [0u8; 4096];
    let mut room = nix::cmsg_space!(std::os::fd::RawFd);
    let mut io = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut io,
        Some(&mut room),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .map_err(|errno| format!("cannot receive a message on the console socket: {errno}"))?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part
            && let Some(descriptor) = descriptors.first()
        {
            // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
            return Ok(std::fs::File::from(unsafe {
                OwnedFd::from_raw_fd(*descriptor)
            }));
        }
    }
    Err("the console socket received no descriptor".into())
}

/// Reads from a terminal's master until the terminal is closed (EIO).
pub(crate) fn read_to_end(mut terminal: std::fs::File) -> String {
    let mut all = Vec::new();
    let mut part = [0u8; 4096];
    while let Ok(length @ 1..) = terminal.read(&mut part) {
        all.extend_from_slice(part.get(..length).unwrap_or_default());
    }
    String::from_utf8_lossy(&all).into_owned()
}
