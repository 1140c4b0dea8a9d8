//! The configuration: files, drop-ins and the command line, laid over each other and checked.
//!
//! [`table`] has every key with its default, [`layers`] reads and merges what files and flags set,
//! [`check`] refuses what can't be served, [`changes`] names the keys in which two differ.

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

pub(crate) use changes::changed_keys;
pub(crate) use flags::Flags;
pub(crate) use layers::ConfigSource;
pub(crate) use rlimit::Rlimit;
pub(crate) use runtime_handler::RuntimeHandler;
pub(crate) use table::Config;

/// What `rrun-cri config default` prints.
pub(crate) const DEFAULT_TEXT: &str = include_str!("config_default.toml");
