//! A minimal HTTP/1 server for metrics scrapers, which listens on the address `metrics_listen`.
//!
//! To restrict the resources that clients can use, the server accepts one request per connection.
//! It also limits the request size, the number of connections and the duration of a connection. If
//! the limit on connections is reached, a new connection replaces the oldest one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::exposition;
use crate::node::Node;
use crate::waiting::WaitingClients;
use rrun_calls::error::{During, Result};
use rrun_kernel::descriptor_limit;
use rrun_kernel::errno::describe;

/// The limit on concurrent connections.
const MAX_CONNECTIONS: usize = 1024;

/// The size limit of a request's first line and headers.
const MAX_REQUEST_BYTES: usize = 8 << 10;

/// The time limit of a connection, until the end of the response.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves the metrics over HTTP until the calling task is aborted.
pub(crate) async fn serve(node: Arc<Node>, listener: TcpListener) {
    let connections = MAX_CONNECTIONS.min(descriptor_limit::share());
    let waiting = WaitingClients::new("metrics", connections);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let node = Arc::clone(&node);
                let (place, replaced) = waiting.add();
                tokio::spawn(async move {
                    let _place = place;
                    let answer = answer(&node, stream);
                    tokio::select! {
                        _ = tokio::time::timeout(REQUEST_TIMEOUT, answer) => {}
                        () = replaced.notified() => {}
                    }
                });
                // Read the request of this client before the next client can replace it.
                tokio::task::yield_now().await;
            }
            Err(error) => {
                log::error!("accept a connection for metrics: {}", describe(&error));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Binds the socket on which metrics are served.
pub(crate) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    let what = || format!("listen on {address} for metrics");
    TcpListener::bind(address).await.during(what)
}

async fn answer(node: &Node, mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut buffer = [0_u8; 1024];
    let is_whole = |request: &[u8]| {
        let mut windows = request.windows(4);
        windows.any(|four| four == b"\r\n\r\n")
    };
    while !is_whole(&request) && request.len() < MAX_REQUEST_BYTES {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        request.extend_from_slice(buffer.get(..count).unwrap_or_default());
    }
    let line = request.split(|byte| *byte == b'\r').next();
    let line = String::from_utf8_lossy(line.unwrap_or_default()).into_owned();
    let mut words = line.split(' ');
    let (method, path, version) = (words.next(), words.next(), words.next());
    let path = path.map(|path| path.split('?').next().unwrap_or_default());
    let is_http = version.is_some_and(|version| version.starts_with("HTTP/1."));
    let (status, body) = match (method, path) {
        _ if !is_http || !is_whole(&request) => {
            ("400 Bad Request", "this is not an HTTP/1 request\n".into())
        }
        (Some("GET" | "HEAD"), Some("/metrics")) => ("200 OK", exposition::text(node)),
        (Some("GET" | "HEAD"), _) => (
            "404 Not Found",
            "metrics are served at the path /metrics\n".into(),
        ),
        _ => (
            "405 Method Not Allowed",
            "only GET and HEAD are allowed\n".into(),
        ),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    if method != Some("HEAD") {
        stream.write_all(body.as_bytes()).await?;
    }
    stream.shutdown().await
}
