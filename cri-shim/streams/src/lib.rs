//! The protocols that carry the streams of exec, attach and port-forward.
//!
//! [`upgrade`] negotiates either SPDY or WebSocket with the client. [`spdy`] implements SPDY
//! without I/O, and `spdy_connection` adds the I/O. `websocket` implements WebSocket. SPDY and
//! WebSocket both use a [`Transport`]. SPDY can also be tunnelled in a WebSocket (`tunnel`). SPDY
//! and WebSocket send through an `output`. If the connection sends the bytes unchanged, the
//! `output` can send the contents of a `pipe` with splice(2). `channels` is the sending side for
//! both protocols.
//!
//! Two more protocols are built on SPDY and WebSocket. [`remotecommand`] serves the five channels
//! of exec and attach. [`port_forward`] serves a client's connections to a pod. The module
//! `backlog` stores the data that programs in the pod have not read yet.

mod backlog;
mod buffers;
mod channels;
mod descriptor;
mod disconnect;
#[cfg(feature = "fuzz")]
pub mod fuzz;
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

pub use buffers::set_buffer_limit;
pub use descriptor::Descriptor;
pub use disconnect::is_disconnect;
pub use transport::Transport;
pub use watch::Watch;
pub use websocket::Codec;
