//! Tests of single flows in the embedded network. The tests check the client address that a server
//! sees, and the answers to a client. The tests also move a host port to another pod while a client
//! uses this host port.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::inside::traffic::{Sctp, ask};
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, WEB, on_a_node};
use crate::support::pod_network::{Uplink, addresses, mapped, node_fetches, web};
use crate::{ensure, ensure_eq, test};

macro_rules! tests {
    ($($name:ident $(, $need:expr)*;)*) => {
        &[$(test!($name, A_NODE, Need::RrunCri $(, $need)*)),*]
    };
}

const BRIDGED: &str = "/proc/sys/net/bridge";
const BR_NETFILTER: Need = Need::File(BRIDGED);
const SCTP: Need = Need::Works(
    "SCTP in connection tracking",
    "test -e /proc/sys/net/netfilter/nf_conntrack_sctp_timeout_established",
);

pub(crate) const TESTS: &[Test] = tests![
    pods_connect_to_the_node_with_their_own_addresses;
    a_host_port_is_reachable_on_the_loopback_of_ipv4_and_ipv6;
    host_ports_on_ipv6_loopback_refuse_connections_immediately_if_br_netfilter_filters_ipv6, BR_NETFILTER;
    a_udp_flow_reaches_the_pod_that_has_the_host_port;
    thousands_of_udp_flows_reach_the_pod_that_has_the_host_port;
    another_pod_starts_while_the_server_deletes_the_flows_of_a_host_port, Need::Program("strace");
    the_end_of_a_pod_ends_only_the_flows_to_its_host_ports;
    sctp_traffic_passes_through_a_host_port, SCTP;
    only_traffic_through_a_host_port_has_the_nodes_source_address, BR_NETFILTER;
    pods_can_have_only_an_ipv6_address;
    the_traffic_of_a_pod_is_counted;
    namespaces_are_pinned_in_the_directory_that_plugins_use;
];

/// Starts a pod with the host ports `ports`. A server in the pod listens on TCP and UDP port 5000.
/// The server answers with its name and the client's address. Returns the ids of the pod and the
/// container.
fn serving(node: &Node, name: &str, ports: Value) -> Result<(String, String)> {
    node.pull(BUSYBOX)?;
    let pod = mapped(node, name, ports);
    let pod_id = node.runp(&pod)?;
    let server = node.container(
        &format!("server-{name}"),
        &["/inside", "net", "serve", "5000", name],
    );
    let id = node.run(&pod_id, &pod, &server)?;
    Ok((pod_id, id))
}

/// Repeats a request from a container until an answer arrives, and returns the answer.
fn pod_asks(node: &Node, container: &str, address: SocketAddr) -> Result<String> {
    let address = address.to_string();
    wait_for(&format!("the server at {address} to answer"), || {
        let args = ["exec", "-s", container, "/inside", "net", "ask", &address];
        let output = node.crictl(&args).end()?;
        ensure!(output.code == 0, "{}", output.told());
        Ok(Some(output.text().to_owned()))
    })
}

/// Repeats a request from the node until an answer arrives, and returns the answer.
fn node_asks(address: SocketAddr) -> Result<String> {
    wait_for(&format!("the server at {address} to answer"), || {
        ask(address)
            .map(Some)
            .map_err(|error| error.to_string().into())
    })
}

/// Repeats a packet until the answer begins with `begin`.
fn answers(socket: &UdpSocket, begin: &str) -> Result {
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    wait_for(&format!("a UDP answer that begins with {begin:?}"), || {
        // The test ignores the result of `send`. This result can be an error that an earlier packet
        // caused.
        let _ = socket.send(b"question");
        let mut got = [0; 64];
        let count = socket.recv(&mut got)?;
        let got = String::from_utf8_lossy(got.get(..count).unwrap_or_default()).into_owned();
        ensure!(
            got.starts_with(begin),
            "the answer {got:?} does not begin with {begin:?}"
        );
        Ok(Some(()))
    })
}

fn at(host: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(host.parse::<IpAddr>()?, port))
}

/// A setting of br_netfilter. Dropping the value restores the previous setting.
struct Bridged {
    path: String,
    before: String,
}

impl Bridged {
    fn set(name: &str, value: &str) -> Result<Option<Self>> {
        let path = format!("{BRIDGED}/{name}");
        if !Path::new(&path).exists() {
            return Ok(None);
        }
        let before = fs::read_to_string(&path)?;
        fs::write(&path, value)?;
        Ok(Some(Bridged { path, before }))
    }
}

impl Drop for Bridged {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, self.before.trim_end());
    }
}

fn pods_connect_to_the_node_with_their_own_addresses() -> Result {
    let _uplink = Uplink::new()?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 8099))?;
    std::thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            let _ = write!(stream, "node {}", from.ip().to_canonical());
            if from.ip().is_loopback() {
                return;
            }
        }
    });
    let tested = on_a_node(|node| {
        let (pod_id, id) = serving(node, "caller", json!([]))?;
        let own = addresses(node, &pod_id)?;
        for (host, family) in [
            ("10.88.0.1", 0),
            (Uplink::V4, 0),
            ("fd72:7275:6e30::1", 1),
            (Uplink::V6, 1),
        ] {
            let answer = pod_asks(node, &id, at(host, 8099)?)?;
            ensure_eq!(
                answer,
                format!("node {}", own[family]),
                "the answer of the node's server at {host}"
            );
        }
        for (address, gateway) in own.iter().zip(["10.88.0.1", "fd72:7275:6e30::1"]) {
            let answer = node_asks(at(address, 5000)?)?;
            ensure_eq!(
                answer,
                format!("caller {gateway}"),
                "the answer of the pod's server"
            );
        }
        Ok(())
    });
    // The listener's thread returns after a connection from a loopback address.
    let _ = ask(SocketAddr::from((Ipv6Addr::LOCALHOST, 8099)));
    tested
}

fn a_host_port_is_reachable_on_the_loopback_of_ipv4_and_ipv6() -> Result {
    let _bridged = Bridged::set("bridge-nf-call-ip6tables", "0")?;
    on_a_node(|node| {
        let ports = json!([
            { "host_port": 8090, "container_port": 5000 },
            { "host_port": 8092, "container_port": 5000, "protocol": 1 },
            { "host_port": 8093, "container_port": 5000, "host_ip": "::1" },
        ]);
        serving(node, "mapped", ports)?;
        for (host, port) in [("127.0.0.1", 8090), ("::1", 8090), ("::1", 8093)] {
            let answer = node_asks(at(host, port)?)?;
            ensure!(
                answer.starts_with("mapped "),
                "the answer from {host}, port {port}, should begin with `mapped `, but is {answer:?}"
            );
        }
        for (own, host) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1")] {
            let socket = UdpSocket::bind(own)?;
            socket.connect(at(host, 8092)?)?;
            answers(&socket, "mapped ")?;
        }
        // A server on the node itself still receives connections to its port, because no pod uses
        // that port as a host port.
        let own = TcpListener::bind("[::1]:8098")?;
        let caller = std::net::TcpStream::connect("[::1]:8098")?;
        ensure_eq!(
            own.accept()?.1,
            caller.local_addr()?,
            "the client address that a server on ::1 sees"
        );
        Ok(())
    })
}

fn host_ports_on_ipv6_loopback_refuse_connections_immediately_if_br_netfilter_filters_ipv6()
-> Result {
    let _bridged = Bridged::set("bridge-nf-call-ip6tables", "0")?;
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        let ports = json!([{ "host_port": 8090, "container_port": 5000 }]);
        serving(node, "before", ports)?;
        node_asks(at("::1", 8090)?)?;
        // rrun-cri notices the changed setting of br_netfilter when the next pod with a host port
        // starts.
        let _bridged = Bridged::set("bridge-nf-call-ip6tables", "1")?;
        let ports = json!([{ "host_port": 8091, "container_port": 5000 }]);
        serving(node, "after", ports)?;
        for port in [8090, 8091] {
            node_asks(at("127.0.0.1", port)?)?;
            node_asks(at(Uplink::V6, port)?)?;
            let refused = std::net::TcpStream::connect(at("::1", port)?);
            let kind = refused.map(|_| ()).map_err(|error| error.kind());
            ensure_eq!(
                kind,
                Err(std::io::ErrorKind::ConnectionRefused),
                "the result of an attempt to connect to ::1, port {port}"
            );
        }
        Ok(())
    })
}

fn a_udp_flow_reaches_the_pod_that_has_the_host_port() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        let own = UdpSocket::bind("127.0.0.1:0")?;
        own.connect("127.0.0.1:8092")?;
        let v4 = UdpSocket::bind("0.0.0.0:0")?;
        v4.connect(at(Uplink::V4, 8092)?)?;
        let v6 = UdpSocket::bind("[::]:0")?;
        v6.connect(at(Uplink::V6, 8092)?)?;
        // No pod has the host port yet, but connection tracking already stores these flows.
        for socket in [&own, &v4, &v6] {
            let _ = socket.send(b"too early");
        }
        // The server searches for the flows of a few ports and of many ports in different ways.
        let ports = |count: u16| -> Value {
            let ports = (8092..8092 + count)
                .map(|port| json!({ "host_port": port, "container_port": 5000, "protocol": 1 }));
            ports.collect()
        };
        for (name, count) in [("first", 1), ("second", 20), ("next", 1)] {
            let (pod_id, _) = serving(node, name, ports(count))?;
            for socket in [&own, &v4, &v6] {
                answers(socket, &format!("{name} "))?;
            }
            node.asks(&["stopp", &pod_id])?;
        }
        // The test deletes the rules of the host port while the server is not running.
        let (pod_id, _) = serving(node, "third", ports(20))?;
        answers(&v4, "third ")?;
        node.kill_server()?;
        command("nft", ["flush", "ruleset"]).ok()?;
        node.start_server()?;
        answers(&v4, "third ")?;
        node.asks(&["rmp", "--force", &pod_id])?;
        serving(node, "fourth", ports(1))?;
        answers(&v4, "fourth ")
    })
}

fn thousands_of_udp_flows_reach_the_pod_that_has_the_host_port() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        // With the first pod, connection tracking begins.
        serving(node, "first", json!([]))?;
        let clients = 20_000..24_000;
        let host_port = at(Uplink::V4, 8092)?;
        for port in clients.clone() {
            let socket = UdpSocket::bind((Uplink::V4, port))?;
            let _ = socket.send_to(b"too early", host_port);
        }
        let ports = json!([{ "host_port": 8092, "container_port": 5000, "protocol": 1 }]);
        serving(node, "mapped", ports)?;
        for port in clients.step_by(500).chain([23_999]) {
            let socket = UdpSocket::bind((Uplink::V4, port))?;
            socket.connect(host_port)?;
            answers(&socket, "mapped ")?;
        }
        Ok(())
    })
}

/// The time after which the kernel forgets a flow without an answer. Dropping the value restores
/// the previous time.
struct FlowTimeout(String);

impl FlowTimeout {
    const PATH: &str = "/proc/sys/net/netfilter/nf_conntrack_udp_timeout";

    fn of_ten_minutes() -> Result<Self> {
        let before = fs::read_to_string(Self::PATH)?;
        fs::write(Self::PATH, "600")?;
        Ok(FlowTimeout(before))
    }
}

impl Drop for FlowTimeout {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, self.0.trim_end());
    }
}

fn flow_count() -> Result<usize> {
    let count = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")?;
    Ok(count.trim_end().parse()?)
}

/// Sends a packet from each of the ports `clients` to `host_port`.
fn send_from_each(clients: std::ops::Range<u16>, host_port: SocketAddr) -> Result {
    for port in clients {
        let socket = UdpSocket::bind((Uplink::V4, port))?;
        let _ = socket.send_to(b"question", host_port);
    }
    Ok(())
}

fn another_pod_starts_while_the_server_deletes_the_flows_of_a_host_port() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        // With the first pod, connection tracking begins.
        let (first, _) = serving(node, "first", json!([]))?;
        let _timeout = FlowTimeout::of_ten_minutes()?;
        // Each flow has another destination, so that the kernel cannot delete many with one message.
        let client = UdpSocket::bind("127.0.0.1:20000")?;
        for number in 0..20_000_u16 {
            let [third, fourth] = number.to_be_bytes();
            let _ = client.send_to(b"question", (Ipv4Addr::new(127, 1, third, fourth), 8092));
        }
        let before = flow_count()?;
        ensure!(before >= 20_000, "the kernel tracks only {before} flows");
        // The server deletes the flows with hundreds of calls of sendto(2). The start of another pod
        // needs far fewer of these calls.
        let pid = node.server_pid()?.to_string();
        let delay = "inject=sendto:delay_enter=100000";
        let strace = command("strace", ["-f", "-o", "/dev/null", "-e", delay, "-p", &pid]);
        let mut strace = strace.start()?;
        wait_for("strace to attach to the server", || {
            Ok(strace.stderr().contains("attached").then_some(()))
        })?;
        let ports = json!([{ "host_port": 8092, "container_port": 5000, "protocol": 1 }]);
        let starting = node.start_runp(&mapped(node, "mapped", ports))?;
        wait_for("the server to delete flows", || {
            Ok((flow_count()? < before - 50).then_some(()))
        })?;
        let other = node.runp(&node.pod("other"))?;
        let remaining = flow_count()?;
        strace.signal(Signal::SIGTERM);
        strace.end()?;
        ensure!(
            remaining > 1000,
            "a pod without host ports started only when the flows of another pod's host port were \
             deleted: {remaining} of {before} flows remained"
        );
        let started = starting.end()?;
        ensure!(started.code == 0, "{}", started.told());
        let remaining = flow_count()?;
        ensure!(
            remaining < 1000,
            "the pod started, but {remaining} flows to its host port remain"
        );
        node.asks(&["stopp", &first, &other]).map(drop)
    })
}

fn the_end_of_a_pod_ends_only_the_flows_to_its_host_ports() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        let start = |name: &str, host_port: u16| {
            let ports = json!([{ "host_port": host_port, "container_port": 5000, "protocol": 1 }]);
            serving(node, name, ports)
        };
        let (ends, _) = start("ends", 8092)?;
        start("stays", 8093)?;
        let _timeout = FlowTimeout::of_ten_minutes()?;
        send_from_each(20_000..23_000, at(Uplink::V4, 8092)?)?;
        send_from_each(20_000..22_000, at(Uplink::V4, 8093)?)?;
        send_from_each(20_000..21_000, at(Uplink::V4, 8094)?)?;
        let before = flow_count()?;
        ensure!(before >= 6000, "the kernel tracks only {before} flows");
        node.asks(&["stopp", &ends])?;
        let after = flow_count()?;
        ensure!(
            (3000..4000).contains(&after),
            "after the end of a pod with 3000 flows, {after} of {before} flows remain"
        );
        let socket = UdpSocket::bind((Uplink::V4, 20_000))?;
        socket.connect(at(Uplink::V4, 8093)?)?;
        answers(&socket, "stays ")
    })
}

fn sctp_traffic_passes_through_a_host_port() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let ports = json!([{ "host_port": 8094, "container_port": 7000, "protocol": 2 }]);
        let pod = mapped(node, "mapped", ports);
        let pod_id = node.runp(&pod)?;
        let mut server = node.container("server", &["/inside", "net", "sctp", "7000"]);
        server["linux"]["security_context"]["capabilities"] =
            json!({ "add_capabilities": ["NET_RAW"] });
        node.run(&pod_id, &pod, &server)?;
        wait_for("the pod's SCTP server to be ready", || {
            Ok(node
                .log_of("mapped", "server")?
                .contains("ready")
                .then_some(()))
        })?;
        let socket = Sctp::open().map_err(|error| error.to_string())?;
        for host in [Uplink::V4, "127.0.0.1"] {
            let host: std::net::Ipv4Addr = host.parse()?;
            let answer = socket.begin(host, 40_000, 8094);
            let answer = answer
                .map_err(|error| format!("the SCTP handshake with {host} failed: {error}"))?;
            ensure_eq!(
                (answer.peer, answer.from),
                (host, 8094),
                "the address and port from which the server's answer arrives"
            );
        }
        Ok(())
    })
}

/// An nftables rule like the rules that kube-proxy creates for a Service. The test replaces POD
/// with a pod's address. The port of the Service is also a host port of this pod.
const SERVICE: &str = "table ip service7 { chain prerouting { type nat hook prerouting priority dstnat; \
                       ip daddr 192.0.2.10 tcp dport 8090 dnat to POD:5000; }; }";

fn only_traffic_through_a_host_port_has_the_nodes_source_address() -> Result {
    let _bridged = Bridged::set("bridge-nf-call-iptables", "1")?;
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        let ports = json!([{ "host_port": 8090, "container_port": 5000 }]);
        let (pod_id, own) = serving(node, "mapped", ports)?;
        let (other_id, other) = serving(node, "other", json!([]))?;
        let address = addresses(node, &pod_id)?.swap_remove(0);
        let other_address = addresses(node, &other_id)?.swap_remove(0);
        let rules = SERVICE.replace("POD", &address);
        command("nft", ["-f", "-"]).stdin(rules).ok()?;
        let tested = (|| {
            let answer = pod_asks(node, &other, at("192.0.2.10", 8090)?)?;
            ensure_eq!(
                answer,
                format!("mapped {other_address}"),
                "the client address that the server sees in a connection through a Service"
            );
            for client in [&own, &other] {
                let answer = pod_asks(node, client, at(Uplink::V4, 8090)?)?;
                ensure_eq!(
                    answer,
                    "mapped 10.88.0.1",
                    "the client address that the server sees in a connection through a host port"
                );
            }
            // In a direct connection, the server sees the address of the client's pod.
            let answer = pod_asks(node, &other, at(&address, 5000)?)?;
            ensure_eq!(
                answer,
                format!("mapped {other_address}"),
                "the client address that the server sees in a direct connection"
            );
            Ok(())
        })();
        command("nft", ["delete", "table", "ip", "service7"]).ok()?;
        tested
    })
}

fn pods_can_have_only_an_ipv6_address() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        fs::write(
            node.join("config.d/network.toml"),
            "[network]\nrange = \"\"\nrange6 = \"fd00:77::/64\"\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        node.pull(WEB)?;
        let ports = json!([{ "host_port": 8090, "container_port": 5000 }]);
        let (pod_id, _) = serving(node, "mapped", ports)?;
        ensure_eq!(
            addresses(node, &pod_id)?,
            ["fd00:77::2"],
            "the pod's addresses"
        );
        let (_, other) = serving(node, "other", json!([]))?;
        let answer = pod_asks(node, &other, at("fd00:77::2", 5000)?)?;
        ensure_eq!(
            answer,
            "mapped fd00:77::3",
            "the client address that the server sees in a direct connection"
        );
        let answer = pod_asks(node, &other, at(Uplink::V6, 8090)?)?;
        ensure_eq!(
            answer,
            "mapped fd00:77::1",
            "the client address that the server sees in a connection through a host port"
        );
        node_asks(at("fd00:77::2", 5000)?)?;
        let mut pod = mapped(
            node,
            "refused",
            json!([{ "host_port": 8091, "container_port": 80, "host_ip": "127.0.0.1" }]),
        );
        pod["hostname"] = json!("refused");
        let refused = node.try_runp(&pod)?;
        ensure!(
            refused.code != 0
                && refused
                    .told()
                    .contains("pods have no IPv4 address (network.range)"),
            "runp did not report that pods have no IPv4 address: {}",
            refused.told()
        );
        // busybox's web server also runs in a pod without IPv4.
        let (web_id, _) = web(node, &node.pod("web"))?;
        let address = addresses(node, &web_id)?.swap_remove(0);
        node_fetches(&format!("http://[{address}]:5000/"))
    })
}

fn the_traffic_of_a_pod_is_counted() -> Result {
    on_a_node(|node| {
        let (pod_id, id) = serving(node, "counted", json!([]))?;
        let (other_id, _) = serving(node, "quiet", json!([]))?;
        let bytes = |pod: &str| -> Result<[u64; 2]> {
            let stats = node.json(&["statsp", "--id", pod])?["stats"][0].clone();
            let interface = &stats["linux"]["network"]["defaultInterface"];
            ensure_eq!(
                interface["name"],
                json!("eth0"),
                "the name of the default interface in the pod's statistics {stats}"
            );
            let of = |field: &str| {
                let value = interface[field]["value"].as_str();
                value.and_then(|value| value.parse().ok()).unwrap_or(0)
            };
            Ok([of("rxBytes"), of("txBytes")])
        };
        let before = bytes(&pod_id)?;
        let quiet = bytes(&other_id)?;
        let payload = [
            "ping",
            "-c",
            "3",
            "-i",
            "0.2",
            "-s",
            "1000",
            "-W",
            "5",
            "10.88.0.1",
        ];
        let exec = ["exec", "-s", &id];
        let args: Vec<&str> = exec.iter().chain(&payload).copied().collect();
        node.asks(&args)?;
        let after = bytes(&pod_id)?;
        for (was, is) in before.iter().zip(after) {
            ensure!(
                is >= was + 3000,
                "the pod's byte counter changed from {was} to {is} during 3 pings of 1000 bytes"
            );
        }
        let quiet_now = bytes(&other_id)?;
        for (was, is) in quiet.iter().zip(quiet_now) {
            ensure!(
                is < was + 3000,
                "the quiet pod's byte counter changed from {was} to {is} during the pings"
            );
        }
        Ok(())
    })
}

fn namespaces_are_pinned_in_the_directory_that_plugins_use() -> Result {
    on_a_node(|node| {
        fs::write(
            node.join("config.d/netns.toml"),
            "netns_dir = \"/run/netns\"\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        let foreign = Path::new("/run/netns/rrun-foreign");
        fs::write(foreign, "")?;
        let (pod_id, _) = serving(node, "seen", json!([]))?;
        let shown = node.json(&["inspectp", &pod_id])?;
        let path = shown
            .pointer("/info/networkNamespace")
            .and_then(Value::as_str);
        let path = path
            .ok_or(format!("the field info.networkNamespace is missing in the output of `crictl inspectp`: {shown}"))?
            .to_owned();
        let name = path.strip_prefix("/run/netns/");
        let name = name.ok_or(format!(
            "the pod's network namespace is not pinned in /run/netns, but at {path}"
        ))?;
        ensure!(
            name.ends_with(&pod_id),
            "the name of the pod's network namespace does not end with the pod's id: {name}"
        );
        let seen = command("ip", ["netns", "exec", name, "ip", "address"]).ok()?;
        let address = addresses(node, &pod_id)?.swap_remove(0);
        ensure!(
            seen.stdout.contains(&address),
            "the pod's address {address} is missing in the pod's network namespace; the output of `ip address`: {}",
            seen.stdout
        );
        // The server removes the pinned namespace of a pod that no longer exists, but not the files
        // of other programs.
        node.kill_server()?;
        let left = path.replace(&pod_id, "left");
        fs::write(&left, "")?;
        node.start_server()?;
        ensure!(
            Path::new(&path).exists(),
            "the pod's network namespace was removed"
        );
        ensure!(
            !Path::new(&left).exists(),
            "the server did not remove {left}, the namespace file of a pod that does not exist"
        );
        ensure!(
            foreign.exists(),
            "the server removed a file that is not its own"
        );
        node.asks(&["rmp", "--all", "--force"])?;
        ensure!(
            !Path::new(&path).exists(),
            "the file {path} of the pod's network namespace still exists after the pod's removal"
        );
        Ok(fs::remove_file(foreign)?)
    })
}
