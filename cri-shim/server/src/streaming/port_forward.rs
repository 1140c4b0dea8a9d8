//! Port-forward: connects clients to ports of a pod.
//!
//! The socket that connects to a port is created inside the pod's network namespace. A socket
//! remains in the network namespace of its creation. The server therefore needs no process inside
//! the pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rrun_proto::v1::NamespaceMode;
use rustix::net::AddressFamily;
use tokio::net::{TcpSocket, TcpStream};

use crate::node::Node;
use crate::sandbox::namespaces;
use rrun_calls::error::{Error, Result};
use rrun_kernel::errno::describe;
use rrun_streams::port_forward::PodPorts;

/// The timeout for a connection to a port of a pod.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// The ports of one pod on this node.
pub(super) struct SandboxPorts {
    pub node: Arc<Node>,
    pub sandbox: String,
}

impl PodPorts for SandboxPorts {
    fn id(&self) -> &str {
        &self.sandbox
    }

    async fn connect(&self, port: u16) -> std::result::Result<TcpStream, String> {
        let connected = connect(&self.node, &self.sandbox, port).await;
        connected.map_err(|error| error.to_string())
    }
}

/// Connects to a port of a pod on the pod's IPv4 loopback address. If this connection fails,
/// connects to the port on the IPv6 loopback address.
async fn connect(node: &Node, sandbox: &str, port: u16) -> Result<TcpStream> {
    let sandbox = node.sandbox(sandbox)?;
    if !sandbox.state().ready {
        return Err(Error::wrong_state("the pod is not ready"));
    }
    let is_host = namespaces::options(&sandbox.config).network() == NamespaceMode::Node;
    let netns = (!is_host).then(|| node.netns(&sandbox.id));
    let mut first = None;
    for address in [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ] {
        let family = match address {
            IpAddr::V4(_) => AddressFamily::INET,
            IpAddr::V6(_) => AddressFamily::INET6,
        };
        let netns = netns.clone();
        let made = tokio::task::spawn_blocking(move || {
            rrun_network::namespace::socket(netns.as_deref(), family)
        });
        let socket = match made.await {
            Ok(made) => made?,
            Err(error) => {
                return Err(Error::internal(format!(
                    "create a socket in the pod: {error}"
                )));
            }
        };
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
        let address = SocketAddr::new(address, port);
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(address));
        let error = match connecting.await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => describe(&error),
            Err(_) => format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()),
        };
        first.get_or_insert(format!("connect to {address} in the pod: {error}"));
    }
    Err(Error::internal(first.unwrap_or_default()))
}
