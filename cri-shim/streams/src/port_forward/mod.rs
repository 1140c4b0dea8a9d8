//! Port-forward: a client's connections to ports of a pod.
//!
//! Over SPDY a connection is a pair of streams, one for data and one that carries an error, with
//! the same `requestID` ([`pairs`]); over WebSocket a pair of channels for each port that was
//! requested ([`ports`]). [`forward`] serves one connection; how a port of the pod is reached is the
//! caller's part ([`PodPorts`]).

mod forward;
mod pairs;
mod ports;
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

/// Serves a client on `transport`, of which `read` has come already, for as long as it is there.
/// `ports` are those of the request; over SPDY the client names them later.
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
