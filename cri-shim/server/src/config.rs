//! The server's configuration, which is merged from the main file, the drop-ins and the command
//! line, and then checked.
//!
//! [`table`] defines every key with its default. [`layers`] reads and merges the values of files
//! and flags. [`check`] rejects values that can't be used. [`changes`] lists the keys whose values
//! differ between two configurations.

mod changes;
mod check;
#[cfg(test)]
mod documented;
mod error;
mod flags;
mod layers;
mod rlimit;
mod runtime_handler;
mod table;

use std::path::Path;

use rrun_kernel::errno::describe;

pub(crate) use changes::changed_keys;
pub(crate) use flags::Flags;
pub(crate) use layers::ConfigSource;
pub(crate) use rlimit::Rlimit;
pub(crate) use runtime_handler::RuntimeHandler;
pub(crate) use table::Config;

/// The commented default configuration, which `rrun-cri config default` prints.
pub(crate) const DEFAULT_TEXT: &str = include_str!("config_default.toml");

/// Returns an error text if `path` is not the path of a file. `what` describes the file.
fn missing(what: &str, path: &Path) -> Option<String> {
    let path_text = path.display();
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() => None,
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Some(format!("find {what} {path_text}: {}", describe(&error)))
        }
        _ => Some(format!("{what} {path_text} does not exist")),
    }
}
