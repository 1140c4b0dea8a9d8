use std::os::fd::OwnedFd;

use crate::arguments::Arguments;
use crate::commands::globals::{Command, Globals};
use crate::config::hooks;
use crate::error::{Error, Result, refuse};
use crate::lifecycle::container_dir::directory;
use crate::lifecycle::notify_socket::{NotifySocket, ServiceManager};
use crate::lifecycle::start_socket;
use crate::lifecycle::state::{State, Status};
use crate::seccomp::Report;

pub(crate) const COMMAND: Command = Command {
    name: "start",
    usage: "<container-id>",
    about: "execute the program of a created container",
    flags: &[],
    rest_is_foreign: false,
    call: start,
};

fn start(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    let state = State::load(&globals.root, id)?;
    let directory = directory(&globals.root, id)?;
    // Bind the notification socket before the container's program starts, because the program can
    // send a notification immediately.
    let notify = match ServiceManager::from_environment()? {
        Some(manager) => NotifySocket::bind(&directory, &manager)?,
        None => None,
    };
    match state.status_from_files(&directory)? {
        Status::Created => {
            let open_process = || open_process(&state);
            let serve_agent = |report: &Report| serve_agent(&state, report);
            start_socket::start(&directory, id, open_process, serve_agent)?
        }
        Status::Stopped => refuse!("cannot start container {id} that has stopped"),
        Status::Running => refuse!("cannot start container {id} that is already running"),
        status => refuse!(
            "cannot start container {id}: the container is {}",
            status.as_str()
        ),
    }
    let shown = state.json_for_hooks(Status::Running);
    hooks::run_and_log_failures("poststart", state.hooks.poststart().as_ref(), &shown);
    if let Some(notify) = notify
        && let Some(process) = state.open_process()?
    {
        notify.wait(state.pid, &process)?;
    }
    Ok(0)
}

/// Returns the pidfd of the container's first process.
fn open_process(state: &State) -> Result<OwnedFd> {
    let process = state.open_process()?;
    process.ok_or_else(|| Error::new("the container's first process has exited"))
}

/// Sends the listener of the container's seccomp filter to the seccomp agent, if config.json
/// specifies a listenerPath.
fn serve_agent(state: &State, report: &Report) -> Result<()> {
    let Some(listener) = state.seccomp.as_ref().and_then(|it| it.listener.as_ref()) else {
        return Ok(());
    };
    let served = listener.connect().and_then(|agent| {
        let process = open_process(state)?;
        let shown = state.oci_state_for_others(Status::Created);
        agent.serve(report, &process, state.pid, shown, || Ok(()))
    });
    if served.is_err() {
        // If this answer fails, the first error is the cause.
        let _ = report.answer(false);
    }
    served
}
