use crate::arguments::Arguments;
use crate::cgroup;
use crate::commands::globals::{Command, Globals};
use crate::error::{Result, refuse};
use crate::lifecycle::container_dir::directory;
use crate::lifecycle::state::{State, Status};

pub(crate) const COMMAND: Command = Command {
    name: "pause",
    usage: "<container-id>",
    about: "freeze all processes of a container",
    flags: &[],
    rest_is_foreign: false,
    call: pause,
};

fn pause(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    let state = State::load(&globals.root, id)?;
    match state.status(&directory(&globals.root, id)?)? {
        Status::Running | Status::Created => cgroup::freeze(&state.cgroup, true)?,
        status => refuse!(
            "cannot pause container {id}: container not running, it is {}",
            status.as_str()
        ),
    }
    Ok(0)
}
