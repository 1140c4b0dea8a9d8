use crate::arguments::Arguments;
use crate::cgroup;
use crate::commands::globals::{Command, Globals};
use crate::error::{Result, refuse};
use crate::lifecycle::container_dir::directory;
use crate::lifecycle::state::{State, Status};

pub(crate) const COMMAND: Command = Command {
    name: "resume",
    usage: "<container-id>",
    about: "resume all processes of a paused container",
    flags: &[],
    rest_is_foreign: false,
    call: resume,
};

fn resume(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    let state = State::load(&globals.root, id)?;
    match state.status(&directory(&globals.root, id)?)? {
        Status::Paused => cgroup::freeze(&state.cgroup, false)?,
        status => refuse!(
            "cannot resume container {id}: container not paused, it is {}",
            status.as_str()
        ),
    }
    Ok(0)
}
