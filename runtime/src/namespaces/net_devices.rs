//! Network devices that rrun moves from the host to the container's network namespace
//! (`linux.netDevices`). See rtnetlink(7).
//!
//! A device loses its addresses when it is moved to another namespace. So rrun adds the device's
//! permanent, global addresses again and brings the device up, as runc does. When the container's
//! network namespace is destroyed, the kernel moves hardware devices back to the host.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::config::spec;
use crate::error::{Context, Error, Result, refuse};

/// The size of the receive buffer, which is enough for any single reply of the kernel
/// (NLMSG_GOODSIZE is at most 8 kB).
const REPLY_BYTES: usize = 32 << 10;
/// linux/if_addr.h
const IFA_FLAGS: u16 = 8;
/// linux/rtnetlink.h
const RT_SCOPE_UNIVERSE: u8 = 0;
const NAME_BYTES_MAX: usize = libc::IFNAMSIZ;

/// The name of a network device on the host, and its name in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetDevice {
    host: String,
    inside: String,
}

/// Checks `linux.netDevices` of config.json.
///
/// # Errors
/// Fails if a name is invalid, or if two devices would have the same name.
pub(crate) fn from_spec(devices: &BTreeMap<String, spec::NetDeviceSpec>) -> Result<Vec<NetDevice>> {
    let mut checked: Vec<NetDevice> = Vec::new();
    let mut names = BTreeSet::new();
    for (host, device) in devices {
        let inside = match device.name.as_str() {
            "" => host,
            name => name,
        };
        for name in [host, inside] {
            let valid = !name.is_empty()
                && name.len() < NAME_BYTES_MAX
                && name != "."
                && name != ".."
                && !name.contains(|letter: char| {
                    matches!(letter, '/' | ':' | '\0') || letter.is_ascii_whitespace()
                });
            if !valid {
                refuse!("linux.netDevices: {name:?} is not a valid name of a network device");
            }
        }
        if !names.insert(inside) {
            refuse!("linux.netDevices: two devices would have the name {inside} in the container");
        }
        checked.push(NetDevice {
            host: host.clone(),
            inside: inside.to_owned(),
        });
    }
    Ok(checked)
}

/// Moves devices from rrun's network namespace to the network namespace of process `pid`.
pub(crate) fn attach(devices: &[NetDevice], pid: i32) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let open = |path: &str| {
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .doing(|| format!("open {path}"))
    };
    let own = open("/proc/self/ns/net")?;
    let target = open(&format!("/proc/{pid}/ns/net"))?;
    let host = NetlinkSocket::open()?;
    enter(target.as_fd())?;
    let inside = NetlinkSocket::open();
    // rrun returns to its own network namespace, even if it could not open the socket in the
    // container's namespace.
    enter(own.as_fd())?;
    let inside = inside?;
    for device in devices {
        device
            .attach(&host, &inside, target.as_fd())
            .map_err(|error| {
                error.while_doing(format!(
                    "move the network device {} to the container as {} (linux.netDevices)",
                    device.host, device.inside
                ))
            })?;
    }
    Ok(())
}

fn enter(namespace: BorrowedFd<'_>) -> Result<()> {
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))
        .doing(|| "enter a network namespace")
}

impl NetDevice {
    fn attach(
        &self,
        host: &NetlinkSocket,
        inside: &NetlinkSocket,
        namespace: BorrowedFd<'_>,
    ) -> Result<()> {
        let index = host
            .index_of(&self.host)?
            .ok_or_else(|| Error::new("the device does not exist on the host"))?;
        // rrun reads the addresses before it takes the device down, because taking a device down
        // removes the device's IPv6 addresses.
        let addresses = host.addresses(index)?;
        // rrun takes the device down first, so that no process on the host uses the device during
        // the move.
        host.set_up(index, false).doing(|| "take the device down")?;
        let mut request = NetlinkRequest::new(libc::RTM_NEWLINK, libc::NLM_F_ACK as u16);
        request.link(index, 0, 0);
        request.attribute(libc::IFLA_IFNAME, &with_nul(&self.inside));
        request.attribute(
            libc::IFLA_NET_NS_FD,
            &(namespace.as_raw_fd() as u32).to_ne_bytes(),
        );
        host.request(request, |_, _| {})
            .doing(|| "set the device's name and network namespace")?;
        let index = inside
            .index_of(&self.inside)?
            .ok_or_else(|| Error::new("the device is missing in the container after the move"))?;
        for address in addresses {
            inside
                .request(address.add_request(index), |_, _| {})
                .doing(|| "add the device's address again")?;
        }
        inside.set_up(index, true).doing(|| "bring the device up")
    }
}

/// An address of a network interface, from `struct ifaddrmsg` and its attributes.
struct InterfaceAddress {
    family: u8,
    prefix: u8,
    local: Vec<u8>,
}

impl InterfaceAddress {
    fn add_request(&self, index: i32) -> NetlinkRequest {
        let flags = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut request = NetlinkRequest::new(libc::RTM_NEWADDR, flags as u16);
        request
            .bytes
            .extend([self.family, self.prefix, 0, RT_SCOPE_UNIVERSE]);
        request.bytes.extend(index.to_ne_bytes());
        request.attribute(libc::IFA_LOCAL, &self.local);
        request.attribute(libc::IFA_ADDRESS, &self.local);
        request
    }

    /// Parses an RTM_NEWADDR message. Returns `None` unless the message contains a permanent,
    /// global address of `device`.
    fn from_message(body: &[u8], device: i32) -> Option<InterfaceAddress> {
        let [family, prefix, flags, scope, a, b, c, d, rest @ ..] = body else {
            return None;
        };
        let index = i32::from_ne_bytes([*a, *b, *c, *d]);
        let (mut local, mut address, mut all_flags) = (None, None, u32::from(*flags));
        for (kind, value) in attributes(rest) {
            match kind {
                libc::IFA_LOCAL => local = Some(value),
                libc::IFA_ADDRESS => address = Some(value),
                IFA_FLAGS => {
                    if let [a, b, c, d] = value {
                        all_flags = u32::from_ne_bytes([*a, *b, *c, *d]);
                    }
                }
                _ => {}
            }
        }
        // rrun keeps only permanent, global addresses. A temporary address from the host's network,
        // or an address that the device generates itself, has no meaning in the container.
        let permanent = all_flags & libc::IFA_F_PERMANENT != 0;
        (index == device && permanent && *scope == RT_SCOPE_UNIVERSE)
            .then(|| Some((*family, *prefix, local.or(address)?)))
            .flatten()
            .map(|(family, prefix, local)| InterfaceAddress {
                family,
                prefix,
                local: local.to_vec(),
            })
    }
}

fn with_nul(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// Returns the type and value of each netlink attribute. See rtnetlink(7), "Routing attributes".
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d, ..] = bytes else { return None };
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        let kind = u16::from_ne_bytes([*c, *d]);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A netlink message to the kernel, including the message header. See netlink(7).
struct NetlinkRequest {
    bytes: Vec<u8>,
}

impl NetlinkRequest {
    fn new(kind: u16, flags: u16) -> NetlinkRequest {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        // The sequence number and the port id can be zero, because rrun sends only one request at a
        // time over a socket.
        bytes.extend([0; 8]);
        NetlinkRequest { bytes }
    }

    /// Appends a `struct ifinfomsg`.
    fn link(&mut self, index: i32, flags: u32, change: u32) {
        self.bytes.extend([0; 4]);
        self.bytes.extend(index.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(change.to_ne_bytes());
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.bytes.extend((value.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A netlink socket, which belongs to the network namespace in which it was opened.
struct NetlinkSocket {
    fd: OwnedFd,
}

impl NetlinkSocket {
    fn open() -> Result<NetlinkSocket> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is 0.
            None,
        )
        .doing(|| "open a netlink socket")?;
        Ok(NetlinkSocket { fd })
    }

    /// Sends a netlink request. Calls `answer` with the type and body of every reply, except the
    /// last reply, which contains only the result.
    fn request(
        &self,
        mut request: NetlinkRequest,
        mut answer: impl FnMut(u16, &[u8]),
    ) -> std::result::Result<(), Errno> {
        let length = (request.bytes.len() as u32).to_ne_bytes();
        for (to, from) in request.bytes.iter_mut().zip(length) {
            *to = from;
        }
        rustix::net::send(&self.fd, &request.bytes, SendFlags::empty())?;
        let mut buffer = vec![0u8; REPLY_BYTES];
        loop {
            let length = match rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::empty()) {
                Ok((_, length)) => length.min(REPLY_BYTES),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let [a, b, c, d, e, f, ..] = rest {
                let length = u32::from_ne_bytes([*a, *b, *c, *d]) as usize;
                let kind = u16::from_ne_bytes([*e, *f]);
                let body = rest.get(16..length).ok_or(Errno::PROTO)?;
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        let code = body.get(..4).and_then(|code| code.try_into().ok());
                        return match i32::from_ne_bytes(code.ok_or(Errno::PROTO)?) {
                            0 => Ok(()),
                            code => Err(Errno::from_raw_os_error(-code)),
                        };
                    }
                    _ => answer(kind, body),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    fn index_of(&self, name: &str) -> Result<Option<i32>> {
        let mut request = NetlinkRequest::new(libc::RTM_GETLINK, libc::NLM_F_ACK as u16);
        request.link(0, 0, 0);
        request.attribute(libc::IFLA_IFNAME, &with_nul(name));
        let mut index = None;
        let answered = self.request(request, |kind, body| {
            if kind == libc::RTM_NEWLINK {
                let bytes = body.get(4..8).and_then(|bytes| bytes.try_into().ok());
                index = bytes.map(i32::from_ne_bytes);
            }
        });
        match answered {
            Err(Errno::NODEV) => Ok(None),
            result => result
                .doing(|| format!("look up the device {name}"))
                .map(|()| index),
        }
    }

    fn set_up(&self, index: i32, up: bool) -> std::result::Result<(), Errno> {
        let mut request = NetlinkRequest::new(libc::RTM_NEWLINK, libc::NLM_F_ACK as u16);
        let flag = libc::IFF_UP as u32;
        request.link(index, if up { flag } else { 0 }, flag);
        self.request(request, |_, _| {})
    }

    fn addresses(&self, index: i32) -> Result<Vec<InterfaceAddress>> {
        let mut request = NetlinkRequest::new(libc::RTM_GETADDR, libc::NLM_F_DUMP as u16);
        // struct ifaddrmsg
        request.bytes.extend([0; 8]);
        let mut found = Vec::new();
        self.request(request, |kind, body| {
            if kind == libc::RTM_NEWADDR {
                found.extend(InterfaceAddress::from_message(body, index));
            }
        })
        .doing(|| "read the device's addresses")?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Vec<NetDevice>> {
        from_spec(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn invalid_and_duplicate_names_are_refused() {
        assert_eq!(
            read(r#"{"eth1":{"name":"net0"},"eth2":{}}"#).unwrap().len(),
            2
        );
        for wrong in [
            r#"{"":{}}"#,
            r#"{"a/b":{}}"#,
            r#"{"eth0":{"name":"0123456789abcdef"}}"#,
            r#"{"eth0":{"name":"x"},"eth1":{"name":"x"}}"#,
        ] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.starts_with("linux.netDevices"), "{error}");
        }
    }

    #[test]
    fn only_permanent_global_addresses_are_kept() {
        let message = |flags: u8, scope: u8| {
            let mut body = vec![libc::AF_INET as u8, 24, flags, scope];
            body.extend(7i32.to_ne_bytes());
            body.extend([8, 0, libc::IFA_LOCAL as u8, 0, 192, 0, 2, 1]);
            body
        };
        let taken = InterfaceAddress::from_message(&message(0x80, 0), 7).unwrap();
        assert_eq!(
            (taken.prefix, taken.local.as_slice()),
            (24, &[192, 0, 2, 1][..])
        );
        assert!(InterfaceAddress::from_message(&message(0x80, 0), 8).is_none());
        assert!(InterfaceAddress::from_message(&message(0, 0), 7).is_none());
        assert!(InterfaceAddress::from_message(&message(0x80, 253), 7).is_none());
    }
}
