use crate::arguments::{Arguments, switch};
use crate::commands::globals::{Command, Globals};
use crate::error::Result;
use crate::lifecycle::delete;

pub(crate) const COMMAND: Command = Command {
    name: "delete",
    usage: "[options] <container-id>",
    about: "remove a stopped container and everything that belongs to it",
    flags: &[switch(
        "force",
        Some('f'),
        "kill the container before removing it; succeed if the container does not exist",
    )],
    rest_is_foreign: false,
    call: delete,
};

fn delete(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    delete::delete(&globals.root, id, arguments.is_set("force"))?;
    Ok(0)
}
