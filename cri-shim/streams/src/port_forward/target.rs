//! The pod whose ports are forwarded.

use tokio::net::TcpStream;

/// Connects to the ports of one pod.
pub trait PodPorts: Send + Sync + 'static {
    /// The pod's id, for the log.
    fn id(&self) -> &str;

    /// Connects to a port; the error is a sentence.
    fn connect(&self, port: u16) -> impl Future<Output = Result<TcpStream, String>> + Send;
}
