//! What the program inside containers does with the network: `inside net COMMAND ARG…`. The node's
//! side of a test calls the same functions.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use nix::libc;

use super::InsideError;

/// Nothing here is silent for longer.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn main(args: &[&str]) -> Result<(), InsideError> {
    match args {
        ["serve", port, word] => serve(port.parse()?, word),
        ["ask", address] => {
            println!("{}", ask(address.parse()?)?);
            Ok(())
        }
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
        _ => Err("no such command".into()),
    }
}

/// Answers `WORD ADDRESS`, the caller's, to every connection and every datagram.
fn serve(port: u16, word: &str) -> Result<(), InsideError> {
    let any = (Ipv6Addr::UNSPECIFIED, port);
    let (listener, datagrams) = (TcpListener::bind(any)?, UdpSocket::bind(any)?);
    let told = word.to_owned();
    std::thread::spawn(move || {
        let mut question = [0; 64];
        while let Ok((_, from)) = datagrams.recv_from(&mut question) {
            let _ = datagrams.send_to(answer(&told, from).as_bytes(), from);
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

/// What a server of [`serve`] answers to a connection.
pub(crate) fn ask(address: SocketAddr) -> Result<String, InsideError> {
    let mut stream = TcpStream::connect_timeout(&address, SOCKET_TIMEOUT)?;
    stream.set_read_timeout(Some(SOCKET_TIMEOUT))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Takes what is poured, and says so at its end.
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

/// How long so many megabytes take to a server of [`sink`].
pub(crate) fn pour(address: SocketAddr, megabytes: usize) -> Result<Duration, InsideError> {
    let mut stream = TcpStream::connect_timeout(&address, SOCKET_TIMEOUT)?;
    let block = vec![1; 1 << 20];
    let begun = Instant::now();
    for _ in 0..megabytes {
        stream.write_all(&block)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut end = [0; 3];
    stream.read_exact(&mut end)?;
    Ok(begun.elapsed())
}

/// The chunks of RFC 9260 that begin an association.
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;

/// A raw socket of SCTP, which even a kernel without the protocol has, and whose connection
/// tracking knows it all the same. The standard library asks no datagram socket what it carries.
pub(crate) struct Sctp(UdpSocket);

/// The beginning of an association, or the answer to it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) kind: u8,
    pub(crate) peer: Ipv4Addr,
    pub(crate) from: u16,
    pub(crate) to: u16,
}

impl Sctp {
    pub(crate) fn open() -> Result<Self, InsideError> {
        // SAFETY: no memory is passed; the descriptor is nobody else's.
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
        // An INIT's verification tag is 0, that of its answer is the INIT's.
        packet.extend((u32::from(kind == INIT_ACK) * TAG).to_be_bytes());
        packet.extend([0; 4]);
        // Chunk: type, flags, length; tag, window, streams out and in, first number.
        packet.extend([kind, 0, 0, 20]);
        packet.extend(TAG.to_be_bytes());
        packet.extend(65_536_u32.to_be_bytes());
        packet.extend([0, 1, 0, 1, 0, 0, 0, 1]);
        let sum = crc32c(&packet);
        packet[8..12].copy_from_slice(&sum.to_le_bytes());
        self.0.send_to(&packet, SocketAddrV4::new(to, 0))?;
        Ok(())
    }

    /// The next chunk whose checksum is right; nothing if a second is over.
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

    /// Begins an association until it is answered: who answered.
    pub(crate) fn begin(
        &self,
        to: Ipv4Addr,
        from_port: u16,
        to_port: u16,
    ) -> Result<Chunk, InsideError> {
        let begun = Instant::now();
        while begun.elapsed() < SOCKET_TIMEOUT {
            self.send(INIT, to, from_port, to_port)?;
            while let Some(chunk) = self.receive() {
                if chunk.kind == INIT_ACK && chunk.to == from_port {
                    return Ok(chunk);
                }
            }
        }
        Err("no INIT ACK".into())
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

/// RFC 9260, appendix A.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0x82f6_3b78 * (sum & 1))
        })
    })
}

/// The link-local address of a router that does not exist.
const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0xbad);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Sends a router advertisement (RFC 4861, 4.2) to all nodes on the interface's link. It announces
/// a default router and a prefix for addresses. It is sent as a frame, which needs neither an
/// address nor a route.
pub(crate) fn advertise(interface: &str, prefix: Ipv6Addr) -> Result<(), InsideError> {
    const LIFETIME: u16 = 1800;
    let mut message = vec![134, 0, 0, 0, 64, 0];
    message.extend(LIFETIME.to_be_bytes());
    message.extend([0; 8]);
    // The prefix option: the length, flags (on-link, autonomous), valid and preferred lifetime.
    message.extend([3, 4, 64, 0xc0]);
    message.extend(86_400_u32.to_be_bytes());
    message.extend(14_400_u32.to_be_bytes());
    message.extend([0; 4]);
    message.extend(prefix.octets());
    let length = u16::try_from(message.len())?;
    let mut pseudo = Vec::new();
    pseudo.extend(ROUTER.octets());
    pseudo.extend(ALL_NODES.octets());
    pseudo.extend(u32::from(length).to_be_bytes());
    pseudo.extend([0, 0, 0, 58]);
    pseudo.extend(&message);
    message[2..4].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([58, 255]);
    packet.extend(ROUTER.octets());
    packet.extend(ALL_NODES.octets());
    packet.extend(message);
    send_frame(interface, [0x33, 0x33, 0, 0, 0, 1], 0x86dd, &packet)
}

/// Sends a redirect (RFC 792) to the pod `victim` in the name of its `router`: packets to `away`
/// are to go through `to`.
fn redirect(
    interface: &str,
    victim: Ipv4Addr,
    router: Ipv4Addr,
    away: Ipv4Addr,
    to: Ipv4Addr,
) -> Result<(), InsideError> {
    let header = |from: Ipv4Addr, to: Ipv4Addr, length: u16| {
        let mut header = vec![0x45, 0];
        header.extend(length.to_be_bytes());
        header.extend([0, 1, 0, 0, 64, 1, 0, 0]);
        header.extend(from.octets());
        header.extend(to.octets());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    };
    // A redirect for a host, and the packet that it claims to answer: an echo reply.
    let mut message = vec![5, 1, 0, 0];
    message.extend(to.octets());
    message.extend(header(victim, away, 28));
    message.extend([0, 0, 0xff, 0xff, 0, 0, 0, 0]);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = header(router, victim, u16::try_from(20 + message.len())?);
    packet.extend(message);
    // The hardware address of a pod contains its IPv4 address.
    let [a, b, c, d] = victim.octets();
    send_frame(interface, [0x0a, 0x58, a, b, c, d], 0x0800, &packet)
}

/// The Internet checksum, RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| {
        u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or_default(),
        ]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Sends a frame with this packet, packet(7); the kernel makes its header.
fn send_frame(
    interface: &str,
    to: [u8; 6],
    protocol: u16,
    packet: &[u8],
) -> Result<(), InsideError> {
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: the name ends with a NUL.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    let mut hardware = [0; 8];
    hardware[..6].copy_from_slice(&to);
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: i32::try_from(index)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: hardware,
    };
    // SAFETY: the packet and the address outlive the call, and the lengths are theirs. Nothing else
    // owns the descriptor.
    let sent = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        let socket: std::os::fd::OwnedFd = std::os::fd::FromRawFd::from_raw_fd(fd);
        libc::sendto(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            packet.as_ptr().cast(),
            packet.len(),
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
