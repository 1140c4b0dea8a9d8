//! The notification socket (`$NOTIFY_SOCKET`). On this socket, a container reports to the service
//! manager that the container is ready. See sd_notify(3).
//!
//! The container cannot reach the service manager's own socket, so rrun gives the container a
//! separate socket, in the directory [`INSIDE`]. Like runc, rrun forwards only READY=1 to the
//! service manager. No other message from a container reaches the host's service manager. rrun adds
//! MAINPID, the id of the process that the service manager will watch.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
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
/// The name of the directory that contains the notification socket. This directory is in the
/// container's directory under --root, and rrun mounts it in the container.
const DIRECTORY: &str = "notify";
/// The name of the notification socket in [`DIRECTORY`].
const FILE: &str = "notify.sock";
/// The mount point of [`DIRECTORY`] in the container.
const INSIDE: &str = "/run/notify";
/// The maximum length of a container's notification in bytes. systemd has the same limit.
const MESSAGE_BYTES: usize = 4096;
/// The maximum time that rrun waits for the service manager to read all of rrun's messages.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(30);
/// The maximum time that rrun waits until the service manager's queue has room for a message.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);
/// The number of notifications that rrun reads before it checks again for signals and for the exit
/// of the container. The queue of the notification socket has room for fewer notifications, unless
/// the administrator has raised net.unix.max_dgram_qlen.
const READS_AT_ONCE: usize = 1024;
/// The time after which rrun logs that it still waits for the container's READY=1.
const READY_WARNING_DELAY: Duration = Duration::from_secs(10);

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs() as _,
        tv_nsec: 0,
    }
}

/// The service manager, such as systemd, that waits for a notification from rrun.
pub(crate) struct ServiceManager {
    address: SocketAddrUnix,
}

impl ServiceManager {
    /// Reads the address of the service manager's socket from the environment.
    ///
    /// # Errors
    /// Fails if NOTIFY_SOCKET does not contain the address of a unix socket.
    pub(crate) fn from_environment() -> Result<Option<ServiceManager>> {
        let Some(name) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        let name = name.as_encoded_bytes();
        let doing = || format!("{VARIABLE}={}", String::from_utf8_lossy(name));
        let address = match name {
            [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest).doing(doing)?,
            [b'/', ..] => SocketAddrUnix::new(name).doing(doing)?,
            _ => refuse!("{}: the value is not the address of a unix socket", doing()),
        };
        Ok(Some(ServiceManager { address }))
    }
}

/// Returns the bind mount through which the container reaches the notification socket's directory.
/// `directory` is the container's directory under --root. `index` is the position of the new mount
/// in the configuration's list of mounts.
pub(crate) fn mount(directory: &Path, index: usize) -> Result<Mount> {
    Mount::read_only_bind(index, &directory.join(DIRECTORY), Path::new(INSIDE))
}

/// Returns the environment variable that contains the path of the container's notification socket.
pub(crate) fn variable() -> String {
    format!("{VARIABLE}={INSIDE}/{FILE}")
}

/// Creates the directory for the container's notification socket.
pub(crate) fn make_directory(directory: &Path) -> Result<()> {
    let path = directory.join(DIRECTORY);
    rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755))
        .doing(|| format!("create directory {}", path.display()))
}

/// Removes the directory that [`make_directory`] created. The directory can contain files of the
/// container, because a container with CAP_SYS_ADMIN can make its mount of the directory writable.
pub(crate) fn remove(directory: &Path) -> Result<()> {
    let directory = directory.join(DIRECTORY);
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).doing(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// The container's notification socket, and a connection to the service manager's socket.
pub(crate) struct NotifySocket {
    socket: OwnedFd,
    path: PathBuf,
    manager: OwnedFd,
}

impl NotifySocket {
    /// Binds the container's notification socket. Returns `None` if the container was created
    /// without a notification socket.
    pub(crate) fn bind(directory: &Path, manager: &ServiceManager) -> Result<Option<NotifySocket>> {
        let directory = directory.join(DIRECTORY);
        if !directory.is_dir() {
            return Ok(None);
        }
        let path = directory.join(FILE);
        let doing = || format!("create socket {}", path.display());
        let datagram = || {
            socket_with(
                AddressFamily::UNIX,
                SocketType::DGRAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )
        };
        let socket = datagram().doing(doing)?;
        // Every user in the container is allowed to report that the container is ready, so the mode
        // is 0777. A later chmod(2) could follow a link, because a container with CAP_SYS_ADMIN can
        // replace the file.
        let umask = rustix::process::umask(Mode::empty());
        let bound = at_address(&directory, FILE, |address| bind(&socket, address));
        rustix::process::umask(umask);
        bound.doing(doing)?;
        let to_manager = datagram().doing(|| "create a unix socket")?;
        connect(&to_manager, &manager.address)
            .doing(|| format!("connect to the service manager's socket ({VARIABLE})"))?;
        Ok(Some(NotifySocket {
            socket,
            path,
            manager: to_manager,
        }))
    }

    /// Returns the descriptor of the notification socket. This descriptor is readable when the
    /// container has sent a message to the socket.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Forwards the container's READY=1 to the service manager. `main_pid` is the id of the process
    /// that the service manager will watch. Returns whether the container has sent READY=1. After
    /// that, the caller must not call this function again, and should drop the socket.
    pub(crate) fn pass_on(&self, main_pid: i32) -> Result<bool> {
        let mut buffer = [0u8; MESSAGE_BYTES];
        for _ in 0..READS_AT_ONCE {
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
        Ok(false)
    }

    fn send(&self, message: &[u8]) -> Result<()> {
        self.when_queue_has_room(|| {
            rustix::net::send(&self.manager, message, rustix::net::SendFlags::NOSIGNAL).map(drop)
        })
        .doing(|| "notify the service manager that the container is ready")
    }

    /// Calls `send`, which sends a message to the service manager. If the service manager's queue
    /// is full, waits until it has room. After [`QUEUE_TIMEOUT`], logs a warning and gives up.
    fn when_queue_has_room(
        &self,
        send: impl Fn() -> std::result::Result<(), Errno>,
    ) -> std::result::Result<(), Errno> {
        let deadline = Instant::now() + QUEUE_TIMEOUT;
        loop {
            match send() {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() >= deadline => {
                    log::warning(&format!(
                        "notify the service manager that the container is ready: the queue of the service manager has been full for {} s",
                        QUEUE_TIMEOUT.as_secs()
                    ));
                    return Ok(());
                }
                Err(Errno::AGAIN) => {
                    let mut watched = [PollFd::new(&self.manager, PollFlags::OUT)];
                    // Another sender can fill the queue again after poll(2) has returned.
                    let _ = poll(&mut watched, Some(&timespec(Duration::from_secs(1))));
                }
                sent => return sent,
            }
        }
    }

    /// Waits until the container has sent READY=1, or until the container's first process has
    /// exited. If the container is ready, also waits until the service manager has read the
    /// notification.
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
                    log::warning(&format!(
                        "{}: rrun is still waiting after {} s",
                        doing(),
                        READY_WARNING_DELAY.as_secs()
                    ));
                    continue;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).doing(doing),
            }
            let exited = !watched[1].revents().is_empty();
            if self.pass_on(pid)? {
                return self.barrier();
            }
            if exited {
                return Ok(());
            }
        }
    }

    /// Waits until the service manager has read all of rrun's messages. rrun sends a descriptor in
    /// the last message. The service manager closes the descriptor after it has read this message.
    /// See sd_notify_barrier(3).
    fn barrier(&self) -> Result<()> {
        let doing = || "wait for the service manager to read the notification";
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC).doing(doing)?;
        self.when_queue_has_room(|| {
            send_descriptor(self.manager.as_fd(), write_end.as_fd(), b"BARRIER=1").map(drop)
        })
        .doing(doing)?;
        drop(write_end);
        let mut watched = [PollFd::new(&read_end, PollFlags::empty())];
        match poll(&mut watched, Some(&timespec(BARRIER_TIMEOUT))) {
            Ok(0) => log::warning(&format!(
                "{}: the service manager has not read the notification within {} s",
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
        // Remove the socket's file, because no process reads from the socket any more, and a later
        // sender must get an error.
        let _ = rustix::fs::unlink(&self.path);
    }
}
