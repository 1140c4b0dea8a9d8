//! Network devices that rrun moves from the host to the container's network namespace
//! (`linux.netDevices`). See rtnetlink(7).
//!
//! A device loses its addresses when it is moved to another namespace. So rrun adds the device's
//! permanent, global addresses again and brings the device up, as runc does. When the container's
//! network namespace is destroyed, the kernel moves hardware devices back to the host, but deletes
//! virtual devices. So if the creation of the container fails, rrun itself moves all devices back,
//! and restores their addresses and routes. It does so only if no other process can have changed the
//! devices in the network namespace. Otherwise a process could give another device the name of
//! the moved one, and this device would become a device of the host.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use oci_spec::runtime::LinuxNamespaceType as Type;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::config::spec;
use crate::error::{Context, Error, Result, refuse};
use crate::namespaces::Namespaces;

/// The size of the receive buffer, which is enough for any single reply of the kernel
/// (NLMSG_GOODSIZE is at most 8 kB).
const REPLY_BYTES: usize = 32 << 10;
/// The size of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// linux/if_addr.h
const IFA_FLAGS: u16 = 8;
/// The position of the device's index in `struct ifaddrmsg`.
const ADDRESS_INDEX_AT: usize = 4;
/// linux/rtnetlink.h
const RT_SCOPE_UNIVERSE: u8 = 0;
const RTPROT_RA: u8 = 9;
const RTM_F_CLONED: u32 = 0x200;
const RTNH_F_ONLINK: u32 = 4;
/// The size of `struct rtmsg`, and the position of its flags.
const ROUTE_BYTES: usize = 12;
const ROUTE_FLAGS_AT: usize = 8;
const NAME_BYTES_MAX: usize = libc::IFNAMSIZ;
/// The device that each network namespace has from its beginning, and that cannot be moved.
const LOOPBACK: &str = "lo";
/// The part of a name for which rrun chooses a number.
const NUMBER: &str = "%d";

/// The name of a network device on the host, and its name in the container. The name in the
/// container can contain [`NUMBER`].
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
                && !name.replacen(NUMBER, "", 1).contains(|letter: char| {
                    matches!(letter, '/' | ':' | '%' | '\0') || letter.is_ascii_whitespace()
                });
            if !valid {
                refuse!("linux.netDevices: {name:?} is not a valid name of a network device");
            }
            if name == LOOPBACK {
                refuse!("linux.netDevices: the loopback device {name} cannot be moved or replaced");
            }
        }
        if !inside.contains(NUMBER) && !names.insert(inside) {
            refuse!("linux.netDevices: two devices would have the name {inside} in the container");
        }
        checked.push(NetDevice {
            host: host.clone(),
            inside: inside.to_owned(),
        });
    }
    Ok(checked)
}

/// The devices that rrun has moved to a container, with everything that rrun needs to move them
/// back.
#[derive(Default)]
pub(crate) struct Attached {
    namespaces: Option<NetworkNamespaces>,
    moved: Vec<MovedDevice>,
    /// True if only the container's processes can be in its network namespace and have rights over
    /// it.
    is_alone: bool,
}

struct NetworkNamespaces {
    /// rrun's own network namespace.
    own: OwnedFd,
    host: NetlinkSocket,
    /// The socket in the container's network namespace. The namespace exists at least as long as
    /// this socket.
    inside: NetlinkSocket,
}

/// The state that a device had on the host before rrun moved it.
struct MovedDevice {
    host: String,
    inside: String,
    was_up: bool,
    /// The bodies of the RTM_NEWADDR messages about the device's permanent addresses.
    addresses: Vec<Vec<u8>>,
    /// The bodies of the RTM_NEWROUTE messages about the routes over the device.
    routes: Vec<Vec<u8>>,
}

/// Moves devices from rrun's network namespace to the network namespace of process `pid`. `namespaces`
/// are the namespaces of this process. Records each device in `attached` before it moves the device.
///
/// # Errors
/// Fails before the first device is moved if a device does not exist, or if its name is in use in
/// the container.
pub(crate) fn attach(
    devices: &[NetDevice],
    pid: i32,
    namespaces: &Namespaces,
    attached: &mut Attached,
) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    attached.is_alone = namespaces.is_new(Type::Network) && !namespaces.is_joined(Type::User);
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
    let namespaces = attached
        .namespaces
        .insert(NetworkNamespaces { own, host, inside });
    let (host, inside) = (&namespaces.host, &namespaces.inside);
    for device in devices {
        device
            .check(host, inside)
            .map_err(|error| device.failed(error))?;
    }
    for device in devices {
        device
            .attach(host, inside, target.as_fd(), devices, &mut attached.moved)
            .map_err(|error| device.failed(error))?;
    }
    Ok(())
}

impl Attached {
    /// Moves all devices back to the host, and restores their addresses and routes. If a step for
    /// one device fails, this function continues with the other devices, and returns the first
    /// error. All processes of the container must have ended.
    pub(crate) fn give_back(&self) -> Result<()> {
        let Some(namespaces) = &self.namespaces else {
            return Ok(());
        };
        let mut result = Ok(());
        for device in self.moved.iter().rev() {
            let given_back = device.give_back(namespaces, self.is_alone);
            result = result.and(given_back.map_err(|error| {
                error.while_doing(format!(
                    "move the network device {} back to the host (linux.netDevices)",
                    device.host
                ))
            }));
        }
        result
    }
}

fn enter(namespace: BorrowedFd<'_>) -> Result<()> {
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))
        .doing(|| "enter a network namespace")
}

impl NetDevice {
    fn failed(&self, error: Error) -> Error {
        error.while_doing(format!(
            "move the network device {} to the container as {} (linux.netDevices)",
            self.host, self.inside
        ))
    }

    /// Checks that the device exists on the host, and that its name is free in the container.
    fn check(&self, host: &NetlinkSocket, inside: &NetlinkSocket) -> Result<()> {
        if host.find(&self.host)?.is_none() {
            return Err(missing_on_host());
        }
        // The kernel moves a device before it changes the name. So if the name is in use, the
        // kernel reports the error only after the move.
        if inside.find(&self.inside)?.is_some() {
            refuse!("the container already has a device with this name");
        }
        Ok(())
    }

    /// Returns the name of the device in the container. In place of [`NUMBER`], the name contains
    /// the smallest number for which no device has this name, as if the kernel chose the number.
    fn name_inside(&self, inside: &NetlinkSocket, devices: &[NetDevice]) -> Result<String> {
        let Some((start, end)) = self.inside.split_once(NUMBER) else {
            return Ok(self.inside.clone());
        };
        for number in 0.. {
            let name = format!("{start}{number}{end}");
            if name.len() >= NAME_BYTES_MAX {
                break;
            }
            let reserved = devices.iter().any(|device| device.inside == name);
            if !reserved && inside.find(&name)?.is_none() {
                return Ok(name);
            }
        }
        refuse!("all names of this form are in use in the container, or are too long")
    }

    fn attach(
        &self,
        host: &NetlinkSocket,
        inside: &NetlinkSocket,
        namespace: BorrowedFd<'_>,
        devices: &[NetDevice],
        moved: &mut Vec<MovedDevice>,
    ) -> Result<()> {
        let device = host.find(&self.host)?.ok_or_else(missing_on_host)?;
        let name = self.name_inside(inside, devices)?;
        let addresses = host.addresses(device.index)?;
        // A temporary address from the host's network, or an address that the device generates
        // itself, has no meaning in the container.
        let global: Vec<_> = addresses
            .iter()
            .filter_map(|body| InterfaceAddress::from_message(body, device.index))
            .filter(|address| address.scope == RT_SCOPE_UNIVERSE)
            .collect();
        moved.push(MovedDevice {
            host: self.host.clone(),
            inside: name.clone(),
            was_up: device.is_up,
            addresses,
            routes: host.routes(device.index)?,
        });
        // The kernel takes the device down before it moves the device.
        host.move_to(device.index, &name, namespace)?;
        let index = inside
            .find(&name)?
            .ok_or_else(|| Error::new("the device is missing in the container after the move"))?
            .index;
        for address in global {
            inside
                .request(address.add_request(index), |_, _| {})
                .doing(|| "add the device's address again")?;
        }
        inside.set_up(index).doing(|| "bring the device up")
    }
}

fn missing_on_host() -> Error {
    Error::new("the device does not exist on the host")
}

impl MovedDevice {
    fn give_back(&self, namespaces: &NetworkNamespaces, is_alone: bool) -> Result<()> {
        let (host, inside) = (&namespaces.host, &namespaces.inside);
        if host.find(&self.host)?.is_some() {
            // The kernel has refused to move the device, which is therefore unchanged.
            return Ok(());
        }
        if !is_alone {
            refuse!(
                "it stays in the container's network namespace, because other containers use the same network or user namespace and could have given its name to another device"
            );
        }
        // If the kernel has moved the device but could not change its name, the device still has
        // the name from the host.
        let found = match inside.find(&self.inside)? {
            None => inside.find(&self.host)?,
            found => found,
        };
        let found = found.ok_or_else(|| Error::new("the device is missing in the container"))?;
        inside.move_to(found.index, &self.host, namespaces.own.as_fd())?;
        let index = host.find(&self.host)?.ok_or_else(missing_on_host)?.index;
        let mut result = Ok(());
        for body in &self.addresses {
            let mut request = NetlinkRequest::addition(libc::RTM_NEWADDR, body);
            request.replace(ADDRESS_INDEX_AT, index as u32);
            result = result.and(host.add(request).doing(|| "add the device's address again"));
        }
        if self.was_up {
            result = result.and(host.set_up(index).doing(|| "bring the device up"));
        }
        for body in &self.routes {
            let mut request = NetlinkRequest::addition(libc::RTM_NEWROUTE, body);
            request.replace(
                ROUTE_FLAGS_AT,
                word_at(body, ROUTE_FLAGS_AT) & RTNH_F_ONLINK,
            );
            if let Some(at) = device_of_route_at(body) {
                request.replace(at, index as u32);
            }
            result = result.and(host.add(request).doing(|| "add the device's route again"));
        }
        result
    }
}

/// Returns whether `body`, the body of an RTM_NEWROUTE message, is about a route over `device` that
/// the kernel does not create itself.
fn is_own_route(body: &[u8], device: i32) -> bool {
    let by_kernel = body
        .get(5)
        .is_none_or(|protocol| matches!(*protocol, libc::RTPROT_KERNEL | RTPROT_RA));
    let at = device_of_route_at(body);
    let over_device = at.is_some_and(|at| word_at(body, at) == device as u32);
    over_device && !by_kernel && word_at(body, ROUTE_FLAGS_AT) & RTM_F_CLONED == 0
}

/// Returns the position of the index of a route's device. `body` is the body of an RTM_NEWROUTE
/// message.
fn device_of_route_at(body: &[u8]) -> Option<usize> {
    let mut at = ROUTE_BYTES;
    for (kind, value) in attributes(body.get(ROUTE_BYTES..)?) {
        if kind == libc::RTA_OIF && value.len() == 4 {
            return Some(at + 4);
        }
        at += (value.len() + 4).next_multiple_of(4);
    }
    None
}

/// Returns the 32 bits at the position `at` of a message, or 0 if the message is shorter.
fn word_at(body: &[u8], at: usize) -> u32 {
    let bytes = body.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_ne_bytes)
}

/// An address of a network interface, from `struct ifaddrmsg` and its attributes.
struct InterfaceAddress {
    family: u8,
    prefix: u8,
    scope: u8,
    local: Vec<u8>,
}

impl InterfaceAddress {
    fn add_request(&self, index: i32) -> NetlinkRequest {
        let flags = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut request = NetlinkRequest::new(libc::RTM_NEWADDR, flags as u16);
        request
            .bytes
            .extend([self.family, self.prefix, 0, self.scope]);
        request.bytes.extend(index.to_ne_bytes());
        request.attribute(libc::IFA_LOCAL, &self.local);
        request.attribute(libc::IFA_ADDRESS, &self.local);
        request
    }

    /// Parses an RTM_NEWADDR message. Returns `None` unless the message contains a permanent address
    /// of `device`.
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
        let permanent = all_flags & libc::IFA_F_PERMANENT != 0;
        if index != device || !permanent {
            return None;
        }
        Some(InterfaceAddress {
            family: *family,
            prefix: *prefix,
            scope: *scope,
            local: local.or(address)?.to_vec(),
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

    /// Returns the request to add what a message of the kernel with this body describes.
    fn addition(kind: u16, body: &[u8]) -> NetlinkRequest {
        let flags = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut request = NetlinkRequest::new(kind, flags as u16);
        request.bytes.extend(body);
        request
    }

    /// Replaces the 32 bits at the position `at` of the body.
    fn replace(&mut self, at: usize, word: u32) {
        let old = self.bytes.iter_mut().skip(HEADER_BYTES + at);
        for (to, from) in old.zip(word.to_ne_bytes()) {
            *to = from;
        }
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
        let fd = rrun_kernel::netlink::open(None, 0).doing(|| "open a netlink socket")?;
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
                let body = rest.get(HEADER_BYTES..length).ok_or(Errno::PROTO)?;
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

    /// Sends a request to add an object. It is not an error if the object already exists, because
    /// the kernel itself adds some addresses and routes.
    fn add(&self, request: NetlinkRequest) -> std::result::Result<(), Errno> {
        match self.request(request, |_, _| {}) {
            Err(Errno::EXIST) => Ok(()),
            added => added,
        }
    }

    /// Sends a request for a list, and returns the bodies that `keep` selects of the messages of
    /// the type `kind`.
    fn list(
        &self,
        request: NetlinkRequest,
        kind: u16,
        keep: impl Fn(&[u8]) -> bool,
    ) -> std::result::Result<Vec<Vec<u8>>, Errno> {
        let mut found = Vec::new();
        self.request(request, |received, body| {
            if received == kind && keep(body) {
                found.push(body.to_vec());
            }
        })?;
        Ok(found)
    }

    fn find(&self, name: &str) -> Result<Option<Link>> {
        let mut request = NetlinkRequest::new(libc::RTM_GETLINK, libc::NLM_F_ACK as u16);
        request.link(0, 0, 0);
        request.attribute(libc::IFLA_IFNAME, &with_nul(name));
        let mut found = None;
        let answered = self.request(request, |kind, body| {
            if kind == libc::RTM_NEWLINK {
                found = Some(Link {
                    index: word_at(body, 4) as i32,
                    is_up: word_at(body, 8) & libc::IFF_UP as u32 != 0,
                });
            }
        });
        match answered {
            Err(Errno::NODEV) => Ok(None),
            result => result
                .doing(|| format!("look up the device {name}"))
                .map(|()| found),
        }
    }

    /// Moves a device to another network namespace, where it gets the name `name`.
    fn move_to(&self, index: i32, name: &str, namespace: BorrowedFd<'_>) -> Result<()> {
        let mut request = NetlinkRequest::new(libc::RTM_NEWLINK, libc::NLM_F_ACK as u16);
        request.link(index, 0, 0);
        request.attribute(libc::IFLA_IFNAME, &with_nul(name));
        let namespace = namespace.as_raw_fd() as u32;
        request.attribute(libc::IFLA_NET_NS_FD, &namespace.to_ne_bytes());
        self.request(request, |_, _| {})
            .doing(|| "set the device's name and network namespace")
    }

    fn set_up(&self, index: i32) -> std::result::Result<(), Errno> {
        let mut request = NetlinkRequest::new(libc::RTM_NEWLINK, libc::NLM_F_ACK as u16);
        let flag = libc::IFF_UP as u32;
        request.link(index, flag, flag);
        self.request(request, |_, _| {})
    }

    /// Returns the bodies of the RTM_NEWADDR messages about the permanent addresses of a device.
    fn addresses(&self, device: i32) -> Result<Vec<Vec<u8>>> {
        let mut request = NetlinkRequest::new(libc::RTM_GETADDR, libc::NLM_F_DUMP as u16);
        // struct ifaddrmsg
        request.bytes.extend([0; 8]);
        let permanent = |body: &[u8]| InterfaceAddress::from_message(body, device).is_some();
        self.list(request, libc::RTM_NEWADDR, permanent)
            .doing(|| "read the device's addresses")
    }

    /// Returns the bodies of the RTM_NEWROUTE messages about the routes over a device.
    fn routes(&self, device: i32) -> Result<Vec<Vec<u8>>> {
        let mut request = NetlinkRequest::new(libc::RTM_GETROUTE, libc::NLM_F_DUMP as u16);
        request.bytes.extend([0; ROUTE_BYTES]);
        self.list(request, libc::RTM_NEWROUTE, |body| {
            is_own_route(body, device)
        })
        .doing(|| "read the device's routes")
    }
}

/// A network device that the kernel has found.
struct Link {
    index: i32,
    is_up: bool,
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
            read(
                r#"{"eth1":{"name":"net0"},"eth2":{},"eth3":{"name":"n%d"},"eth4":{"name":"n%d"}}"#
            )
            .unwrap()
            .len(),
            4
        );
        for wrong in [
            r#"{"":{}}"#,
            r#"{"a/b":{}}"#,
            r#"{"eth0":{"name":"0123456789abcdef"}}"#,
            r#"{"eth0":{"name":"x"},"eth1":{"name":"x"}}"#,
            r#"{"eth0":{"name":"lo"}}"#,
            r#"{"lo":{"name":"x"}}"#,
            r#"{"eth0":{"name":"x%s"}}"#,
            r#"{"eth0":{"name":"x%d%d"}}"#,
        ] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.starts_with("linux.netDevices"), "{error}");
        }
    }

    #[test]
    fn only_permanent_addresses_of_the_device_are_kept() {
        let message = |flags: u8, scope: u8| {
            let mut body = vec![libc::AF_INET as u8, 24, flags, scope];
            body.extend(7i32.to_ne_bytes());
            body.extend([8, 0, libc::IFA_LOCAL as u8, 0, 192, 0, 2, 1]);
            body
        };
        let taken = InterfaceAddress::from_message(&message(0x80, 0), 7).unwrap();
        assert_eq!(
            (taken.prefix, taken.scope, taken.local.as_slice()),
            (24, 0, &[192, 0, 2, 1][..])
        );
        assert!(InterfaceAddress::from_message(&message(0x80, 0), 8).is_none());
        assert!(InterfaceAddress::from_message(&message(0, 0), 7).is_none());
        let link_local = InterfaceAddress::from_message(&message(0x80, 253), 7).unwrap();
        assert_eq!(link_local.scope, 253);
    }
}
