//! The foreground mode of `run` and `exec`, without --detach. In this mode, rrun waits for the
//! container's process and forwards signals to this process. rrun then exits with the exit status
//! of this process.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, WaitIdStatus, waitid};

use crate::error::{Context, Result};
use crate::lifecycle::notify_socket::NotifySocket;
use crate::log;
use crate::sys::syscalls::{pidfd_send_signal, read_signal, set_signal_mask, signal_set, signalfd};

/// A signalfd(2) descriptor. rrun reads signals from this descriptor, and forwards them to the
/// container's process.
///
/// rrun first blocks the signals and creates the descriptor, and then creates the container's
/// process. So no signal is lost. The container's process unblocks the signals for itself.
pub(crate) struct Foreground {
    pub(super) signals: OwnedFd,
    /// The socket on which the container reports that it is ready.
    pub(crate) notify: Option<NotifySocket>,
}

impl Foreground {
    pub(crate) fn start() -> Result<Foreground> {
        // rrun does not forward the signals in this list. Each of these signals concerns rrun
        // itself, or cannot be received through a signalfd(2) descriptor.
        let not_forwarded = [
            libc::SIGKILL,
            libc::SIGSTOP,
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGABRT,
            libc::SIGTRAP,
            libc::SIGSYS,
            libc::SIGPIPE,
            libc::SIGCHLD,
        ];
        let forwarded: Vec<i32> = (1..=64)
            .filter(|signal| !not_forwarded.contains(signal) && !matches!(signal, 32 | 33))
            .collect();
        let set = signal_set(&forwarded);
        set_signal_mask(&set).doing(|| "block the signals that rrun forwards")?;
        Ok(Foreground {
            signals: signalfd(&set).doing(|| "create a descriptor for signals (signalfd)")?,
            notify: None,
        })
    }

    /// Forwards all pending signals to the container's process.
    fn forward(&self, pidfd: &OwnedFd) {
        while let Some(signal) = read_signal(self.signals.as_fd()) {
            // A failed send means that the container's process has exited, so the failure is
            // ignored.
            let _ = pidfd_send_signal(pidfd.as_fd(), signal);
        }
    }

    /// Forwards the container's notification to the service manager. While rrun is in the
    /// foreground, the service manager watches rrun, so the notification names rrun's own process
    /// id. After the first READY=1, this function closes the notification socket, because a
    /// container could otherwise fill the service manager's queue.
    pub(super) fn pass_on_notification(&mut self) {
        let Some(notify) = &self.notify else { return };
        match notify.pass_on(rustix::process::getpid().as_raw_nonzero().get()) {
            Ok(false) => return,
            Ok(true) => {}
            Err(error) => log::warning(&error.to_string()),
        }
        self.notify = None;
    }

    /// Waits until the container's process exits, and returns its status. As in a shell, this
    /// status is the exit status of the process, or 128 plus the number of the signal that killed
    /// the process.
    pub(crate) fn wait(mut self, pidfd: &OwnedFd) -> Result<u8> {
        loop {
            let mut watched = vec![
                PollFd::new(pidfd, PollFlags::IN),
                PollFd::new(&self.signals, PollFlags::IN),
            ];
            if let Some(notify) = &self.notify {
                watched.push(PollFd::from_borrowed_fd(notify.descriptor(), PollFlags::IN));
            }
            match poll(&mut watched, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).doing(|| "wait for the container's process"),
            }
            self.forward(pidfd);
            self.pass_on_notification();
            if let Some(status) = status_if_exited(pidfd)? {
                return Ok(status);
            }
        }
    }
}

/// Returns the status of the container's process (see [`Foreground::wait`]), if the process has
/// exited.
pub(super) fn status_if_exited(pidfd: &OwnedFd) -> Result<Option<u8>> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), options)
        .doing(|| "read the exit status of the container's process")?;
    Ok(status.map(|status| exit_code(&status)))
}

fn exit_code(status: &WaitIdStatus) -> u8 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => (128 + signal) as u8,
        (None, None) => 255,
    }
}
