use crate::arguments::Arguments;
use crate::commands::globals::{Command, Globals, print};
use crate::error::{Error, Result};
use crate::lifecycle::container_dir::directory;
use crate::lifecycle::state::State;

pub(crate) const COMMAND: Command = Command {
    name: "state",
    usage: "<container-id>",
    about: "print the state of a container as JSON",
    flags: &[],
    rest_is_foreign: false,
    call: state,
};

fn state(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    let state = State::load(&globals.root, id)?;
    let status = state.status(&directory(&globals.root, id)?)?;
    let mut text = serde_json::to_string_pretty(&state.oci_state(status))
        .map_err(|error| Error::new(format!("print the state of container {id}: {error}")))?;
    text.push('\n');
    print(&text)?;
    Ok(0)
}
