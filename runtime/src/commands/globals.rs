//! What commands share: their description, the flags before their names, and the flags that
//! several of them take.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::arguments::{Arguments, Flag, switch, value};
use crate::error::Result;
use crate::process::descriptors::Descriptors;
use crate::sys::unix_socket;

/// One command: how it is called, and what does it.
pub(crate) struct Command {
    pub(crate) name: &'static str,
    pub(crate) usage: &'static str,
    pub(crate) about: &'static str,
    pub(crate) flags: &'static [Flag],
    /// Whether what follows the id belongs to another program.
    pub(crate) rest_is_foreign: bool,
    pub(crate) call: fn(&Globals, &Arguments) -> Result<u8>,
}

/// What the flags before the command's name say.
pub(crate) struct Globals {
    /// Where states are kept.
    pub(crate) root: PathBuf,
    /// Whether --root is not given.
    pub(crate) default_root: bool,
    /// Whether systemd makes the cgroups of new containers.
    pub(crate) systemd_cgroup: bool,
    /// The result of [`descriptors::inherited`], for commands that start processes in containers.
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
    "unix socket that is sent the master side of the terminal",
);

pub(crate) const PID_FILE: Flag = value("pid-file", None, "file to write the process id to");

pub(crate) const NO_PIVOT: Flag = switch(
    "no-pivot",
    None,
    "move the root instead of pivot_root, for a root on a ramdisk",
);

pub(crate) const NO_NEW_KEYRING: Flag =
    switch("no-new-keyring", None, "keep the caller's session keyring");

pub(crate) const PRESERVE_FDS: Flag = value(
    "preserve-fds",
    None,
    "hand this many further descriptors to the container",
);

pub(crate) const PIDFD_SOCKET: Flag = value(
    "pidfd-socket",
    None,
    "unix socket that is sent a descriptor of the process (pidfd)",
);

/// Writes to standard output; a reader that went away is no error.
pub(crate) fn print(text: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// The bundle that --bundle names, or the working directory.
pub(crate) fn bundle(arguments: &Arguments) -> &Path {
    Path::new(arguments.value("bundle").unwrap_or("."))
}

/// Descriptors for the program: LISTEN_FDS of the environment and --preserve-fds.
///
/// # Errors
/// One of them is not open.
pub(crate) fn descriptors(globals: &Globals, arguments: &Arguments) -> Result<Descriptors> {
    let number = |name| -> Option<u32> { std::env::var(name).ok()?.parse().ok() };
    // Meant for another process if it says so; see sd_listen_fds(3).
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

/// The socket that --pidfd-socket names, connected.
pub(crate) fn pidfd_socket(arguments: &Arguments) -> Result<Option<OwnedFd>> {
    arguments
        .value("pidfd-socket")
        .filter(|path| !path.is_empty())
        .map(|path| unix_socket::connect("--pidfd-socket", path))
        .transpose()
}
