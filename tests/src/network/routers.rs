//! Tests of router advertisements and ICMP redirects. The node and all pods must ignore
//! advertisements and redirects that a pod sends. The node's other interfaces must accept the same
//! advertisements as without rrun.

use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use serde_json::{Value, json};

use crate::support::inside::traffic::advertise;
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::network_view::{in_a_new_network, ip, new_network, set, sysctl, within};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::pod_network::{addresses, allow_spoofing};
use crate::{ensure, ensure_eq, test};

const IPV6: Need = Need::File("/proc/sys/net/ipv6/conf/all/accept_ra");

pub(crate) const TESTS: &[Test] = &[
    test!(
        advertisements_of_a_pod_are_ignored_by_the_node_and_other_pods,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        advertisements_are_ignored_if_pods_have_no_ipv6,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        redirects_of_a_pod_are_ignored_by_other_pods,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        other_interfaces_accept_the_same_advertisements_as_without_rrun,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        a_node_that_ignores_advertisements_continues_to_ignore_them,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        the_server_corrects_sysctls_and_routes_from_an_earlier_version_when_it_starts,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
    test!(
        ports_of_a_deleted_bridge_ignore_advertisements,
        A_NODE,
        IPV6,
        Need::RrunCri
    ),
];

/// An address for which the pods have no route except the default route.
const ELSEWHERE: &str = "203.0.113.9";

/// The network at the other end of the node's uplinks.
struct Beyond(OwnedFd);

impl Beyond {
    fn new() -> Result<Self> {
        new_network().map(Beyond)
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(self.0.as_fd(), work)
    }

    /// Creates a veth pair between the node and this network. Sets `sysctls` for the node's
    /// interface, and then sets both interfaces up.
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

/// Returns the IPv6 default routes through an interface of the calling thread's network namespace.
fn default_routes(interface: &str) -> Result<String> {
    let all = ip("-6 route show default")?;
    let by = format!(" dev {interface} ");
    let lines = all.lines().filter(|line| format!("{line} ").contains(&by));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Returns whether the interface has an address and a default route from an advertisement of
/// `prefix`.
fn has_accepted(interface: &str, prefix: &str) -> Result<bool> {
    let addresses = ip(&format!("-6 address show dev {interface}"))?;
    let has_address = addresses.contains(prefix.trim_end_matches("::"));
    Ok(has_address && default_routes(interface)?.contains("proto ra"))
}

/// Returns the number of router advertisements that an interface has received.
fn received(interface: &str) -> Result<u64> {
    let path = format!("/proc/thread-self/net/dev_snmp6/{interface}");
    counter(&path, "Icmp6InRouterAdvertisements")
}

/// Returns the number after `name` in a file of names and numbers. Returns 0 if `name` is missing.
fn counter(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))?;
    let mut words = text.split_whitespace();
    words.find(|word| *word == name);
    Ok(words.next().map_or(Ok(0), str::parse)?)
}

/// Two pods. The attacker sends forged packets. The victim runs a server on port 5000.
struct Pods {
    attacker: String,
    attackers_address: IpAddr,
    victims_address: IpAddr,
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
            made.push((
                id,
                all.first().ok_or("the pod has no address")?.parse()?,
                network,
            ));
        }
        let [
            (attacker, attackers_address, attackers_network),
            (_, victims_address, victims_network),
        ] = made
            .try_into()
            .map_err(|_| "the number of pods is not two")?;
        Ok(Pods {
            attacker,
            attackers_address,
            victims_address,
            attackers_network,
            victims_network,
        })
    }

    /// Runs a program in the attacker's container.
    fn attack(&self, node: &Node, program: &[&str]) -> Result {
        node.asks(&[&["exec", "-s", &self.attacker], program].concat())
            .map(drop)
    }

    /// Makes the attacker advertise itself as a router for the address prefix `prefix`. Waits until
    /// `interface`, an interface of the node, has received the advertisement.
    fn advertise(&self, node: &Node, prefix: &str, interface: &str) -> Result {
        let before = received(interface)?;
        self.attack(node, &["/inside", "net", "advertise", "eth0", prefix])?;
        wait_for(
            &format!("the interface {interface} to receive the advertisement"),
            || Ok((received(interface)? > before).then_some(())),
        )
    }

    /// Runs `work` in the victim's network namespace.
    fn at_victim<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(self.victims_network.as_fd(), work)
    }

    /// Checks that neither the node nor the victim has accepted an advertisement of `prefix`.
    fn check_all_ignore(&self, prefix: &str) -> Result {
        for interface in rruns_interfaces()? {
            check_ignores(&interface, prefix)?;
            check_sysctls(&interface)?;
        }
        self.at_victim(|| {
            wait_for("the other pod to receive the advertisement", || {
                Ok((received("eth0")? > 0).then_some(()))
            })?;
            check_ignores("eth0", prefix)?;
            check_sysctls("eth0")?;
            check_sysctls("lo")
        })
    }
}

/// Returns the names of the bridge and of the interfaces that connect pods to the bridge.
fn rruns_interfaces() -> Result<Vec<String>> {
    let links = ip("-oneline link show")?;
    let names = links.lines().filter_map(|line| line.split(": ").nth(1));
    let names = names.map(|name| name.split('@').next().unwrap_or(name));
    let rruns_interfaces = names.filter(|name| name.starts_with("rr"));
    Ok(rruns_interfaces.map(str::to_owned).collect())
}

/// Checks that the interface has no default route from an advertisement, and no address with the
/// prefix `prefix`.
fn check_ignores(interface: &str, prefix: &str) -> Result {
    let routes = default_routes(interface)?;
    ensure!(
        !routes.contains("proto ra"),
        "the interface {interface} has accepted an advertisement; the default routes through this interface: {routes}"
    );
    let addresses = ip(&format!("-6 address show dev {interface}"))?;
    ensure!(
        !addresses.contains(prefix.trim_end_matches("::")),
        "the interface {interface} has an address with the advertised prefix {prefix}; the output of `ip -6 address`: {addresses}"
    );
    Ok(())
}

/// Sends an advertisement of `prefix` to an uplink. The node must accept the advertisement if
/// `accepted` is true, and must ignore it otherwise.
fn check_acceptance(beyond: &Beyond, uplink: &str, prefix: &str, accepted: bool) -> Result {
    let before = received(uplink)?;
    beyond.advertises(uplink, prefix)?;
    wait_for(
        &format!("the interface {uplink} to receive the advertisement"),
        || Ok((received(uplink)? > before).then_some(())),
    )?;
    if !accepted {
        return check_ignores(uplink, prefix);
    }
    wait_for(
        &format!("the interface {uplink} to accept the advertisement"),
        || Ok(has_accepted(uplink, prefix)?.then_some(())),
    )
}

/// Checks that the sysctls of `interface` disable advertisements and redirects.
fn check_sysctls(interface: &str) -> Result {
    for file in [
        "ipv6/conf/NAME/accept_ra",
        "ipv6/conf/NAME/accept_redirects",
        "ipv4/conf/NAME/accept_redirects",
    ] {
        let name = file.replace("NAME", interface);
        ensure_eq!(sysctl(&name)?, "0", "value of the sysctl {name}");
    }
    Ok(())
}

fn advertisements_of_a_pod_are_ignored_by_the_node_and_other_pods() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            let pods = Pods::new(node, json!({}))?;
            pods.advertise(node, "2001:db8:bad::", "rrun0")?;
            pods.check_all_ignore("2001:db8:bad::")?;
            ensure_eq!(
                rruns_interfaces()?.len(),
                3,
                "the number of rrun's interfaces {:?}, which must be a bridge and two ports",
                rruns_interfaces()?
            );

            // The test deletes the bridge twice. After the first deletion, rrun-cri creates the
            // bridge again. After the second deletion, another program creates a bridge with the
            // same name.
            ip("link delete rrun0")?;
            node.asks(&["info"])?;
            pods.advertise(node, "2001:db8:bad:1::", "rrun0")?;
            pods.check_all_ignore("2001:db8:bad:1::")?;
            ip("link delete rrun0")?;
            ip("link add rrun0 type bridge")?;
            node.asks(&["info"])?;
            check_sysctls("rrun0")
        })
    })
}

fn advertisements_are_ignored_if_pods_have_no_ipv6() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            // The node's default value of accept_ra for new interfaces must not affect rrun's
            // interfaces.
            set("ipv6/conf/default/accept_ra", "2")?;
            // With an MTU below 1280, the bridge has no IPv6. With an MTU of 1400, the bridge has
            // IPv6.
            for mtu in [1200, 1400] {
                node.terminate_server()?;
                let text = format!("[network]\nrange6 = \"\"\nmtu = {mtu}\n");
                fs::write(node.join("config.d/network.toml"), text)?;
                node.start_server()?;
                node.asks(&["info"])?;
                let has = sysctl("ipv6/conf/rrun0/accept_ra").is_ok();
                ensure_eq!(
                    has,
                    mtu == 1400,
                    "whether a bridge with an MTU of {mtu} has IPv6"
                );
            }
            ensure!(ip("link show rrun0")?.contains(",UP"), "the bridge is down");
            let pods = Pods::new(node, json!({}))?;
            pods.advertise(node, "2001:db8:bad::", "rrun0")?;
            pods.check_all_ignore("2001:db8:bad::")
        })
    })
}

fn redirects_of_a_pod_are_ignored_by_other_pods() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            // The redirect has a forged source address.
            allow_spoofing(node)?;
            // By default, the kernel accepts redirects only in a network namespace without
            // forwarding. Therefore, the pods disable forwarding. Writing 0 to ip_forward also sets
            // accept_redirects to 1. rrun-cri must set accept_redirects to 0.
            let pods = Pods::new(node, json!({ "net.ipv4.ip_forward": "0" }))?;
            let addresses = [pods.attackers_address, pods.victims_address];
            let [attackers, victims] = addresses.map(|ip| ip.to_string());
            let server = format!("{victims}:5000");
            wait_for("the victim's server to answer", || {
                let asked = pods.attack(node, &["/inside", "net", "ask", &server]);
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
                wait_for("the victim to receive the redirect", || {
                    let snmp = fs::read_to_string("/proc/thread-self/net/snmp")?;
                    let mut lines = snmp.lines().filter(|line| line.starts_with("Icmp:"));
                    let names = lines.next().unwrap_or_default().split(' ');
                    let values = lines.next().unwrap_or_default().split(' ');
                    let mut all = names.zip(values);
                    let received = all.find(|(name, _)| *name == "InRedirects");
                    Ok(received.filter(|(_, value)| *value != "0").map(drop))
                })?;
                let route = ip(&format!("route get {ELSEWHERE}"))?;
                ensure!(
                    route.contains("via 10.88.0.1 "),
                    "the victim has accepted the attacker's redirect; the victim's route to {ELSEWHERE}: {route}"
                );
                check_sysctls("eth0")?;
                check_sysctls("lo")
            })
        })
    })
}

fn other_interfaces_accept_the_same_advertisements_as_without_rrun() -> Result {
    in_a_new_network(|| {
        let beyond = Beyond::new()?;
        beyond.uplink("forwards", &[("forwarding", "1"), ("accept_ra", "1")])?;
        beyond.uplink("believes", &[("forwarding", "0"), ("accept_ra", "1")])?;
        beyond.uplink("always", &[("forwarding", "1"), ("accept_ra", "2")])?;
        beyond.uplink("refuses", &[("forwarding", "0"), ("accept_ra", "0")])?;
        check_acceptance(&beyond, "believes", "2001:db8:1::", true)?;
        check_acceptance(&beyond, "always", "2001:db8:2::", true)?;
        check_acceptance(&beyond, "forwards", "2001:db8:3::", false)?;
        check_acceptance(&beyond, "refuses", "2001:db8:4::", false)?;
        on_a_node(|node| {
            node.pull(BUSYBOX)?;
            node.runp(&node.pod("first"))?;
            ensure_eq!(sysctl("ipv6/conf/all/forwarding")?, "1", "forwarding");
            for (uplink, prefix) in [("believes", "2001:db8:1::"), ("always", "2001:db8:2::")] {
                ensure!(
                    has_accepted(uplink, prefix)?,
                    "the advertised route through the interface {uplink} was removed"
                );
            }
            let still = |server: u8| -> Result {
                for (uplink, number, accepted) in [
                    ("believes", 1, true),
                    ("always", 2, true),
                    ("forwards", 3, false),
                    ("refuses", 4, false),
                    // The interface `late` was created when forwarding was already on.
                    ("late", 5, true),
                ] {
                    let prefix = format!("2001:db8:{server}{number}::");
                    check_acceptance(&beyond, uplink, &prefix, accepted)?;
                }
                Ok(())
            };
            beyond.uplink("late", &[])?;
            still(1)?;
            for (name, value) in [("all", "1"), ("forwards", "1"), ("refuses", "0")] {
                let name = format!("ipv6/conf/{name}/accept_ra");
                ensure_eq!(sysctl(&name)?, value, "value of the sysctl {name}");
            }

            // The test changes accept_ra of two interfaces. The next start of the server and the
            // next pod must not change these values.
            set("ipv6/conf/late/accept_ra", "1")?;
            set("ipv6/conf/always/accept_ra", "0")?;
            node.terminate_server()?;
            node.start_server()?;
            node.runp(&node.pod("second"))?;
            for (name, value) in [("late", "1"), ("always", "0")] {
                let name = format!("ipv6/conf/{name}/accept_ra");
                ensure_eq!(sysctl(&name)?, value, "value of the sysctl {name}");
            }

            // If the server must switch forwarding on again, each interface must accept the same
            // advertisements as before.
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
                ensure_eq!(sysctl(&name)?, value, "value of the sysctl {name}");
            }
            Ok(())
        })
    })
}

fn a_node_that_ignores_advertisements_continues_to_ignore_them() -> Result {
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
                check_acceptance(&beyond, "late", "2001:db8:1::", false)?;
                ensure_eq!(
                    sysctl("ipv6/conf/default/accept_ra")?,
                    accept,
                    "the node's default value of accept_ra, which rrun-cri must not change"
                );
                Ok(())
            })
        })?;
    }
    Ok(())
}

fn the_server_corrects_sysctls_and_routes_from_an_earlier_version_when_it_starts() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            let pods = Pods::new(node, json!({}))?;
            node.terminate_server()?;
            let interfaces = rruns_interfaces()?;
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
                // rrun-cri must not change accept_ra of lo, because another program could have set
                // this sysctl.
                set("ipv6/conf/lo/accept_ra", "2")
            })?;
            within(pods.attackers_network.as_fd(), || {
                Ok(advertise("eth0", "2001:db8:bad::".parse()?)?)
            })?;
            wait_for("the bridge to accept the pod's advertisement", || {
                Ok(has_accepted("rrun0", "2001:db8:bad::")?.then_some(()))
            })?;

            node.start_server()?;
            for interface in &interfaces {
                check_sysctls(interface)?;
            }
            check_ignores("rrun0", "2001:db8:bad::")?;
            let routes = ip("-6 route show dev rrun0")?;
            ensure!(
                !routes.contains("2001:db8:bad"),
                "a route from the pod's advertisement still exists; the routes through rrun0: {routes}"
            );
            ensure!(
                routes.contains("fd72:7275:6e30::/64"),
                "the route to the pods was removed; the remaining routes through rrun0: {routes}"
            );
            pods.at_victim(|| {
                check_sysctls("eth0")?;
                ensure_eq!(
                    sysctl("ipv6/conf/lo/accept_ra")?,
                    "2",
                    "accept_ra of lo, which rrun-cri must not change"
                );
                Ok(())
            })
        })
    })
}

fn ports_of_a_deleted_bridge_ignore_advertisements() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            let pods = Pods::new(node, json!({}))?;
            ip("link delete rrun0")?;
            for (port, prefix) in rruns_interfaces()?
                .iter()
                .zip(["2001:db8:1::", "2001:db8:2::"])
            {
                // One of the two ports belongs to the attacker's pod, so this port receives the
                // advertisement.
                pods.attack(node, &["/inside", "net", "advertise", "eth0", prefix])?;
                check_sysctls(port)?;
            }
            let ports = rruns_interfaces()?;
            wait_for("the attacker's port to receive the advertisement", || {
                let received = ports.iter().map(|port| received(port));
                Ok((received.sum::<Result<u64>>()? > 0).then_some(()))
            })?;
            ports
                .iter()
                .try_for_each(|port| check_ignores(port, "2001:db8:"))
        })
    })
}
