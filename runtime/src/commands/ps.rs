use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::process::Stdio;

use rustix::fs::MemfdFlags;

use crate::arguments::{Arguments, value};
use crate::cgroup;
use crate::commands::globals::{Command, Globals, print};
use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::state::State;
use crate::log::without_control_characters;
use crate::sys::files::exists;

pub(crate) const COMMAND: Command = Command {
    name: "ps",
    usage: "[options] <container-id> [options of ps(1)]",
    about: "list the processes of a container",
    flags: &[value("format", Some('f'), "table or json (default: table)")],
    rest_is_foreign: true,
    call: ps,
};

fn ps(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let Some((id, options)) = arguments.positional.split_first() else {
        refuse!("the argument for the container id is missing");
    };
    let state = State::load(&globals.root, id)?;
    // The container of an unprivileged caller does not always have a cgroup.
    if !exists(&state.cgroup)? && state.open_process()?.is_some() {
        refuse!(
            "list the processes of container {id}: the container has no cgroup in which rrun can find its processes"
        );
    }
    let pids = cgroup::all_pids(&state.cgroup)?;
    match arguments.value("format").unwrap_or("table") {
        "json" => {
            // Print `null` if the container has no processes, as runc does.
            let text = serde_json::to_string(&Some(&pids).filter(|pids| !pids.is_empty()))
                .map_err(|error| Error::new(format!("print the processes: {error}")))?;
            print(&format!("{text}\n"))?;
        }
        "table" => print(&table(&pids, options)?)?,
        other => refuse!("invalid format {other:?}: expected table or json"),
    }
    Ok(0)
}

/// Returns the output of the host's ps(1), without the lines of processes outside the container.
fn table(pids: &[i32], options: &[String]) -> Result<String> {
    let mut command = std::process::Command::new("ps");
    if options.is_empty() {
        command.arg("-ef");
    } else {
        command.args(options);
    }
    let doing = || "run ps";
    // ps writes its errors to a file in memory, so that rrun can first read all of the output.
    let errors = rustix::fs::memfd_create("ps", MemfdFlags::CLOEXEC).doing(doing)?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors.try_clone().doing(doing)?)
        .spawn()
        .doing(doing)?;
    let mut output = Vec::new();
    let read = child
        .stdout
        .take()
        .map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut output));
    let status = child.wait().doing(doing)?;
    read.doing(doing)?;
    if !status.success() {
        let mut text = String::new();
        let mut errors = File::from(errors);
        errors.rewind().doing(doing)?;
        errors.read_to_string(&mut text).doing(doing)?;
        refuse!("run ps: {}", text.trim());
    }
    let text = String::from_utf8_lossy(&output);
    let pids = pids.iter().copied().collect();
    filtered(&text, &pids).ok_or_else(|| Error::new("run ps: the output of ps has no PID column"))
}

fn filtered(text: &str, pids: &BTreeSet<i32>) -> Option<String> {
    let mut lines = text.lines();
    let heading = lines.next()?;
    let column = heading.split_whitespace().position(|word| word == "PID")?;
    let mut kept = format!("{heading}\n");
    for line in lines {
        let pid = line
            .split_whitespace()
            .nth(column)
            .and_then(|word| word.parse().ok());
        if pid.is_some_and(|pid: i32| pids.contains(&pid)) {
            kept.push_str(&without_control_characters(line));
            kept.push('\n');
        }
    }
    Some(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_contains_only_the_containers_processes() {
        let text =
            "UID   PID PPID CMD\nroot    1    0 init\nroot   42    1 sh -c x 7\nroot    7    1 y\n";
        assert_eq!(
            filtered(text, &BTreeSet::from([42])).unwrap(),
            "UID   PID PPID CMD\nroot   42    1 sh -c x 7\n"
        );
        assert_eq!(
            filtered("PID CMD\n42 a\u{1b}[2J\n", &BTreeSet::from([42])).unwrap(),
            "PID CMD\n42 a\\u001b[2J\n"
        );
        assert!(filtered("no heading\n", &BTreeSet::from([1])).is_none());
    }
}
