//! The session of a client on an upgraded connection.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;

use super::port_forward::SandboxPorts;
use super::shutdown::Shutdown;
use super::tickets::StreamTicket;
use super::{attach, exec};
use crate::node::Node;
use rrun_streams::remotecommand;
use rrun_streams::upgrade::Subprotocol;
use rrun_streams::{Transport, is_disconnect, port_forward};

/// The time limit for a client to read the reason for the end of its session, if another session
/// has replaced the session.
const REPLACED_GRACE: Duration = Duration::from_secs(10);

/// A client's connection with its ticket and its protocol.
pub(super) struct Session {
    pub node: Arc<Node>,
    pub ticket: StreamTicket,
    pub subprotocol: Subprotocol,
    pub shutdown: Shutdown,
}

impl Session {
    /// Serves the client from the upgrade to the end of the session. Either the client or the
    /// server ends the session.
    pub(super) async fn run(self, upgrade: OnUpgrade) {
        let method = self.ticket.method();
        let served = match upgrade.await {
            Ok(upgraded) => self.serve_upgraded(upgraded).await,
            Err(error) => Err(io::Error::other(error)),
        };
        match served {
            Err(error) if !is_disconnect(&error) => {
                log::info!("a client's {method} session failed: {error}");
            }
            _ => {}
        }
    }

    async fn serve_upgraded(self, upgraded: Upgraded) -> io::Result<()> {
        let Ok(parts) = upgraded.downcast::<TokioIo<Transport>>() else {
            return Ok(());
        };
        let transport = parts.io.into_inner();
        let watch = transport.watch();
        watch.limit_buffers()?;
        let idle = self.node.config.stream_idle_timeout();
        let replaced = self.shutdown.clone();
        let replaced = async {
            replaced.replaced().await;
            tokio::time::sleep(REPLACED_GRACE).await;
        };
        let served = tokio::select! {
            served = self.serve(transport, parts.read_buf) => served,
            () = replaced => Ok(()),
            () = watch.idle(idle) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no data was transferred for {} s", idle.as_secs()),
            )),
        };
        // Shut down the connection. A task may still be reading from the connection or writing to
        // it, and would otherwise wait for the client.
        watch.shut_down();
        served
    }

    async fn serve(self, transport: Transport, read: Bytes) -> io::Result<()> {
        let options = self.ticket.stream_options();
        let Session {
            node,
            ticket,
            subprotocol,
            mut shutdown,
        } = self;
        match (ticket, subprotocol) {
            (StreamTicket::Exec(request), Subprotocol::Command(protocol)) => {
                let (receiver, sender) =
                    remotecommand::open(protocol, transport, read, options).await?;
                exec::exec(&node, request, &sender, receiver, &mut shutdown).await
            }
            (StreamTicket::Attach(request), Subprotocol::Command(protocol)) => {
                let (receiver, sender) =
                    remotecommand::open(protocol, transport, read, options).await?;
                attach::attach(&node, &request, &sender, receiver, &mut shutdown).await
            }
            (StreamTicket::PortForward(request), Subprotocol::PortForward(protocol)) => {
                let pod = Arc::new(SandboxPorts {
                    node,
                    sandbox: request.pod_sandbox_id,
                });
                let ports = &request.port;
                let served = port_forward::serve(protocol, transport, read, pod, ports);
                shutdown.cut(served).await
            }
            // This case is impossible: the negotiation selects a protocol that fits the ticket.
            _ => Ok(()),
        }
    }
}
