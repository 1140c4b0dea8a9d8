//! The life cycle of a container, from `create` to `delete`.

pub(crate) mod channel;
pub(crate) mod container_dir;
pub(crate) mod create;
pub(crate) mod delete;
pub(crate) mod exec;
pub(crate) mod foreground;
pub(crate) mod init;
mod intermediate;
pub(crate) mod notify_socket;
pub(crate) mod program;
mod relay;
pub(crate) mod serve_child;
pub(crate) mod start_socket;
pub(crate) mod state;
pub(crate) mod state_root;
