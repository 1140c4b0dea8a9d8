//! The startup of a monitor. The startup parses the command line and prepares the monitor's process
//! for the event loop in `serve`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::io::Errno;

use super::descriptors::close_from;
use super::own_log;
use super::pause;
use super::serve::{Monitor, PodContext};
use rrun_kernel::errno::describe;
use rrun_kernel::namespace_limits::unshare;
use rrun_protocol::{CONFIGURATION_NAME, LISTEN_FD, Pod, SOCKET_NAME};

/// The maximum size of the configuration in bytes. A configuration usually has a few hundred bytes.
const MAX_CONFIGURATION_BYTES: u64 = 64 << 10;

/// The default timeout for each runtime call.
const RUNTIME_TIMEOUT: Duration = Duration::from_secs(120);

const USAGE: &str = "usage: rrun-monitor --dir DIRECTORY [--runtime-timeout SECONDS]";

const HELP: &str = "\
rrun-monitor supervises one pod: it is the parent of the containers' processes and writes their logs
and exit codes. rrun-cri starts rrun-monitor, which keeps running when rrun-cri exits. There is no
need to start rrun-monitor by hand.

  --dir DIRECTORY            the pod's directory, which contains monitor.json
  --runtime-timeout SECONDS  the timeout for each call of an OCI runtime (default: 120)
  -h, --help                 print this text
  -V, --version              print the version
";

#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("{USAGE}")]
    Usage,
    #[error("{what}: {}", describe(.error))]
    Io { what: String, error: std::io::Error },
    #[error("read {CONFIGURATION_NAME}: {0}")]
    Configuration(serde_json::Error),
}

impl StartError {
    fn io<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |error| StartError::Io {
            what,
            error: error.into(),
        }
    }
}

struct Arguments {
    dir: PathBuf,
    runtime_timeout: Duration,
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Arguments, StartError> {
    let (mut dir, mut runtime_timeout) = (None, RUNTIME_TIMEOUT);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(StartError::Usage)?;
        match name.as_str() {
            "--dir" => dir = Some(PathBuf::from(value)),
            "--runtime-timeout" => {
                let seconds = value.parse().map_err(|_| StartError::Usage)?;
                runtime_timeout = Duration::from_secs(seconds);
            }
            _ => return Err(StartError::Usage),
        }
    }
    Ok(Arguments {
        dir: dir.ok_or(StartError::Usage)?,
        runtime_timeout,
    })
}

/// Runs the monitor, and returns after a client has requested the monitor's shutdown. If the first
/// argument is [`pause::ARGUMENT`], runs the pause process instead.
pub(crate) fn run(arguments: impl Iterator<Item = String>) -> Result<(), StartError> {
    let mut arguments = arguments.peekable();
    if arguments.peek().is_some_and(|name| name == pause::ARGUMENT) {
        pause::run();
        return Ok(());
    }
    match arguments.peek().map(String::as_str) {
        Some("-h" | "--help") => return print(&format!("{HELP}\n{USAGE}\n")),
        Some("-V" | "--version") => {
            return print(concat!("rrun-monitor ", env!("CARGO_PKG_VERSION"), "\n"));
        }
        _ => {}
    }
    let arguments = parse(arguments)?;
    let what = format!("enter the directory {}", arguments.dir.display());
    std::env::set_current_dir(&arguments.dir).map_err(StartError::io(what))?;
    let served = serve(arguments.runtime_timeout);
    if let Err(error) = &served {
        own_log::write(&error.to_string());
    }
    served
}

/// Prints the text to standard output. A write error is ignored, because standard output can be a
/// pipe whose reader has closed it.
fn print(text: &str) -> Result<(), StartError> {
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

fn serve(runtime_timeout: Duration) -> Result<(), StartError> {
    let dir = std::env::current_dir().map_err(StartError::io("find the working directory"))?;
    let mut pod = read_configuration(Path::new(CONFIGURATION_NAME))?;
    let listener = take_descriptors()?;
    // setsid(2) fails without harm if the monitor was started as the leader of a session.
    let _ = rustix::process::setsid();
    let signals = take_signals().map_err(StartError::io("block signals"))?;
    // prctl(2) only needs a nonzero argument to set PR_SET_CHILD_SUBREAPER, so any process id
    // works.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(StartError::io("become the child subreaper"))?;
    if pod.users.is_none() {
        enter_namespaces(&pod)?;
    }
    // A single heap for all threads saves memory. With several heaps, each log's thread would get a
    // separate heap.
    rrun_kernel::heap::one_heap();
    let held = if pod.shared_pid || pod.users.is_some() {
        Some(pause::start(&pod).map_err(StartError::io("start the pod's pause process"))?)
    } else {
        None
    };
    let context = PodContext {
        dir,
        runtime_timeout,
        pid1: held.filter(|_| pod.shared_pid),
        holder: held.filter(|_| pod.users.is_some()),
        runtime: pod.runtime.take(),
    };
    drop(pod);
    let mut monitor =
        Monitor::new(context, signals, listener).map_err(StartError::io("create the epoll set"))?;
    monitor.run().map_err(StartError::io("wait for events"))?;
    let _ = std::fs::remove_file(SOCKET_NAME);
    Ok(())
}

fn read_configuration(path: &Path) -> Result<Pod, StartError> {
    let what = || format!("read {}", path.display());
    let file = File::open(path).map_err(StartError::io(what()))?;
    let mut json = Vec::new();
    file.take(MAX_CONFIGURATION_BYTES)
        .read_to_end(&mut json)
        .map_err(StartError::io(what()))?;
    serde_json::from_slice(&json).map_err(StartError::Configuration)
}

/// Keeps the listening socket and closes all other inherited descriptors. Redirects stdio to
/// /dev/null. The inherited stdio can be the CRI server's terminal or a pipe to the journal. Both
/// can disappear when the CRI server exits.
fn take_descriptors() -> Result<OwnedFd, StartError> {
    // SAFETY: this function first checks that descriptor 3 is an open listening socket. If the
    // check fails, the function returns without using the descriptor again.
    let listener = unsafe { BorrowedFd::borrow_raw(LISTEN_FD) };
    match rustix::net::sockopt::socket_acceptconn(listener) {
        Ok(true) => {}
        Ok(false) => {
            return Err(StartError::io(
                "use descriptor 3, which must be a listening socket",
            )(Errno::INVAL));
        }
        Err(errno) => {
            return Err(StartError::io(
                "use descriptor 3, which must be a listening socket",
            )(errno));
        }
    }
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(StartError::io("open /dev/null"))?;
    nix::unistd::dup2_stdin(&null)
        .and_then(|()| nix::unistd::dup2_stdout(&null))
        .and_then(|()| nix::unistd::dup2_stderr(&null))
        .map_err(StartError::io("use /dev/null as stdio"))?;
    drop(null);
    close_from(LISTEN_FD.cast_unsigned() + 1);
    rustix::io::fcntl_setfd(listener, rustix::io::FdFlags::CLOEXEC)
        .and_then(|()| rustix::io::ioctl_fionbio(listener, true))
        .map_err(StartError::io(
            "make descriptor 3 non-blocking and close-on-exec",
        ))?;
    // SAFETY: descriptor 3 has no other owner in this process, because the monitor inherited it
    // from the CRI server.
    Ok(unsafe { OwnedFd::from_raw_fd(LISTEN_FD) })
}

/// Blocks all signals. Ctrl-C, or the SIGTERM at a machine's shutdown, must not end the monitor
/// before it has recorded the containers' exits. The monitor reads SIGCHLD from the returned
/// descriptor.
fn take_signals() -> nix::Result<SignalFd> {
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    SignalFd::with_flags(&children, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn enter_namespaces(pod: &Pod) -> Result<(), StartError> {
    let mut flags = CloneFlags::empty();
    if pod.new_ipc {
        flags |= CloneFlags::CLONE_NEWIPC;
    }
    if pod.hostname.is_some() {
        flags |= CloneFlags::CLONE_NEWUTS;
    }
    if !flags.is_empty() {
        unshare(flags).map_err(StartError::io("create the pod's IPC and UTS namespaces"))?;
    }
    if let Some(name) = &pod.hostname {
        rustix::system::sethostname(name.as_bytes())
            .map_err(StartError::io(format!("set the host name {name}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Option<(PathBuf, u64)> {
        let arguments = arguments.iter().map(ToString::to_string);
        let parsed = parse(arguments).ok()?;
        Some((parsed.dir, parsed.runtime_timeout.as_secs()))
    }

    #[test]
    fn the_command_line_has_a_directory_and_an_optional_timeout() {
        assert_eq!(parsed(&["--dir", "/a"]), Some(("/a".into(), 120)));
        assert_eq!(
            parsed(&["--runtime-timeout", "5", "--dir", "/a"]),
            Some(("/a".into(), 5))
        );
        assert_eq!(parsed(&[]), None);
        assert_eq!(parsed(&["--dir"]), None);
        assert_eq!(parsed(&["--dir", "/a", "--runtime-timeout", "soon"]), None);
    }
}
