//! The embedded network against the real kernel. Each test has a node of its own: a network
//! namespace with an uplink. The host's network is never touched.

mod crash;
mod node;
mod traffic;

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};

use libtest_mimic::{Arguments, Failed, Trial};
use rrun_network::{Attachment, NetworkConfig, OptionalRange, namespace};

use node::{NODE, Node, OUTSIDE, UPLINK_MTU, inside, ip, program};
use traffic::{fetch, ping};

fn main() {
    if crash::is_child() {
        crash::child();
    }
    let arguments = Arguments::from_args();
    let obstacle = node::leave_the_host().err();
    if let Some(obstacle) = &obstacle {
        eprintln!("SKIPPED, all tests of the network: {obstacle}");
    }
    let mut trials: Vec<Trial> = TESTS
        .iter()
        .map(|(name, test)| Trial::test(*name, || Node::run(*test)))
        .map(|trial| trial.with_ignored_flag(obstacle.is_some()))
        .collect();
    let has_nft = program("nft", &["--version"]).is_ok();
    if !has_nft {
        eprintln!("SKIPPED, what nft(8) shows of our rules: it is not installed");
    }
    trials.push(
        Trial::test("rules_read_as_meant_and_others_are_not_touched", || {
            Node::run(rules_read_as_meant_and_others_are_not_touched)
        })
        .with_ignored_flag(obstacle.is_some() || !has_nft),
    );
    libtest_mimic::run(&arguments, trials).exit();
}

type Test = fn(&Node) -> Result<(), Failed>;

const TESTS: &[(&str, Test)] = &[
    (
        "a_new_namespace_has_its_loopback_up",
        a_new_namespace_has_its_loopback_up,
    ),
    (
        "a_namespace_is_never_made_over_another",
        a_namespace_is_never_made_over_another,
    ),
    ("two_pods_ping_and_fetch", two_pods_ping_and_fetch),
    (
        "pod_and_node_reach_each_other",
        pod_and_node_reach_each_other,
    ),
    (
        "what_leaves_the_range_has_the_nodes_address",
        what_leaves_the_range_has_the_nodes_address,
    ),
    (
        "without_masquerade_it_has_the_pods",
        without_masquerade_it_has_the_pods,
    ),
    ("the_mtu_is_the_uplinks", the_mtu_is_the_uplinks),
    ("attach_again_gives_the_same", attach_again_gives_the_same),
    (
        "attach_again_completes_what_is_half_made",
        attach_again_completes_what_is_half_made,
    ),
    ("detach_leaves_nothing", detach_leaves_nothing),
    (
        "detach_ends_without_a_namespace",
        detach_ends_without_a_namespace,
    ),
    (
        "attach_right_after_detach_wins",
        attach_right_after_detach_wins,
    ),
    (
        "a_reserved_address_is_the_pods",
        a_reserved_address_is_the_pods,
    ),
    (
        "a_failed_attach_leaves_nothing",
        a_failed_attach_leaves_nothing,
    ),
    ("addresses_outlive_the_server", addresses_outlive_the_server),
    ("an_exhausted_range_is_named", an_exhausted_range_is_named),
    ("fifty_pods_ten_at_a_time", fifty_pods_ten_at_a_time),
    (
        "what_somebody_removed_comes_back",
        what_somebody_removed_comes_back,
    ),
    ("a_range_in_use_is_refused", a_range_in_use_is_refused),
    (
        "a_bridge_name_in_use_is_refused",
        a_bridge_name_in_use_is_refused,
    ),
    (
        "reconcile_removes_ours_and_only_ours",
        reconcile_removes_ours_and_only_ours,
    ),
    (
        "a_crash_at_any_moment_leaves_nothing",
        crash::a_crash_at_any_moment_leaves_nothing,
    ),
];

fn a_new_namespace_has_its_loopback_up(node: &Node) -> Result<(), Failed> {
    let path = node.netns("pod");
    namespace::create(&path)?;
    expect(namespace::is_pinned(&path), "it is pinned")?;
    fetch(Some(&path), Some(&path), Ipv4Addr::LOCALHOST)?;
    namespace::remove(&path)?;
    expect(!path.exists(), "its file is gone")?;
    Ok(namespace::remove(&path)?)
}

fn a_namespace_is_never_made_over_another(node: &Node) -> Result<(), Failed> {
    let path = node.netns("pod");
    namespace::create(&path)?;
    let error = namespace::create(&path)
        .expect_err("a second one")
        .to_string();
    expect(error.contains("netns/pod: File exists"), &error)?;
    expect(namespace::is_pinned(&path), "the first one stays")?;
    namespace::remove(&path)?;
    let nowhere = node.dir.join("nowhere/pod");
    expect(namespace::create(&nowhere).is_err(), "no directory for it")
}

fn two_pods_ping_and_fetch(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let a = node.pod(&network, "a")?;
    let b = node.pod(&network, "b")?;
    expect_eq(address(&a)?, Ipv4Addr::new(10, 88, 0, 2))?;
    expect_eq(address(&b)?, Ipv4Addr::new(10, 88, 0, 3))?;
    expect_eq(a.gateway, Some(Ipv4Addr::new(10, 88, 0, 1).into()))?;
    expect_eq(a.mac, [0x0a, 0x58, 10, 88, 0, 2])?;
    ping(&node.netns("a"), address(&b)?)?;
    ping(&node.netns("b"), address(&a)?)?;
    let from = fetch(Some(&node.netns("b")), Some(&node.netns("a")), address(&b)?)?;
    expect_eq(from, IpAddr::from(address(&a)?))
}

fn pod_and_node_reach_each_other(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let pod = node.pod(&network, "pod")?;
    let Some(std::net::IpAddr::V4(gateway)) = pod.gateway else {
        return Err("no gateway".into());
    };
    let netns = node.netns("pod");
    ping(&netns, gateway)?;
    let from = fetch(None, Some(&netns), gateway)?;
    expect_eq(from, IpAddr::from(address(&pod)?))?;
    let from = fetch(None, Some(&netns), NODE)?;
    expect_eq(from, IpAddr::from(address(&pod)?))?;
    let from = fetch(Some(&netns), None, address(&pod)?)?;
    expect_eq(from, IpAddr::from(gateway))
}

fn what_leaves_the_range_has_the_nodes_address(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "pod")?;
    ping(&node.netns("pod"), OUTSIDE)?;
    let from = fetch(Some(node.outside()), Some(&node.netns("pod")), OUTSIDE)?;
    expect_eq(from, IpAddr::from(NODE))
}

fn without_masquerade_it_has_the_pods(node: &Node) -> Result<(), Failed> {
    let network = node.network_with(NetworkConfig {
        masquerade: false,
        ..NetworkConfig::default()
    })?;
    let pod = node.pod(&network, "pod")?;
    inside(node.outside(), || {
        ip(&format!("route add 10.88.0.0/16 via {NODE}"))
    })?;
    let from = fetch(Some(node.outside()), Some(&node.netns("pod")), OUTSIDE)?;
    expect_eq(from, IpAddr::from(address(&pod)?))?;
    let from = fetch(
        Some(&node.netns("pod")),
        Some(node.outside()),
        address(&pod)?,
    )?;
    expect_eq(from, IpAddr::from(OUTSIDE))
}

fn the_mtu_is_the_uplinks(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "pod")?;
    let eth0 = inside(&node.netns("pod"), || ip("link show eth0"))?;
    expect(eth0.contains(&format!("mtu {UPLINK_MTU} ")), &eth0)?;
    let bridge = ip("link show rrun0")?;
    expect(bridge.contains(&format!("mtu {UPLINK_MTU} ")), &bridge)
}

fn attach_again_gives_the_same(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let first = node.pod(&network, "pod")?;
    let links = inside(&node.netns("pod"), || ip("-oneline address"))?;
    let (again, and_again) = node.wait(async {
        let netns = node.netns("pod");
        tokio::join!(network.attach("pod", &netns), network.attach("pod", &netns))
    });
    expect_eq(again?, first.clone())?;
    expect_eq(and_again?, first.clone())?;
    // The interface itself is the same one.
    expect_eq(
        inside(&node.netns("pod"), || ip("-oneline address"))?,
        links,
    )?;
    ping(&node.netns("pod"), OUTSIDE)?;
    drop(network);
    let again = node.wait(node.network()?.attach("pod", &node.netns("pod")))?;
    expect_eq(again, first)
}

fn attach_again_completes_what_is_half_made(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let pod = node.pod(&network, "pod")?;
    let netns = node.netns("pod");
    inside(&netns, || ip("route delete default"))?;
    inside(&netns, || {
        ip(&format!("address delete {}/16 dev eth0", address(&pod)?))
    })?;
    node.wait(network.attach("pod", &netns))?;
    ping(&netns, OUTSIDE)?;
    // The namespace was lost and made anew under the same name.
    namespace::remove(&netns)?;
    namespace::create(&netns)?;
    expect_eq(node.wait(network.attach("pod", &netns))?, pod)?;
    ping(&netns, OUTSIDE)
}

fn detach_leaves_nothing(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "pod")?;
    expect_eq(node.pod_interfaces()?.len(), 1)?;
    node.remove(&network, "pod")?;
    node.remove(&network, "pod")?;
    node.wait(network.detach("never seen", None))?;
    node.wait(network.settled());
    drop(network);
    node.nothing_of_pods_is_left()
}

fn detach_ends_without_a_namespace(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "pod")?;
    namespace::remove(&node.netns("pod"))?;
    node.wait(network.detach("pod", Some(&node.netns("pod"))))?;
    node.wait(network.settled());
    drop(network);
    node.nothing_of_pods_is_left()
}

fn attach_right_after_detach_wins(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let netns = node.netns("pod");
    node.pod(&network, "pod")?;
    for _ in 0..10 {
        node.wait(async {
            network.detach("pod", None).await?;
            network.detach("pod", None).await?;
            network.attach("pod", &netns).await
        })?;
        node.wait(network.settled());
        ping(&netns, OUTSIDE)?;
    }
    // A caller that gives up on its attach and detaches: nothing comes of it afterwards.
    node.wait(async {
        network.detach("pod", None).await?;
        let attach = network.attach("pod", &netns);
        let _ = tokio::time::timeout(std::time::Duration::from_millis(1), attach).await;
        network.detach("pod", None).await
    })?;
    node.wait(network.settled());
    namespace::remove(&netns)?;
    drop(network);
    node.nothing_of_pods_is_left()
}

fn a_reserved_address_is_the_pods(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.wait(network.reserve("pod", "pod", Vec::new(), true))?;
    node.wait(network.reserve("pod", "pod", Vec::new(), true))?;
    node.pod(&network, "other")?;
    let pod = node.pod(&network, "pod")?;
    expect_eq(address(&pod)?, Ipv4Addr::new(10, 88, 0, 2))?;
    node.remove(&network, "other")?;
    node.remove(&network, "pod")?;
    drop(network);
    node.nothing_of_pods_is_left()
}

fn a_failed_attach_leaves_nothing(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    // The pin of a namespace from before a reboot.
    let stale = node.netns("stale");
    std::fs::write(&stale, "")?;
    let error = failure(node.wait(network.attach("stale", &stale)))?;
    expect(
        error.contains("netns/stale is not a network namespace"),
        &error,
    )?;
    namespace::remove(&stale)?;
    let error = failure(node.wait(network.attach("missing", &node.netns("missing"))))?;
    expect(error.contains("netns/missing: No such file"), &error)?;
    // Somebody else was there before us.
    namespace::create(&node.netns("taken"))?;
    inside(&node.netns("taken"), || ip("link add eth0 type bridge"))?;
    let error = failure(node.wait(network.attach("taken", &node.netns("taken"))))?;
    expect(error.contains("has an interface eth0 that is not"), &error)?;
    let links = inside(&node.netns("taken"), || ip("link show eth0"))?;
    expect(links.contains("eth0"), "the other's interface stays")?;
    namespace::remove(&node.netns("taken"))?;
    node.wait(network.settled());
    drop(network);
    node.nothing_of_pods_is_left()
}

fn addresses_outlive_the_server(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let a = node.pod(&network, "a")?;
    node.pod(&network, "b")?;
    node.remove(&network, "b")?;
    drop(network);
    let network = node.network()?;
    expect_eq(node.wait(network.attach("a", &node.netns("a")))?, a)?;
    // It is not the turn of b's address.
    let c = node.pod(&network, "c")?;
    expect_eq(address(&c)?, Ipv4Addr::new(10, 88, 0, 4))
}

fn an_exhausted_range_is_named(node: &Node) -> Result<(), Failed> {
    let network = node.network_with(NetworkConfig {
        range: OptionalRange::Of("10.9.8.0/29".parse()?),
        ..NetworkConfig::default()
    })?;
    for pod in ["a", "b", "c", "d", "e"] {
        node.pod(&network, pod)?;
    }
    let error = failure(node.pod(&network, "f"))?;
    expect(
        error.contains("every address of the pods' range 10.9.8.0/29 is taken"),
        &error,
    )?;
    expect_eq(node.pod_interfaces()?.len(), 5)?;
    node.remove(&network, "c")?;
    let f = node.wait(network.attach("f", &node.netns("f")))?;
    expect_eq(address(&f)?, Ipv4Addr::new(10, 9, 8, 4))
}

fn fifty_pods_ten_at_a_time(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let pods: Vec<String> = (0..50).map(|pod| format!("pod{pod}")).collect();
    let mut seen = HashSet::new();
    for ten in pods.chunks(10) {
        let attached = ten.iter().map(|pod| {
            let (network, netns, pod) = (network.clone(), node.netns(pod), pod.clone());
            async move {
                namespace::create(&netns)?;
                network.attach(&pod, &netns).await
            }
        });
        for attached in node.wait(futures_util::future::join_all(attached)) {
            seen.insert(address(&attached?)?);
        }
    }
    expect_eq(seen.len(), 50)?;
    expect_eq(node.pod_interfaces()?.len(), 50)?;
    ping(&node.netns("pod0"), Ipv4Addr::new(10, 88, 0, 51))?;
    for ten in pods.chunks(10) {
        let detached = ten.iter().map(|pod| network.detach(pod, None));
        for detached in node.wait(futures_util::future::join_all(detached)) {
            detached?;
        }
        for pod in ten {
            namespace::remove(&node.netns(pod))?;
        }
    }
    node.wait(network.settled());
    drop(network);
    node.nothing_of_pods_is_left()
}

fn what_somebody_removed_comes_back(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "a")?;
    let b = node.pod(&network, "b")?;
    ip("link delete rrun0")?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "0")?;
    node.wait(network.ready())?;
    fetch(Some(node.outside()), Some(&node.netns("a")), OUTSIDE)?;
    ping(&node.netns("a"), address(&b)?)?;
    // The next pod notices as well.
    ip("link delete rrun0")?;
    node.pod(&network, "c")?;
    ping(&node.netns("c"), address(&b)?)?;
    ip("link set rrun0 down")?;
    ip("address flush dev rrun0")?;
    node.wait(network.ready())?;
    ping(&node.netns("c"), address(&b)?)?;
    ping(&node.netns("c"), OUTSIDE)
}

fn a_range_in_use_is_refused(node: &Node) -> Result<(), Failed> {
    ip("route add 10.88.7.0/24 dev up0")?;
    let network = node.network()?;
    let error = failure(node.pod(&network, "pod"))?;
    expect(
        error.contains("10.88.0.0/16 overlaps the route to 10.88.7.0/24"),
        &error,
    )?;
    let ready = node.wait(network.ready()).err().ok_or("it is ready")?;
    expect(ready.contains("set network.range"), &ready)?;
    expect(ip("link show rrun0").is_err(), "no bridge was made")?;
    ip("route delete 10.88.7.0/24 dev up0")?;
    node.wait(network.attach("pod", &node.netns("pod")))?;
    Ok(node.wait(network.ready())?)
}

fn a_bridge_name_in_use_is_refused(node: &Node) -> Result<(), Failed> {
    ip("link add rrun0 type veth peer name other")?;
    let network = node.network()?;
    let error = failure(node.pod(&network, "pod"))?;
    expect(
        error.contains("rrun0 is there already and is no bridge but veth"),
        &error,
    )?;
    ip("link delete rrun0")?;
    namespace::remove(&node.netns("pod"))?;
    node.wait(network.settled());
    drop(network);
    node.nothing_of_pods_is_left()
}

fn reconcile_removes_ours_and_only_ours(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let alive = node.pod(&network, "alive")?;
    node.pod(&network, "dead")?;
    // A port of our bridge and a name like ours, but not both.
    ip("link add other0 type veth peer name other1")?;
    ip("link set other0 master rrun0")?;
    ip("link add rr0123456789ab type veth peer name other2")?;
    drop(network);
    let network = node.network()?;
    node.wait(network.reconcile(&HashSet::from(["alive".to_owned()])))?;
    expect_eq(
        node.wait(network.attach("alive", &node.netns("alive")))?,
        alive.clone(),
    )?;
    ping(&node.netns("alive"), OUTSIDE)?;
    drop(network);
    let stored: Vec<String> = alive.addresses.iter().map(ToString::to_string).collect();
    expect_eq(node.stored_addresses()?, stored)?;
    let interfaces = node.pod_interfaces()?.join(" ");
    expect(interfaces.contains("other0"), &interfaces)?;
    expect(interfaces.contains("rr0123456789ab"), &interfaces)?;
    expect_eq(node.pod_interfaces()?.len(), 5)
}

fn rules_read_as_meant_and_others_are_not_touched(node: &Node) -> Result<(), Failed> {
    let nft = |arguments: &[&str]| program("nft", arguments);
    nft(&["add table inet other"])?;
    nft(&["add chain inet other input { type filter hook input priority 0; policy accept; }"])?;
    nft(&["add rule inet other input tcp dport 9 drop"])?;
    let other = nft(&["list table inet other"])?;
    let network = node.network()?;
    node.pod(&network, "pod")?;
    let ours = nft(&["list table inet rrun0"])?;
    for words in [
        "type nat hook postrouting priority srcnat; policy accept;",
        "ip saddr 10.88.0.0/16 ip daddr != 10.88.0.0/16 oifname != \"rrun0\" \
         ip daddr != 224.0.0.0/4 masquerade fully-random",
    ] {
        expect(ours.contains(words), &ours)?;
    }
    nft(&["flush table inet rrun0"])?;
    node.wait(network.ready())?;
    expect_eq(nft(&["list table inet rrun0"])?, ours.clone())?;
    // The next pod notices as well that somebody emptied it.
    nft(&["delete table inet rrun0"])?;
    node.pod(&network, "next")?;
    expect_eq(nft(&["list table inet rrun0"])?, ours)?;
    expect_eq(nft(&["list table inet other"])?, other)
}

fn address(attachment: &Attachment) -> Result<Ipv4Addr, Failed> {
    match attachment.addresses.as_slice() {
        [IpAddr::V4(address), ..] => Ok(*address),
        other => Err(Failed::from(format!("addresses {other:?}"))),
    }
}

fn failure<T, E: ToString>(result: Result<T, E>) -> Result<String, Failed> {
    match result {
        Ok(_) => Err(Failed::from("it did not fail")),
        Err(error) => Ok(error.to_string()),
    }
}

fn expect(condition: bool, what: &str) -> Result<(), Failed> {
    if condition {
        return Ok(());
    }
    Err(Failed::from(format!("not so: {what}")))
}

fn expect_eq<T: PartialEq + std::fmt::Debug>(found: T, wanted: T) -> Result<(), Failed> {
    if found == wanted {
        return Ok(());
    }
    Err(Failed::from(format!("found {found:?}, wanted {wanted:?}")))
}
