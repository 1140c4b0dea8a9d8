//! The embedded network flow by flow: who is seen to call, where answers come back, and what becomes
//! of a flow when its port moves on.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::time::Duration;

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
    pods_call_the_node_by_their_own_addresses;
    a_host_port_is_at_the_loopback_of_both_families;
    where_ipv6_is_bridged_through_netfilter_a_call_of_the_loopback_is_refused_at_once, BR_NETFILTER;
    a_udp_flow_follows_its_host_port_from_pod_to_pod;
    sctp_passes_by_a_host_port, SCTP;
    only_what_a_host_port_led_to_a_pod_takes_the_nodes_address, BR_NETFILTER;
    pods_can_have_ipv6_only;
    a_pods_interface_is_counted;
    namespaces_are_pinned_where_plugins_look;
];

/// A pod with these host ports and a server in it, at port 5000 of TCP and UDP, that answers its
/// name and who calls: the pod and the container.
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

/// What the container is answered that asks there; as soon as it is.
fn pod_asks(node: &Node, container: &str, address: SocketAddr) -> Result<String> {
    let address = address.to_string();
    wait_for(&format!("{address} to answer"), || {
        let args = ["exec", "-s", container, "/inside", "net", "ask", &address];
        let output = node.crictl(&args).end()?;
        ensure!(output.code == 0, "{}", output.told());
        Ok(Some(output.text().to_owned()))
    })
}

fn node_asks(address: SocketAddr) -> Result<String> {
    wait_for(&format!("{address} to answer"), || {
        ask(address)
            .map(Some)
            .map_err(|error| error.to_string().into())
    })
}

/// Sends from this socket until there is this answer to it.
fn answers(socket: &UdpSocket, begin: &str) -> Result {
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    wait_for(&format!("{begin:?} by UDP"), || {
        // A refusal is told by the next call.
        let _ = socket.send(b"question");
        let mut got = [0; 64];
        let count = socket.recv(&mut got)?;
        let got = String::from_utf8_lossy(got.get(..count).unwrap_or_default()).into_owned();
        ensure!(got.starts_with(begin), "answered {got:?}");
        Ok(Some(()))
    })
}

fn at(host: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(host.parse::<IpAddr>()?, port))
}

/// A setting of br_netfilter, until the end of the test.
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

fn pods_call_the_node_by_their_own_addresses() -> Result {
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
        for (host, of) in [
            ("10.88.0.1", 0),
            (Uplink::V4, 0),
            ("fd72:7275:6e30::1", 1),
            (Uplink::V6, 1),
        ] {
            let answer = pod_asks(node, &id, at(host, 8099)?)?;
            ensure_eq!(answer, format!("node {}", own[of]), "the answer of {host}");
        }
        for (address, gateway) in own.iter().zip(["10.88.0.1", "fd72:7275:6e30::1"]) {
            let answer = node_asks(at(address, 5000)?)?;
            ensure_eq!(answer, format!("caller {gateway}"), "the answer of the pod");
        }
        Ok(())
    });
    // Lets the listener go.
    let _ = ask(SocketAddr::from((Ipv6Addr::LOCALHOST, 8099)));
    tested
}

fn a_host_port_is_at_the_loopback_of_both_families() -> Result {
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
            ensure!(answer.starts_with("mapped "), "{host} answers {answer:?}");
        }
        for (own, host) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1")] {
            let socket = UdpSocket::bind(own)?;
            socket.connect(at(host, 8092)?)?;
            answers(&socket, "mapped ")?;
        }
        // What is no host port is whose it was.
        let own = TcpListener::bind("[::1]:8098")?;
        let caller = std::net::TcpStream::connect("[::1]:8098")?;
        ensure_eq!(
            own.accept()?.1,
            caller.local_addr()?,
            "who calls a server at ::1"
        );
        Ok(())
    })
}

fn where_ipv6_is_bridged_through_netfilter_a_call_of_the_loopback_is_refused_at_once() -> Result {
    let _bridged = Bridged::set("bridge-nf-call-ip6tables", "0")?;
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        let ports = json!([{ "host_port": 8090, "container_port": 5000 }]);
        serving(node, "before", ports)?;
        node_asks(at("::1", 8090)?)?;
        // From the next pod with a host port on.
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
                "a call of ::1, port {port}"
            );
        }
        Ok(())
    })
}

fn a_udp_flow_follows_its_host_port_from_pod_to_pod() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        let own = UdpSocket::bind("127.0.0.1:0")?;
        own.connect("127.0.0.1:8092")?;
        let v4 = UdpSocket::bind("0.0.0.0:0")?;
        v4.connect(at(Uplink::V4, 8092)?)?;
        let v6 = UdpSocket::bind("[::]:0")?;
        v6.connect(at(Uplink::V6, 8092)?)?;
        // Nobody is there yet: that is remembered too.
        for socket in [&own, &v4, &v6] {
            let _ = socket.send(b"too early");
        }
        let ports = || json!([{ "host_port": 8092, "container_port": 5000, "protocol": 1 }]);
        for name in ["first", "second"] {
            let (pod_id, _) = serving(node, name, ports())?;
            for socket in [&own, &v4, &v6] {
                answers(socket, &format!("{name} "))?;
            }
            node.asks(&["stopp", &pod_id])?;
        }
        // The server is dead while the port moves.
        let (pod_id, _) = serving(node, "third", ports())?;
        answers(&v4, "third ")?;
        node.kill_server()?;
        command("nft", ["flush", "ruleset"]).ok()?;
        node.start_server()?;
        answers(&v4, "third ")?;
        node.asks(&["rmp", "--force", &pod_id])?;
        serving(node, "fourth", ports())?;
        answers(&v4, "fourth ")
    })
}

fn sctp_passes_by_a_host_port() -> Result {
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
        wait_for("the server to be ready", || {
            Ok(node
                .log_of("mapped", "server")?
                .contains("ready")
                .then_some(()))
        })?;
        let socket = Sctp::open().map_err(|error| error.to_string())?;
        for host in [Uplink::V4, "127.0.0.1"] {
            let host: std::net::Ipv4Addr = host.parse()?;
            let answer = socket.begin(host, 40_000, 8094);
            let answer = answer.map_err(|error| format!("{host}: {error}"))?;
            ensure_eq!((answer.peer, answer.from), (host, 8094), "who answers");
        }
        Ok(())
    })
}

/// As kube-proxy has it: a Service whose port is also a host port.
const SERVICE: &str = "table ip service7 { chain prerouting { type nat hook prerouting priority dstnat; \
                       ip daddr 192.0.2.10 tcp dport 8090 dnat to POD:5000; }; }";

fn only_what_a_host_port_led_to_a_pod_takes_the_nodes_address() -> Result {
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
                "who calls by a Service"
            );
            for client in [&own, &other] {
                let answer = pod_asks(node, client, at(Uplink::V4, 8090)?)?;
                ensure_eq!(answer, "mapped 10.88.0.1", "who calls by a host port");
            }
            // Straight, nothing is translated.
            let answer = pod_asks(node, &other, at(&address, 5000)?)?;
            ensure_eq!(answer, format!("mapped {other_address}"), "who calls a pod");
            Ok(())
        })();
        command("nft", ["delete", "table", "ip", "service7"]).ok()?;
        tested
    })
}

fn pods_can_have_ipv6_only() -> Result {
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
        ensure_eq!(addresses(node, &pod_id)?, ["fd00:77::2"], "its addresses");
        let (_, other) = serving(node, "other", json!([]))?;
        let answer = pod_asks(node, &other, at("fd00:77::2", 5000)?)?;
        ensure_eq!(answer, "mapped fd00:77::3", "who calls a pod");
        let answer = pod_asks(node, &other, at(Uplink::V6, 8090)?)?;
        ensure_eq!(answer, "mapped fd00:77::1", "who calls by a host port");
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
            "the answer: {}",
            refused.told()
        );
        // A server of IPv4's tools beside it.
        let (web_id, _) = web(node, &node.pod("web"))?;
        let address = addresses(node, &web_id)?.swap_remove(0);
        node_fetches(&format!("http://[{address}]:5000/"))
    })
}

fn a_pods_interface_is_counted() -> Result {
    on_a_node(|node| {
        let (pod_id, id) = serving(node, "counted", json!([]))?;
        let (other_id, _) = serving(node, "quiet", json!([]))?;
        let bytes = |pod: &str| -> Result<[u64; 2]> {
            let stats = node.json(&["statsp", "--id", pod])?["stats"][0].clone();
            let interface = &stats["linux"]["network"]["defaultInterface"];
            ensure_eq!(interface["name"], json!("eth0"), "the interface in {stats}");
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
                "{was} bytes before 3 pings of 1000, {is} after"
            );
        }
        let quiet_now = bytes(&other_id)?;
        for (was, is) in quiet.iter().zip(quiet_now) {
            ensure!(
                is < was + 3000,
                "{was} bytes of a quiet pod before, {is} after"
            );
        }
        Ok(())
    })
}

fn namespaces_are_pinned_where_plugins_look() -> Result {
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
            .ok_or(format!("no networkNamespace in {shown}"))?
            .to_owned();
        let name = path.strip_prefix("/run/netns/");
        let name = name.ok_or(format!("it is at {path}"))?;
        ensure!(name.ends_with(&pod_id), "the name is {name}");
        let seen = command("ip", ["netns", "exec", name, "ip", "address"]).ok()?;
        let address = addresses(node, &pod_id)?.swap_remove(0);
        ensure!(
            seen.stdout.contains(&address),
            "no {address} in {}",
            seen.stdout
        );
        // One that a dead server left is taken away, what is others' is not.
        node.kill_server()?;
        let left = path.replace(&pod_id, "left");
        fs::write(&left, "")?;
        node.start_server()?;
        ensure!(Path::new(&path).exists(), "the pod's namespace is gone");
        ensure!(!Path::new(&left).exists(), "{left} is there");
        ensure!(foreign.exists(), "what was not the server's is gone");
        node.asks(&["rmp", "--all", "--force"])?;
        ensure!(!Path::new(&path).exists(), "{path} is there");
        Ok(fs::remove_file(foreign)?)
    })
}
