//! Waiting in the foreground for a container's process, as `run` and `exec` do without
//! --detach: signals go on to it, its status becomes rrun's own.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, WaitIdStatus, waitid};

use crate::error::{Context, Result};
use crate::lifecycle::notify_socket::NotifySocket;
use crate::log;
use crate::sys::syscalls::{pidfd_send_signal, read_signal, set_signal_mask, signal_set, signalfd};

/// How much a relay carries at once.
const RELAY_BYTES: usize = 32 << 10;
/// How long the output may pause, after the end of the process, before the relay ends.
const OUTPUT_GRACE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// Signals that are for the container's process, taken by a descriptor.
///
/// Made before the process is, so that none is lost in between; the process unblocks
/// them for itself.
pub(crate) struct Foreground {
    signals: OwnedFd,
    /// Where the container says that it is ready.
    pub(crate) notify: Option<NotifySocket>,
}

impl Foreground {
    pub(crate) fn start() -> Result<Foreground> {
        // All but those that report an error of this program itself, or can not be had.
        let own = [
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
        let others: Vec<i32> = (1..=64)
            .filter(|signal| !own.contains(signal) && !matches!(signal, 32 | 33))
            .collect();
        let set = signal_set(&others);
        set_signal_mask(&set).doing(|| "block signals to forward them")?;
        Ok(Foreground {
            signals: signalfd(&set).doing(|| "make a descriptor for signals")?,
            notify: None,
        })
    }

    /// Sends on what has come in.
    fn forward(&self, pidfd: &OwnedFd) {
        while let Some(signal) = read_signal(self.signals.as_fd()) {
            // A process that is gone needs no signals.
            let _ = pidfd_send_signal(pidfd.as_fd(), signal);
        }
    }

    /// As long as rrun is in the foreground, it is what the service manager watches.
    fn pass_on_notification(&self) {
        if let Some(notify) = &self.notify
            && let Err(error) = notify.pass_on(rustix::process::getpid().as_raw_nonzero().get())
        {
            log::warning(&error.to_string());
        }
    }

    /// Waits for the end of a child and returns its status as a shell would: its exit
    /// status, or 128 and the number of the signal that killed it.
    pub(crate) fn wait(&self, pidfd: &OwnedFd) -> Result<u8> {
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
            if let Some(status) = ended(pidfd)? {
                return Ok(status);
            }
        }
    }
}

/// The status of a child, if it has ended.
fn ended(pidfd: &OwnedFd) -> Result<Option<u8>> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), options)
        .doing(|| "take the status of the container's process")?;
    Ok(status.map(|status| exit_code(&status)))
}

fn exit_code(status: &WaitIdStatus) -> u8 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => (128 + signal) as u8,
        (None, None) => 255,
    }
}

/// The caller's own terminal, put in raw mode so that every key goes on as it is; given
/// back its mode in the end.
struct RawTerminal {
    mode: Option<rustix::termios::Termios>,
}

impl RawTerminal {
    fn set() -> RawTerminal {
        let stdin = rustix::stdio::stdin();
        // Standard input that is no terminal needs nothing.
        let mode = rustix::termios::tcgetattr(stdin).ok();
        if let Some(mode) = &mode {
            let mut raw = mode.clone();
            raw.make_raw();
            // Keep output processing (NL → CRNL): the container's pty does not do it.
            raw.output_modes = mode.output_modes;
            let _ = rustix::termios::tcsetattr(stdin, rustix::termios::OptionalActions::Now, &raw);
        }
        RawTerminal { mode }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(mode) = &self.mode {
            let _ = rustix::termios::tcsetattr(
                rustix::stdio::stdin(),
                rustix::termios::OptionalActions::Now,
                mode,
            );
        }
    }
}

/// Gives the container's terminal the size of the caller's, of which any of the three standard
/// streams may be redirected.
fn copy_size(master: &OwnedFd) {
    use rustix::stdio::{stderr, stdin, stdout};
    let own = [stderr(), stdout(), stdin()];
    if let Some(size) = own
        .into_iter()
        .find_map(|stream| rustix::termios::tcgetwinsize(stream).ok())
    {
        let _ = rustix::termios::tcsetwinsize(master, size);
    }
}

fn write_all(to: impl AsFd, mut bytes: &[u8]) -> std::result::Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

impl Foreground {
    /// Like [`Foreground::wait`], and carries bytes between the caller's standard input and
    /// output and the container's terminal.
    pub(crate) fn relay(&self, pidfd: &OwnedFd, master: OwnedFd) -> Result<u8> {
        let _raw = RawTerminal::set();
        copy_size(&master);
        let mut input_open = true;
        let mut buffer = vec![0u8; RELAY_BYTES];
        let mut status = None;
        loop {
            let Some(ready) = self.await_relay(pidfd, &master, input_open, status.is_some())?
            else {
                continue;
            };
            self.pass_on_notification();
            if let (Some(status), Ready { any: false, .. }) = (status, &ready) {
                return Ok(status);
            }
            if ready.signals {
                self.forward_with_size(pidfd, &master);
            }
            if ready.input {
                input_open = relay_input(&master, &mut buffer);
            }
            if status.is_none() {
                status = ended(pidfd)?;
            }
            if ready.master && !relay_output(&master, &mut buffer) {
                return match status {
                    Some(status) => Ok(status),
                    None => self.wait(pidfd),
                };
            }
        }
    }

    /// Waits until there is something to relay. After the end of the process only what is still on
    /// the way is waited for. `None` if a signal interrupted the wait.
    fn await_relay(
        &self,
        pidfd: &OwnedFd,
        master: &OwnedFd,
        input_open: bool,
        has_ended: bool,
    ) -> Result<Option<Ready>> {
        let stdin = rustix::stdio::stdin();
        let end = if has_ended {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        let mut watched = vec![
            PollFd::new(master, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::new(pidfd, end),
        ];
        if input_open {
            watched.push(PollFd::new(&stdin, PollFlags::IN));
        }
        if let Some(notify) = &self.notify {
            watched.push(PollFd::from_borrowed_fd(notify.descriptor(), PollFlags::IN));
        }
        let timeout = has_ended.then_some(&OUTPUT_GRACE);
        let any = match poll(&mut watched, timeout) {
            Ok(ready) => ready > 0,
            Err(Errno::INTR) => return Ok(None),
            Err(errno) => return Err(errno).doing(|| "wait for the container's process"),
        };
        let readable = |at: usize| watched.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Some(Ready {
            any,
            master: readable(0),
            signals: readable(1),
            input: input_open && readable(3),
        }))
    }

    /// Like [`Foreground::forward`], but a new size of the caller's terminal becomes that of the
    /// container's.
    fn forward_with_size(&self, pidfd: &OwnedFd, master: &OwnedFd) {
        while let Some(signal) = read_signal(self.signals.as_fd()) {
            if signal == libc::SIGWINCH {
                copy_size(master);
            } else {
                let _ = pidfd_send_signal(pidfd.as_fd(), signal);
            }
        }
    }
}

/// What a relay can read without waiting.
struct Ready {
    any: bool,
    master: bool,
    signals: bool,
    input: bool,
}

/// Carries some input to the terminal; false if there will be no more.
fn relay_input(master: &OwnedFd, buffer: &mut [u8]) -> bool {
    match rustix::io::read(rustix::stdio::stdin(), &mut *buffer) {
        Ok(length) if length > 0 => {
            let _ = write_all(master, buffer.get(..length).unwrap_or_default());
            true
        }
        // End of file, for which a terminal has Ctrl-D.
        Ok(_) => {
            let _ = write_all(master, &[4]);
            false
        }
        Err(_) => false,
    }
}

/// Carries some output of the terminal; false if there will be no more.
fn relay_output(master: &OwnedFd, buffer: &mut [u8]) -> bool {
    match rustix::io::read(master, &mut *buffer) {
        Ok(length) if length > 0 => {
            let output = buffer.get(..length).unwrap_or_default();
            let _ = write_all(rustix::stdio::stdout(), output);
            true
        }
        // EIO: the last holder of the slave side has closed it.
        _ => false,
    }
}
