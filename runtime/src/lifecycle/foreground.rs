//! The foreground mode of `run` and `exec`, without --detach. In this mode, rrun waits for the
//! container's process and forwards signals to this process. rrun then exits with the exit status
//! of this process.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};

use crate::error::{Context, Result, refuse};
use crate::lifecycle::notify_socket::NotifySocket;
use crate::log;
use crate::sys::syscalls::{
    is_ignored, pidfd_send_signal, read_signal, set_signal_mask, signal_set, signalfd,
};

/// The time for which rrun waits for the exit status of a dead process that another process traces.
/// Only the tracer can reap the dead process. The kernel sends SIGCHLD when the tracer no longer
/// traces it.
pub(super) const TRACER_TIMEOUT: Duration = Duration::from_secs(5);

/// The number of other children after which rrun looks for signals before it reaps more of them.
const MAX_REAPED: u32 = 64;

/// The time after which rrun looks for signals before it reaps more of its other children. If a
/// process traces thousands of threads, the kernel searches all of them for each exit that it
/// reports.
const MAX_REAPING_TIME: Duration = Duration::from_millis(5);

/// The signals with which rrun's caller requests the end of the container's process.
pub(super) const ENDING_SIGNALS: [i32; 4] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// The time that rrun grants the setup of the container's process after one of the
/// [`ENDING_SIGNALS`]. The setup usually takes a few milliseconds, and rrun then forwards the
/// signal.
const SETUP_GRACE: Duration = Duration::from_millis(500);

/// A signalfd(2) descriptor. rrun reads signals from this descriptor, and forwards them to the
/// container's process. SIGCHLD only wakes rrun.
///
/// rrun first blocks the signals and creates the descriptor, and then creates the container's
/// process. So no signal is lost. The container's process unblocks the signals for itself.
pub(crate) struct Foreground {
    pub(super) signals: OwnedFd,
    /// The signals that arrived during the setup of the process, and that rrun forwards later.
    early: VecDeque<i32>,
    /// The first signal that arrived during the setup to end the process, and the time at which
    /// rrun then gives the setup up.
    setup_end: Option<(i32, Instant)>,
    /// The socket on which the container reports that it is ready.
    pub(crate) notify: Option<NotifySocket>,
}

impl Foreground {
    pub(crate) fn start() -> Result<Foreground> {
        // rrun does not forward the signals in this list. Each of these signals concerns rrun
        // itself, or cannot be received through a signalfd(2) descriptor.
        let not_received = [
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
        ];
        let received: Vec<i32> = (1..=64)
            .filter(|signal| !not_received.contains(signal) && !matches!(signal, 32 | 33))
            .collect();
        let set = signal_set(&received);
        set_signal_mask(&set).doing(|| "block the signals that rrun forwards")?;
        Ok(Foreground {
            signals: signalfd(&set).doing(|| "create a descriptor for signals (signalfd)")?,
            early: VecDeque::new(),
            setup_end: None,
            notify: None,
        })
    }

    /// Waits until `descriptor` is ready, while the container's process is being set up.
    ///
    /// The container can have stopped the process, which then never becomes ready. rrun blocks the
    /// signals that would end it. So this function fails if the descriptor is not ready within
    /// [`SETUP_GRACE`] after such a signal.
    pub(super) fn await_ready(&mut self, descriptor: BorrowedFd<'_>) -> Result<()> {
        loop {
            let mut watched = [
                PollFd::from_borrowed_fd(descriptor, PollFlags::IN),
                PollFd::new(&self.signals, PollFlags::IN),
            ];
            let timeout = self.setup_end.map(|(_, end)| time_left(end));
            match poll(&mut watched, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).doing(|| "wait for the container's process"),
            }
            let [ready, _] = watched.map(|it| !it.revents().is_empty());
            if ready {
                return Ok(());
            }
            self.check_setup_end()?;
        }
    }

    /// Reads the pending signals while the container's process is being set up. Fails if the setup
    /// has taken longer than [`SETUP_GRACE`] after a signal to end the process.
    pub(crate) fn check_setup_end(&mut self) -> Result<()> {
        while let Some(signal) = self.read_signal() {
            if ENDING_SIGNALS.contains(&signal) {
                let end = Instant::now() + SETUP_GRACE;
                self.setup_end.get_or_insert((signal, end));
            }
            self.early.push_back(signal);
        }
        match self.setup_end {
            Some((signal, end)) if Instant::now() >= end => refuse!(
                "signal {signal} arrived, and the container's process was not ready {} ms later",
                SETUP_GRACE.as_millis()
            ),
            _ => Ok(()),
        }
    }

    /// Forwards all pending signals to the container's process.
    fn forward(&mut self, pidfd: &OwnedFd) {
        while let Some(signal) = self.next_signal() {
            // A failed send means that the container's process has exited, so the failure is
            // ignored.
            let _ = pidfd_send_signal(pidfd.as_fd(), signal);
        }
    }

    /// Returns the next signal for the container's process.
    pub(super) fn next_signal(&mut self) -> Option<i32> {
        self.early.pop_front().or_else(|| self.read_signal())
    }

    /// Returns whether rrun has read signals that it has not forwarded yet.
    pub(super) fn has_early_signals(&self) -> bool {
        !self.early.is_empty()
    }

    /// Reads the next pending signal for the container's process. A shell makes its background
    /// jobs ignore SIGINT and SIGQUIT, and nohup(1) makes a program ignore SIGHUP. The container's
    /// process does not ignore these signals, so rrun does not forward them.
    fn read_signal(&self) -> Option<i32> {
        loop {
            match read_signal(self.signals.as_fd())? {
                libc::SIGCHLD => {}
                signal @ (libc::SIGHUP | libc::SIGINT | libc::SIGQUIT) if is_ignored(signal) => {}
                signal => return Some(signal),
            }
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
    pub(crate) fn wait(mut self, pid: i32, pidfd: &OwnedFd) -> Result<u8> {
        let mut deadline = None;
        let mut has_more = false;
        if self.has_early_signals() {
            self.forward(pidfd);
        }
        loop {
            let mut watched = vec![PollFd::new(&self.signals, PollFlags::IN)];
            if deadline.is_none() {
                watched.push(PollFd::new(pidfd, PollFlags::IN));
            }
            if let Some(notify) = &self.notify {
                watched.push(PollFd::from_borrowed_fd(notify.descriptor(), PollFlags::IN));
            }
            let timeout = if has_more {
                Some(Timespec::default())
            } else {
                deadline.map(time_left)
            };
            match poll(&mut watched, timeout.as_ref()) {
                Ok(0) if deadline.is_some_and(|it| Instant::now() >= it) => refuse!(
                    "the container's process has exited, but another process traces it and does not read its exit status"
                ),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).doing(|| "wait for the container's process"),
            }
            let is_ready = |at: usize| watched.get(at).is_some_and(|it| !it.revents().is_empty());
            let (has_signals, has_died) = (is_ready(0), deadline.is_none() && is_ready(1));
            self.pass_on_notification();
            if has_signals && !has_died {
                self.forward(pidfd);
            }
            match reap(pid)? {
                Reaped::Exited(status) => return Ok(status),
                Reaped::All => has_more = false,
                Reaped::Some => has_more = true,
            }
            if has_died {
                deadline = Some(Instant::now() + TRACER_TIMEOUT);
            }
        }
    }
}

/// Returns the time until `deadline`.
pub(super) fn time_left(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now());
    Timespec {
        tv_sec: left.as_secs() as _,
        tv_nsec: left.subsec_nanos().into(),
    }
}

/// The result of [`reap`].
pub(super) enum Reaped {
    /// The container's process has exited with this status (see [`Foreground::wait`]).
    Exited(u8),
    /// The container's process has not exited. No other child is left that has exited.
    All,
    /// The container's process has not exited. Other children may be left that have exited.
    Some,
}

/// Reaps the container's process `pid` if it has exited, and other children of rrun that have
/// exited.
///
/// A thread of the process can make rrun its tracer (PTRACE_TRACEME of ptrace(2)). The exit of the
/// process is then complete only after rrun has reaped the thread. The kernel also reports that a
/// traced thread has stopped, which this function ignores. A process can create such threads, or
/// other children of rrun (CLONE_PARENT of clone(2)), as fast as rrun reaps them. For this reason,
/// one call reaps only a limited number of them.
pub(super) fn reap(pid: i32) -> Result<Reaped> {
    let what = || "read the exit status of the container's process";
    let begun = Instant::now();
    for _ in 0..MAX_REAPED {
        let child = rustix::process::wait(WaitOptions::NOHANG).doing(what)?;
        let Some((child, status)) = child else {
            return Ok(Reaped::All);
        };
        let code = exit_code(status).filter(|_| child.as_raw_nonzero().get() == pid);
        if let Some(code) = code {
            return Ok(Reaped::Exited(code));
        }
        if begun.elapsed() >= MAX_REAPING_TIME {
            break;
        }
    }
    let child = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG).doing(what)?;
    let code = child.and_then(|(_, status)| exit_code(status));
    Ok(code.map_or(Reaped::Some, Reaped::Exited))
}

fn exit_code(status: WaitStatus) -> Option<u8> {
    let killed_by = status.terminating_signal().map(|signal| 128 + signal);
    status.exit_status().or(killed_by).map(|code| code as u8)
}
