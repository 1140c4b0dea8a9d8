//! The streaming server: HTTP that is upgraded.
//!
//! A connection is good for one upgrade. The request for it must come within [`HEAD`], its head fit into
//! [`MAX_HEAD`]; whatever else comes is closed. At most [`MAX_CONNECTIONS`] at once.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use super::port_forward::SandboxPorts;
use super::token::Permit;
use super::{attach, exec};
use crate::config::{Config, ConfigError};
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::errno::describe;
use rrun_streams::remotecommand::{self, StreamOptions};
use rrun_streams::upgrade::{Purpose, Subprotocol, negotiate, refuse};
use rrun_streams::{Transport, is_disconnect, port_forward};

/// How long a client may take for the TLS handshake and the head of its request.
const HEAD: Duration = Duration::from_secs(10);

/// The longest head of a request, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// The most connections at once; more are closed.
const MAX_CONNECTIONS: usize = 1024;

/// The server's end, which sessions wait for. Whoever tells it can wait until all of them are gone.
#[derive(Clone)]
pub(crate) struct Ending(pub watch::Receiver<bool>);

impl Ending {
    /// Waits until it comes, or nobody is left to tell.
    pub(crate) async fn come(&mut self) {
        let _ = self.0.wait_for(|ending| *ending).await;
    }

    /// Serves until then: for a client that can't be told anything.
    async fn cuts(&mut self, served: impl Future<Output = io::Result<()>>) -> io::Result<()> {
        tokio::select! {
            served = served => served,
            () = self.come() => Ok(()),
        }
    }
}

/// The server before it serves.
pub(crate) struct Server {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
}

impl Server {
    /// Listens where the configuration says, and lets the node's URLs begin with that.
    pub(crate) async fn listen(node: &Node) -> Result<Self> {
        let config = &node.config;
        let tls = tls(config).map_err(|error| Error::invalid(error.to_string()))?;
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

    /// Serves until `ending` comes; what is open then is ended, and its clients are told.
    pub(crate) async fn serve(self, node: Arc<Node>, mut ending: Ending) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = ending.come() => return,
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
            let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
                log::warn!("a stream's connection was closed: there are {MAX_CONNECTIONS} already");
                continue;
            };
            let (node, tls) = (Arc::clone(&node), self.tls.clone());
            let mut until = ending.clone();
            tokio::spawn(async move {
                let greeted = greet(node, stream, tls, place, until.clone());
                let greeted = tokio::select! {
                    greeted = tokio::time::timeout(HEAD, greeted) => greeted,
                    () = until.come() => return,
                };
                match greeted {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => log::debug!("a stream's connection ended: {error}"),
                    Err(_) => log::debug!("a stream's connection was closed: it asks too slowly"),
                }
            });
        }
    }
}

/// The certificate and key of the configuration, if it has them.
pub(crate) fn tls(config: &Config) -> std::result::Result<Option<TlsAcceptor>, ConfigError> {
    let (Some(cert), Some(key)) = (&config.stream_tls_cert, &config.stream_tls_key) else {
        return Ok(None);
    };
    let bad = |key, path: &Path, why: &dyn std::fmt::Display| ConfigError::Value {
        key,
        reason: format!("{}: {why}", path.display()),
    };
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|error| bad("stream_tls_cert", cert, &error))?;
    let private =
        PrivateKeyDer::from_pem_file(key).map_err(|error| bad("stream_tls_key", key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad("stream_tls_cert", cert, &error))?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| bad("stream_tls_cert", cert, &error))?;
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}

/// Takes a connection as far as the end of its request.
async fn greet(
    node: Arc<Node>,
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    place: OwnedSemaphorePermit,
    ending: Ending,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let transport = Transport::accept(stream, tls).await?;
    let place = Arc::new(std::sync::Mutex::new(Some(place)));
    let service = service_fn(move |request| {
        let response = answer(&node, request, &place, &ending);
        std::future::ready(Ok::<_, Infallible>(response))
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(transport), service)
        .with_upgrades()
        .await?;
    Ok(())
}

/// Answers a request; what follows an upgrade runs in a task of its own.
fn answer(
    node: &Arc<Node>,
    mut request: Request<Incoming>,
    place: &std::sync::Mutex<Option<OwnedSemaphorePermit>>,
    ending: &Ending,
) -> Response<String> {
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return *refuse(StatusCode::METHOD_NOT_ALLOWED, "GET and POST are served");
    }
    let path = request.uri().path().trim_start_matches('/');
    let (method, token) = path.split_once('/').unwrap_or_default();
    let unknown = || *refuse(StatusCode::NOT_FOUND, "this URL is not, or no longer, good");
    let Some(permit) = node.streams.tokens.look(method, token) else {
        return unknown();
    };
    let purpose = match permit {
        Permit::Exec(_) | Permit::Attach(_) => Purpose::Command,
        Permit::PortForward(_) => Purpose::PortForward,
    };
    // A client may try again with another protocol.
    let (subprotocol, response) = match negotiate(purpose, request.headers()) {
        Ok(agreed) => agreed,
        Err(refusal) => return *refusal,
    };
    if !node.streams.tokens.spend(token) {
        return unknown();
    }
    let node = Arc::clone(node);
    let place = place.lock().ok().and_then(|mut place| place.take());
    let upgrade = hyper::upgrade::on(&mut request);
    let mut ending = ending.clone();
    tokio::spawn(async move {
        let _place = place;
        let served = match upgrade.await {
            Ok(upgraded) => match upgraded.downcast::<TokioIo<Transport>>() {
                Ok(parts) => {
                    let transport = parts.io.into_inner();
                    let watch = transport.watch();
                    let idle = node.config.stream_idle_timeout;
                    let serving = serve(
                        &node,
                        &permit,
                        subprotocol,
                        transport,
                        parts.read_buf,
                        &mut ending,
                    );
                    let served = tokio::select! {
                        served = serving => served,
                        () = watch.idle(idle) => Err(io::Error::new(
                            io::ErrorKind::TimedOut,
                            format!("nothing moved for {} s", idle.as_secs()),
                        )),
                    };
                    // Whoever still holds a half of it is not to wait for its client.
                    watch.shut_down();
                    served
                }
                Err(_) => Ok(()),
            },
            Err(error) => Err(io::Error::other(error)),
        };
        match served {
            Err(error) if !is_disconnect(&error) => {
                log::info!("a client's {} ended: {error}", permit.method());
            }
            _ => {}
        }
    });
    response
}

/// Serves what was agreed, until either side ends it.
async fn serve(
    node: &Arc<Node>,
    permit: &Permit,
    subprotocol: Subprotocol,
    transport: Transport,
    read: Bytes,
    ending: &mut Ending,
) -> io::Result<()> {
    match (permit, subprotocol) {
        (Permit::Exec(request), Subprotocol::Command(protocol)) => {
            let options = StreamOptions {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                tty: request.tty,
            };
            let (receiver, sender) =
                remotecommand::open(protocol, transport, read, options).await?;
            exec::exec(node, request, &sender, receiver, ending).await
        }
        (Permit::Attach(request), Subprotocol::Command(protocol)) => {
            let options = StreamOptions {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                tty: request.tty,
            };
            let (receiver, sender) =
                remotecommand::open(protocol, transport, read, options).await?;
            attach::attach(node, request, &sender, receiver, ending).await
        }
        (Permit::PortForward(request), Subprotocol::PortForward(protocol)) => {
            let pod = Arc::new(SandboxPorts {
                node: Arc::clone(node),
                sandbox: request.pod_sandbox_id.clone(),
            });
            let serving = port_forward::serve(protocol, transport, read, pod, &request.port);
            ending.cuts(serving).await
        }
        // What was agreed is for the permit's purpose.
        _ => Ok(()),
    }
}
