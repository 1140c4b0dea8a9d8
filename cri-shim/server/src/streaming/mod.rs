//! Streams between clients and containers.
//!
//! [`exec_sync`] answers with what a command wrote. Exec, Attach and PortForward answer with a [`url`]
//! of the streaming [`server`], whose token stands for a ticket ([`tickets`]); the client that comes
//! there chooses what to speak ([`rrun_streams::upgrade`]). Its [`session`] is then one of [`exec`],
//! [`attach`] and [`port_forward`], until the server's [`shutdown`].

mod attach;
mod command;
mod exec;
mod exec_sync;
mod port_forward;
pub(crate) mod server;
mod session;
mod shutdown;
pub(crate) mod tickets;
pub(crate) mod tls;
mod url;

pub(crate) use exec_sync::exec_sync;
pub(crate) use shutdown::Shutdown;
pub(crate) use url::{attach_url, exec_url, port_forward_url};
