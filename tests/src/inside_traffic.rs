//! What the program inside containers does with the network: `inside net COMMAND ARG…`. The node's
//! side of a test calls the same functions.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use nix::libc;

type Error = Box<dyn std::error::Error>;

/// Nothing here is silent for longer.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn main(args: &[&str]) -> Result<(), Error> {
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
        _ => Err("no such command".into()),
    }
}

/// Answers `WORD ADDRESS`, the caller's, to every connection and every datagram.
fn serve(port: u16, word: &str) -> Result<(), Error> {
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
pub fn ask(address: SocketAddr) -> Result<String, Error> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Takes what is poured, and says so at its end.
fn sink(port: u16) -> Result<(), Error> {
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
pub fn pour(address: SocketAddr, megabytes: usize) -> Result<Duration, Error> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
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
pub struct Sctp(UdpSocket);

/// The beginning of an association, or the answer to it.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    pub kind: u8,
    pub peer: Ipv4Addr,
    pub from: u16,
    pub to: u16,
}

impl Sctp {
    pub fn open() -> Result<Self, Error> {
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

    pub fn send(&self, kind: u8, to: Ipv4Addr, from_port: u16, to_port: u16) -> Result<(), Error> {
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
    pub fn receive(&self) -> Option<Chunk> {
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
    pub fn begin(&self, to: Ipv4Addr, from_port: u16, to_port: u16) -> Result<Chunk, Error> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
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

fn answer_sctp(port: u16) -> Result<(), Error> {
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
