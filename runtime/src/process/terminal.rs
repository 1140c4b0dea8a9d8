//! A container's terminal, which is a pseudo-terminal from the container's own devpts. If rrun's
//! caller specifies a console socket, rrun sends the master side of the terminal to this socket.
//! Otherwise, rrun copies data between the terminal and its own standard streams. See pty(7).

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

/// `DEVPTS_SUPER_MAGIC` in linux/magic.h.
const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;

pub(crate) struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

/// Connects to the console socket, which will receive the terminal's master side.
pub(crate) fn connect_console(path: &str) -> Result<OwnedFd> {
    unix_socket::connect("console socket", path)
}

/// Sends a terminal's master side over the console socket. As in runc's protocol for the console
/// socket, the message contains the terminal's path in the container, such as `/dev/pts/0`.
pub(crate) fn send_to_console(socket: &OwnedFd, master: &OwnedFd) -> Result<()> {
    let name = rustix::pty::ptsname(master, Vec::new());
    let name = name
        .as_ref()
        .map_or(&b"/dev/pts"[..], |name| name.to_bytes());
    send_descriptor(socket.as_fd(), master.as_fd(), name)
        .map(drop)
        .doing(|| "send the terminal over the console socket")
}

impl Terminal {
    /// Opens a new terminal from the devpts that is mounted in the container.
    pub(crate) fn open(rootfs: &Rootfs, size: Option<(u16, u16)>) -> Result<Terminal> {
        let doing = || "open /dev/pts/ptmx in the container (process.terminal)";
        // A container's image can contain any file at /dev/pts/ptmx (CVE-2025-52565), and opening
        // such a file can already do harm. This function therefore checks that /dev/pts is a real
        // devpts, in which the image cannot create files. RESOLVE_NO_XDEV refuses a file that is
        // mounted on ptmx.
        let devpts = rootfs
            .open(Path::new("/dev/pts"), OFlags::PATH | OFlags::DIRECTORY)
            .doing(doing)?;
        if rustix::fs::fstatfs(&devpts).doing(doing)?.f_type as u64 != DEVPTS_SUPER_MAGIC {
            refuse!("{}: no devpts is mounted on /dev/pts", doing());
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
        Ok(Terminal { master, slave })
    }

    /// Mounts the terminal's slave side on /dev/console.
    pub(crate) fn mount_console(&self, rootfs: &Rootfs) -> Result<()> {
        let doing = || "mount the terminal on /dev/console";
        let target = rootfs.mount_target(Path::new("/dev/console"), MountTarget::File)?;
        let slave = clone_descriptor(&self.slave, false).doing(doing)?;
        move_mount(&slave, &target).doing(doing)
    }

    /// Stops the terminal from translating \n to \r\n. rrun calls this function if it copies the
    /// terminal's output itself. rrun writes the output to a file, to a pipe, or to a terminal that
    /// translates newlines itself. So the output must not contain \r\n already. A program that
    /// receives the terminal through a console socket sets the terminal's output mode itself.
    pub(crate) fn keep_newlines(&self) -> Result<()> {
        let doing = || "set the terminal's output modes";
        let mut mode = tcgetattr(&self.slave).doing(doing)?;
        mode.output_modes.remove(OutputModes::ONLCR);
        tcsetattr(&self.slave, OptionalActions::Now, &mode).doing(doing)
    }

    pub(crate) fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Makes the slave side the controlling terminal of the calling process's session, and also the
    /// process's standard input, output and error.
    pub(crate) fn make_controlling(&self) -> Result<()> {
        set_controlling_terminal(self.slave.as_fd()).doing(|| "set the controlling terminal")?;
        let doing = || "use the terminal as standard input, output and error";
        rustix::stdio::dup2_stdin(&self.slave).doing(doing)?;
        rustix::stdio::dup2_stdout(&self.slave).doing(doing)?;
        rustix::stdio::dup2_stderr(&self.slave).doing(doing)
    }
}
