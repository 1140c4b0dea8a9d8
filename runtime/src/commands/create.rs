use std::path::Path;

use super::{Command, Globals, PIDFD_SOCKET, bundle, console_socket, descriptors, pidfd_socket};
use crate::arguments::{Arguments, switch, value};
use crate::birth::{self, Request};
use crate::config::Config;
use crate::error::Result;
use crate::notify_socket::{self, Manager};
use crate::refuse;
use crate::state::directory;
use crate::terminal::connect_console;

pub const COMMAND: Command = Command {
    name: "create",
    usage: "[options] <container-id>",
    about: "create a container; its program then waits for start",
    flags: &[
        value(
            "bundle",
            Some('b'),
            "directory with config.json (default: the working directory)",
        ),
        value(
            "console-socket",
            None,
            "unix socket that is sent the master side of the terminal",
        ),
        PIDFD_SOCKET,
        value("pid-file", None, "file to write the process id to"),
        switch(
            "no-pivot",
            None,
            "move the root instead of pivot_root, for a root on a ramdisk",
        ),
        switch("no-new-keyring", None, "keep the caller's session keyring"),
        value(
            "preserve-fds",
            None,
            "hand this many further descriptors to the container",
        ),
    ],
    rest_is_foreign: false,
    call: create,
};

fn create(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    crate::state::validate_id(id)?;
    let descriptors = descriptors(arguments)?;
    let mut config = Config::load(bundle(arguments))?;
    let console_socket = match (config.process.terminal, console_socket(arguments)) {
        (true, Some(path)) => Some(connect_console(path)?),
        (true, None) => refuse!("process.terminal: needs --console-socket to send the terminal to"),
        (false, Some(_)) => refuse!("--console-socket: process.terminal is not set"),
        (false, None) => None,
    };
    let notify = Manager::from_environment()?;
    if notify.is_some() {
        notify_socket::announce(&mut config, &directory(&globals.root, id)?)?;
    }
    birth::create(Request {
        root: &globals.root,
        id,
        config: &config,
        waits: true,
        console_socket,
        pidfd_socket: pidfd_socket(arguments)?,
        pid_file: arguments.value("pid-file").map(Path::new),
        no_pivot: arguments.is_set("no-pivot"),
        new_keyring: !arguments.is_set("no-new-keyring"),
        systemd_cgroup: globals.systemd_cgroup,
        descriptors,
        notify,
    })?;
    Ok(0)
}
