//! The streaming server: HTTP that is upgraded.
//!
//! A connection is good for one upgrade. The request for it must come within [`REQUEST_TIMEOUT`] and
//! its head fit into [`MAX_HEAD_BYTES`], else the connection is closed. At most [`MAX_CONNECTIONS`]
//! are open at once.

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
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

use super::session::Session;
use super::shutdown::Shutdown;
use super::tls;
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::errno::describe;
use rrun_streams::Transport;
use rrun_streams::upgrade::{negotiate, refuse};

/// How long a client may take for the TLS handshake and the head of its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest head of a request, in bytes.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// The most connections at once; more are closed.
const MAX_CONNECTIONS: usize = 1024;

/// The server before it serves.
pub(crate) struct Server {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
}

impl Server {
    /// Listens where the configuration says, and lets the node's URLs begin with that.
    pub(crate) async fn listen(node: &Node) -> Result<Self> {
        let config = &node.config;
        let (cert, key) = (&config.stream_tls_cert, &config.stream_tls_key);
        let tls = tls::acceptor(cert.as_ref(), key.as_ref())
            .map_err(|(key, reason)| Error::invalid(format!("{key}: {reason}")))?;
        let what = || format!("listen for streams on {}", config.stream_listen);
        let listener = TcpListener::bind(config.stream_listen).await.during(what)?;
        let mut address = listener.local_addr().during(what)?;
        if address.ip().is_unspecified() {
            // Nobody can connect to that; kubelet is on this node.
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let _ = node.streams.base.set(format!("{scheme}://{address}"));
        Ok(Server { listener, tls })
    }

    /// Serves until `shutdown` comes; open sessions then end, and their clients are informed.
    pub(crate) async fn serve(self, node: Arc<Node>, mut shutdown: Shutdown) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = shutdown.begun() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: some will be closed.
                    log::error!("accept a stream's connection: {}", describe(&error));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                log::warn!("a stream's connection was closed: there are {MAX_CONNECTIONS} already");
                continue;
            };
            let (node, tls) = (Arc::clone(&node), self.tls.clone());
            let mut until = shutdown.clone();
            tokio::spawn(async move {
                let served = serve_request(node, stream, tls, slot, until.clone());
                let served = tokio::select! {
                    served = tokio::time::timeout(REQUEST_TIMEOUT, served) => served,
                    () = until.begun() => return,
                };
                match served {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => log::debug!("a stream's connection ended: {error}"),
                    Err(_) => log::debug!("a stream's connection was closed: it asks too slowly"),
                }
            });
        }
    }
}

/// Serves a connection as far as the response to its request.
async fn serve_request(
    node: Arc<Node>,
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    slot: OwnedSemaphorePermit,
    shutdown: Shutdown,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let transport = Transport::accept(stream, tls).await?;
    let slot = Arc::new(Mutex::new(Some(slot)));
    let service = service_fn(move |request| {
        let response = respond(&node, request, &slot, &shutdown);
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

/// Responds to a request; what follows an upgrade runs in a task of its own.
fn respond(
    node: &Arc<Node>,
    mut request: Request<Incoming>,
    slot: &Mutex<Option<OwnedSemaphorePermit>>,
    shutdown: &Shutdown,
) -> Response<String> {
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return *refuse(StatusCode::METHOD_NOT_ALLOWED, "GET and POST are served");
    }
    let path = request.uri().path().trim_start_matches('/');
    let (method, token) = path.split_once('/').unwrap_or_default();
    let unknown = || *refuse(StatusCode::NOT_FOUND, "this URL is not, or no longer, good");
    let Some(ticket) = node.streams.tickets.find(method, token) else {
        return unknown();
    };
    // A client may try again with another protocol.
    let (subprotocol, response) = match negotiate(ticket.purpose(), request.headers()) {
        Ok(agreed) => agreed,
        Err(refusal) => return *refusal,
    };
    if !node.streams.tickets.redeem(token) {
        return unknown();
    }
    let slot = slot.lock().ok().and_then(|mut slot| slot.take());
    let upgrade = hyper::upgrade::on(&mut request);
    let session = Session {
        node: Arc::clone(node),
        ticket,
        subprotocol,
        shutdown: shutdown.clone(),
    };
    tokio::spawn(async move {
        let _slot = slot;
        session.run(upgrade).await;
    });
    response
}
