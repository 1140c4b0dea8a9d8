//! `$NOTIFY_SOCKET`: the container's way to tell the service manager that it is ready. See
//! sd_notify(3).
//!
//! The manager's own socket is not the container's to reach, so the container gets one of
//! its own, at [`INSIDE`]. What it says there is passed on if it is READY=1, with its process
//! id on the host as MAINPID, as runc does it: nothing else that a container could say is to
//! reach the host's service manager.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, recv,
    socket_with,
};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::error::{Context, Result, refuse};
use crate::log;
use crate::mounts::Mount;
use crate::sys::unix_socket::send_descriptor;
use rrun_kernel::unix_socket::at_address;

const VARIABLE: &str = "NOTIFY_SOCKET";
/// The directory in the container's own under --root that is shown to the container.
const DIRECTORY: &str = "notify";
/// The socket in there.
const FILE: &str = "notify.sock";
const INSIDE: &str = "/run/notify";
/// The longest message; systemd takes no longer ones.
const MESSAGE_BYTES: usize = 4096;
/// How long the service manager may take to have read everything.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(30);
/// After this, the log says what is being waited for.
const READY_WARNING_DELAY: Duration = Duration::from_secs(10);

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs() as _,
        tv_nsec: 0,
    }
}

/// The service manager's socket, if rrun's caller has one.
pub(crate) struct ServiceManager {
    address: SocketAddrUnix,
}

impl ServiceManager {
    /// # Errors
    /// An address that is none of a unix socket's.
    pub(crate) fn from_environment() -> Result<Option<ServiceManager>> {
        let Some(name) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        let name = name.as_encoded_bytes();
        let doing = || format!("{VARIABLE}={}", String::from_utf8_lossy(name));
        let address = match name {
            [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest).doing(doing)?,
            [b'/', ..] => SocketAddrUnix::new(name).doing(doing)?,
            _ => refuse!("{}: it is no address of a unix socket", doing()),
        };
        Ok(Some(ServiceManager { address }))
    }
}

/// The mount by which the container, whose directory under --root is `directory`, gets its socket;
/// `index` is its place among the mounts.
pub(crate) fn mount(directory: &Path, index: usize) -> Result<Mount> {
    Mount::read_only_bind(index, &directory.join(DIRECTORY), Path::new(INSIDE))
}

/// The variable by which the container finds its socket.
pub(crate) fn variable() -> String {
    format!("{VARIABLE}={INSIDE}/{FILE}")
}

/// Makes the directory for the container's socket.
pub(crate) fn make_directory(directory: &Path) -> Result<()> {
    let path = directory.join(DIRECTORY);
    rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755))
        .doing(|| format!("make directory {}", path.display()))
}

/// Removes what [`make_directory`] and [`NotifySocket::bind`] made.
pub(crate) fn remove(directory: &Path) -> Result<()> {
    let directory = directory.join(DIRECTORY);
    let path = directory.join(FILE);
    match rustix::fs::unlink(&path) {
        Ok(()) | Err(Errno::NOENT) => {}
        result => result.doing(|| format!("remove {}", path.display()))?,
    }
    match rustix::fs::rmdir(&directory) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        result => result.doing(|| format!("remove {}", directory.display())),
    }
}

/// The container's socket, and the service manager's.
pub(crate) struct NotifySocket {
    socket: OwnedFd,
    path: PathBuf,
    manager: OwnedFd,
}

impl NotifySocket {
    /// Binds the container's socket. `None` if it was made without one.
    pub(crate) fn bind(directory: &Path, manager: &ServiceManager) -> Result<Option<NotifySocket>> {
        let directory = directory.join(DIRECTORY);
        if !directory.is_dir() {
            return Ok(None);
        }
        let path = directory.join(FILE);
        let doing = || format!("make socket {}", path.display());
        let datagram = || {
            socket_with(
                AddressFamily::UNIX,
                SocketType::DGRAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )
        };
        let socket = datagram().doing(doing)?;
        // Any user of the container's may say that it is ready.
        at_address(&directory, FILE, |address| bind(&socket, address))
            .and_then(|()| {
                rustix::fs::chmodat(
                    CWD,
                    &path,
                    Mode::from_raw_mode(0o777),
                    rustix::fs::AtFlags::empty(),
                )
            })
            .doing(doing)?;
        let to_manager = datagram().doing(|| "make a unix socket")?;
        connect(&to_manager, &manager.address)
            .doing(|| format!("connect to the service manager's socket ({VARIABLE})"))?;
        Ok(Some(NotifySocket {
            socket,
            path,
            manager: to_manager,
        }))
    }

    /// Readable when the container has something to say.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Passes on what the container says, `main_pid` being the process that the service
    /// manager is to watch. Returns whether the container is ready.
    pub(crate) fn pass_on(&self, main_pid: i32) -> Result<bool> {
        let mut buffer = [0u8; MESSAGE_BYTES];
        loop {
            let length = match recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((_, length)) => length.min(MESSAGE_BYTES),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno).doing(|| "read the container's notification"),
            };
            let message = buffer.get(..length).unwrap_or_default();
            let ready = message
                .split(|byte| *byte == b'\n')
                .any(|line| line == b"READY=1");
            if ready {
                self.send(b"READY=1\n")?;
                self.send(format!("MAINPID={main_pid}\n").as_bytes())?;
                return Ok(true);
            }
        }
    }

    fn send(&self, message: &[u8]) -> Result<()> {
        rustix::net::send(&self.manager, message, rustix::net::SendFlags::NOSIGNAL)
            .doing(|| "tell the service manager that the container is ready")?;
        Ok(())
    }

    /// Waits until the container is ready, or its first process has ended, and then until
    /// the service manager knows.
    pub(crate) fn wait(self, pid: i32, pidfd: &OwnedFd) -> Result<()> {
        let doing = || "wait for the container's READY=1 on its NOTIFY_SOCKET";
        let mut timeout = Some(timespec(READY_WARNING_DELAY));
        loop {
            let mut watched = [
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::new(pidfd, PollFlags::IN),
            ];
            match poll(&mut watched, timeout.as_ref()) {
                Ok(0) => {
                    timeout = None;
                    log::warning(&format!("{}: it takes long", doing()));
                    continue;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).doing(doing),
            }
            let ended = !watched[1].revents().is_empty();
            if self.pass_on(pid)? {
                return self.barrier();
            }
            if ended {
                return Ok(());
            }
        }
    }

    /// Returns when the service manager has read all that was sent: it closes the
    /// descriptor that comes last. See sd_notify_barrier(3).
    fn barrier(&self) -> Result<()> {
        let doing = || "wait for the service manager to read the notification";
        let (end, given) = pipe_with(PipeFlags::CLOEXEC).doing(doing)?;
        send_descriptor(self.manager.as_fd(), given.as_fd(), b"BARRIER=1").doing(doing)?;
        drop(given);
        let mut watched = [PollFd::new(&end, PollFlags::empty())];
        match poll(&mut watched, Some(&timespec(BARRIER_TIMEOUT))) {
            Ok(0) => log::warning(&format!(
                "{}: it has not after {} s",
                doing(),
                BARRIER_TIMEOUT.as_secs()
            )),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).doing(doing),
        }
        Ok(())
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        // Nobody listens any more: who still writes is to be told so.
        let _ = rustix::fs::unlink(&self.path);
    }
}
