//! Tests of the limits between pods, the node and other machines in the embedded network: the node's
//! loopback, host ports at 127.0.0.1, routes of other machines to pods, and nftables rules that
//! another program deletes.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::frames::{IPV4, Mac, ethernet, mac_of_pod, udp};
use crate::support::inside::traffic::send_frame;
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::network_view::{in_a_new_network, ip, new_network, set, sysctl, within};
use crate::support::node::{A_NODE, BUSYBOX, Node, WEB, on_a_node};
use crate::support::pod_network::{
    Uplink, addresses, configure, mapped, node_fetches, pod_fetches, web,
};
use crate::{ensure, ensure_eq, test};

macro_rules! tests {
    ($($name:ident;)*) => {
        &[$(test!($name, A_NODE, Need::RrunCri)),*]
    };
}

pub(crate) const TESTS: &[Test] = tests![
    the_server_restores_deleted_nftables_rules_without_a_request;
    the_server_gives_way_to_a_program_that_deletes_the_rules_again_and_again;
    the_node_has_thousands_of_host_ports;
    a_pod_never_reaches_the_loopback_of_the_node;
    the_bridge_routes_loopback_addresses_only_for_host_ports;
    a_host_port_at_127_0_0_1_is_not_reachable_from_other_machines;
    other_machines_reach_pods_only_through_host_ports;
    other_machines_reach_pods_directly_if_the_configuration_allows_it;
];

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
const PORT: u16 = 9999;

fn nft(arguments: &[&str]) -> Result<String> {
    Ok(command("nft", arguments).ok()?.text().to_owned())
}

fn the_server_restores_deleted_nftables_rules_without_a_request() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        node.pull(WEB)?;
        let ports = json!([{ "host_port": 8090, "container_port": 5000 }]);
        let (_, client) = web(node, &mapped(node, "mapped", ports))?;
        let url = "http://127.0.0.1:8090/";
        node_fetches(url)?;
        let before = nft(&["list", "ruleset"])?;
        for deletion in [
            &["flush", "ruleset"][..],
            &["delete", "table", "inet", "rrun0"],
            &["flush", "table", "inet", "rrun0"],
            &["flush", "chain", "inet", "rrun0", "guard"],
            &["flush", "map", "inet", "rrun0", "host_ports4"],
        ] {
            nft(deletion)?;
            wait_for("the deleted rules", || {
                Ok((nft(&["list", "ruleset"])? == before).then_some(()))
            })?;
            node_fetches(url)?;
        }
        pod_fetches(node, &client, &format!("http://{}:8090/", Uplink::V4))?;
        let log = node.log();
        ensure!(
            log.contains("\"nft\"") && log.contains("the server has restored them"),
            "the log does not name the program that deleted the rules: {log}"
        );
        Ok(())
    })
}

fn the_server_gives_way_to_a_program_that_deletes_the_rules_again_and_again() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            node.pull(BUSYBOX)?;
            node.runp(&node.pod("first"))?;
            // The server restores the rules several times within the first second, and then waits.
            wait_for("the server to wait before it restores the rules", || {
                nft(&["flush", "ruleset"])?;
                Ok(node.log().contains("again and again").then_some(()))
            })?;
            let restored = node.log().matches("has restored them").count();
            ensure!(
                restored <= 10,
                "the server has restored the rules {restored} times within a few seconds"
            );
            // Requests restore the rules immediately.
            node.runp(&node.pod("second"))?;
            nft(&["list", "table", "inet", "rrun0"]).map(drop)
        })
    })
}

/// Returns `count` port mappings, beginning with the host port `first`.
fn many_ports(first: u16, count: u16) -> Value {
    let ports = (first..first + count)
        .map(|port| json!({ "host_port": port, "container_port": 5000, "protocol": port % 2 }));
    ports.collect()
}

fn the_node_has_thousands_of_host_ports() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            node.pull(WEB)?;
            let (first, _) = web(node, &mapped(node, "first", many_ports(10_000, 4000)))?;
            web(node, &mapped(node, "second", many_ports(20_000, 20_000)))?;
            for port in [10_000, 13_998, 20_000, 39_998] {
                node_fetches(&format!("http://127.0.0.1:{port}/"))?;
            }
            node.terminate_server()?;
            nft(&["flush", "ruleset"])?;
            node.start_server()?;
            node_fetches("http://127.0.0.1:39998/")?;
            nft(&["flush", "ruleset"])?;
            node_fetches("http://127.0.0.1:39998/")?;
            node.runp(&node.pod("third"))?;
            // The removal of a pod closes all of its host ports.
            node.asks(&["rmp", "--force", &first])?;
            let map = nft(&["list", "map", "inet", "rrun0", "host_ports4"])?;
            ensure_eq!(map.matches(" : ").count(), 20_001, "the number of entries");
            node.runp(&mapped(node, "fourth", many_ports(10_000, 4000)))?;
            Ok(())
        })
    })
}

/// A pod that prints the UDP datagrams that arrive at its port 5000.
struct Listener {
    name: String,
    container: String,
    addresses: [IpAddr; 2],
}

impl Listener {
    fn new(node: &Node, name: &str, ports: Value) -> Result<Self> {
        node.pull(BUSYBOX)?;
        let pod = mapped(node, name, ports);
        let pod_id = node.runp(&pod)?;
        let main = node.container(name, &["/inside", "net", "hear", "5000"]);
        let container = node.run(&pod_id, &pod, &main)?;
        let listener = Listener {
            name: name.to_owned(),
            container,
            addresses: addresses(node, &pod_id)?
                .iter()
                .map(|address| address.parse())
                .collect::<std::result::Result<Vec<IpAddr>, _>>()?
                .try_into()
                .map_err(|_| "the pod does not have two addresses")?,
        };
        wait_for("the pod to listen", || {
            Ok(listener.has(node, "ready")?.then_some(()))
        })?;
        Ok(listener)
    }

    /// Returns whether the pod has received a datagram that contains `text`.
    fn has(&self, node: &Node, text: &str) -> Result<bool> {
        Ok(node.log_of(&self.name, &self.name)?.contains(text))
    }
}

/// Another machine in the node's network.
struct Lan(OwnedFd);

impl Lan {
    const NODE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
    const OWN4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);
    const NODE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);

    /// Creates the machine, and connects it to the node through the node's interface `uplink0`.
    fn new() -> Result<Self> {
        let lan = Lan(new_network()?);
        ip("link add uplink0 type veth peer name far0")?;
        ip("address add 192.0.2.2/24 dev uplink0")?;
        ip("address add 2001:db8::2/64 dev uplink0 nodad")?;
        ip("link set uplink0 up")?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), lan.0.as_raw_fd());
        ip(&format!("link set far0 netns {path}"))?;
        lan.inside(|| {
            ip("address add 192.0.2.77/24 dev far0")?;
            ip("address add 2001:db8::77/64 dev far0 nodad")?;
            ip("link set far0 up")?;
            ip("route add 10.0.0.0/8 via 192.0.2.2")?;
            ip("route add fd00::/8 via 2001:db8::2").map(drop)
        })?;
        Ok(lan)
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(self.0.as_fd(), work)
    }

    /// Sends a UDP datagram.
    fn send(&self, to: impl Into<IpAddr>, port: u16, content: &str) -> Result {
        let to = SocketAddr::new(to.into(), port);
        self.inside(|| {
            let socket = match to {
                SocketAddr::V4(_) => UdpSocket::bind("0.0.0.0:0")?,
                SocketAddr::V6(_) => UdpSocket::bind("[::]:0")?,
            };
            socket.send_to(content.as_bytes(), to)?;
            Ok(())
        })
    }
}

/// Returns the hardware address of an interface in the calling thread's network namespace.
fn hardware_address(interface: &str) -> Result<Mac> {
    let links: Value = command("ip", ["-json", "link", "show", interface])
        .ok()?
        .json()?;
    let text = links[0]["address"].as_str().unwrap_or_default();
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16));
    let bytes: Vec<u8> = bytes.collect::<std::result::Result<_, _>>()?;
    bytes
        .try_into()
        .map_err(|_| format!("{text} is not a hardware address").into())
}

fn a_pod_never_reaches_the_loopback_of_the_node() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            let ports = json!([{ "host_port": 8090, "container_port": 5000, "protocol": 1 }]);
            let pod = Listener::new(node, "attacker", ports)?;
            let [IpAddr::V4(own), _] = pod.addresses else {
                return Err("the pod has no IPv4 address".into());
            };
            let network = File::open(format!("/proc/{}/ns/net", node.pid(&pod.container)?))?;
            // Another program can route loopback addresses on all interfaces.
            set("ipv4/conf/all/route_localnet", "1")?;
            let check = |when: &str| {
                let secret = UdpSocket::bind((Ipv4Addr::LOCALHOST, PORT))?;
                let public = UdpSocket::bind((GATEWAY, PORT))?;
                for socket in [&secret, &public] {
                    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
                }
                let send = |to: Ipv4Addr| {
                    let packet = udp((own, PORT).into(), (to, PORT).into(), "from the pod");
                    let frame = ethernet(mac_of_pod(GATEWAY), mac_of_pod(own), IPV4, &packet);
                    within(network.as_fd(), || Ok(send_frame("eth0", &frame)?))
                };
                send(Ipv4Addr::LOCALHOST)?;
                wait_for("the node to receive the pod's packet", || {
                    send(GATEWAY)?;
                    Ok(public.recv(&mut [0; 64]).ok())
                })?;
                ensure!(
                    secret.recv(&mut [0; 64]).is_err(),
                    "the pod has reached 127.0.0.1 of the node {when}"
                );
                Ok(())
            };
            check("with the rules")?;
            node.kill_server()?;
            nft(&["flush", "ruleset"])?;
            check("without the rules")?;
            node.start_server()?;
            check("after the start of the server")
        })
    })
}

fn the_bridge_routes_loopback_addresses_only_for_host_ports() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            node.pull(BUSYBOX)?;
            let setting = || sysctl("ipv4/conf/rrun0/route_localnet");
            let ports = |host_ip: &str, port: u16| json!([{ "host_port": port, "container_port": 80, "host_ip": host_ip }]);
            node.runp(&node.pod("none"))?;
            ensure_eq!(setting()?, "0", "route_localnet without host ports");
            node.runp(&mapped(node, "other", ports("192.0.2.1", 8090)))?;
            ensure_eq!(setting()?, "0", "route_localnet with another address");
            let one = node.runp(&mapped(node, "one", ports("127.0.0.1", 8090)))?;
            ensure_eq!(setting()?, "1", "route_localnet with a host port");
            let two = node.runp(&mapped(node, "two", ports("", 8091)))?;
            node.asks(&["stopp", &one])?;
            ensure_eq!(setting()?, "1", "route_localnet with one of two host ports");
            node.asks(&["stopp", &two])?;
            ensure_eq!(setting()?, "0", "route_localnet after the last host port");
            let three = node.runp(&mapped(node, "three", ports("", 8091)))?;
            node.kill_server()?;
            node.start_server()?;
            ensure_eq!(setting()?, "1", "route_localnet after a restart");
            node.asks(&["rmp", "--force", &three])?;
            ensure_eq!(setting()?, "0", "route_localnet after the last pod");
            Ok(())
        })
    })
}

fn a_host_port_at_127_0_0_1_is_not_reachable_from_other_machines() -> Result {
    in_a_new_network(|| {
        let lan = Lan::new()?;
        on_a_node(|node| {
            let ports = json!([
                { "host_port": 8090, "container_port": 5000, "protocol": 1, "host_ip": "127.0.0.1" },
                { "host_port": 8091, "container_port": 5000, "protocol": 1 },
            ]);
            let pod = Listener::new(node, "local", ports)?;
            // kube-proxy can route loopback addresses on all interfaces.
            for all in ["0", "1"] {
                set("ipv4/conf/all/route_localnet", all)?;
                let to = hardware_address("uplink0")?;
                lan.inside(|| {
                    let from = hardware_address("far0")?;
                    for (address, port) in [
                        (Ipv4Addr::LOCALHOST, 8090),
                        (Ipv4Addr::LOCALHOST, 8091),
                        (Ipv4Addr::new(127, 1, 2, 3), 8091),
                    ] {
                        let sender = SocketAddr::from((Lan::OWN4, PORT));
                        let packet = udp(sender, (address, port).into(), "forbidden");
                        send_frame("far0", &ethernet(to, from, IPV4, &packet))?;
                    }
                    Ok(())
                })?;
                let allowed = format!("allowed {all}");
                wait_for("a packet through the host port at every address", || {
                    lan.send(Lan::NODE4, 8091, &allowed)?;
                    Ok(pod.has(node, &allowed)?.then_some(()))
                })?;
                ensure!(
                    !pod.has(node, "forbidden")?,
                    "another machine has reached a host port at 127.0.0.1 (route_localnet {all})"
                );
            }
            // A process of the node reaches the host port.
            wait_for("a packet from the node", || {
                UdpSocket::bind("127.0.0.1:0")?.send_to(b"local", "127.0.0.1:8090")?;
                Ok(pod.has(node, "local")?.then_some(()))
            })
        })
    })
}

/// Sends datagrams from another machine to the pod's addresses, and then to its host port. Returns
/// whether the pod has received the datagrams to its IPv4 address and to its IPv6 address.
fn reached_directly(node: &Node, lan: &Lan, pod: &Listener) -> Result<[bool; 2]> {
    for (address, content) in pod.addresses.iter().zip(["direct 4", "direct 6"]) {
        for _ in 0..3 {
            lan.send(*address, 5000, content)?;
        }
    }
    for (address, content) in [
        (IpAddr::from(Lan::NODE4), "mapped 4"),
        (Lan::NODE6.into(), "mapped 6"),
    ] {
        wait_for("a packet through the host port", || {
            lan.send(address, 8090, content)?;
            Ok(pod.has(node, content)?.then_some(()))
        })?;
    }
    Ok([pod.has(node, "direct 4")?, pod.has(node, "direct 6")?])
}

fn udp_port() -> Value {
    json!([{ "host_port": 8090, "container_port": 5000, "protocol": 1 }])
}

fn other_machines_reach_pods_only_through_host_ports() -> Result {
    in_a_new_network(|| {
        let lan = Lan::new()?;
        on_a_node(|node| {
            let pod = Listener::new(node, "hidden", udp_port())?;
            ensure_eq!(
                reached_directly(node, &lan, &pod)?,
                [false, false],
                "whether another machine reaches the pod directly"
            );
            // The pod reaches the other machine, and receives the replies.
            for address in ["192.0.2.77", "2001:db8::77"] {
                let ping = ["ping", "-c", "1", "-W", "5", address];
                node.asks(&[&["exec", "-s", &pod.container], &ping[..]].concat())?;
            }
            // The node reaches the pod, and its own address in the pod range.
            for address in [&pod.addresses[0].to_string(), "10.88.0.1"] {
                command("ping", ["-c", "1", "-W", "5", address]).ok()?;
            }
            Ok(())
        })
    })
}

fn other_machines_reach_pods_directly_if_the_configuration_allows_it() -> Result {
    for (text, expected) in [
        ("allow_direct_routing = true", [true, true]),
        ("masquerade = false", [true, true]),
        ("range = \"10.77.0.0/16\"", [true, false]),
        (
            "range = \"10.77.0.0/16\"\nallow_direct_routing = false",
            [false, false],
        ),
    ] {
        in_a_new_network(|| {
            let lan = Lan::new()?;
            on_a_node(|node| {
                configure(node, &format!("{text}\n"))?;
                let pod = Listener::new(node, "routed", udp_port())?;
                ensure_eq!(
                    reached_directly(node, &lan, &pod)?,
                    expected,
                    "whether another machine reaches the pod directly with {text:?}"
                );
                Ok(())
            })
        })?;
    }
    Ok(())
}
