//! The process that an exec runs.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use crate::container::Container;
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};

/// The container's own process with another command: same user, environment and confinement.
pub(super) fn process(
    node: &Node,
    container: &Container,
    command: &[String],
    terminal: bool,
) -> Result<Value> {
    let path = node
        .bundle(&container.sandbox.id, &container.id)
        .join("config.json");
    let text = std::fs::read(&path).during(|| format!("read {}", path.display()))?;
    let mut spec: Value = serde_json::from_slice(&text)
        .map_err(|error| Error::internal(format!("parse {}: {error}", path.display())))?;
    let process = spec.get_mut("process").filter(|it| it.is_object());
    let mut process = process
        .map(Value::take)
        .ok_or_else(|| Error::internal(format!("{}: has no process", path.display())))?;
    process["args"] = json!(command);
    process["terminal"] = json!(terminal);
    if terminal {
        know_the_terminal(&mut process);
    }
    Ok(process)
}

/// Programs look at `TERM` for what the terminal can do; what the container says itself stands.
fn know_the_terminal(process: &mut Value) {
    let Some(environment) = process["env"].as_array_mut() else {
        process["env"] = json!(["TERM=xterm"]);
        return;
    };
    let set = |entry: &Value| {
        entry
            .as_str()
            .is_some_and(|entry| entry.starts_with("TERM="))
    };
    if !environment.iter().any(set) {
        environment.push(json!("TERM=xterm"));
    }
}

/// What is read and written where nobody wants to read or write.
pub(super) fn null() -> Result<OwnedFd> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .during(|| "open /dev/null".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_known_unless_the_container_knows_better() {
        for (before, after) in [
            (json!({}), json!(["TERM=xterm"])),
            (json!({ "env": ["A=b"] }), json!(["A=b", "TERM=xterm"])),
            (json!({ "env": ["TERM=vt100"] }), json!(["TERM=vt100"])),
        ] {
            let mut process = before;
            know_the_terminal(&mut process);
            assert_eq!(process["env"], after);
        }
    }
}
