//! A function that starts a pod's monitor.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::socket::{bind, connect};
use rrun_kernel::errno::describe;
use rrun_protocol::{CONFIGURATION_NAME, LISTEN_FD, Pod, SOCKET_NAME};

/// The timeout for a connection to an existing socket. A connection to a dead monitor's socket is
/// refused immediately. If this timeout expires instead, the client assumes that the monitor is
/// alive but busy.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("{what} {path}: {}", describe(.error))]
    File {
        what: &'static str,
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("a monitor is already listening at {0}")]
    Alive(PathBuf),
}

/// Starts the pod's monitor: writes `dir`/monitor.json, binds `dir`/monitor.sock and runs `binary`
/// with the listening socket at [`LISTEN_FD`]. Returns the monitor's pid without waiting until the
/// monitor is ready. The caller can send a request immediately. The monitor replies to the request
/// after the monitor has started. If the monitor cannot start, the request fails with
/// [`MonitorError::Gone`](crate::MonitorError::Gone). A tokio task reaps the monitor when it exits.
///
/// `spawn` replaces a socket that an earlier monitor left behind. `spawn` fails if a monitor still
/// listens on the socket.
pub async fn spawn(dir: &Path, pod: &Pod, binary: &Path) -> Result<i32, SpawnError> {
    let configuration = dir.join(CONFIGURATION_NAME);
    let socket = dir.join(SOCKET_NAME);
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |error: std::io::Error| SpawnError::File { what, path, error }
    };
    let json = serde_json::to_vec(pod)
        .map_err(|error| failed("encode", &configuration)(std::io::Error::other(error)))?;
    write_private(&configuration, &json).map_err(failed("write", &configuration))?;

    let listener = match bind(&socket) {
        Err(rustix::io::Errno::ADDRINUSE) => {
            // An error means that no monitor listens on the socket. After a timeout, a monitor may
            // still listen on the socket, see [`PROBE_TIMEOUT`].
            let connecting = tokio::time::timeout(PROBE_TIMEOUT, connect(&socket)).await;
            if !matches!(connecting, Ok(Err(_))) {
                return Err(SpawnError::Alive(socket));
            }
            std::fs::remove_file(&socket).map_err(failed("remove the old socket", &socket))?;
            bind(&socket)
        }
        bound => bound,
    }
    .map_err(|errno| failed("listen on", &socket)(errno.into()))?;

    let pid = start(binary, dir, &listener)
        .map_err(|errno| failed("start the monitor", binary)(errno.into()))?;
    let prepared = rrun_kernel::descriptor_limit::restore_for(pid)
        .map_err(|errno| failed("set the descriptor limit of the monitor", binary)(errno.into()))
        .and_then(|()| reap(pid).map_err(failed("wait for the exit of the monitor", binary)));
    if let Err(error) = prepared {
        kill_and_reap(pid);
        return Err(error);
    }
    Ok(pid)
}

fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    // Ours: only root can create an entry in a pod's directory.
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)
}

/// Starts the monitor's process. The only descriptor that the monitor inherits from this process is
/// the socket. The monitor's stdio is /dev/null, its environment contains only PATH, and every
/// signal has its default action.
fn start(binary: &Path, dir: &Path, listener: &OwnedFd) -> nix::Result<i32> {
    let c_string = |bytes: &[u8]| std::ffi::CString::new(bytes).map_err(|_| nix::Error::EINVAL);
    let mut actions = PosixSpawnFileActions::init()?;
    let (null, write_null) = (nix::fcntl::OFlag::O_RDWR, nix::sys::stat::Mode::empty());
    actions.add_dup2(listener.as_raw_fd(), LISTEN_FD)?;
    for fd in 0..3 {
        actions.add_open(fd, "/dev/null", null, write_null)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigmask(&nix::sys::signal::SigSet::empty())?;
    attributes.set_sigdefault(&nix::sys::signal::SigSet::all())?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF,
    )?;
    let path = std::env::var_os("PATH")
        .unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    let mut search = b"PATH=".to_vec();
    search.extend_from_slice(path.as_encoded_bytes());
    let arguments = [
        c_string(binary.as_os_str().as_encoded_bytes())?,
        c_string(b"--dir")?,
        c_string(dir.as_os_str().as_encoded_bytes())?,
    ];
    let environment = [c_string(&search)?];
    let pid = posix_spawn(binary, &actions, &attributes, &arguments, &environment)?;
    Ok(pid.as_raw())
}

/// Starts a task that reaps the monitor after its exit. Without this task, the monitor would remain
/// as a zombie.
fn reap(pid: i32) -> std::io::Result<()> {
    let pid = Pid::from_raw(pid).ok_or(rustix::io::Errno::SRCH)?;
    // The pid still belongs to the monitor, because the monitor has not been reaped yet. Only the
    // task below reaps the monitor.
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    // SAFETY: `AsyncFd` owns `pidfd`, never replaces it, and `pidfd` always refers to the same
    // descriptor.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
    tokio::spawn(async move {
        if pidfd.readable().await.is_ok() {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            let _ = rustix::process::waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options);
        }
    });
    Ok(())
}

/// Kills a monitor that no task reaps. A killed process exits immediately, so the wait is short.
fn kill_and_reap(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        let _ = rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
    }
}
