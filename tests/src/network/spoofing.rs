//! Tests of forged source addresses in the embedded network. A pod can send packets only from its own
//! hardware address and IP addresses, unless the configuration or the pod's privileges allow other
//! addresses.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::frames::{
    ARP, IPV4, IPV6, Mac, advertisement, arp_request, ethernet, link_local_of, mac_of_pod,
    solicitation, tagged, udp, with_options,
};
use crate::support::inside::traffic::send_frame;
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::network_view::{in_a_new_network, ip, set, within};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::pod_network::{addresses, allow_spoofing};
use crate::{ensure, test};

macro_rules! tests {
    ($($name:ident $(, $need:expr)*;)*) => {
        &[$(test!($name, A_NODE, Need::RrunCri, BRIDGE_FILTER $(, $need)*)),*]
    };
}

/// nftables for the frames of bridges.
const BRIDGE_FILTER: Need = Need::Works(
    "nftables for bridges",
    "nft -c 'add table bridge t; add chain bridge t c { type filter hook prerouting priority 0; }'",
);

pub(crate) const TESTS: &[Test] = tests![
    a_pod_can_not_send_packets_from_foreign_addresses;
    without_spoof_protection_a_pod_can_send_packets_from_all_addresses;
    a_pod_can_not_take_the_address_of_another_pod_or_of_the_gateway;
    without_spoof_protection_a_pod_can_take_the_address_of_the_gateway;
    a_pod_can_not_attract_the_frames_of_another_pod, Need::Program("bridge");
    the_server_protects_pods_from_an_earlier_version_when_it_starts;
    a_privileged_pod_can_send_packets_from_all_addresses;
];

const PORT: u16 = 9999;
const GATEWAY4: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
/// An address of the node outside the pod range.
const NODE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd72, 0x7275, 0x6e30, 0, 0, 0, 0, 1);

/// A pod with a container that waits.
struct Pod {
    container: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    mac: Mac,
    network: File,
}

impl Pod {
    fn new(node: &Node, name: &str, is_privileged: bool) -> Result<Self> {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod(name);
        let mut main = node.container(name, &["sleep", "600"]);
        for config in [&mut pod, &mut main] {
            config["linux"]["security_context"]["privileged"] = json!(is_privileged);
        }
        let pod_id = node.runp(&pod)?;
        let container = node.run(&pod_id, &pod, &main)?;
        let all = addresses(node, &pod_id)?;
        let [v4, v6] = all.as_slice() else {
            return Err(format!("the pod does not have two addresses: {all:?}").into());
        };
        let v4 = v4.parse()?;
        Ok(Pod {
            network: File::open(format!("/proc/{}/ns/net", node.pid(&container)?))?,
            container,
            v4,
            v6: v6.parse()?,
            mac: mac_of_pod(v4),
        })
    }

    /// Sends the frames through the pod's interface, as a process in the pod can do.
    fn send(&self, frames: &[Vec<u8>]) -> Result {
        within(self.network.as_fd(), || {
            let mut frames = frames.iter();
            frames.try_for_each(|frame| send_frame("eth0", frame))?;
            Ok(())
        })
    }

    /// Returns a frame with a UDP datagram to the node.
    fn datagram(&self, from: impl Into<IpAddr>, content: &str) -> Vec<u8> {
        let from = from.into();
        let (to, ethertype): (IpAddr, u16) = match from {
            IpAddr::V4(_) => (NODE4.into(), IPV4),
            IpAddr::V6(_) => (GATEWAY6.into(), IPV6),
        };
        let packet = udp(
            SocketAddr::new(from, PORT),
            SocketAddr::new(to, PORT),
            content,
        );
        ethernet(mac_of_pod(GATEWAY4), self.mac, ethertype, &packet)
    }
}

/// Returns frames that a pod must not send. The content of each datagram names the forgery.
fn forgeries(attacker: &Pod, victim: &Pod) -> Vec<Vec<u8>> {
    let from = |mac: Mac, mut frame: Vec<u8>| {
        frame[6..12].copy_from_slice(&mac);
        frame
    };
    // The kernel usually passes frames to these addresses to the node without a filter.
    let to_group = |number: u8, content: &str| {
        let mut frame = attacker.datagram(victim.v4, content);
        frame[..6].copy_from_slice(&[0x01, 0x80, 0xc2, 0, 0, number]);
        frame
    };
    vec![
        attacker.datagram(victim.v4, "the other pod's IPv4 address"),
        attacker.datagram(victim.v6, "the other pod's IPv6 address"),
        attacker.datagram(
            link_local_of(victim.mac),
            "the other pod's link-local address",
        ),
        from(
            victim.mac,
            attacker.datagram(attacker.v4, "the other pod's hardware address"),
        ),
        from(
            victim.mac,
            attacker.datagram(victim.v6, "all of the other pod's addresses"),
        ),
        tagged(&attacker.datagram(victim.v4, "a frame with a VLAN tag")),
        tagged(&tagged(
            &attacker.datagram(victim.v4, "a frame with two VLAN tags"),
        )),
        to_group(0, "a frame to the spanning tree group"),
        to_group(2, "a frame to the group of slow protocols"),
        to_group(14, "a frame to the LLDP group"),
    ]
}

/// Makes the attacker send the frames, and then a frame that it is allowed to send. Returns the
/// contents of the datagrams that the node has received.
fn received_by_node(attacker: &Pod, frames: &[Vec<u8>]) -> Result<Vec<String>> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    attacker.send(frames)?;
    let mut received = Vec::new();
    wait_for("the node to receive the attacker's last datagrams", || {
        let last = [
            attacker.datagram(attacker.v4, "allowed 4"),
            attacker.datagram(attacker.v6, "allowed 6"),
        ];
        attacker.send(&last)?;
        let mut content = [0; 64];
        while let Ok(length) = socket.recv(&mut content) {
            let content = content.get(..length).unwrap_or_default();
            received.push(String::from_utf8_lossy(content).into_owned());
        }
        let has = |word: &str| received.iter().any(|one| one == word);
        Ok((has("allowed 4") && has("allowed 6")).then_some(()))
    })?;
    received.retain(|one| !one.starts_with("allowed"));
    Ok(received)
}

/// Checks that the node receives none of the forged datagrams.
fn check_protection(attacker: &Pod, victim: &Pod) -> Result {
    let mut frames = forgeries(attacker, victim);
    let loopback = Ipv4Addr::new(127, 9, 9, 9);
    frames.push(attacker.datagram(loopback, "a loopback address"));
    let received = received_by_node(attacker, &frames)?;
    ensure!(
        received.is_empty(),
        "the node has received forged packets: {received:?}"
    );
    Ok(())
}

/// Adds an address to the node, and disables the kernel's own check of source addresses. The check
/// would drop some forged packets.
fn prepare_node() -> Result {
    ip(&format!("address add {NODE4}/32 dev lo"))?;
    set("ipv4/conf/all/rp_filter", "0")?;
    set("ipv4/conf/default/rp_filter", "0")
}

fn a_pod_can_not_send_packets_from_foreign_addresses() -> Result {
    in_a_new_network(|| {
        prepare_node()?;
        on_a_node(|node| {
            let attacker = Pod::new(node, "attacker", false)?;
            let victim = Pod::new(node, "victim", false)?;
            check_protection(&attacker, &victim)
        })
    })
}

fn without_spoof_protection_a_pod_can_send_packets_from_all_addresses() -> Result {
    in_a_new_network(|| {
        prepare_node()?;
        on_a_node(|node| {
            let attacker = Pod::new(node, "attacker", false)?;
            let victim = Pod::new(node, "victim", false)?;
            // The pods were created with spoof protection. The server removes the protection when it
            // starts.
            allow_spoofing(node)?;
            let tables = command("nft", ["list", "tables"]).ok()?;
            ensure!(
                !tables.text().contains("bridge"),
                "the nftables table of the family bridge still exists: {}",
                tables.text()
            );
            let frames = forgeries(&attacker, &victim);
            let received = received_by_node(&attacker, &frames)?;
            ensure!(
                received.len() == frames.len(),
                "the node has received only {} of {} forged packets: {received:?}",
                received.len(),
                frames.len()
            );
            // Packets from a loopback address are always dropped.
            let loopback = Ipv4Addr::new(127, 9, 9, 9);
            let frame = attacker.datagram(loopback, "a loopback address");
            let received = received_by_node(&attacker, &[frame])?;
            ensure!(
                received.is_empty(),
                "the node has received a packet from a loopback address: {received:?}"
            );
            Ok(())
        })
    })
}

/// Returns the entries of the neighbour cache in the calling thread's network namespace that contain
/// the hardware address `mac`.
fn neighbours(mac: Mac) -> Result<Vec<String>> {
    let text = mac.map(|byte| format!("{byte:02x}")).join(":");
    let all = ip("neighbour show")?;
    let lines = all.lines().filter(|line| line.contains(&text));
    let words = lines.filter_map(|line| line.split(' ').next());
    Ok(words.map(str::to_owned).collect())
}

/// Makes the attacker claim the addresses of the gateway and of the node's other pod. Returns the
/// addresses that the victim and the node then have for the attacker's hardware address.
fn claim_addresses(attacker: &Pod, victim: &Pod, other: &Pod) -> Result<Vec<String>> {
    let to_victim =
        |ethertype, packet: Vec<u8>| ethernet(victim.mac, attacker.mac, ethertype, &packet);
    let to_node = |ethertype, packet: Vec<u8>| {
        ethernet(mac_of_pod(GATEWAY4), attacker.mac, ethertype, &packet)
    };
    let target = advertisement(attacker.v6, victim.v6, GATEWAY6, attacker.mac);
    attacker.send(&[
        to_victim(ARP, arp_request(GATEWAY4, attacker.mac, victim.v4)),
        to_victim(ARP, arp_request(other.v4, attacker.mac, victim.v4)),
        to_victim(IPV6, target.clone()),
        to_victim(IPV6, with_options(&target)),
        to_victim(IPV6, solicitation(GATEWAY6, victim.v6, attacker.mac)),
        to_victim(IPV6, solicitation(other.v6, victim.v6, attacker.mac)),
        to_node(ARP, arp_request(victim.v4, attacker.mac, GATEWAY4)),
        to_node(IPV6, solicitation(victim.v6, GATEWAY6, attacker.mac)),
        // The sender in the ARP packet differs from the sender of the frame.
        ethernet(
            victim.mac,
            attacker.mac,
            ARP,
            &arp_request(attacker.v4, other.mac, victim.v4),
        ),
    ])?;
    let own = [attacker.v4.to_string(), attacker.v6.to_string()];
    let mut claimed = Vec::new();
    let mut collect = |mut found: Vec<String>| {
        let has_own = own.iter().all(|own| found.contains(own));
        found.retain(|one| !own.contains(one));
        claimed.extend(found);
        has_own
    };
    wait_for(
        "the attacker's own addresses in the neighbour caches",
        || {
            attacker.send(&[
                to_victim(ARP, arp_request(attacker.v4, attacker.mac, victim.v4)),
                to_victim(IPV6, solicitation(attacker.v6, victim.v6, attacker.mac)),
                to_node(ARP, arp_request(attacker.v4, attacker.mac, GATEWAY4)),
                to_node(IPV6, solicitation(attacker.v6, GATEWAY6, attacker.mac)),
            ])?;
            let at_victim = collect(within(victim.network.as_fd(), || neighbours(attacker.mac))?);
            let at_node = collect(neighbours(attacker.mac)?);
            Ok((at_victim && at_node).then_some(()))
        },
    )?;
    Ok(claimed)
}

/// Creates an attacker, a victim whose neighbour cache contains the gateway, and another pod.
fn three_pods(node: &Node) -> Result<[Pod; 3]> {
    let pods = [
        Pod::new(node, "attacker", false)?,
        Pod::new(node, "victim", false)?,
        Pod::new(node, "other", false)?,
    ];
    for gateway in [IpAddr::from(GATEWAY4), GATEWAY6.into()] {
        let gateway = gateway.to_string();
        let ping = ["ping", "-c", "1", "-W", "5", &gateway];
        node.asks(&[&["exec", "-s", &pods[1].container], &ping[..]].concat())?;
    }
    Ok(pods)
}

fn a_pod_can_not_take_the_address_of_another_pod_or_of_the_gateway() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            let [attacker, victim, other] = three_pods(node)?;
            let claimed = claim_addresses(&attacker, &victim, &other)?;
            ensure!(
                claimed.is_empty(),
                "the attacker has taken these addresses: {claimed:?}"
            );
            Ok(())
        })
    })
}

fn without_spoof_protection_a_pod_can_take_the_address_of_the_gateway() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            allow_spoofing(node)?;
            let [attacker, victim, other] = three_pods(node)?;
            let mut claimed = claim_addresses(&attacker, &victim, &other)?;
            claimed.sort();
            claimed.dedup();
            for address in [GATEWAY4.to_string(), GATEWAY6.to_string()] {
                ensure!(
                    claimed.contains(&address),
                    "the attacker has not taken the address {address}, but: {claimed:?}"
                );
            }
            Ok(())
        })
    })
}

fn a_pod_can_not_attract_the_frames_of_another_pod() -> Result {
    in_a_new_network(|| {
        prepare_node()?;
        on_a_node(|node| {
            let attacker = Pod::new(node, "attacker", false)?;
            let victim = Pod::new(node, "victim", false)?;
            // The victim sends a packet, so the bridge learns the victim's port.
            received_by_node(&victim, &[])?;
            let port = || -> Result<String> {
                let mac = victim.mac.map(|byte| format!("{byte:02x}")).join(":");
                let all: Value = command("bridge", ["-json", "fdb", "show", "br", "rrun0"])
                    .ok()?
                    .json()?;
                let mut entries = all.as_array().into_iter().flatten();
                let entry = entries.find(|entry| entry["mac"] == json!(mac));
                let port = entry.map(|entry| entry["ifname"].to_string());
                port.ok_or_else(|| "the bridge has not learned the victim's address".into())
            };
            let before = port()?;
            let frames = [0, 2, 3, 14].map(|group| {
                let group = [0x01, 0x80, 0xc2, 0, 0, group];
                ethernet(group, victim.mac, 0x88cc, &[0; 46])
            });
            let mut forged = attacker.datagram(attacker.v4, "forged");
            forged[6..12].copy_from_slice(&victim.mac);
            // The victim's own packets would correct the bridge's entry. The test therefore checks the
            // entry several times.
            for _ in 0..20 {
                attacker.send(&frames)?;
                attacker.send(std::slice::from_ref(&forged))?;
                received_by_node(&attacker, &[])?;
                let after = port()?;
                ensure!(
                    before == after,
                    "the bridge sends the victim's frames to {after} instead of {before}"
                );
            }
            Ok(())
        })
    })
}

fn the_server_protects_pods_from_an_earlier_version_when_it_starts() -> Result {
    in_a_new_network(|| {
        prepare_node()?;
        on_a_node(|node| {
            let attacker = Pod::new(node, "attacker", false)?;
            let victim = Pod::new(node, "victim", false)?;
            node.terminate_server()?;
            command("nft", ["delete", "table", "bridge", "rrun0"]).ok()?;
            let links = ip("-oneline link show type veth")?;
            let names = links.lines().filter_map(|line| line.split(": ").nth(1));
            for name in names.filter_map(|name| name.split('@').next()) {
                ip(&format!(
                    "link set {name} type bridge_slave group_fwd_mask 0"
                ))?;
            }
            let received = received_by_node(&attacker, &forgeries(&attacker, &victim))?;
            ensure!(
                !received.is_empty(),
                "the protection exists without the table"
            );
            node.start_server()?;
            check_protection(&attacker, &victim)
        })
    })
}

fn a_privileged_pod_can_send_packets_from_all_addresses() -> Result {
    in_a_new_network(|| {
        prepare_node()?;
        on_a_node(|node| {
            let privileged = Pod::new(node, "privileged", true)?;
            let other = Pod::new(node, "other", false)?;
            for _ in 0..2 {
                let frame = privileged.datagram(other.v4, "another address");
                let received = received_by_node(&privileged, &[frame])?;
                ensure!(
                    received == ["another address"],
                    "the node did not receive the packet of the privileged pod"
                );
                check_protection(&other, &privileged)?;
                node.terminate_server()?;
                node.start_server()?;
            }
            Ok(())
        })
    })
}
