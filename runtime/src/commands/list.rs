use std::io::ErrorKind;

use crate::arguments::{Arguments, switch, value};
use crate::commands::globals::{Command, Globals, print};
use crate::error::{Context, Error, Kind, Result, refuse};
use crate::lifecycle::container_dir::validate_id;
use crate::lifecycle::state::{State, Status};
use crate::log::{self, without_control_characters};

pub(crate) const COMMAND: Command = Command {
    name: "list",
    usage: "[options]",
    about: "list the containers that have a directory in --root",
    flags: &[
        value("format", Some('f'), "table or json (default: table)"),
        switch("quiet", Some('q'), "print only the ids"),
    ],
    rest_is_foreign: false,
    call: list,
};

/// The minimum width of a column in characters, as in runc's table.
const MIN_WIDTH: usize = 12;
/// The number of spaces after the longest cell of a column, as in runc's table.
const MARGIN: usize = 3;

fn list(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    arguments.check_only_flags()?;
    let containers = containers(globals)?;
    if arguments.is_set("quiet") {
        for (state, _) in &containers {
            print(&format!("{}\n", state.id))?;
        }
        return Ok(0);
    }
    match arguments.value("format").unwrap_or("table") {
        "json" => {
            let shown: Vec<_> = containers
                .iter()
                .map(|(state, status)| state.oci_state(*status))
                .collect();
            let text = if shown.is_empty() {
                "null".to_owned() // runc also prints null for an empty list
            } else {
                serde_json::to_string(&shown)
                    .map_err(|error| Error::new(format!("print the list of containers: {error}")))?
            };
            print(&format!("{}\n", without_control_characters(&text)))?;
        }
        "table" => print(&table(&containers))?,
        other => refuse!("invalid format {other:?}: expected table or json"),
    }
    Ok(0)
}

fn containers(globals: &Globals) -> Result<Vec<(State, Status)>> {
    let root = &globals.root.path;
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        // If the default root directory does not exist, there are no containers, because rrun
        // creates this directory for the first container. But if --root is given, the directory
        // must exist.
        Err(error) if error.kind() == ErrorKind::NotFound && globals.default_root => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error).doing(|| format!("read --root {}", root.display())),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let entry = entry.doing(|| format!("read --root {}", root.display()))?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        // The CRI server also stores its state in the default root directory, so some entries are
        // not containers.
        if validate_id(&name).is_err() {
            continue;
        }
        ids.push(name);
    }
    ids.sort_unstable();
    let mut containers = Vec::new();
    for id in ids {
        let found = State::load_to_print(&globals.root, &id)
            .and_then(|state| Ok((state.status(&root.join(&id))?, state)));
        match found {
            Ok((status, state)) => containers.push((state, status)),
            Err(error) if error.kind() == Kind::NoSuchContainer => {}
            // Log the error and list the other containers. The state of one container can be
            // unreadable.
            Err(error) => log::warning(&error.to_string()),
        }
    }
    Ok(containers)
}

fn table(containers: &[(State, Status)]) -> String {
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
    for (state, status) in containers {
        let shown = state.oci_state(*status);
        let cells = [
            state.id.clone(),
            shown.pid.to_string(),
            shown.status.to_owned(),
            state.bundle.display().to_string(),
            state.created.clone(),
            state.owner.clone(),
        ];
        rows.push(cells.map(|cell| without_control_characters(&cell)));
    }
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let longest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        (longest + MARGIN).max(MIN_WIDTH)
    };
    let widths: Vec<usize> = (0..6).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: String = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text.push_str(cells.trim_end());
        text.push('\n');
    }
    text
}
