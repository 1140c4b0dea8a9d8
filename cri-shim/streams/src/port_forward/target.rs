//! The interface to the pod whose ports the server forwards.

use tokio::net::TcpStream;

/// The interface for connecting to the ports of one pod.
pub trait PodPorts: Send + Sync + 'static {
    /// Returns the pod's id, for the log.
    fn id(&self) -> &str;

    /// Connects to a port of the pod. The error is a sentence for the client.
    fn connect(&self, port: u16) -> impl Future<Output = Result<TcpStream, String>> + Send;
}
