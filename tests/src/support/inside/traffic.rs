//! The network commands of the program `inside`, which are called as `inside net COMMAND ARG…`. The
//! tests also call functions of this module directly, without `inside`, to send traffic from the
//! node.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use nix::libc;

use super::InsideError;
use crate::support::frames;

/// The timeout of each socket operation.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn main(args: &[&str]) -> Result<(), InsideError> {
    match args {
        ["serve", port, word] => serve(port.parse()?, word),
        ["ask", address] => {
            println!("{}", ask(address.parse()?)?);
            Ok(())
        }
        ["hear", port] => hear(port.parse()?),
        ["sink", port] => sink(port.parse()?),
        ["pour", address, megabytes] => {
            let took = pour(address.parse()?, megabytes.parse()?)?;
            println!("{}", took.as_secs_f64());
            Ok(())
        }
        ["sctp", port] => answer_sctp(port.parse()?),
        ["advertise", interface, prefix] => advertise(interface, prefix.parse()?),
        ["redirect", interface, victim, router, away, to] => redirect(
            interface,
            victim.parse()?,
            router.parse()?,
            away.parse()?,
            to.parse()?,
        ),
        _ => Err("unknown network command".into()),
    }
}

/// Runs a server that responds to every TCP connection and every UDP datagram with `word` and the
/// client's address.
fn serve(port: u16, word: &str) -> Result<(), InsideError> {
    let any = (Ipv6Addr::UNSPECIFIED, port);
    let (listener, datagrams) = (TcpListener::bind(any)?, UdpSocket::bind(any)?);
    let udp_word = word.to_owned();
    std::thread::spawn(move || {
        let mut question = [0; 64];
        while let Ok((_, from)) = datagrams.recv_from(&mut question) {
            let _ = datagrams.send_to(answer(&udp_word, from).as_bytes(), from);
        }
    });
    loop {
        let (mut stream, from) = listener.accept()?;
        let _ = stream.write_all(answer(word, from).as_bytes());
    }
}

fn answer(word: &str, from: SocketAddr) -> String {
    format!("{word} {}", from.ip().to_canonical())
}

/// Connects to a server that [`serve`] runs, and returns the server's response.
pub(crate) fn ask(address: SocketAddr) -> Result<String, InsideError> {
    let mut stream = TcpStream::connect_timeout(&address, SOCKET_TIMEOUT)?;
    stream.set_read_timeout(Some(SOCKET_TIMEOUT))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Prints the content and the sender's address of each UDP datagram that arrives at `port`.
fn hear(port: u16) -> Result<(), InsideError> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
    println!("ready");
    let mut content = [0; 64];
    loop {
        let (length, from) = socket.recv_from(&mut content)?;
        let content = String::from_utf8_lossy(content.get(..length).unwrap_or_default());
        println!("{}", answer(&content, from));
    }
}

/// Runs a server that reads and discards the data of each connection. After the client has closed
/// its side of the connection, the server replies with the text `all`.
fn sink(port: u16) -> Result<(), InsideError> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    loop {
        let (mut stream, _) = listener.accept()?;
        std::thread::spawn(move || {
            let mut block = vec![0; 1 << 20];
            while stream.read(&mut block).is_ok_and(|count| count > 0) {}
            let _ = stream.write_all(b"all");
        });
    }
}

/// Sends `megabytes` MB to a server that [`sink`] runs, and returns how long the transfer takes.
pub(crate) fn pour(address: SocketAddr, megabytes: usize) -> Result<Duration, InsideError> {
    let mut stream = TcpStream::connect_timeout(&address, SOCKET_TIMEOUT)?;
    let block = vec![1; 1 << 20];
    let started = Instant::now();
    for _ in 0..megabytes {
        stream.write_all(&block)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut end = [0; 3];
    stream.read_exact(&mut end)?;
    Ok(started.elapsed())
}

/// The SCTP chunk types that begin an association (RFC 9260).
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;

/// A raw socket that sends and receives SCTP packets. Raw sockets do not need SCTP support in the
/// kernel. The kernel's connection tracking recognises the packets as SCTP traffic, so they can
/// pass through a host port. The type `UdpSocket` can contain an SCTP socket, because the standard
/// library does not check the protocol of a socket.
pub(crate) struct Sctp(UdpSocket);

/// An SCTP chunk of the type INIT or INIT ACK. INIT begins an association, and INIT ACK is the
/// response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) kind: u8,
    pub(crate) peer: Ipv4Addr,
    pub(crate) from: u16,
    pub(crate) to: u16,
}

impl Sctp {
    pub(crate) fn open() -> Result<Self, InsideError> {
        // SAFETY: socket(2) gets no pointers, and only `socket` owns the new descriptor.
        let socket: std::os::fd::OwnedFd = unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_INET, kind, libc::IPPROTO_SCTP);
            if fd < 0 {
                return Err(std::io::Error::last_os_error().into());
            }
            std::os::fd::FromRawFd::from_raw_fd(fd)
        };
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(Sctp(socket))
    }

    pub(crate) fn send(
        &self,
        kind: u8,
        to: Ipv4Addr,
        from_port: u16,
        to_port: u16,
    ) -> Result<(), InsideError> {
        let mut packet = Vec::new();
        packet.extend(from_port.to_be_bytes());
        packet.extend(to_port.to_be_bytes());
        // The verification tag of an INIT chunk is 0. The verification tag of an INIT ACK chunk is
        // the initiate tag of the INIT chunk.
        packet.extend((u32::from(kind == INIT_ACK) * TAG).to_be_bytes());
        packet.extend([0; 4]);
        // The chunk begins with its type, flags and length. The next fields are the initiate tag,
        // the window, the numbers of outbound and inbound streams, and the initial TSN.
        packet.extend([kind, 0, 0, 20]);
        packet.extend(TAG.to_be_bytes());
        packet.extend(65_536_u32.to_be_bytes());
        packet.extend([0, 1, 0, 1, 0, 0, 0, 1]);
        let sum = crc32c(&packet);
        packet[8..12].copy_from_slice(&sum.to_le_bytes());
        self.0.send_to(&packet, SocketAddrV4::new(to, 0))?;
        Ok(())
    }

    /// Receives the next chunk. Returns `None` if the chunk's checksum is wrong or no chunk arrives
    /// within a second.
    pub(crate) fn receive(&self) -> Option<Chunk> {
        let mut packet = [0; 256];
        let (length, _) = self.0.recv_from(&mut packet).ok()?;
        let packet = packet.get(..length)?;
        let peer: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
        let header = usize::from(packet.first()? & 0xf) * 4;
        let sctp = packet.get(header..)?;
        let mut plain = sctp.to_vec();
        plain.get_mut(8..12)?.fill(0);
        let word = |at| Some(u16::from_be_bytes(sctp.get(at..at + 2)?.try_into().ok()?));
        (sctp.get(8..12)? == crc32c(&plain).to_le_bytes()).then_some(Chunk {
            kind: *sctp.get(12)?,
            peer: peer.into(),
            from: word(0)?,
            to: word(2)?,
        })
    }

    /// Sends INIT chunks until an INIT ACK chunk arrives, and returns the INIT ACK chunk.
    pub(crate) fn begin(
        &self,
        to: Ipv4Addr,
        from_port: u16,
        to_port: u16,
    ) -> Result<Chunk, InsideError> {
        let started = Instant::now();
        while started.elapsed() < SOCKET_TIMEOUT {
            self.send(INIT, to, from_port, to_port)?;
            while let Some(chunk) = self.receive() {
                if chunk.kind == INIT_ACK && chunk.to == from_port {
                    return Ok(chunk);
                }
            }
        }
        Err("the peer did not respond with an INIT ACK".into())
    }
}

const TAG: u32 = 0x7272_756e;

fn answer_sctp(port: u16) -> Result<(), InsideError> {
    let socket = Sctp::open()?;
    println!("ready");
    loop {
        if let Some(chunk) = socket.receive()
            && chunk.kind == INIT
            && chunk.to == port
        {
            socket.send(INIT_ACK, chunk.peer, port, chunk.from)?;
        }
    }
}

/// Returns the CRC32c checksum of `bytes` (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0x82f6_3b78 * (sum & 1))
        })
    })
}

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Sends a router advertisement (RFC 4861, section 4.2) to all nodes on the interface's link. The
/// advertisement announces a default router and the address prefix `prefix`. The function sends a
/// raw frame, so the interface needs neither an address nor a route. The source address is the
/// link-local address that belongs to the interface's hardware address.
pub(crate) fn advertise(interface: &str, prefix: Ipv6Addr) -> Result<(), InsideError> {
    const LIFETIME: u16 = 1800;
    let mac = hardware_address(interface)?;
    let router = frames::link_local_of(mac);
    let mut message = vec![134, 0, 0, 0, 64, 0];
    message.extend(LIFETIME.to_be_bytes());
    message.extend([0; 8]);
    // The prefix option begins with its type and its length in units of 8 bytes. The next fields
    // are the prefix length, the flags (on-link, autonomous), and the valid and preferred
    // lifetimes.
    message.extend([3, 4, 64, 0xc0]);
    message.extend(86_400_u32.to_be_bytes());
    message.extend(14_400_u32.to_be_bytes());
    message.extend([0; 4]);
    message.extend(prefix.octets());
    let packet = frames::icmpv6(router, ALL_NODES, message);
    let everyone = [0x33, 0x33, 0, 0, 0, 1];
    send_frame(interface, &frames::ethernet(everyone, mac, 0x86dd, &packet))
}

/// Sends an ICMP redirect (RFC 792) to the pod `victim`. The redirect's source address is `router`,
/// the address of the pod's router. The redirect instructs the pod to send packets for the address
/// `away` through the router `to`.
fn redirect(
    interface: &str,
    victim: Ipv4Addr,
    router: Ipv4Addr,
    away: Ipv4Addr,
    to: Ipv4Addr,
) -> Result<(), InsideError> {
    // The ICMP message has type 5 (redirect) and code 1 (for a host). The data of a redirect is the
    // packet that caused the redirect. The attack invents such a packet: an echo reply.
    let mut message = vec![5, 1, 0, 0];
    message.extend(to.octets());
    message.extend(frames::ipv4(
        victim,
        away,
        1,
        &[0, 0, 0xff, 0xff, 0, 0, 0, 0],
    ));
    let sum = frames::checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let packet = frames::ipv4(router, victim, 1, &message);
    let mac = hardware_address(interface)?;
    let frame = frames::ethernet(frames::mac_of_pod(victim), mac, 0x0800, &packet);
    send_frame(interface, &frame)
}

/// Returns the hardware address of an interface (netdevice(7)).
fn hardware_address(interface: &str) -> Result<[u8; 6], InsideError> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: an ifreq consists of integers and arrays of integers, which can all be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()).take(15) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: `request` is valid for reads and writes during the system call. A successful system
    // call has written the field `ifru_hwaddr`.
    let hardware = unsafe {
        if libc::ioctl(descriptor, libc::SIOCGIFHWADDR, &raw mut request) != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        request.ifr_ifru.ifru_hwaddr.sa_data
    };
    let [a, b, c, d, e, f, ..] = hardware.map(|byte| byte.to_ne_bytes()[0]);
    Ok([a, b, c, d, e, f])
}

/// Sends `frame`, which begins with its link-layer header, through the interface (packet(7)).
pub(crate) fn send_frame(interface: &str, frame: &[u8]) -> Result<(), InsideError> {
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: `name` ends with a NUL.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: i32::try_from(index)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: `frame` and `address` outlive the system calls, and the passed lengths are their
    // sizes. `fd` is a new descriptor, which only `socket` owns.
    let sent = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        let socket: std::os::fd::OwnedFd = std::os::fd::FromRawFd::from_raw_fd(fd);
        libc::sendto(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    if sent < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}
