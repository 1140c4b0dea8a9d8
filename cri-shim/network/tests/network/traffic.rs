//! What pods do: TCP and pings, over plain sockets.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto,
    socket_with, sockopt,
};

use crate::node::{TRAFFIC_TIMEOUT, inside};

pub(crate) const PORT: u16 = 5000;

/// Until it executes its program, a child of another test's has a copy of every listener here: also
/// of the last one at this port.
fn listen() -> io::Result<TcpListener> {
    let until = Instant::now() + TRAFFIC_TIMEOUT;
    loop {
        match TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            listener => return listener,
        }
    }
}

/// Listens in `server`'s namespace, or on the node, and fetches from `client`'s by `address`.
/// Returns where the server saw the client come from.
pub(crate) fn fetch(
    server: Option<&Path>,
    client: Option<&Path>,
    address: Ipv4Addr,
) -> Result<IpAddr, Failed> {
    let listener = within(server, || Ok(listen()?))?;
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| -> Result<IpAddr, Failed> {
            let (mut stream, from) = listener.accept()?;
            stream.set_read_timeout(Some(TRAFFIC_TIMEOUT))?;
            let mut request = [0; 5];
            stream.read_exact(&mut request)?;
            // More than a packet, so that an MTU that does not fit is noticed.
            stream.write_all(&[b'x'; PAGE])?;
            Ok(from.ip())
        });
        let fetched = within(client, || {
            let to = SocketAddr::from((address, PORT));
            let mut stream = TcpStream::connect_timeout(&to, TRAFFIC_TIMEOUT)?;
            stream.set_read_timeout(Some(TRAFFIC_TIMEOUT))?;
            stream.write_all(b"fetch")?;
            let mut page = Vec::new();
            stream.read_to_end(&mut page)?;
            Ok(page.len())
        });
        if fetched.is_err() {
            // Let the server go.
            let _ = within(server, || {
                let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
                Ok(stream.write_all(b"leave")?)
            });
        }
        let served = serving.join().map_err(|_| Failed::from("it panicked"))?;
        match fetched? {
            PAGE => served,
            length => Err(Failed::from(format!("fetched {length} bytes of {PAGE}"))),
        }
    })
}

/// What a fetch transfers, in bytes.
pub(crate) const PAGE: usize = 100_000;

/// One ICMP echo and its answer, from the namespace `from`.
pub(crate) fn ping(from: &Path, to: Ipv4Addr) -> Result<(), Failed> {
    inside(from, || {
        let socket = socket_with(
            AddressFamily::INET,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(ipproto::ICMP),
        )?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(TRAFFIC_TIMEOUT))?;
        // Echo request, code 0, a checksum, an identifier, sequence 1: see RFC 792.
        let (kind, identifier) = (8 << 8, 0x7272);
        let checksum: u16 = !(kind + identifier + 1);
        let mut request = Vec::new();
        for word in [kind, checksum, identifier, 1] {
            request.extend_from_slice(&word.to_be_bytes());
        }
        sendto(
            &socket,
            &request,
            SendFlags::empty(),
            &SocketAddr::from((to, 0)),
        )?;
        loop {
            let mut packet = [0; 128];
            let (length, _) = recv(&socket, &mut packet[..], RecvFlags::empty())?;
            // 20 bytes of IP header, then type 0, an echo reply.
            let reply = packet.get(20..length).unwrap_or_default();
            if reply.first() == Some(&0) && reply.get(4..8) == request.get(4..8) {
                return Ok(());
            }
        }
    })
}

fn within<T: Send>(
    netns: Option<&Path>,
    work: impl FnOnce() -> Result<T, Failed> + Send,
) -> Result<T, Failed> {
    match netns {
        Some(netns) => inside(netns, work),
        None => work(),
    }
}
