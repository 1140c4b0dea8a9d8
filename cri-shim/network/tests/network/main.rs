//! Tests of the embedded network with the real kernel. Each test has its own node. The node is a
//! network namespace with an uplink, which leads to a second network namespace. The tests do not
//! change the host's network.

mod crash;
mod many_ports;
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
    if many_ports::is_child() {
        many_ports::child();
    }
    let arguments = Arguments::from_args();
    let obstacle = node::leave_the_host().err();
    if let Some(obstacle) = &obstacle {
        eprintln!("SKIPPED all tests of the embedded network: {obstacle}");
    }
    let mut trials: Vec<Trial> = TESTS
        .iter()
        .map(|(name, test)| Trial::test(*name, || Node::run(*test)))
        .map(|trial| trial.with_ignored_flag(obstacle.is_some()))
        .collect();
    let has_nft = program("nft", &["--version"]).is_ok();
    if !has_nft {
        eprintln!("SKIPPED the tests of the nftables rules: nft(8) is not installed");
    }
    for (name, test) in TESTS_WITH_NFT {
        let trial = Trial::test(*name, || Node::run(*test));
        trials.push(trial.with_ignored_flag(obstacle.is_some() || !has_nft));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

type Test = fn(&Node) -> Result<(), Failed>;

const TESTS: &[(&str, Test)] = &[
    (
        "a_new_namespace_has_its_loopback_up",
        a_new_namespace_has_its_loopback_up,
    ),
    (
        "a_namespace_is_never_pinned_over_another",
        a_namespace_is_never_pinned_over_another,
    ),
    ("two_pods_reach_each_other", two_pods_reach_each_other),
    (
        "pod_and_node_reach_each_other",
        pod_and_node_reach_each_other,
    ),
    (
        "packets_that_leave_the_pod_range_have_the_nodes_address",
        packets_that_leave_the_pod_range_have_the_nodes_address,
    ),
    (
        "without_masquerade_packets_have_the_pods_address",
        without_masquerade_packets_have_the_pods_address,
    ),
    (
        "pods_and_the_bridge_get_the_mtu_of_the_uplink",
        pods_and_the_bridge_get_the_mtu_of_the_uplink,
    ),
    (
        "a_second_attach_returns_the_same_result",
        a_second_attach_returns_the_same_result,
    ),
    (
        "a_second_attach_repairs_a_partial_attachment",
        a_second_attach_repairs_a_partial_attachment,
    ),
    (
        "a_detach_removes_the_pods_interface_and_address",
        a_detach_removes_the_pods_interface_and_address,
    ),
    (
        "a_detach_succeeds_without_a_namespace",
        a_detach_succeeds_without_a_namespace,
    ),
    (
        "an_attach_directly_after_a_detach_connects_the_pod",
        an_attach_directly_after_a_detach_connects_the_pod,
    ),
    (
        "a_pod_gets_its_reserved_address",
        a_pod_gets_its_reserved_address,
    ),
    (
        "a_failed_attach_leaves_no_objects_behind",
        a_failed_attach_leaves_no_objects_behind,
    ),
    (
        "addresses_survive_a_restart_of_the_server",
        addresses_survive_a_restart_of_the_server,
    ),
    (
        "the_error_for_an_exhausted_range_contains_the_range",
        the_error_for_an_exhausted_range_contains_the_range,
    ),
    (
        "fifty_pods_are_attached_ten_at_a_time",
        fifty_pods_are_attached_ten_at_a_time,
    ),
    (
        "a_deleted_bridge_and_disabled_forwarding_are_restored",
        a_deleted_bridge_and_disabled_forwarding_are_restored,
    ),
    (
        "a_pod_range_that_overlaps_a_route_is_refused",
        a_pod_range_that_overlaps_a_route_is_refused,
    ),
    (
        "the_name_of_an_interface_that_is_not_a_bridge_is_refused",
        the_name_of_an_interface_that_is_not_a_bridge_is_refused,
    ),
    (
        "reconcile_removes_only_rruns_interfaces",
        reconcile_removes_only_rruns_interfaces,
    ),
    (
        "reconcile_removes_everything_after_a_crash_at_any_time",
        crash::reconcile_removes_everything_after_a_crash_at_any_time,
    ),
];

/// The tests that need the program nft(8).
const TESTS_WITH_NFT: &[(&str, Test)] = &[
    (
        "nft_lists_the_rules_of_rrun_and_other_tables_are_not_changed",
        nft_lists_the_rules_of_rrun_and_other_tables_are_not_changed,
    ),
    (
        "thousands_of_host_ports_survive_a_restart_and_a_flush",
        many_ports::thousands_of_host_ports_survive_a_restart_and_a_flush,
    ),
    (
        "a_host_port_that_the_store_contains_twice_belongs_to_the_live_pod",
        crash::a_host_port_that_the_store_contains_twice_belongs_to_the_live_pod,
    ),
    (
        "host_ports_do_not_need_a_large_send_buffer",
        many_ports::host_ports_do_not_need_a_large_send_buffer,
    ),
];

fn a_new_namespace_has_its_loopback_up(node: &Node) -> Result<(), Failed> {
    let path = node.netns("pod");
    namespace::create(&path)?;
    expect(
        namespace::is_pinned(&path),
        "the new namespace is not pinned",
    )?;
    fetch(Some(&path), Some(&path), Ipv4Addr::LOCALHOST)?;
    namespace::remove(&path)?;
    expect(
        !path.exists(),
        "the pin of the removed namespace still exists",
    )?;
    Ok(namespace::remove(&path)?)
}

fn a_namespace_is_never_pinned_over_another(node: &Node) -> Result<(), Failed> {
    let path = node.netns("pod");
    namespace::create(&path)?;
    let error = namespace::create(&path)
        .expect_err("a second namespace was created at the same path")
        .to_string();
    expect(error.contains("netns/pod: File exists"), &error)?;
    expect(
        namespace::is_pinned(&path),
        "the refused second `create` has unpinned the first namespace",
    )?;
    namespace::remove(&path)?;
    let nowhere = node.dir.join("nowhere/pod");
    expect(
        namespace::create(&nowhere).is_err(),
        "a namespace was created in a directory that does not exist",
    )
}

fn two_pods_reach_each_other(node: &Node) -> Result<(), Failed> {
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
        return Err("the pod has no IPv4 gateway".into());
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

fn packets_that_leave_the_pod_range_have_the_nodes_address(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "pod")?;
    ping(&node.netns("pod"), OUTSIDE)?;
    let from = fetch(Some(node.outside()), Some(&node.netns("pod")), OUTSIDE)?;
    expect_eq(from, IpAddr::from(NODE))
}

fn without_masquerade_packets_have_the_pods_address(node: &Node) -> Result<(), Failed> {
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

fn pods_and_the_bridge_get_the_mtu_of_the_uplink(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "pod")?;
    let eth0 = inside(&node.netns("pod"), || ip("link show eth0"))?;
    expect(eth0.contains(&format!("mtu {UPLINK_MTU} ")), &eth0)?;
    let bridge = ip("link show rrun0")?;
    expect(bridge.contains(&format!("mtu {UPLINK_MTU} ")), &bridge)
}

fn a_second_attach_returns_the_same_result(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let first = node.pod(&network, "pod")?;
    let links = inside(&node.netns("pod"), || ip("-oneline address"))?;
    let (again, and_again) = node.wait(async {
        let netns = node.netns("pod");
        tokio::join!(network.attach("pod", &netns), network.attach("pod", &netns))
    });
    expect_eq(again?, first.clone())?;
    expect_eq(and_again?, first.clone())?;
    // After the second attach, ip(8) must still list the same interfaces and addresses.
    expect_eq(
        inside(&node.netns("pod"), || ip("-oneline address"))?,
        links,
    )?;
    ping(&node.netns("pod"), OUTSIDE)?;
    drop(network);
    let again = node.wait(node.network()?.attach("pod", &node.netns("pod")))?;
    expect_eq(again, first)
}

fn a_second_attach_repairs_a_partial_attachment(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let pod = node.pod(&network, "pod")?;
    let netns = node.netns("pod");
    inside(&netns, || ip("route delete default"))?;
    inside(&netns, || {
        ip(&format!("address delete {}/16 dev eth0", address(&pod)?))
    })?;
    node.wait(network.attach("pod", &netns))?;
    ping(&netns, OUTSIDE)?;
    // The test removes the pod's network namespace, and creates a new namespace at the same path.
    namespace::remove(&netns)?;
    namespace::create(&netns)?;
    expect_eq(node.wait(network.attach("pod", &netns))?, pod)?;
    ping(&netns, OUTSIDE)
}

fn a_detach_removes_the_pods_interface_and_address(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "pod")?;
    expect_eq(node.pod_interfaces()?.len(), 1)?;
    node.remove(&network, "pod")?;
    node.remove(&network, "pod")?;
    node.wait(network.detach("unknown", None))?;
    node.wait(network.settled());
    drop(network);
    node.nothing_of_pods_is_left()
}

fn a_detach_succeeds_without_a_namespace(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "pod")?;
    namespace::remove(&node.netns("pod"))?;
    node.wait(network.detach("pod", Some(&node.netns("pod"))))?;
    node.wait(network.settled());
    drop(network);
    node.nothing_of_pods_is_left()
}

fn an_attach_directly_after_a_detach_connects_the_pod(node: &Node) -> Result<(), Failed> {
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
    // A caller cancels its attach and then detaches the pod. The detach must remove everything that
    // the attach has created.
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

fn a_pod_gets_its_reserved_address(node: &Node) -> Result<(), Failed> {
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

fn a_failed_attach_leaves_no_objects_behind(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    // After a reboot, the file at which a namespace was pinned is an ordinary file.
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
    // The next pod's network namespace already contains an interface eth0 that another program has
    // created.
    namespace::create(&node.netns("taken"))?;
    inside(&node.netns("taken"), || ip("link add eth0 type bridge"))?;
    let error = failure(node.wait(network.attach("taken", &node.netns("taken"))))?;
    expect(
        error.contains("has an interface eth0 that rrun did not create"),
        &error,
    )?;
    let links = inside(&node.netns("taken"), || ip("link show eth0"))?;
    expect(
        links.contains("eth0"),
        "a failed attach removed the interface eth0 that another program had created",
    )?;
    namespace::remove(&node.netns("taken"))?;
    node.wait(network.settled());
    drop(network);
    node.nothing_of_pods_is_left()
}

fn addresses_survive_a_restart_of_the_server(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let a = node.pod(&network, "a")?;
    node.pod(&network, "b")?;
    node.remove(&network, "b")?;
    drop(network);
    let network = node.network()?;
    expect_eq(node.wait(network.attach("a", &node.netns("a")))?, a)?;
    // The pod c does not get the freed address of the pod b. A freed address is assigned again as
    // late as possible.
    let c = node.pod(&network, "c")?;
    expect_eq(address(&c)?, Ipv4Addr::new(10, 88, 0, 4))
}

fn the_error_for_an_exhausted_range_contains_the_range(node: &Node) -> Result<(), Failed> {
    let network = node.network_with(NetworkConfig {
        range: OptionalRange::Of("10.9.8.0/29".parse()?),
        ..NetworkConfig::default()
    })?;
    for pod in ["a", "b", "c", "d", "e"] {
        node.pod(&network, pod)?;
    }
    let error = failure(node.pod(&network, "f"))?;
    expect(
        error.contains("every address of the pod range 10.9.8.0/29 is in use"),
        &error,
    )?;
    expect_eq(node.pod_interfaces()?.len(), 5)?;
    node.remove(&network, "c")?;
    let f = node.wait(network.attach("f", &node.netns("f")))?;
    expect_eq(address(&f)?, Ipv4Addr::new(10, 9, 8, 4))
}

fn fifty_pods_are_attached_ten_at_a_time(node: &Node) -> Result<(), Failed> {
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

fn a_deleted_bridge_and_disabled_forwarding_are_restored(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    node.pod(&network, "a")?;
    let b = node.pod(&network, "b")?;
    ip("link delete rrun0")?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "0")?;
    node.wait(network.ready())?;
    fetch(Some(node.outside()), Some(&node.netns("a")), OUTSIDE)?;
    ping(&node.netns("a"), address(&b)?)?;
    // The attach of the next pod must create the bridge again.
    ip("link delete rrun0")?;
    node.pod(&network, "c")?;
    ping(&node.netns("c"), address(&b)?)?;
    ip("link set rrun0 down")?;
    ip("address flush dev rrun0")?;
    node.wait(network.ready())?;
    ping(&node.netns("c"), address(&b)?)?;
    ping(&node.netns("c"), OUTSIDE)
}

fn a_pod_range_that_overlaps_a_route_is_refused(node: &Node) -> Result<(), Failed> {
    ip("route add 10.88.7.0/24 dev up0")?;
    let network = node.network()?;
    let error = failure(node.pod(&network, "pod"))?;
    expect(
        error.contains("10.88.0.0/16 overlaps the route to 10.88.7.0/24"),
        &error,
    )?;
    let ready = node
        .wait(network.ready())
        .err()
        .ok_or("the network is ready although its pod range overlaps a route")?;
    expect(ready.contains("set network.range"), &ready)?;
    expect(
        ip("link show rrun0").is_err(),
        "a bridge was created although the pod range was refused",
    )?;
    ip("route delete 10.88.7.0/24 dev up0")?;
    node.wait(network.attach("pod", &node.netns("pod")))?;
    Ok(node.wait(network.ready())?)
}

fn the_name_of_an_interface_that_is_not_a_bridge_is_refused(node: &Node) -> Result<(), Failed> {
    ip("link add rrun0 type veth peer name other")?;
    let network = node.network()?;
    let error = failure(node.pod(&network, "pod"))?;
    expect(
        error.contains("rrun0 already exists, but its type is veth instead of bridge"),
        &error,
    )?;
    ip("link delete rrun0")?;
    namespace::remove(&node.netns("pod"))?;
    node.wait(network.settled());
    drop(network);
    node.nothing_of_pods_is_left()
}

fn reconcile_removes_only_rruns_interfaces(node: &Node) -> Result<(), Failed> {
    let network = node.network()?;
    let alive = node.pod(&network, "alive")?;
    node.pod(&network, "dead")?;
    // `reconcile` must not remove the interfaces other0 and rr0123456789ab. The interface other0 is
    // a port of rrun's bridge, but its name differs from the names of rrun's interfaces. The
    // interface rr0123456789ab has a name like rrun's interfaces, but it is not a port of the
    // bridge.
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

fn nft_lists_the_rules_of_rrun_and_other_tables_are_not_changed(node: &Node) -> Result<(), Failed> {
    let nft = |arguments: &[&str]| program("nft", arguments);
    nft(&["add table inet other"])?;
    nft(&["add chain inet other input { type filter hook input priority 0; policy accept; }"])?;
    nft(&["add rule inet other input tcp dport 9 drop"])?;
    let other = nft(&["list table inet other"])?;
    let network = node.network()?;
    node.pod(&network, "pod")?;
    let ours = nft(&["list table inet rrun0"])?;
    for rule in [
        "type nat hook postrouting priority srcnat; policy accept;",
        "ip saddr 10.88.0.0/16 ip daddr != 10.88.0.0/16 oifname != \"rrun0\" \
         ip daddr != 224.0.0.0/4 masquerade fully-random",
    ] {
        expect(ours.contains(rule), &ours)?;
    }
    nft(&["flush table inet rrun0"])?;
    node.wait(network.ready())?;
    expect_eq(nft(&["list table inet rrun0"])?, ours.clone())?;
    // The attach of the next pod must create the table again.
    nft(&["delete table inet rrun0"])?;
    node.pod(&network, "next")?;
    expect_eq(nft(&["list table inet rrun0"])?, ours)?;
    expect_eq(nft(&["list table inet other"])?, other)
}

fn address(attachment: &Attachment) -> Result<Ipv4Addr, Failed> {
    match attachment.addresses.as_slice() {
        [IpAddr::V4(address), ..] => Ok(*address),
        other => Err(Failed::from(format!(
            "the pod's first address is not an IPv4 address; the pod's addresses: {other:?}"
        ))),
    }
}

fn failure<T, E: ToString>(result: Result<T, E>) -> Result<String, Failed> {
    match result {
        Ok(_) => Err(Failed::from(
            "the pod was attached, but the test expected the attach to fail",
        )),
        Err(error) => Ok(error.to_string()),
    }
}

fn expect(condition: bool, failure: &str) -> Result<(), Failed> {
    if condition {
        return Ok(());
    }
    Err(Failed::from(format!("a check failed: {failure}")))
}

fn expect_eq<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Result<(), Failed> {
    if found == expected {
        return Ok(());
    }
    Err(Failed::from(format!(
        "found: {found:?}, expected: {expected:?}"
    )))
}
