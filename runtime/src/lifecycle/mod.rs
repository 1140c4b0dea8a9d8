//! What happens to a container, from `create` to `delete`, a file for each step.

pub mod channel;
pub mod container_dir;
pub mod create;
pub mod delete;
pub mod exec;
pub mod foreground;
pub mod init;
pub mod notify_socket;
pub mod program;
pub mod start_socket;
pub mod state;
