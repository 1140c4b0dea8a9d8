use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::arguments::{Arguments, Flag, value};
use crate::commands::creation::{request, service_manager};
use crate::commands::globals::{
    BUNDLE, CONSOLE_SOCKET, Command, Globals, NO_NEW_KEYRING, NO_PIVOT, PID_FILE, PIDFD_SOCKET,
    PRESERVE_FDS, bundle, console_socket, descriptors,
};
use crate::config::Config;
use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::create::{self, CreateRequest};
use crate::process::terminal::connect_console;

pub(crate) const COMMAND: Command = Command {
    name: "create",
    usage: "[options] <container-id>",
    about: "create a container, which waits for start before it executes its program",
    flags: &[
        BUNDLE,
        CONSOLE_SOCKET,
        PIDFD_SOCKET,
        PID_FILE,
        AFTER,
        NO_PIVOT,
        NO_NEW_KEYRING,
        PRESERVE_FDS,
    ],
    rest_is_foreign: false,
    call: create,
};

/// The flag `--after`. With this flag, a caller can start rrun before the bundle is complete.
const AFTER: Flag = value(
    "after",
    None,
    "pipe from which rrun reads one byte before it reads the bundle; end of file instead of the byte cancels the creation",
);

/// Waits without a timeout until rrun's caller writes a byte to the pipe at `path`. The byte means
/// that the bundle is complete.
fn await_bundle(path: &str) -> Result<()> {
    let doing = || format!("wait for the bundle (--after {path})");
    let flags = OFlags::RDONLY | OFlags::NOCTTY | OFlags::CLOEXEC;
    let pipe = rustix::fs::open(path, flags, Mode::empty()).doing(doing)?;
    loop {
        match rustix::io::read(&pipe, &mut [0u8; 1]) {
            Err(Errno::INTR) => {}
            Ok(0) => {
                return Err(Error::new("the caller cancelled the creation").while_doing(doing()));
            }
            read => return read.map(drop).doing(doing),
        }
    }
}

fn create(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    crate::lifecycle::container_dir::validate_id(id)?;
    let descriptors = descriptors(globals, arguments)?;
    if let Some(path) = arguments.value("after") {
        await_bundle(path)?;
    }
    let mut config = Config::load(bundle(arguments))?;
    let console_socket = match (config.process.terminal, console_socket(arguments)) {
        (true, Some(path)) => Some(connect_console(path)?),
        (true, None) => refuse!(
            "process.terminal is true, so create needs --console-socket, the socket that receives the terminal"
        ),
        (false, Some(_)) => {
            refuse!("--console-socket cannot be used, because process.terminal is not true")
        }
        (false, None) => None,
    };
    let notify = service_manager(globals, id, &mut config)?;
    create::create(CreateRequest {
        waits: true,
        console_socket,
        descriptors,
        notify,
        ..request(globals, arguments, &config)?
    })?;
    Ok(0)
}
