//! Functions that generate network traffic, such as TCP connections and pings.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto,
    socket_with, sockopt,
};

use crate::node::{TRAFFIC_TIMEOUT, inside};

pub(crate) const PORT: u16 = 5000;

/// Opens a listener at [`PORT`]. [`PORT`] can remain in use for a short time after the previous
/// listener was closed. If another test has forked a child process, the child has a copy of the
/// previous listener until its execve(2).
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

/// Starts a server in the network namespace `server`, and fetches a page from `address` in the
/// network namespace `client`. If `server` or `client` is `None`, the server or the client runs in
/// the node's network namespace. Returns the client's address as the server sees it.
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
            // The page is larger than a packet, so the test fails if the MTU is wrong.
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
            // The server thread may still wait in `accept`. It returns from `accept` when this
            // connection arrives.
            let _ = within(server, || {
                let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
                Ok(stream.write_all(b"leave")?)
            });
        }
        let served = serving
            .join()
            .map_err(|_| Failed::from("the server thread panicked"))?;
        match fetched? {
            PAGE => served,
            length => Err(Failed::from(format!(
                "number of bytes that the client received: {length}, expected: {PAGE}"
            ))),
        }
    })
}

/// The size of the page that [`fetch`] transfers, in bytes.
pub(crate) const PAGE: usize = 100_000;

/// Sends an ICMP echo request from the namespace `from` and waits for the reply.
pub(crate) fn ping(from: &Path, to: Ipv4Addr) -> Result<(), Failed> {
    inside(from, || {
        let socket = socket_with(
            AddressFamily::INET,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(ipproto::ICMP),
        )?;
        let second = Duration::from_secs(1);
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(second))?;
        // The packet consists of four 16-bit words, see RFC 792. The words are the type 8 (echo
        // request) with the code 0, the checksum, the identifier and the sequence number.
        let (kind, identifier) = (8 << 8, 0x7272);
        let checksum: u16 = !(kind + identifier + 1);
        let mut request = Vec::new();
        for word in [kind, checksum, identifier, 1] {
            request.extend_from_slice(&word.to_be_bytes());
        }
        // The kernel can drop packets in the first milliseconds of an interface, so the request is
        // repeated.
        let end = Instant::now() + TRAFFIC_TIMEOUT;
        loop {
            let address = SocketAddr::from((to, 0));
            sendto(&socket, &request, SendFlags::empty(), &address)?;
            let mut packet = [0; 128];
            let length = match recv(&socket, &mut packet[..], RecvFlags::empty()) {
                Ok((length, _)) => length,
                Err(Errno::AGAIN) if Instant::now() < end => continue,
                Err(errno) => return Err(errno.into()),
            };
            // The packet begins with an IP header of 20 bytes. The next byte is the ICMP type,
            // which is 0 for an echo reply.
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
