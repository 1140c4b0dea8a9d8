//! The foreground mode of `run` and `exec`, without --detach. In this mode, rrun waits for the
//! container's process and forwards signals to this process. rrun then exits with the exit status
//! of this process.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, WaitIdStatus, waitid};

use crate::error::{Context, Result};
use crate::lifecycle::notify_socket::NotifySocket;
use crate::log;
use crate::sys::syscalls::{pidfd_send_signal, read_signal, set_signal_mask, signal_set, signalfd};

/// The size, in bytes, of the buffer through which rrun copies data to and from the container's
/// terminal.
const RELAY_BYTES: usize = 32 << 10;
/// The time that rrun waits for further output on the container's terminal after the container's
/// process has exited.
const OUTPUT_GRACE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// A signalfd(2) descriptor. rrun reads signals from this descriptor, and forwards them to the
/// container's process.
///
/// rrun first blocks the signals and creates the descriptor, and then creates the container's
/// process. So no signal is lost. The container's process unblocks the signals for itself.
pub(crate) struct Foreground {
    signals: OwnedFd,
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
    /// id.
    fn pass_on_notification(&self) {
        if let Some(notify) = &self.notify
            && let Err(error) = notify.pass_on(rustix::process::getpid().as_raw_nonzero().get())
        {
            log::warning(&error.to_string());
        }
    }

    /// Waits until the container's process exits, and returns its status. As in a shell, this
    /// status is the exit status of the process, or 128 plus the number of the signal that killed
    /// the process.
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
            if let Some(status) = status_if_exited(pidfd)? {
                return Ok(status);
            }
        }
    }
}

/// Returns the status of the container's process (see [`Foreground::wait`]), if the process has
/// exited.
fn status_if_exited(pidfd: &OwnedFd) -> Result<Option<u8>> {
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

/// The terminal of rrun's caller in raw mode, in which every key reaches the container unchanged.
/// Dropping this value restores the terminal's previous mode.
struct RawTerminal {
    mode: Option<rustix::termios::Termios>,
}

impl RawTerminal {
    fn set() -> RawTerminal {
        let stdin = rustix::stdio::stdin();
        // If standard input is not a terminal, rrun sets no terminal mode.
        let mode = rustix::termios::tcgetattr(stdin).ok();
        if let Some(mode) = &mode {
            let mut raw = mode.clone();
            raw.make_raw();
            // Keep the output processing of the caller's terminal. This terminal translates \n to
            // \r\n, but the container's terminal does not.
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

/// Sets the container's terminal to the size of the terminal of rrun's caller. Some of the three
/// standard streams can be redirected. So this function uses the first stream that is a terminal.
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
    /// Waits like [`Foreground::wait`]. While this function waits, it copies rrun's standard input
    /// to the container's terminal, and the terminal's output to rrun's standard output.
    pub(crate) fn relay(&self, pidfd: &OwnedFd, master: OwnedFd) -> Result<u8> {
        let _raw = RawTerminal::set();
        copy_size(&master);
        let mut input_open = true;
        let mut buffer = vec![0u8; RELAY_BYTES];
        let mut status = None;
        let mut lost = Ok(());
        loop {
            let Some(ready) = self.await_relay(pidfd, &master, input_open, status.is_some())?
            else {
                continue;
            };
            self.pass_on_notification();
            if let (Some(status), Ready { any: false, .. }) = (status, &ready) {
                return lost.map(|()| status);
            }
            if ready.signals {
                self.forward_with_size(pidfd, &master);
            }
            if ready.input {
                input_open = relay_input(&master, &mut buffer);
            }
            if status.is_none() {
                status = status_if_exited(pidfd)?;
            }
            if ready.master && !relay_output(&master, &mut buffer, &mut lost)? {
                let status = status.map_or_else(|| self.wait(pidfd), Ok)?;
                return lost.map(|()| status);
            }
        }
    }

    /// Waits until data or a signal can be read from one of the descriptors, or until the
    /// container's process exits. After the container's process has exited, this function waits at
    /// most [`OUTPUT_GRACE`] for remaining output. Returns `None` if a signal interrupted the wait.
    fn await_relay(
        &self,
        pidfd: &OwnedFd,
        master: &OwnedFd,
        input_open: bool,
        has_exited: bool,
    ) -> Result<Option<Ready>> {
        let stdin = rustix::stdio::stdin();
        let end = if has_exited {
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
        let timeout = has_exited.then_some(&OUTPUT_GRACE);
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

    /// Forwards signals like [`Foreground::forward`], except SIGWINCH. On SIGWINCH, this function
    /// sets the container's terminal to the new size of the terminal of rrun's caller.
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

/// The flags that show from which descriptors rrun can read without blocking.
struct Ready {
    any: bool,
    master: bool,
    signals: bool,
    input: bool,
}

/// Copies available bytes from rrun's standard input to the container's terminal. Returns false at
/// the end of the input.
fn relay_input(master: &OwnedFd, buffer: &mut [u8]) -> bool {
    match rustix::io::read(rustix::stdio::stdin(), &mut *buffer) {
        Ok(length) if length > 0 => {
            let _ = write_all(master, buffer.get(..length).unwrap_or_default());
            true
        }
        Err(Errno::INTR) => true,
        // rrun's standard input is at end of file. Write Ctrl-D (byte 4) to the container's
        // terminal, so that the container's process also reads end of file.
        Ok(_) => {
            let _ = write_all(master, &[4]);
            false
        }
        Err(_) => false,
    }
}

/// Copies available output of the container's terminal to rrun's standard output. Returns false at
/// the end of the output. If rrun cannot write to its standard output, this function stores the
/// error in `lost`. The function then discards the output, so that the container does not hang.
fn relay_output(master: &OwnedFd, buffer: &mut [u8], lost: &mut Result<()>) -> Result<bool> {
    match rustix::io::read(master, &mut *buffer) {
        Ok(length) if length > 0 => {
            let output = buffer.get(..length).unwrap_or_default();
            match write_all(rustix::stdio::stdout(), output) {
                // The reader of rrun's standard output has closed the pipe.
                Err(Errno::PIPE) => {}
                Err(errno) if lost.is_ok() => {
                    *lost = Err(errno).doing(|| "write the container's output to standard output");
                }
                _ => {}
            }
            Ok(true)
        }
        Err(Errno::INTR | Errno::AGAIN) => Ok(true),
        // EIO means that all processes have closed the terminal's slave side.
        Ok(_) | Err(Errno::IO) => Ok(false),
        Err(errno) => Err(errno).doing(|| "read the output of the container's terminal"),
    }
}
