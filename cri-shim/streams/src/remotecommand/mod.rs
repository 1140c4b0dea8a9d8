//! The remotecommand protocol of exec and attach: five channels to a client, of either protocol
//! family.
//!
//! Over SPDY each channel is a stream that the client opens, whose header `streamType` names it;
//! over WebSocket each is a number. [`open`] waits for the client's channels, then there is a
//! [`ClientReceiver`] for what the client does and a [`ClientSender`] for what it is sent; the
//! `copy_` functions connect them to a process's stdio. Source: k8s.io/cri-streaming, whose clients
//! these are.

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
pub use resize::resize;
pub use sender::ClientSender;
pub use stdio::{copy_input, copy_output, copy_output_until_exit};
