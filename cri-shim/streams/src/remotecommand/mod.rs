//! The remotecommand protocol of exec and attach: five channels between the server and a client,
//! over SPDY or WebSocket.
//!
//! Over SPDY, each channel is a stream that the client opens, and the stream's header `streamType`
//! names the channel. Over WebSocket, each message begins with the number of its channel.
//! [`open()`] waits for the client's channels. [`open()`] returns a [`ClientReceiver`] for the
//! client's input and a [`ClientSender`] for the output. The `copy_` functions connect the receiver
//! and the sender to a process's stdio. Source: k8s.io/cri-streaming, which contains the clients of
//! this protocol.

mod channel;
mod open;
mod outcome;
mod receiver;
mod resize;
mod sender;
mod stdio;

pub use channel::Channel;
pub use open::{StreamOptions, open};
pub use outcome::Outcome;
pub use receiver::{ClientInput, ClientReceiver, StdinWrite};
pub use resize::Resizable;
#[cfg(feature = "fuzz")]
pub(crate) use resize::ResizeParser;
pub use sender::ClientSender;
pub use stdio::{copy_input, copy_output, copy_output_until_exit};
