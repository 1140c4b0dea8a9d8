//! The streaming server: HTTP that is upgraded.
//!
//! A connection is good for one upgrade. The request for it must come within [`HEAD`], its head fit into
//! [`MAX_HEAD`]; whatever else comes is closed. At most [`MAX_CONNECTIONS`] at once.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use super::exec::is_gone;
use super::token::Permit;
use super::{attach, exec, port_forward};
use crate::config::tls::tls;
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::errno::describe;
use rrun_streams::remotecommand::{self, Wanted};
use rrun_streams::transport::{Transport, Watch};
use rrun_streams::upgrade::{Spoken, negotiate, refuse};
use rrun_streams::{connection, websocket};

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

/// Takes a connection as far as the end of its request.
async fn greet(
    node: Arc<Node>,
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    place: OwnedSemaphorePermit,
    ending: Ending,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    let watch = Watch::new(&stream)?;
    let transport = match tls {
        Some(tls) => Transport::Tls(Box::new(tls.accept(stream).await?), watch),
        None => Transport::Plain(stream, watch),
    };
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
    let port_forward = matches!(permit, Permit::PortForward(_));
    // A client may try again with another protocol.
    let (spoken, response) = match negotiate(port_forward, request.headers()) {
        Ok(agreed) => agreed,
        Err(refused) => return *refused,
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
                    let idle = node.config.stream_idle_timeout();
                    let serving = serve(
                        &node,
                        &permit,
                        spoken,
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
            Err(error) if !is_gone(&error) => {
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
    spoken: Spoken,
    transport: Transport,
    read: Bytes,
    ending: &mut Ending,
) -> io::Result<()> {
    let watch = transport.watch();
    let (wanted, ports) = match permit {
        Permit::Exec(request) => (
            Wanted {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                tty: request.tty,
            },
            None,
        ),
        Permit::Attach(request) => (
            Wanted {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                tty: request.tty,
            },
            None,
        ),
        Permit::PortForward(request) => (Wanted::default(), Some(request)),
    };
    let (receiver, sender) = match (spoken, ports) {
        (Spoken::Spdy(version), _) => {
            let (reader, writer) = connection::serve(transport, &read);
            remotecommand::over_spdy(reader, writer, version, wanted, watch).await?
        }
        (Spoken::WebSocket(version, codec), _) => {
            let (reader, writer) = websocket::channels(transport, read, codec).await;
            remotecommand::over_websocket(reader, writer, version, wanted, watch).await?
        }
        (Spoken::SpdyPorts, Some(request)) => {
            let (reader, writer) = connection::serve(transport, &read);
            let ports = port_forward::over_spdy(node, request, reader, writer, &watch);
            return ending.cuts(ports).await;
        }
        (Spoken::TunnelledPorts, Some(request)) => {
            let socket = websocket::serve(transport, read).await;
            let tunnel = Transport::Tunnel(Box::new(websocket::Tunnel::new(socket)));
            let (reader, writer) = connection::serve(tunnel, &[]);
            let ports = port_forward::over_spdy(node, request, reader, writer, &watch);
            return ending.cuts(ports).await;
        }
        (Spoken::WebSocketPorts(codec), Some(request)) => {
            let (reader, writer) = websocket::channels(transport, read, codec).await;
            let ports = port_forward::over_websocket(node, request, reader, writer, &watch);
            return ending.cuts(ports).await;
        }
        (_, None) => return Ok(()),
    };
    match permit {
        Permit::Exec(request) => exec::exec(node, request, &sender, receiver, ending).await,
        Permit::Attach(request) => attach::attach(node, request, &sender, receiver, ending).await,
        Permit::PortForward(_) => Ok(()),
    }
}
