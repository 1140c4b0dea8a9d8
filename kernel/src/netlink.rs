//! Netlink sockets, netlink(7).

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, bind, connect, socket_with};

/// Opens a netlink socket for requests to the kernel. `groups` are the multicast groups to which the
/// socket belongs, as bits. `protocol` is `None` for NETLINK_ROUTE.
///
/// A process with CAP_NET_ADMIN in the network namespace can send messages to every netlink socket of
/// this namespace, and could forge the kernel's answers. The socket is therefore connected to the
/// kernel, and messages of other processes fail with ECONNREFUSED.
pub fn open(protocol: Option<Protocol>, groups: u32) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    if groups != 0 {
        bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    }
    connect(&socket, &SocketAddrNetlink::new(0, 0))?;
    Ok(socket)
}

/// Returns the port of a socket, which identifies the socket in its network namespace.
pub fn port(socket: impl AsFd) -> Result<u32, Errno> {
    let address = rustix::net::getsockname(socket)?;
    Ok(SocketAddrNetlink::try_from(address)?.pid())
}

#[cfg(test)]
mod tests {
    use rustix::net::{SendFlags, sendto};

    use super::*;

    /// This test needs CAP_NET_ADMIN. Without it, the kernel refuses all messages to other sockets.
    #[test]
    fn other_processes_cannot_send_messages_to_a_socket() {
        let socket = open(None, 0).unwrap();
        let other = open(None, 0).unwrap();
        let to = SocketAddrNetlink::new(port(&socket).unwrap(), 0);
        let sent = sendto(&other, &[0; 16], SendFlags::empty(), &to);
        assert_eq!(sent, Err(Errno::CONNREFUSED));
    }
}
