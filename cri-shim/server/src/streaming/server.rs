//! The streaming server: an HTTP server whose connections are upgraded to streams.
//!
//! The server handles one upgrade request on each connection. The upgrade request must arrive
//! within [`REQUEST_TIMEOUT`], and its head must fit into [`MAX_HEAD_BYTES`]; otherwise the server
//! closes the connection. At most [`MAX_WAITING`] connections wait for a valid request at the same
//! time ([`WaitingClients`]). The number of sessions has its own limit (`sessions`).

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::session::Session;
use super::shutdown::Shutdown;
use super::tickets::IssuedTicket;
use super::tls;
use crate::node::Node;
use crate::waiting::{Place, WaitingClients};
use rrun_calls::error::{During, Error, Result};
use rrun_calls::lock::lock;
use rrun_kernel::descriptor_limit;
use rrun_kernel::errno::describe;
use rrun_network::Listener;
use rrun_streams::upgrade::{negotiate, refuse};
use rrun_streams::{Transport, set_buffer_limit};

/// The time limit for the TLS handshake and the head of a client's request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The size limit of a request's head, in bytes.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// The number of ports that the server leaves to pods before it uses the next port.
const MAX_TAKEN_PORTS: usize = 1000;

/// The limit on connections without a valid request.
const MAX_WAITING: usize = 1024;

/// The streaming server, which listens on its address but does not accept connections yet.
pub(crate) struct Server {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
}

impl Server {
    /// Listens on the configured address, and stores the base URL of the streaming server in the
    /// node.
    pub(crate) async fn listen(node: &Node) -> Result<Self> {
        let config = &node.config;
        set_buffer_limit(config.stream_buffer_bytes.get());
        let (cert, key) = (&config.stream_tls_cert, &config.stream_tls_key);
        let tls = tls::acceptor(cert.as_ref(), key.as_ref())
            .map_err(|(key, reason)| Error::invalid(format!("{key}: {reason}")))?;
        let listener = bind(node).await?;
        let mut address = listening(&listener)?.address;
        if address.ip().is_unspecified() {
            // Clients can't connect to an unspecified address such as 0.0.0.0. The URLs contain the
            // loopback address instead. This address is sufficient, because kubelet runs on this
            // node.
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let _ = node.streams.base.set(format!("{scheme}://{address}"));
        Ok(Server { listener, tls })
    }

    /// Returns the address on which the server listens.
    pub(crate) fn listener(&self) -> Result<Listener> {
        listening(&self.listener)
    }

    /// Serves clients until the shutdown begins. At the shutdown, the open sessions end, and each
    /// session informs its client.
    pub(crate) async fn serve(self, node: Arc<Node>, mut shutdown: Shutdown) {
        let waiting = WaitingClients::new("streams", MAX_WAITING.min(descriptor_limit::share()));
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                _ = shutdown.begun() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // The most likely cause is a lack of file descriptors. Other connections free
                    // descriptors when they are closed. The server therefore pauses, and then
                    // accepts the next connection.
                    log::error!("accept a connection for a stream: {}", describe(&error));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (place, replaced) = waiting.add();
            let (node, tls) = (Arc::clone(&node), self.tls.clone());
            let mut until = shutdown.clone();
            tokio::spawn(async move {
                let served = serve_request(node, stream, tls, place, until.clone());
                let served = tokio::select! {
                    served = tokio::time::timeout(REQUEST_TIMEOUT, served) => served,
                    () = replaced.notified() => return,
                    _ = until.begun() => return,
                };
                match served {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => log::debug!("a streaming connection failed: {error}"),
                    Err(_) => log::debug!(
                        "closed a streaming connection: its request did not arrive in time"
                    ),
                }
            });
            // Read the request of this client before the next client can replace it.
            tokio::task::yield_now().await;
        }
    }
}

/// Binds the socket. If the kernel chooses the port, and a pod has the same host port, the kernel
/// chooses another port. Processes of the node could otherwise not reach the pod's host port, or
/// CNI plugins could forward connections to this server to the pod.
async fn bind(node: &Node) -> Result<TcpListener> {
    let address = node.config.stream_listen;
    let what = || format!("listen for streams on {address}");
    let host_ports = node.network.tcp_host_ports()?;
    let mut listener = TcpListener::bind(address).await.during(what)?;
    // These sockets remain bound, so that the kernel chooses a different port each time.
    let mut taken = Vec::new();
    loop {
        let port = listening(&listener)?.address.port();
        if address.port() != 0 || !host_ports.contains(&port) {
            return Ok(listener);
        }
        match TcpListener::bind(address).await {
            Ok(next) if taken.len() < MAX_TAKEN_PORTS => {
                taken.push(std::mem::replace(&mut listener, next));
            }
            _ => {
                log::warn!(
                    "pods have so many host ports that the server listens for streams on a pod's \
                     host port, {port}; set stream_listen to an address with another port"
                );
                return Ok(listener);
            }
        }
    }
}

fn listening(listener: &TcpListener) -> Result<Listener> {
    let address = listener.local_addr();
    Ok(Listener {
        key: "stream_listen",
        address: address.during(|| "read the address of the streaming server".to_owned())?,
    })
}

/// Serves a connection until the response to the upgrade request is sent.
async fn serve_request(
    node: Arc<Node>,
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    place: Place,
    shutdown: Shutdown,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let transport = Transport::accept(stream, tls).await?;
    let place = Mutex::new(Some(place));
    let service = service_fn(move |request| {
        let response = respond(&node, request, &place, &shutdown);
        std::future::ready(Ok::<_, Infallible>(response))
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(transport), service)
        .with_upgrades()
        .await?;
    Ok(())
}

/// Responds to an upgrade request. After the upgrade, the stream's session runs in a separate task,
/// and the connection no longer occupies its place among the waiting connections.
fn respond(
    node: &Arc<Node>,
    mut request: Request<Incoming>,
    place: &Mutex<Option<Place>>,
    shutdown: &Shutdown,
) -> Response<String> {
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return *refuse(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET and POST are allowed",
        );
    }
    let path = request.uri().path().trim_start_matches('/');
    let (method, token) = path.split_once('/').unwrap_or_default();
    let unknown = || *refuse(StatusCode::NOT_FOUND, "this URL is invalid or has expired");
    let Some(IssuedTicket { pod, ticket, .. }) = node.streams.tickets.find(method, token) else {
        return unknown();
    };
    // If the negotiation fails, the ticket remains valid. The client can then retry with another
    // protocol.
    let (subprotocol, response) = match negotiate(ticket.purpose(), request.headers()) {
        Ok(agreed) => agreed,
        Err(refusal) => return *refusal,
    };
    let Some(session_place) = node.streams.sessions.add(&pod) else {
        let limit = node.streams.sessions.limit();
        let sentence = format!(
            "open a stream for the pod {pod}: the limit of {limit} streams (stream_sessions) is reached"
        );
        log::warn!("{sentence}");
        return *refuse(StatusCode::SERVICE_UNAVAILABLE, &sentence);
    };
    if !node.streams.tickets.redeem(token) {
        return unknown();
    }
    drop(lock(place).take());
    let upgrade = hyper::upgrade::on(&mut request);
    let session = Session {
        node: Arc::clone(node),
        ticket,
        subprotocol,
        shutdown: shutdown.of_session(session_place.replaced.clone()),
    };
    tokio::spawn(async move {
        let _place = session_place;
        session.run(upgrade).await;
    });
    response
}
