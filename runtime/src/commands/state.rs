use crate::arguments::Arguments;
use crate::commands::globals::{Command, Globals, print};
use crate::error::{Error, Result};
use crate::lifecycle::container_dir::directory;
use crate::lifecycle::state::State;
use crate::log::without_control_characters;

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
    let state = State::load_to_print(&globals.root, id)?;
    let status = state.status(&directory(&globals.root, id)?)?;
    let text = serde_json::to_string_pretty(&state.oci_state(status))
        .map_err(|error| Error::new(format!("print the state of container {id}: {error}")))?;
    // JSON allows some of the control characters in a text, so only the ends of the lines are kept.
    let lines = text
        .lines()
        .map(|line| without_control_characters(line) + "\n");
    print(&lines.collect::<String>())?;
    Ok(0)
}
