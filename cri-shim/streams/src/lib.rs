//! The protocols that clients speak on the streams of exec, attach and port-forward.
//!
//! [`upgrade`] agrees with the client on SPDY ([`spdy`], on a connection by `spdy_connection`) or
//! WebSocket (`websocket`). Both travel on a [`Transport`]: SPDY also in a WebSocket, by a `tunnel`.
//! Both send by one `output`, which splices from a `pipe` where the bytes pass unchanged. `channels`
//! is the sending side of either. On top of them [`remotecommand`] serves the five channels of exec
//! and attach, and [`port_forward`] a client's connections to a pod; its `backlog` is what programs
//! in pods have not read yet.

mod backlog;
mod channels;
mod descriptor;
mod disconnect;
mod halves;
mod output;
mod pipe;
pub mod port_forward;
pub mod remotecommand;
pub mod spdy;
mod spdy_connection;
mod transport;
mod tunnel;
pub mod upgrade;
mod watch;
mod websocket;

pub use descriptor::Descriptor;
pub use disconnect::is_disconnect;
pub use pipe::PIPE_BYTES;
pub use transport::Transport;
pub use watch::Watch;
pub use websocket::Codec;
