use crate::arguments::{Arguments, switch};
use crate::commands::creation::{request, service_manager};
use crate::commands::globals::{
    BUNDLE, CONSOLE_SOCKET, Command, Globals, NO_NEW_KEYRING, NO_PIVOT, PID_FILE, PIDFD_SOCKET,
    PRESERVE_FDS, bundle, console_socket, descriptors,
};
use crate::config::{Config, hooks};
use crate::error::{Result, refuse};
use crate::lifecycle::create::{self, CreateRequest};
use crate::lifecycle::delete;
use crate::lifecycle::foreground::Foreground;
use crate::lifecycle::state::Status;
use crate::process::terminal::connect_console;

pub(crate) const COMMAND: Command = Command {
    name: "run",
    usage: "[options] <container-id>",
    about: "create and start a container, and remove it when it exits",
    flags: &[
        BUNDLE,
        CONSOLE_SOCKET,
        PIDFD_SOCKET,
        switch(
            "detach",
            Some('d'),
            "return when the container has started, without waiting for its exit",
        ),
        switch("keep", None, "do not remove the container when it exits"),
        PID_FILE,
        switch(
            "no-subreaper",
            None,
            "ignored; accepted for compatibility with runc",
        ),
        NO_PIVOT,
        NO_NEW_KEYRING,
        PRESERVE_FDS,
    ],
    rest_is_foreign: false,
    call: run,
};

fn run(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    crate::lifecycle::container_dir::validate_id(id)?;
    let descriptors = descriptors(globals, arguments)?;
    let mut config = Config::load(bundle(arguments))?;
    let detach = arguments.is_set("detach");
    let console_socket = match (config.process.terminal, detach, console_socket(arguments)) {
        (true, true, Some(path)) => Some(connect_console(path)?),
        (true, true, None) => {
            refuse!(
                "process.terminal is true, so run --detach needs --console-socket, the socket that receives the terminal"
            )
        }
        (_, false, Some(_)) | (false, _, Some(_)) => {
            refuse!(
                "--console-socket can only be used with --detach and with process.terminal set to true"
            )
        }
        (_, _, None) => None,
    };
    let notify = service_manager(globals, id, &mut config)?;
    let mut foreground = if detach {
        None
    } else {
        Some(Foreground::start()?)
    };
    let created = create::create(CreateRequest {
        console_socket,
        descriptors,
        foreground: foreground.as_mut(),
        notify,
        ..request(globals, arguments, &config)?
    })?;
    let shown = created.state.json_for_hooks(Status::Running);
    hooks::run_and_log_failures("poststart", config.hooks.poststart().as_ref(), &shown);
    let Some(mut foreground) = foreground else {
        if let Some(notify) = created.notify {
            notify.wait(created.state.pid, &created.pidfd)?;
        }
        return Ok(0);
    };
    foreground.notify = created.notify;
    let status = match created.terminal {
        Some(master) => foreground.relay(created.state.pid, &created.pidfd, master)?,
        None => foreground.wait(created.state.pid, &created.pidfd)?,
    };
    if !arguments.is_set("keep") {
        delete::delete_after_exit(&globals.root, &created.state)?;
    }
    Ok(status)
}
