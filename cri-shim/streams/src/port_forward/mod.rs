//! Port-forward: a client's connections to ports of a pod.
//!
//! Over SPDY, a forwarded connection is a pair of streams with the same `requestID` ([`pairs`]).
//! One stream is for data, and the other stream is for an error text. Over WebSocket, each
//! requested port has one forwarded connection, which is a pair of channels ([`ports`]).
//! [`forward`] serves one forwarded connection. The caller provides the connections to the pod's
//! ports ([`PodPorts`]).

mod forward;
mod pairs;
mod ports;
mod session_log;
mod target;

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::spdy_connection;
use crate::transport::Transport;
use crate::tunnel::Tunnel;
use crate::upgrade::PortForwardProtocol;
use crate::websocket;

pub use target::PodPorts;

/// Serves the client on `transport` until the client disconnects. `read` is the data that has
/// already been read from the client. `ports` are the ports in the CRI request. A SPDY client
/// specifies its ports later, in the headers of its streams.
pub async fn serve(
    protocol: PortForwardProtocol,
    transport: Transport,
    read: Bytes,
    pod: Arc<impl PodPorts>,
    ports: &[i32],
) -> io::Result<()> {
    let watch = transport.watch();
    match protocol {
        PortForwardProtocol::Spdy => {
            let (reader, writer) = spdy_connection::open(transport.split(), &read);
            pairs::serve(pod, reader, writer, &watch).await
        }
        PortForwardProtocol::Tunnel => {
            let tunnel = Tunnel::open(transport, read).await;
            let (reader, writer) = spdy_connection::open(tunnel.split(), &[]);
            pairs::serve(pod, reader, writer, &watch).await
        }
        PortForwardProtocol::WebSocket(codec) => {
            let (reader, writer) = websocket::open(transport, read, codec).await;
            ports::serve(pod, ports, reader, writer, &watch).await
        }
    }
}
