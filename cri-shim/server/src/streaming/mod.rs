//! Data streams between clients and containers.
//!
//! [`exec_sync()`] returns a command's output in its response. The responses of Exec, Attach and
//! PortForward contain a [`url`] of the streaming [`server`]. The URL contains a token that
//! identifies a ticket ([`tickets`]). The client connects to the URL and selects a protocol
//! ([`rrun_streams::upgrade`]). The client's [`session`] then runs [`exec`], [`attach`] or
//! [`port_forward`]. A server's [`shutdown`] ends the session early.

mod attach;
mod channel;
mod command;
mod exec;
pub(crate) mod exec_output;
mod exec_sync;
mod fair_share;
mod port_forward;
pub(crate) mod server;
mod session;
mod sessions;
mod shutdown;
mod terminal;
pub(crate) mod tickets;
pub(crate) mod tls;
mod url;

pub(crate) use exec_sync::exec_sync;
pub(crate) use shutdown::Shutdown;
pub(crate) use url::{attach_url, exec_url, port_forward_url};
