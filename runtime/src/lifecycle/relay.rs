//! The copying of data between a container's terminal and rrun's standard streams, while rrun is in
//! the foreground.
//!
//! A container's program can stop to read its terminal, and rrun's caller can stop to read rrun's
//! output. rrun must then nevertheless forward signals, and copy data in the other direction. So
//! rrun waits with poll(2) for all descriptors, and calls only operations that do not block.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use rustix::stdio::{stderr, stdin, stdout};

use crate::error::{Context, Result};
use crate::lifecycle::foreground::{
    ENDING_SIGNALS, Foreground, Reaped, TRACER_TIMEOUT, reap, time_left,
};
use crate::sys::syscalls::pidfd_send_signal;

/// The size, in bytes, of the buffer for each direction. If poll(2) reports that a pipe is writable,
/// the pipe has room for this number of bytes (`PIPE_BUF`).
const BUFFER_BYTES: usize = 4096;
/// The time after the exit of the container's process during which rrun waits for further output on
/// the container's terminal.
const OUTPUT_GRACE: Duration = Duration::from_millis(50);
/// The largest number of bytes that rrun reads from the container's terminal after the exit of the
/// container's process. The kernel stores fewer bytes for a terminal, so all bytes that the process
/// wrote are among these bytes. Without this limit, another process that writes to the terminal
/// forever would keep rrun alive.
const OUTPUT_BYTES_AFTER_EXIT: usize = 128 << 10;

impl Foreground {
    /// Waits like [`Foreground::wait`]. While this function waits, it copies rrun's standard input
    /// to the container's terminal, and the terminal's output to rrun's standard output.
    pub(crate) fn relay(self, pid: i32, pidfd: &OwnedFd, master: OwnedFd) -> Result<u8> {
        let _raw = RawTerminal::set();
        copy_size(&master);
        // The container's processes have the slave side open, so this call does not affect them.
        rustix::io::ioctl_fionbio(&master, true)
            .doing(|| "make the container's terminal non-blocking")?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let relay = Relay {
            foreground: self,
            pid,
            pidfd,
            dead_until: None,
            has_more: false,
            slave: ioctl_tiocgptpeer(&master, flags).ok(),
            master,
            own_terminal: open_own_terminal(),
            input: Pending::new(),
            input_open: true,
            output: Pending::new(),
            lost: Ok(()),
            exit: None,
            must_end: false,
        };
        relay.run()
    }
}

/// The terminal of rrun's caller in raw mode, in which every key reaches the container unchanged.
/// Dropping this value restores the terminal's previous mode.
struct RawTerminal {
    mode: Option<rustix::termios::Termios>,
}

impl RawTerminal {
    fn set() -> RawTerminal {
        // If standard input is not a terminal, rrun sets no terminal mode.
        let mode = rustix::termios::tcgetattr(stdin()).ok();
        if let Some(mode) = &mode {
            let mut raw = mode.clone();
            raw.make_raw();
            // Keep the output processing of the caller's terminal. This terminal translates \n to
            // \r\n, but the container's terminal does not.
            raw.output_modes = mode.output_modes;
            let _ =
                rustix::termios::tcsetattr(stdin(), rustix::termios::OptionalActions::Now, &raw);
        }
        RawTerminal { mode }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(mode) = &self.mode {
            let _ =
                rustix::termios::tcsetattr(stdin(), rustix::termios::OptionalActions::Now, mode);
        }
    }
}

/// Sets the container's terminal to the size of the terminal of rrun's caller. Some of the three
/// standard streams can be redirected. So this function uses the first stream that is a terminal.
fn copy_size(master: &OwnedFd) {
    let own = [stderr(), stdout(), stdin()];
    if let Some(size) = own
        .into_iter()
        .find_map(|stream| rustix::termios::tcgetwinsize(stream).ok())
    {
        let _ = rustix::termios::tcsetwinsize(master, size);
    }
}

/// Opens the terminal that is rrun's standard output again, for writes that do not block. The
/// descriptor of standard output itself must remain blocking, because rrun shares it with its
/// caller. Returns `None` if standard output is not a terminal, or if rrun has no right to open the
/// terminal. rrun then writes to the descriptor of standard output. poll(2) reports a terminal as
/// writable even if the terminal has room for only one byte, but a pipe or a socket only if it has
/// room for a whole buffer.
fn open_own_terminal() -> Option<OwnedFd> {
    if !rustix::termios::isatty(stdout()) {
        return None;
    }
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // The kernel's link leads to the terminal that standard output already refers to.
    rustix::fs::open("/proc/self/fd/1", flags, Mode::empty()).ok()
}

/// Returns the descriptor to which rrun writes the output of the container's terminal.
fn output_end(own_terminal: &Option<OwnedFd>) -> BorrowedFd<'_> {
    match own_terminal {
        Some(terminal) => terminal.as_fd(),
        None => stdout(),
    }
}

/// The state of the copying.
struct Relay<'a> {
    foreground: Foreground,
    pid: i32,
    pidfd: &'a OwnedFd,
    /// The time until which rrun waits for the exit status, if the container's process is dead.
    dead_until: Option<Instant>,
    /// True if rrun can have more children that have exited ([`Reaped::Some`]).
    has_more: bool,
    master: OwnedFd,
    /// The slave side of the terminal, until the container's process has exited. If no process has
    /// the slave side open, reading from the master side fails. But the container's processes can
    /// close their terminal and open it again later. So rrun keeps the slave side open. This field
    /// is `None` if the kernel cannot open the slave side.
    slave: Option<OwnedFd>,
    own_terminal: Option<OwnedFd>,
    input: Pending,
    input_open: bool,
    output: Pending,
    /// The first error that occurred when rrun wrote to its standard output. rrun then discards the
    /// output, so that the container does not hang.
    lost: Result<()>,
    exit: Option<Exit>,
    /// True if rrun's caller has sent a signal to end the container's process. After the exit of the
    /// process, rrun then does not wait for the reader of its standard output.
    must_end: bool,
}

/// The exit of the container's process.
struct Exit {
    status: u8,
    /// The time until which rrun waits for further output.
    deadline: Instant,
    /// The number of bytes of output that rrun still reads.
    bytes_left: usize,
}

/// The operations that rrun can do without blocking.
#[derive(Default)]
struct Ready {
    signals: bool,
    exit: bool,
    read_input: bool,
    write_output: bool,
    read_master: bool,
    write_master: bool,
}

impl Relay<'_> {
    /// Copies data until the container's process has exited and its output is copied. Returns the
    /// status of the process.
    fn run(mut self) -> Result<u8> {
        if self.foreground.has_early_signals() {
            self.forward_signals();
        }
        loop {
            let Some(ready) = self.wait()? else {
                return self.end();
            };
            self.foreground.pass_on_notification();
            if ready.signals {
                self.forward_signals();
            }
            if ready.exit {
                self.dead_until = Some(Instant::now() + TRACER_TIMEOUT);
            }
            if (ready.exit || ready.signals || self.has_more) && self.exit.is_none() {
                self.record_exit()?;
            }
            if ready.read_input {
                self.read_input();
            }
            if ready.write_master && self.input.write_to(&self.master).is_err() {
                self.input_open = false;
            }
            if ready.write_output {
                self.write_output();
            }
            if ready.read_master && !self.read_output()? {
                return self.end();
            }
        }
    }

    /// Waits for the exit of the container's process if necessary, and returns its status.
    fn end(self) -> Result<u8> {
        let status = match self.exit {
            Some(exit) => exit.status,
            None => self.foreground.wait(self.pid, self.pidfd)?,
        };
        self.lost.map(|()| status)
    }

    /// Waits until rrun can do an operation without blocking. Returns `None` if the container's
    /// process has exited, and either all its output is copied, or rrun's caller has requested the
    /// end and does not read the output.
    fn wait(&self) -> Result<Option<Ready>> {
        let mut master_flags = PollFlags::empty();
        master_flags.set(PollFlags::IN, self.output.is_empty());
        master_flags.set(PollFlags::OUT, !self.input.is_empty());
        let reads_input = self.input_open && self.input.is_empty() && self.exit.is_none();
        let notify = self.foreground.notify.as_ref();
        // poll(2) reports the disconnection of a descriptor even if no flags are set. So the list
        // contains only descriptors with flags.
        let all = [
            Some((self.foreground.signals.as_fd(), PollFlags::IN)),
            self.dead_until
                .is_none()
                .then_some((self.pidfd.as_fd(), PollFlags::IN)),
            reads_input.then_some((stdin(), PollFlags::IN)),
            (!self.output.is_empty()).then_some((output_end(&self.own_terminal), PollFlags::OUT)),
            (!master_flags.is_empty()).then_some((self.master.as_fd(), master_flags)),
            notify.map(|notify| (notify.descriptor(), PollFlags::IN)),
        ];
        let listed = all.iter().flatten();
        let mut watched: Vec<PollFd<'_>> = listed
            .map(|(descriptor, flags)| PollFd::from_borrowed_fd(*descriptor, *flags))
            .collect();
        let deadline = match &self.exit {
            Some(exit) if self.output.is_empty() || self.must_end => Some(exit.deadline),
            Some(_) => None,
            None => self.dead_until,
        };
        let has_more = self.has_more && self.exit.is_none();
        let timeout = if has_more {
            Some(Timespec::default())
        } else {
            deadline.map(time_left)
        };
        let count = match poll(&mut watched, timeout.as_ref()) {
            Err(Errno::INTR) => return Ok(Some(Ready::default())),
            result => result.doing(|| "wait for the container's process")?,
        };
        if count == 0 {
            let is_over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            return Ok((!is_over).then(Ready::default));
        }
        let mut results = watched.iter();
        let [signals, exit, read_input, write_output, master, _] = all.map(|entry| {
            let result = entry.and_then(|_| results.next());
            result.map_or(PollFlags::empty(), PollFd::revents)
        });
        let disconnected = PollFlags::HUP | PollFlags::ERR;
        Ok(Some(Ready {
            signals: !signals.is_empty(),
            exit: !exit.is_empty(),
            read_input: !read_input.is_empty(),
            write_output: !write_output.is_empty(),
            read_master: self.output.is_empty() && master.intersects(PollFlags::IN | disconnected),
            write_master: !self.input.is_empty()
                && master.intersects(PollFlags::OUT | disconnected),
        }))
    }

    /// Forwards signals like [`Foreground::wait`], except SIGWINCH. On SIGWINCH, this function sets
    /// the container's terminal to the new size of the terminal of rrun's caller.
    fn forward_signals(&mut self) {
        while let Some(signal) = self.foreground.next_signal() {
            if signal == libc::SIGWINCH {
                copy_size(&self.master);
                continue;
            }
            self.must_end |= ENDING_SIGNALS.contains(&signal);
            // A failed send means that the process has exited, so the failure is ignored.
            let _ = pidfd_send_signal(self.pidfd.as_fd(), signal);
        }
    }

    fn record_exit(&mut self) -> Result<()> {
        let reaped = reap(self.pid)?;
        self.has_more = matches!(reaped, Reaped::Some);
        let Reaped::Exited(status) = reaped else {
            return Ok(());
        };
        self.exit = Some(Exit {
            status,
            deadline: Instant::now() + OUTPUT_GRACE,
            bytes_left: OUTPUT_BYTES_AFTER_EXIT,
        });
        self.input.clear();
        // Now the kernel reports the end of the output as soon as no process has the terminal open.
        self.slave = None;
        Ok(())
    }

    fn read_input(&mut self) {
        match self.input.read_from(stdin()) {
            Ok(0) => {
                self.input.push_end_of_file();
                self.input_open = false;
            }
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.input_open = false,
        }
    }

    fn write_output(&mut self) {
        match self.output.write_to(output_end(&self.own_terminal)) {
            // EPIPE means that the reader of rrun's standard output has closed the pipe.
            Ok(()) | Err(Errno::PIPE) => {}
            Err(errno) if self.lost.is_ok() => {
                self.lost = Err(errno).doing(|| "write the container's output to standard output");
            }
            Err(_) => {}
        }
    }

    /// Reads available output from the container's terminal. Returns false at the end of the output.
    fn read_output(&mut self) -> Result<bool> {
        let length = match self.output.read_from(&self.master) {
            Ok(length) => length,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(true),
            // EIO means that all processes have closed the terminal's slave side.
            Err(Errno::IO) => 0,
            Err(errno) => {
                return Err(errno).doing(|| "read the output of the container's terminal");
            }
        };
        let Some(exit) = &mut self.exit else {
            return Ok(length > 0);
        };
        let is_wanted = exit.bytes_left > 0;
        exit.bytes_left = exit.bytes_left.saturating_sub(length);
        Ok(length > 0 && is_wanted)
    }
}

/// Bytes that rrun has read at one end, and that it has not written at the other end yet.
struct Pending {
    buffer: Vec<u8>,
    range: Range<usize>,
    /// The last byte that rrun has read, or a newline if rrun has read no byte.
    last: u8,
}

impl Pending {
    fn new() -> Pending {
        Pending {
            buffer: vec![0; BUFFER_BYTES],
            range: 0..0,
            last: b'\n',
        }
    }

    fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    fn clear(&mut self) {
        self.range = 0..0;
    }

    /// Appends the bytes with which a program reads end of file from its terminal. The caller has
    /// written all other bytes. Within a line, the first Ctrl-D ends only the line.
    fn push_end_of_file(&mut self) {
        const CTRL_D: u8 = 4;
        let is_within_line = !matches!(self.last, b'\n' | b'\r');
        self.buffer.clear();
        self.buffer.resize(BUFFER_BYTES, CTRL_D);
        self.range = 0..1 + usize::from(is_within_line);
    }

    /// Replaces the bytes with bytes that one call of read(2) returns, and returns their number.
    fn read_from(&mut self, descriptor: impl AsFd) -> std::result::Result<usize, Errno> {
        self.clear();
        let length = rustix::io::read(descriptor, &mut *self.buffer)?;
        self.range = 0..length;
        if let Some(last) = self.buffer.get(..length).and_then(<[u8]>::last) {
            self.last = *last;
        }
        Ok(length)
    }

    /// Writes the bytes with one call of write(2), and keeps the bytes that the kernel does not
    /// accept yet. If the call fails, the bytes are discarded.
    fn write_to(&mut self, descriptor: impl AsFd) -> std::result::Result<(), Errno> {
        let bytes = self.buffer.get(self.range.clone()).unwrap_or_default();
        match rustix::io::write(descriptor, bytes) {
            Ok(written) => self.range.start += written,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => {
                self.clear();
                return Err(errno);
            }
        }
        Ok(())
    }
}
