//! A container's terminal: a pseudo-terminal out of its own devpts, whose master side goes
//! to whoever holds the console socket. See pty(7).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, OutputModes, Winsize, tcgetattr, tcsetattr};

use crate::error::{Context, Result, refuse};
use crate::mounts::rootfs::{MountTarget, Rootfs};
use crate::mounts::tree::{clone_descriptor, move_mount};
use crate::sys::syscalls::set_controlling_terminal;
use crate::sys::unix_socket::{self, send_descriptor};

/// linux/magic.h
const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;

pub(crate) struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
    /// Its name in the container, `/dev/pts/0`.
    name: String,
}

/// Connects to the socket that is to receive the master side.
pub(crate) fn connect_console(path: &str) -> Result<OwnedFd> {
    unix_socket::connect("console socket", path)
}

impl Terminal {
    /// A new one, from the devpts that is mounted in the container.
    pub(crate) fn open(rootfs: &Rootfs, size: Option<(u16, u16)>) -> Result<Terminal> {
        let doing = || "open /dev/pts/ptmx in the container (process.terminal)";
        // A container's image may have put anything there (CVE-2025-52565), and to open it
        // may be harm enough. In a devpts itself nobody can; nothing mounted on it is taken.
        let devpts = rootfs
            .open(Path::new("/dev/pts"), OFlags::PATH | OFlags::DIRECTORY)
            .doing(doing)?;
        if rustix::fs::fstatfs(&devpts).doing(doing)?.f_type as u64 != DEVPTS_SUPER_MAGIC {
            refuse!("{}: /dev/pts is no devpts", doing());
        }
        let master = rustix::fs::openat2(
            &devpts,
            "ptmx",
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS,
        )
        .doing(doing)?;
        rustix::pty::unlockpt(&master).doing(|| "unlock the terminal")?;
        let slave = rustix::pty::ioctl_tiocgptpeer(
            &master,
            OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
        )
        .doing(|| "open the terminal's slave side")?;
        if let Some((rows, columns)) = size {
            let size = Winsize {
                ws_row: rows,
                ws_col: columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            rustix::termios::tcsetwinsize(&master, size)
                .doing(|| "set the terminal's size (process.consoleSize)")?;
        }
        let name = rustix::pty::ptsname(&master, Vec::new()).map_or_else(
            |_| "/dev/pts".to_owned(),
            |name| name.to_string_lossy().into_owned(),
        );
        Ok(Terminal {
            master,
            slave,
            name,
        })
    }

    /// Shows the slave side as /dev/console.
    pub(crate) fn mount_console(&self, rootfs: &Rootfs) -> Result<()> {
        let doing = || "mount the terminal on /dev/console";
        let target = rootfs.mount_target(Path::new("/dev/console"), MountTarget::File)?;
        let slave = clone_descriptor(&self.slave, false).doing(doing)?;
        move_mount(&slave, &target).doing(doing)
    }

    /// Leaves newlines as they are. rrun's relay needs that: its own output is a file, a pipe, or a
    /// terminal that translates newlines itself, and lines that end in \r\n are no use to any of
    /// them. A receiver of the console socket decides about that alone.
    pub(crate) fn keep_newlines(&self) -> Result<()> {
        let doing = || "set the terminal's modes";
        let mut mode = tcgetattr(&self.slave).doing(doing)?;
        mode.output_modes.remove(OutputModes::ONLCR);
        tcsetattr(&self.slave, OptionalActions::Now, &mode).doing(doing)
    }

    pub(crate) fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Sends the master side away, as runc does: with its name as the message.
    pub(crate) fn send_master(&self, socket: BorrowedFd<'_>) -> Result<()> {
        send_descriptor(socket, self.master.as_fd(), self.name.as_bytes())
            .doing(|| "send the terminal over the console socket")
    }

    /// Makes the slave side this session's terminal and standard input, output and error.
    pub(crate) fn make_controlling(&self) -> Result<()> {
        set_controlling_terminal(self.slave.as_fd()).doing(|| "take the terminal")?;
        let doing = || "make the terminal standard input, output and error";
        rustix::stdio::dup2_stdin(&self.slave).doing(doing)?;
        rustix::stdio::dup2_stdout(&self.slave).doing(doing)?;
        rustix::stdio::dup2_stderr(&self.slave).doing(doing)
    }
}
