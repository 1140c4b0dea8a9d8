//! Definitions that the commands share: the description of a command, the global flags, and the
//! flags that several commands accept.

use std::os::fd::OwnedFd;
use std::path::Path;

use crate::arguments::{Arguments, Flag, switch, value};
use crate::error::{Context, Result};
use crate::lifecycle::state_root::StateRoot;
use crate::process::descriptors::Descriptors;
use crate::sys::unix_socket;

/// A command: its name, its help texts, its flags and its function.
pub(crate) struct Command {
    pub(crate) name: &'static str,
    pub(crate) usage: &'static str,
    pub(crate) about: &'static str,
    pub(crate) flags: &'static [Flag],
    /// True if all words after the container id are arguments of another program, such as ps(1).
    pub(crate) rest_is_foreign: bool,
    pub(crate) call: fn(&Globals, &Arguments) -> Result<u8>,
}

/// The values of the global flags, which precede the command's name.
pub(crate) struct Globals {
    pub(crate) root: StateRoot,
    /// True if --root is not given.
    pub(crate) default_root: bool,
    /// True if systemd creates the cgroups of new containers.
    pub(crate) systemd_cgroup: bool,
    /// The numbers of the descriptors that rrun's caller left open. The list is empty for commands
    /// that start no process in a container.
    pub(crate) inherited: Vec<u32>,
}

pub(crate) const BUNDLE: Flag = value(
    "bundle",
    Some('b'),
    "directory with config.json (default: the working directory)",
);

pub(crate) const CONSOLE_SOCKET: Flag = value(
    "console-socket",
    None,
    "unix socket that receives the master side of the terminal",
);

pub(crate) const PID_FILE: Flag = value(
    "pid-file",
    None,
    "file to which rrun writes the id of the new process",
);

pub(crate) const NO_PIVOT: Flag = switch(
    "no-pivot",
    None,
    "use chroot instead of pivot_root, for a root on a ramdisk",
);

pub(crate) const NO_NEW_KEYRING: Flag = switch(
    "no-new-keyring",
    None,
    "keep the caller's session keyring instead of creating one",
);

pub(crate) const PRESERVE_FDS: Flag = value(
    "preserve-fds",
    None,
    "number of additional descriptors, from 3 upwards, to pass to the container",
);

pub(crate) const PIDFD_SOCKET: Flag = value(
    "pidfd-socket",
    None,
    "unix socket that receives a descriptor of the process (pidfd)",
);

/// Writes text to standard output. If the reader of a pipe has closed the pipe, this function does
/// not report an error.
pub(crate) fn print(text: &str) -> Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.doing(|| "write to standard output"),
    }
}

/// Returns the bundle that --bundle names, or the working directory.
pub(crate) fn bundle(arguments: &Arguments) -> &Path {
    Path::new(arguments.value("bundle").unwrap_or("."))
}

/// Returns the descriptors that rrun will pass to the program. LISTEN_FDS in rrun's environment
/// announces some of these descriptors, and --preserve-fds requests the others.
///
/// # Errors
/// Fails if a descriptor that the program should get is not open.
pub(crate) fn descriptors(globals: &Globals, arguments: &Arguments) -> Result<Descriptors> {
    let number = |name| -> Option<u32> { std::env::var(name).ok()?.parse().ok() };
    // LISTEN_FDS applies to rrun only if LISTEN_PID contains rrun's process id. See
    // sd_listen_fds(3).
    let meant = number("LISTEN_PID") == Some(std::process::id());
    let listen = number("LISTEN_FDS").filter(|_| meant).unwrap_or(0);
    let preserve = arguments.number("preserve-fds")?.unwrap_or(0);
    Descriptors::new(listen, preserve, globals.inherited.clone())
}

pub(crate) fn console_socket(arguments: &Arguments) -> Option<&str> {
    arguments
        .value("console-socket")
        .filter(|path| !path.is_empty())
}

/// Connects to the socket that --pidfd-socket names.
pub(crate) fn pidfd_socket(arguments: &Arguments) -> Result<Option<OwnedFd>> {
    arguments
        .value("pidfd-socket")
        .filter(|path| !path.is_empty())
        .map(|path| unix_socket::connect("--pidfd-socket", path))
        .transpose()
}
