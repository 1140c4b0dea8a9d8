//! A client's session: from the upgraded connection to the verb that was requested.

use std::io;
use std::sync::Arc;

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

/// What a client may do on its connection, and what it speaks there.
pub(super) struct Session {
    pub node: Arc<Node>,
    pub ticket: StreamTicket,
    pub subprotocol: Subprotocol,
    pub shutdown: Shutdown,
}

impl Session {
    /// Serves the client once the connection is upgraded, until either side ends the session.
    pub(super) async fn run(mut self, upgrade: OnUpgrade) {
        let served = match upgrade.await {
            Ok(upgraded) => self.serve_upgraded(upgraded).await,
            Err(error) => Err(io::Error::other(error)),
        };
        match served {
            Err(error) if !is_disconnect(&error) => {
                log::info!("a client's {} ended: {error}", self.ticket.method());
            }
            _ => {}
        }
    }

    async fn serve_upgraded(&mut self, upgraded: Upgraded) -> io::Result<()> {
        let Ok(parts) = upgraded.downcast::<TokioIo<Transport>>() else {
            return Ok(());
        };
        let transport = parts.io.into_inner();
        let watch = transport.watch();
        let idle = self.node.config.stream_idle_timeout();
        let served = tokio::select! {
            served = self.serve(transport, parts.read_buf) => served,
            () = watch.idle(idle) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("nothing moved for {} s", idle.as_secs()),
            )),
        };
        // Whoever still holds a half of it is not to wait for its client.
        watch.shut_down();
        served
    }

    async fn serve(&mut self, transport: Transport, read: Bytes) -> io::Result<()> {
        let options = self.ticket.stream_options();
        let Session { node, shutdown, .. } = self;
        match (&self.ticket, self.subprotocol) {
            (StreamTicket::Exec(request), Subprotocol::Command(protocol)) => {
                let (receiver, sender) =
                    remotecommand::open(protocol, transport, read, options).await?;
                exec::exec(node, request, &sender, receiver, shutdown).await
            }
            (StreamTicket::Attach(request), Subprotocol::Command(protocol)) => {
                let (receiver, sender) =
                    remotecommand::open(protocol, transport, read, options).await?;
                attach::attach(node, request, &sender, receiver, shutdown).await
            }
            (StreamTicket::PortForward(request), Subprotocol::PortForward(protocol)) => {
                let pod = Arc::new(SandboxPorts {
                    node: Arc::clone(node),
                    sandbox: request.pod_sandbox_id.clone(),
                });
                let ports = &request.port;
                let served = port_forward::serve(protocol, transport, read, pod, ports);
                shutdown.cut(served).await
            }
            // What was agreed is for the ticket's purpose.
            _ => Ok(()),
        }
    }
}
