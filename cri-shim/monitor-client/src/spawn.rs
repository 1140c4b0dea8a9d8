//! The start of a pod's monitor.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::socket::{bind, connect};
use rrun_protocol::{CONFIGURATION_NAME, LISTEN_FD, Pod, SOCKET_NAME};

/// How long a socket that was there is tried. A monitor that takes longer to accept is busy, and
/// so alive.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("{what} {path}: {error}")]
    File {
        what: &'static str,
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("a monitor is listening at {0} already")]
    Alive(PathBuf),
}

/// Starts the pod's monitor: writes `dir`/monitor.json, binds `dir`/monitor.sock and runs
/// `binary` with the listening socket at [`LISTEN_FD`]. Returns its pid without waiting for it:
/// a request made at once is answered when the monitor has come up, or fails with
/// [`MonitorError::Gone`](crate::MonitorError::Gone) if it could not. A task of the runtime reaps
/// it whenever it ends.
///
/// A socket that an earlier monitor left behind is replaced; one with a monitor behind it is not.
pub async fn spawn(dir: &Path, pod: &Pod, binary: &Path) -> Result<i32, SpawnError> {
    let configuration = dir.join(CONFIGURATION_NAME);
    let socket = dir.join(SOCKET_NAME);
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |error: std::io::Error| SpawnError::File { what, path, error }
    };
    let json = serde_json::to_vec(pod)
        .map_err(|error| failed("encode", &configuration)(std::io::Error::other(error)))?;
    std::fs::write(&configuration, json).map_err(failed("write", &configuration))?;

    let listener = match bind(&socket) {
        Err(rustix::io::Errno::ADDRINUSE) => {
            // One whose backlog is full is alive, too.
            let connecting = tokio::time::timeout(PROBE_TIMEOUT, connect(&socket)).await;
            if !matches!(connecting, Ok(Err(_))) {
                return Err(SpawnError::Alive(socket));
            }
            std::fs::remove_file(&socket).map_err(failed("remove the old", &socket))?;
            bind(&socket)
        }
        bound => bound,
    }
    .map_err(|errno| failed("listen on", &socket)(errno.into()))?;

    let pid = start(binary, dir, &listener)
        .map_err(|errno| failed("start the monitor", binary)(errno.into()))?;
    rrun_kernel::descriptor_limit::restore_for(pid);
    reap(pid);
    Ok(pid)
}

/// Runs the monitor with nothing of ours but the socket: /dev/null as stdio, no environment but
/// the search path, every signal as it is by default.
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

/// Waits for a monitor in a task of its own, so that its end leaves no zombie.
fn reap(pid: i32) {
    let Some(pid) = Pid::from_raw(pid) else {
        return;
    };
    // It can't have been reaped by anybody else, so the pid is still the monitor's.
    let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) else {
        return;
    };
    tokio::spawn(async move {
        // SAFETY: `pidfd` is owned, never replaced, and always gives the same descriptor.
        let registered = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        let Ok(pidfd) = registered else {
            return;
        };
        if pidfd.readable().await.is_ok() {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            let _ = rustix::process::waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options);
        }
    });
}
