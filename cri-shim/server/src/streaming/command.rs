//! The description of the process that Exec or ExecSync starts in a container.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use crate::container::Container;
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::blocking;

/// The size in bytes above which a config.json is parsed on a separate thread. A usual config.json
/// has 10 to 20 KiB, and a separate thread would make the start of a command slower.
const LONG_BYTES: usize = 128 << 10;

/// Returns a copy of the `process` section of the container's config.json in which `command`
/// replaces the container's command. The user, the environment and the security settings are those
/// of the container.
pub(super) async fn process(
    node: &Node,
    container: &Container,
    command: &[String],
    terminal: bool,
) -> Result<Value> {
    let path = node
        .bundle(&container.sandbox.id, &container.id)
        .join("config.json");
    let text = std::fs::read(&path).during(|| format!("read {}", path.display()))?;
    let what = format!("parse {}", path.display());
    let mut process = if text.len() > LONG_BYTES {
        blocking(&what, move || section(&text)).await
    } else {
        section(&text)
    }
    .during(|| what)?;
    process["args"] = json!(command);
    process["terminal"] = json!(terminal);
    if terminal {
        set_default_term(&mut process);
    }
    Ok(process)
}

/// Returns the section `process` of a config.json.
fn section(text: &[u8]) -> Result<Value> {
    let mut spec: Value =
        serde_json::from_slice(text).map_err(|error| Error::internal(error.to_string()))?;
    let process = spec.get_mut("process").filter(|it| it.is_object());
    process
        .map(Value::take)
        .ok_or_else(|| Error::internal("the field \"process\" is missing"))
}

/// Sets `TERM` to xterm unless the container sets it. Programs use this variable to look up the
/// terminal's features.
fn set_default_term(process: &mut Value) {
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

/// Opens /dev/null as the replacement for streams that the client does not request.
pub(super) fn null() -> Result<OwnedFd> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .during(|| "open /dev/null".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn term_is_set_unless_the_container_sets_it() {
        for (before, after) in [
            (json!({}), json!(["TERM=xterm"])),
            (json!({ "env": ["A=b"] }), json!(["A=b", "TERM=xterm"])),
            (json!({ "env": ["TERM=vt100"] }), json!(["TERM=vt100"])),
        ] {
            let mut process = before;
            set_default_term(&mut process);
            assert_eq!(process["env"], after);
        }
    }
}
