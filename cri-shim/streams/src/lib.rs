//! The protocols that clients speak on the streams of exec, attach and port-forward.
//!
//! [`upgrade`] agrees with the client on SPDY ([`spdy`], on a socket [`connection`]) or WebSocket
//! ([`websocket`]). Both lie on a [`transport`], and send by its [`output`], which splices from a
//! [`pipe`] where nothing has to be put in between. [`remotecommand`] is the five channels of exec
//! and attach, [`backlog`] what a port-forward's program has not read yet.

pub mod backlog;
pub mod connection;
pub mod descriptor;
pub mod output;
pub mod pipe;
pub mod remotecommand;
pub mod spdy;
pub mod transport;
pub mod upgrade;
pub mod websocket;
