//! Router advertisements and redirects. Those of a pod are refused everywhere, and the node's other
//! interfaces accept the same ones as without rrun.

use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};

use crate::support::inside::traffic::advertise;
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::pod_network::addresses;
use crate::{ensure, ensure_eq, test};

const IPV6: Need = Need::File("/proc/sys/net/ipv6/conf/all/accept_ra");

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_pod_that_advertises_itself_becomes_nobodys_router,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        pods_without_ipv6_believe_no_advertisement,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        a_pod_that_sends_redirects_diverts_nobody,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        other_interfaces_believe_the_advertisements_that_they_believed,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        a_node_that_refuses_advertisements_goes_on_refusing_them,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        what_an_earlier_version_let_in_is_closed_at_the_start,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        no_port_of_a_lost_bridge_believes_its_pod,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
];

/// An address that is reached only by the default route.
const ELSEWHERE: &str = "203.0.113.9";

/// Runs a test on a thread whose network namespace is new, so that nothing forwards yet. The
/// programs that the test starts run there, too.
fn in_a_new_network(test: impl FnOnce() -> Result + Send) -> Result {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            ip("link set lo up")?;
            test()
        });
        thread.join().map_err(|_| "the test panicked")?
    })
}

fn ip(arguments: &str) -> Result<String> {
    let output = command("ip", arguments.split(' ')).ok()?;
    Ok(output.text().to_owned())
}

/// A sysctl below net/ of the network that the thread is in.
fn sysctl(name: &str) -> Result<String> {
    let path = format!("/proc/sys/net/{name}");
    let value = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    Ok(value.trim_end().to_owned())
}

fn set(name: &str, value: &str) -> Result {
    let path = format!("/proc/sys/net/{name}");
    fs::write(&path, value).map_err(|error| format!("write {value} to {path}: {error}").into())
}

/// The network beyond the node's uplinks.
struct Beyond(OwnedFd);

impl Beyond {
    fn new() -> Result<Self> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                Ok(Beyond(fs::File::open("/proc/thread-self/ns/net")?.into()))
            });
            thread.join().map_err(|_| "it panicked")?
        })
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(self.0.as_fd(), work)
    }

    /// Makes a link from the node to this network, up at both ends. Sets `sysctls` at the node's
    /// end before that is up.
    fn uplink(&self, name: &str, sysctls: &[(&str, &str)]) -> Result {
        ip(&format!("link add {name} type veth peer name far-{name}"))?;
        let set_up = || {
            for (key, value) in sysctls {
                set(&format!("ipv6/conf/{name}/{key}"), value)?;
            }
            set(&format!("ipv6/conf/{name}/accept_dad"), "0")?;
            ip(&format!("link set {name} up")).map(drop)
        };
        set_up()?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd());
        ip(&format!("link set far-{name} netns {path}"))?;
        self.inside(|| ip(&format!("link set far-{name} up")).map(drop))
    }

    fn advertises(&self, name: &str, prefix: &str) -> Result {
        self.inside(|| Ok(advertise(&format!("far-{name}"), prefix.parse()?)?))
    }
}

fn within<T: Send>(namespace: BorrowedFd, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread.join().map_err(|_| "it panicked")?
    })
}

/// The IPv6 default routes through this interface of the thread's network.
fn default_routes(interface: &str) -> Result<String> {
    let all = ip("-6 route show default")?;
    let by = format!(" dev {interface} ");
    let lines = all.lines().filter(|line| format!("{line} ").contains(&by));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

fn believes(interface: &str, prefix: &str) -> Result<bool> {
    let addresses = ip(&format!("-6 address show dev {interface}"))?;
    let has_address = addresses.contains(prefix.trim_end_matches("::"));
    Ok(has_address && default_routes(interface)?.contains("proto ra"))
}

/// How many router advertisements have come in by this interface of the thread's network.
fn heard(interface: &str) -> Result<u64> {
    let path = format!("/proc/thread-self/net/dev_snmp6/{interface}");
    counter(&path, "Icmp6InRouterAdvertisements")
}

/// The number after `name` in a file of names and numbers; 0 if the name is missing.
fn counter(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let mut words = text.split_whitespace();
    words.find(|word| *word == name);
    Ok(words.next().map_or(Ok(0), str::parse)?)
}

/// Two pods: one that sends what it likes, and its neighbour, which serves at port 5000.
struct Pods {
    attacker: String,
    attackers: IpAddr,
    victims: IpAddr,
    attackers_network: fs::File,
    victims_network: fs::File,
}

impl Pods {
    fn new(node: &Node, sysctls: Value) -> Result<Self> {
        node.pull(BUSYBOX)?;
        let mut made = Vec::new();
        for (name, command) in [
            ("attacker", &["sleep", "600"][..]),
            ("victim", &["/inside", "net", "serve", "5000", "victim"]),
        ] {
            let mut pod = node.pod(name);
            pod["linux"]["sysctls"] = sysctls.clone();
            let pod_id = node.runp(&pod)?;
            let id = node.run(&pod_id, &pod, &node.container(name, command))?;
            let all = addresses(node, &pod_id)?;
            let network = fs::File::open(format!("/proc/{}/ns/net", node.pid(&id)?))?;
            made.push((id, all.first().ok_or("no address")?.parse()?, network));
        }
        let [
            (attacker, attackers, attackers_network),
            (_, victims, victims_network),
        ] = made.try_into().map_err(|_| "there are two pods")?;
        Ok(Pods {
            attacker,
            attackers,
            victims,
            attackers_network,
            victims_network,
        })
    }

    /// Runs a program in the attacker.
    fn attack(&self, node: &Node, program: &[&str]) -> Result {
        node.asks(&[&["exec", "-s", &self.attacker], program].concat())
            .map(drop)
    }

    /// The attacker advertises itself as a router with this prefix. Waits until this interface of
    /// the node has received the advertisement.
    fn advertise(&self, node: &Node, prefix: &str, interface: &str) -> Result {
        let before = heard(interface)?;
        self.attack(node, &["/inside", "net", "advertise", "eth0", prefix])?;
        wait_for(&format!("{interface} to hear the advertisement"), || {
            Ok((heard(interface)? > before).then_some(()))
        })
    }

    /// Runs `work` in the victim's network.
    fn at_victim<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(self.victims_network.as_fd(), work)
    }

    fn nobody_believes(&self, prefix: &str) -> Result {
        for interface in ours()? {
            doubts(&interface, prefix)?;
            refuses(&interface)?;
        }
        self.at_victim(|| {
            wait_for("the other pod to hear the advertisement", || {
                Ok((heard("eth0")? > 0).then_some(()))
            })?;
            doubts("eth0", prefix)?;
            refuses("eth0")?;
            refuses("lo")
        })
    }
}

/// The bridge and the node's ends of the pods' links.
fn ours() -> Result<Vec<String>> {
    let links = ip("-oneline link show")?;
    let names = links.lines().filter_map(|line| line.split(": ").nth(1));
    let names = names.map(|name| name.split('@').next().unwrap_or(name));
    let ours = names.filter(|name| name.starts_with("rr"));
    Ok(ours.map(str::to_owned).collect())
}

fn doubts(interface: &str, prefix: &str) -> Result {
    let routes = default_routes(interface)?;
    ensure!(
        !routes.contains("proto ra"),
        "{interface} believes an advertisement: {routes}"
    );
    let addresses = ip(&format!("-6 address show dev {interface}"))?;
    ensure!(
        !addresses.contains(prefix.trim_end_matches("::")),
        "{interface} has an advertised address: {addresses}"
    );
    Ok(())
}

/// The router beyond an uplink advertises this prefix. The node must believe it if `wanted`.
fn is_believed(beyond: &Beyond, uplink: &str, prefix: &str, wanted: bool) -> Result {
    let before = heard(uplink)?;
    beyond.advertises(uplink, prefix)?;
    wait_for(&format!("{uplink} to hear the router"), || {
        Ok((heard(uplink)? > before).then_some(()))
    })?;
    if !wanted {
        return doubts(uplink, prefix);
    }
    wait_for(&format!("{uplink} to believe the router"), || {
        Ok(believes(uplink, prefix)?.then_some(()))
    })
}

fn refuses(interface: &str) -> Result {
    for file in [
        "ipv6/conf/NAME/accept_ra",
        "ipv6/conf/NAME/accept_redirects",
        "ipv4/conf/NAME/accept_redirects",
    ] {
        let name = file.replace("NAME", interface);
        ensure_eq!(sysctl(&name)?, "0", "{name}");
    }
    Ok(())
}

fn a_pod_that_advertises_itself_becomes_nobodys_router() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            let pods = Pods::new(node, json!({}))?;
            pods.advertise(node, "2001:db8:bad::", "rrun0")?;
            pods.nobody_believes("2001:db8:bad::")?;
            ensure_eq!(ours()?.len(), 3, "the bridge and two ports ({:?})", ours()?);

            // First rrun-cri makes the bridge again, and then somebody else makes one in its place.
            ip("link delete rrun0")?;
            node.asks(&["info"])?;
            pods.advertise(node, "2001:db8:bad:1::", "rrun0")?;
            pods.nobody_believes("2001:db8:bad:1::")?;
            ip("link delete rrun0")?;
            ip("link add rrun0 type bridge")?;
            node.asks(&["info"])?;
            refuses("rrun0")
        })
    })
}

fn pods_without_ipv6_believe_no_advertisement() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            // The node's default for new interfaces must not matter.
            set("ipv6/conf/default/accept_ra", "2")?;
            // With an MTU below 1280 the bridge has no IPv6; with 1400 it gets IPv6.
            for mtu in [1200, 1400] {
                node.terminate_server()?;
                let text = format!("[network]\nrange6 = \"\"\nmtu = {mtu}\n");
                fs::write(node.join("config.d/network.toml"), text)?;
                node.start_server()?;
                node.asks(&["info"])?;
                let has = sysctl("ipv6/conf/rrun0/accept_ra").is_ok();
                ensure_eq!(has, mtu == 1400, "IPv6 of a bridge with an MTU of {mtu}");
            }
            ensure!(ip("link show rrun0")?.contains(",UP"), "the bridge is down");
            let pods = Pods::new(node, json!({}))?;
            pods.advertise(node, "2001:db8:bad::", "rrun0")?;
            pods.nobody_believes("2001:db8:bad::")
        })
    })
}

fn a_pod_that_sends_redirects_diverts_nobody() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            // The kernel follows redirects on a host that does not forward, and accepts them from
            // the moment that this sysctl is written.
            let pods = Pods::new(node, json!({ "net.ipv4.ip_forward": "0" }))?;
            let [attackers, victims] = [pods.attackers, pods.victims].map(|ip| ip.to_string());
            let serving = format!("{victims}:5000");
            wait_for("the victim to serve", || {
                let asked = pods.attack(node, &["/inside", "net", "ask", &serving]);
                Ok(asked.is_ok().then_some(()))
            })?;
            pods.attack(
                node,
                &[
                    "/inside",
                    "net",
                    "redirect",
                    "eth0",
                    &victims,
                    "10.88.0.1",
                    ELSEWHERE,
                    &attackers,
                ],
            )?;
            pods.at_victim(|| {
                wait_for("the victim to hear the redirect", || {
                    let snmp = fs::read_to_string("/proc/thread-self/net/snmp")?;
                    let mut lines = snmp.lines().filter(|line| line.starts_with("Icmp:"));
                    let names = lines.next().unwrap_or_default().split(' ');
                    let values = lines.next().unwrap_or_default().split(' ');
                    let mut all = names.zip(values);
                    let heard = all.find(|(name, _)| *name == "InRedirects");
                    Ok(heard.filter(|(_, value)| *value != "0").map(drop))
                })?;
                let way = ip(&format!("route get {ELSEWHERE}"))?;
                ensure!(
                    way.contains("via 10.88.0.1 "),
                    "the victim follows the pod's redirect: {way}"
                );
                refuses("eth0")?;
                refuses("lo")
            })
        })
    })
}

fn other_interfaces_believe_the_advertisements_that_they_believed() -> Result {
    in_a_new_network(|| {
        let beyond = Beyond::new()?;
        beyond.uplink("forwards", &[("forwarding", "1"), ("accept_ra", "1")])?;
        beyond.uplink("believes", &[("forwarding", "0"), ("accept_ra", "1")])?;
        beyond.uplink("always", &[("forwarding", "1"), ("accept_ra", "2")])?;
        beyond.uplink("refuses", &[("forwarding", "0"), ("accept_ra", "0")])?;
        is_believed(&beyond, "believes", "2001:db8:1::", true)?;
        is_believed(&beyond, "always", "2001:db8:2::", true)?;
        is_believed(&beyond, "forwards", "2001:db8:3::", false)?;
        is_believed(&beyond, "refuses", "2001:db8:4::", false)?;
        on_a_node(|node| {
            node.pull(BUSYBOX)?;
            node.runp(&node.pod("first"))?;
            ensure_eq!(sysctl("ipv6/conf/all/forwarding")?, "1", "forwarding");
            for (uplink, prefix) in [("believes", "2001:db8:1::"), ("always", "2001:db8:2::")] {
                ensure!(believes(uplink, prefix)?, "the route by {uplink} is lost");
            }
            let still = |server: u8| -> Result {
                for (uplink, number, wanted) in [
                    ("believes", 1, true),
                    ("always", 2, true),
                    ("forwards", 3, false),
                    ("refuses", 4, false),
                    // This interface appeared when the node forwarded already.
                    ("late", 5, true),
                ] {
                    let prefix = format!("2001:db8:{server}{number}::");
                    is_believed(&beyond, uplink, &prefix, wanted)?;
                }
                Ok(())
            };
            beyond.uplink("late", &[])?;
            still(1)?;
            for (name, value) in [("all", "1"), ("forwards", "1"), ("refuses", "0")] {
                let name = format!("ipv6/conf/{name}/accept_ra");
                ensure_eq!(sysctl(&name)?, value, "{name}");
            }

            // Another start of the server and another pod change nothing.
            set("ipv6/conf/late/accept_ra", "1")?;
            set("ipv6/conf/always/accept_ra", "0")?;
            node.terminate_server()?;
            node.start_server()?;
            node.runp(&node.pod("second"))?;
            for (name, value) in [("late", "1"), ("always", "0")] {
                let name = format!("ipv6/conf/{name}/accept_ra");
                ensure_eq!(sysctl(&name)?, value, "{name}");
            }

            // A server that has to switch forwarding on again changes nothing, either.
            set("ipv6/conf/all/forwarding", "0")?;
            set("ipv6/conf/refuses/forwarding", "1")?;
            set("ipv6/conf/refuses/accept_ra", "1")?;
            node.asks(&["info"])?;
            ensure_eq!(sysctl("ipv6/conf/all/forwarding")?, "1", "forwarding");
            for (name, value) in [
                ("believes", "2"),
                ("late", "2"),
                ("always", "0"),
                ("refuses", "1"),
            ] {
                let name = format!("ipv6/conf/{name}/accept_ra");
                ensure_eq!(sysctl(&name)?, value, "{name}");
            }
            Ok(())
        })
    })
}

fn a_node_that_refuses_advertisements_goes_on_refusing_them() -> Result {
    for (forwarding, accept) in [("0", "0"), ("1", "1")] {
        in_a_new_network(|| {
            let beyond = Beyond::new()?;
            set("ipv6/conf/default/forwarding", forwarding)?;
            set("ipv6/conf/default/accept_ra", accept)?;
            on_a_node(|node| {
                node.pull(BUSYBOX)?;
                node.runp(&node.pod("first"))?;
                ensure_eq!(sysctl("ipv6/conf/all/forwarding")?, "1", "forwarding");
                beyond.uplink("late", &[])?;
                is_believed(&beyond, "late", "2001:db8:1::", false)?;
                ensure_eq!(
                    sysctl("ipv6/conf/default/accept_ra")?,
                    accept,
                    "the default"
                );
                Ok(())
            })
        })?;
    }
    Ok(())
}

fn what_an_earlier_version_let_in_is_closed_at_the_start() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            let pods = Pods::new(node, json!({}))?;
            node.terminate_server()?;
            let interfaces = ours()?;
            for interface in &interfaces {
                set(&format!("ipv6/conf/{interface}/accept_ra"), "2")?;
                set(&format!("ipv4/conf/{interface}/accept_redirects"), "1")?;
            }
            pods.at_victim(|| {
                for name in [
                    "ipv6/conf/eth0/accept_ra",
                    "ipv4/conf/eth0/accept_redirects",
                ] {
                    set(name, "1")?;
                }
                // A value that somebody chose.
                set("ipv6/conf/lo/accept_ra", "2")
            })?;
            within(pods.attackers_network.as_fd(), || {
                Ok(advertise("eth0", "2001:db8:bad::".parse()?)?)
            })?;
            wait_for("the bridge to believe the pod", || {
                Ok(believes("rrun0", "2001:db8:bad::")?.then_some(()))
            })?;

            node.start_server()?;
            for interface in &interfaces {
                refuses(interface)?;
            }
            doubts("rrun0", "2001:db8:bad::")?;
            let routes = ip("-6 route show dev rrun0")?;
            ensure!(
                !routes.contains("2001:db8:bad"),
                "a route is left: {routes}"
            );
            ensure!(
                routes.contains("fd72:7275:6e30::/64"),
                "the route to the pods is gone: {routes}"
            );
            pods.at_victim(|| {
                refuses("eth0")?;
                ensure_eq!(
                    sysctl("ipv6/conf/lo/accept_ra")?,
                    "2",
                    "what somebody chose"
                );
                Ok(())
            })
        })
    })
}

fn no_port_of_a_lost_bridge_believes_its_pod() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            let pods = Pods::new(node, json!({}))?;
            ip("link delete rrun0")?;
            for (port, prefix) in ours()?.iter().zip(["2001:db8:1::", "2001:db8:2::"]) {
                // One of the two ports is the attacker's.
                pods.attack(node, &["/inside", "net", "advertise", "eth0", prefix])?;
                refuses(port)?;
            }
            let ports = ours()?;
            wait_for("the attacker's port to hear it", || {
                let heard = ports.iter().map(|port| heard(port));
                Ok((heard.sum::<Result<u64>>()? > 0).then_some(()))
            })?;
            ports.iter().try_for_each(|port| doubts(port, "2001:db8:"))
        })
    })
}
