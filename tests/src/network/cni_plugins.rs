//! Tests of pod networks that Debian's CNI plugins create. The tests check the effects of the
//! plugins, for example that pods can connect to each other.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::cni::{FIREWALL, PLUGINS, tidy, write};
use crate::support::inside::traffic::pour;
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, WEB, is_rrun, on_a_node};
use crate::support::pod_network::{addresses, node_fetches};
use crate::{ensure, ensure_eq, test};

const SHAPING: Need = Need::Works(
    "ifb interfaces and tbf queues, which the plugin bandwidth uses",
    "ip link add rrprobe type ifb && { tc qdisc add dev rrprobe root tbf rate 1mbit burst 10k latency 1s; code=$?; ip link delete rrprobe; exit $code; }",
);
const MACVLAN: Need = Need::Works(
    "macvlan interfaces",
    "ip link add rrprobe type dummy && { ip link add rrprobe1 link rrprobe type macvlan; code=$?; ip link delete rrprobe; exit $code; }",
);

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_chain_of_plugins_provides_ipv4_and_ipv6_and_host_ports_and_bandwidth_limits,
        A_NODE,
        PLUGINS,
        SHAPING,
        FIREWALL
    ),
    test!(
        the_traffic_of_a_pod_does_not_exceed_its_bandwidth,
        A_NODE,
        PLUGINS,
        SHAPING,
        Need::NativeOrLong
    ),
    test!(
        a_pod_has_an_interface_for_each_configuration_in_use,
        A_NODE,
        PLUGINS,
        Need::RrunCri
    ),
    test!(
        strange_interfaces_of_a_pod_do_not_affect_the_statistics,
        A_NODE,
        PLUGINS,
        Need::RrunCri
    ),
    test!(pods_reach_each_other_with_the_plugin_ptp, A_NODE, PLUGINS),
    test!(
        pods_reach_each_other_with_the_plugin_macvlan,
        A_NODE,
        PLUGINS,
        MACVLAN
    ),
];

fn ipam(node: &Node, subnets: &[&str]) -> Value {
    let ranges: Vec<Value> = subnets
        .iter()
        .map(|subnet| json!([{ "subnet": subnet }]))
        .collect();
    json!({
        "type": "host-local", "dataDir": node.join("ipam"), "ranges": ranges,
        "routes": [{ "dst": "0.0.0.0/0" }],
    })
}

/// Returns the addresses that the plugin host-local has leased in the CNI network `network`.
fn leases(node: &Node, network: &str) -> Vec<String> {
    let dir = node.join("ipam").join(network);
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with("last_reserved") && name != "lock")
        .collect()
}

fn web(node: &Node, pod: &Value, pod_id: &str) -> Result<String> {
    let name = pod["metadata"]["name"].as_str().unwrap_or("pod");
    let mut web = node.container(&format!("web-{name}"), &[]);
    web["image"]["image"] = json!(WEB);
    node.run(pod_id, pod, &web)
}

fn fetch_inside(node: &Node, container: &str, host: &str, port: u16) -> Result {
    let url = format!("http://{host}:{port}/");
    wait_for(&format!("the web server at {url} to answer"), || {
        let page = node.asks(&["exec", "-s", container, "wget", "-q", "-O", "-", &url]);
        Ok(page
            .is_ok_and(|page| page.trim() == "hello from rrun")
            .then_some(()))
    })
}

fn fetch(host: &str, port: u16) -> Result {
    let url = format!("http://{host}:{port}/");
    command("curl", ["-fsS", "--max-time", "20", &url])
        .ok()?
        .says("hello from rrun")
        .map(|_| ())
}

fn a_chain_of_plugins_provides_ipv4_and_ipv6_and_host_ports_and_bandwidth_limits() -> Result {
    let tested = on_a_node(|node| {
        let mut ipam = ipam(node, &["10.98.0.0/24", "fd98::/64"]);
        ipam["routes"] = json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]);
        let list = json!({
            "cniVersion": "1.0.0", "name": "chain", "plugins": [
                { "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
                  "hairpinMode": true, "ipam": ipam },
                { "type": "portmap", "capabilities": { "portMappings": true } },
                { "type": "bandwidth", "capabilities": { "bandwidth": true } },
                { "type": "firewall" },
                { "type": "tuning", "sysctl": { "net.ipv4.conf.eth0.arp_notify": "1" } },
            ],
        });
        write(node, "10-chain.conflist", &list.to_string())?;
        node.pull(WEB)?;
        let mut pods = Vec::new();
        for (name, port) in [("here", 18080), ("there", 18081)] {
            let mut pod = node.pod(name);
            pod["port_mappings"] = json!([{ "container_port": 5000, "host_port": port }]);
            pod["annotations"] = json!({
                "kubernetes.io/ingress-bandwidth": "80M", "kubernetes.io/egress-bandwidth": "90M",
            });
            let pod_id = node.runp(&pod)?;
            let all = addresses(node, &pod_id)?;
            ensure_eq!(all.len(), 2, "the number of the pod's addresses {all:?}");
            ensure!(
                all[0].starts_with("10.98.0.") && all[1].starts_with("fd98::"),
                "the pod's addresses are not in the configured ranges: {all:?}"
            );
            pods.push((web(node, &pod, &pod_id)?, all, port, pod_id));
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let ((container, ..), (_, target, port, _)) = (&pods[from], &pods[to]);
            fetch_inside(node, container, &target[0], 5000)?;
            fetch(&target[0], 5000)?;
            for address in target {
                node.asks(&[
                    "exec", "-s", container, "ping", "-c", "1", "-W", "20", address,
                ])?;
            }
            // The host port is reachable on loopback, and on an address of the node.
            fetch("127.0.0.1", *port)?;
            fetch("10.98.0.1", *port)?;
            // A new IPv6 address works only after the kernel has finished the duplicate address
            // detection. Until then, node_fetches repeats the request.
            node_fetches(&format!("http://[fd98::1]:{port}/"))?;
            fetch_inside(node, container, "10.98.0.1", *port)?;
            fetch_inside(node, container, "[fd98::1]", *port)?;
        }
        // The plugin portmap would forward the connections to rrun-cri to the pod.
        if is_rrun() {
            let mut pod = node.pod("metrics");
            pod["port_mappings"] = json!([{ "container_port": 5000, "host_port": 9464 }]);
            let refused = node.try_runp(&pod)?;
            ensure!(
                refused.code != 0 && refused.told().contains("metrics_listen"),
                "runp does not refuse the port of metrics_listen as a host port: {}",
                refused.told()
            );
        }
        let queues = command("tc", ["qdisc", "show"]).ok()?;
        for rate in ["rate 80Mbit", "rate 90Mbit"] {
            ensure_eq!(
                queues.stdout.matches(rate).count(),
                2,
                "the number of occurrences of `{rate}` in the output {:?} of `tc qdisc show`",
                queues.stdout
            );
        }
        let tuned = "/proc/sys/net/ipv4/conf/eth0/arp_notify";
        let tuned = node.asks(&["exec", "-s", &pods[0].0, "cat", tuned])?;
        ensure_eq!(tuned.trim(), "1", "the sysctl that the plugin tuning sets");
        let stats = node.json(&["statsp", &pods[0].3])?.to_string();
        ensure!(
            stats.contains("eth0"),
            "the interface eth0 is missing in the pod's statistics {stats}"
        );
        // crictl info shows the CNI configuration and its status in the same fields as with
        // containerd.
        let info = node.json(&["info"])?;
        ensure_eq!(
            info.pointer("/cniconfig/Networks/0/Config/Name"),
            Some(&json!("chain")),
            "the name of the CNI configuration in the output of `crictl info`"
        );
        ensure_eq!(
            info["lastCNILoadStatus"],
            json!("OK"),
            "lastCNILoadStatus in the output of `crictl info`"
        );

        // The plugins must remove their firewall rules and address leases even if the CNI
        // configuration was deleted.
        fs::remove_file(node.join("cni/10-chain.conflist"))?;
        for (_, _, _, pod_id) in &pods {
            node.asks(&["stopp", pod_id])?;
            node.asks(&["rmp", pod_id])?;
        }
        let rules = command("iptables-save", [""; 0]).ok()?.stdout;
        for address_or_port in ["10.98.0.2", "10.98.0.3", "18080", "18081"] {
            ensure!(
                !rules.contains(address_or_port),
                "the removed pods' address or host port {address_or_port} still occurs in the iptables rules:\n{rules}"
            );
        }
        let left = leases(node, "chain");
        ensure!(
            left.is_empty(),
            "address leases of the plugin host-local still exist: {left:?}"
        );
        Ok(())
    });
    tidy();
    tested
}

/// The plugin bandwidth passes a first burst at full speed. The burst has at most 2^32 bits, but
/// its exact size is not known. The test sends more data than the largest possible burst. After the
/// burst, the plugin limits the rate. Therefore, the transfer takes at least three seconds on any
/// machine.
fn the_traffic_of_a_pod_does_not_exceed_its_bandwidth() -> Result {
    const MEGABYTES: usize = 812;
    const BITS_A_SECOND: u64 = 800_000_000;
    let tested = on_a_node(|node| {
        let ipam = ipam(node, &["10.95.0.0/24"]);
        let list = json!({ "cniVersion": "1.0.0", "name": "shaped", "plugins": [
            { "type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": ipam },
            { "type": "bandwidth", "capabilities": { "bandwidth": true } },
        ]});
        write(node, "10-shaped.conflist", &list.to_string())?;
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("shaped");
        pod["annotations"] = json!({ "kubernetes.io/ingress-bandwidth": "800M" });
        let pod_id = node.runp(&pod)?;
        let sink = node.container("sink", &["/inside", "net", "sink", "7000"]);
        node.run(&pod_id, &pod, &sink)?;
        let address = format!("{}:7000", addresses(node, &pod_id)?[0]).parse()?;
        wait_for("the pod's server to listen", || {
            Ok(std::net::TcpStream::connect(address).ok().map(|_| ()))
        })?;
        let took = pour(address, MEGABYTES).map_err(|error| error.to_string())?;
        let bits = (MEGABYTES as u64) << 23;
        let least = (bits - u64::from(u32::MAX)) as f64 / BITS_A_SECOND as f64;
        ensure!(
            took.as_secs_f64() >= least,
            "the transfer of {MEGABYTES} MB took {took:?}, but at {BITS_A_SECOND} bits per second it should take at least {least} s"
        );
        Ok(())
    });
    tidy();
    tested
}

fn a_pod_has_an_interface_for_each_configuration_in_use() -> Result {
    let tested = on_a_node(|node| {
        fs::write(
            node.join("config.d/50-cni.toml"),
            "[cni]\nmax_conf_num = 2\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        // rrun-cri uses configurations in the order of their file names, not in the order of their
        // creation.
        for (file, name, bridge, subnet) in [
            ("30-c.conflist", "third", "cni3", "10.93.0.0/24"),
            ("20-b.conflist", "second", "cni2", "10.92.0.0/24"),
            ("10-a.conflist", "first", "cni0", "10.91.0.0/24"),
        ] {
            let mut ipam = ipam(node, &[subnet]);
            if name != "first" {
                ipam["routes"] = json!([]);
            }
            let list = json!({ "cniVersion": "1.0.0", "name": name, "plugins": [
                { "type": "bridge", "bridge": bridge, "isGateway": true, "ipam": ipam },
            ]});
            write(node, file, &list.to_string())?;
        }
        node.pull(WEB)?;
        let mut pods = Vec::new();
        for name in ["here", "there"] {
            let pod = node.pod(name);
            let pod_id = node.runp(&pod)?;
            let id = web(node, &pod, &pod_id)?;
            // The pod's status contains only the addresses from the first configuration.
            let mut all = addresses(node, &pod_id)?;
            ensure_eq!(
                all.len(),
                1,
                "the number of addresses {all:?} in the pod's status"
            );
            let eth1 = [
                "exec", "-s", &id, "ip", "-4", "-o", "address", "show", "eth1",
            ];
            let shown = node.asks(&eth1)?;
            let mut words = shown.split_whitespace().skip_while(|word| *word != "inet");
            let address = words.nth(1).and_then(|word| word.split('/').next());
            all.push(
                address
                    .ok_or(format!(
                        "the output of `ip address show eth1` contains no IPv4 address: {shown:?}"
                    ))?
                    .to_owned(),
            );
            ensure!(
                all[0].starts_with("10.91.0.") && all[1].starts_with("10.92.0."),
                "the pod's addresses are not in the configured ranges: {all:?}"
            );
            pods.push((id, all, pod_id));
        }
        let (container, _, pod_id) = &pods[0];
        let (_, target, _) = &pods[1];
        for address in target {
            fetch_inside(node, container, address, 5000)?;
            fetch(address, 5000)?;
        }
        let stats = node.json(&["statsp", "--id", pod_id])?["stats"][0].clone();
        let network = &stats["linux"]["network"];
        ensure_eq!(
            network["defaultInterface"]["name"],
            json!("eth0"),
            "the pod's default interface"
        );
        let more: Vec<&Value> = network["interfaces"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|one| &one["name"])
            .collect();
        ensure_eq!(
            more,
            [&json!("eth1")],
            "the names of the pod's additional interfaces"
        );
        node.asks(&["rmp", "--all", "--force"])?;
        for network in ["first", "second", "third"] {
            let left = leases(node, network);
            ensure!(
                left.is_empty(),
                "address leases of the network {network} still exist: {left:?}"
            );
        }
        Ok(())
    });
    // The cleanup of the node deletes the first configuration's bridge, but not cni2.
    let _ = command("ip", ["link", "delete", "cni2"]).end();
    tidy();
    tested
}

fn pods_reach_each_other_with_the_plugin_ptp() -> Result {
    let tested = on_a_node(|node| {
        let ipam = ipam(node, &["10.97.0.0/24"]);
        // A configuration of a single plugin, in an old version of the CNI format.
        let single = json!({
            "cniVersion": "0.3.1", "name": "pairs", "type": "ptp", "ipam": ipam,
        });
        write(node, "20-pairs.conf", &single.to_string())?;
        // In this test, rrun-cri uses only the configuration with the first file name in sorted
        // order, 20-pairs.conf. Therefore, rrun-cri ignores this broken configuration.
        write(node, "30-broken.conflist", "{ not JSON")?;
        node.pull(WEB)?;
        let mut pods = Vec::new();
        for name in ["here", "there"] {
            let pod = node.pod(name);
            let pod_id = node.runp(&pod)?;
            let all = addresses(node, &pod_id)?;
            ensure!(
                all[0].starts_with("10.97.0."),
                "the pod's addresses are not in the configured ranges: {all:?}"
            );
            pods.push((web(node, &pod, &pod_id)?, all[0].clone()));
        }
        fetch_inside(node, &pods[0].0, &pods[1].1, 5000)?;
        fetch(&pods[0].1, 5000)?;
        node.asks(&["rmp", "--all", "--force"])?;
        let left = leases(node, "pairs");
        ensure!(
            left.is_empty(),
            "address leases of the plugin host-local still exist: {left:?}"
        );
        Ok(())
    });
    tidy();
    tested
}

fn pods_reach_each_other_with_the_plugin_macvlan() -> Result {
    command("ip", ["link", "add", "wire0", "type", "dummy"]).ok()?;
    command("ip", ["link", "set", "wire0", "up"]).ok()?;
    let tested = on_a_node(|node| {
        let mut ipam = ipam(node, &["10.96.0.0/24"]);
        ipam["routes"] = json!([]);
        let list = json!({ "cniVersion": "0.4.0", "name": "wire", "plugins": [
            { "type": "macvlan", "master": "wire0", "mode": "bridge", "ipam": ipam,
              "capabilities": { "mac": true } },
        ]});
        write(node, "10-wire.conflist", &list.to_string())?;
        node.pull(BUSYBOX)?;
        let mut pods = Vec::new();
        for (name, mac) in [
            ("here", "02:00:00:00:96:01"),
            ("there", "02:00:00:00:96:02"),
        ] {
            let mut pod = node.pod(name);
            pod["annotations"] = json!({ "io.rrun/mac": mac });
            let pod_id = node.runp(&pod)?;
            let main = node.container(&format!("main-{name}"), &["sleep", "600"]);
            let id = node.run(&pod_id, &pod, &main)?;
            let shown = node.asks(&["exec", "-s", &id, "cat", "/sys/class/net/eth0/address"])?;
            ensure_eq!(shown.trim(), mac, "the MAC address of the pod's interface");
            pods.push((id, addresses(node, &pod_id)?[0].clone()));
        }
        node.asks(&[
            "exec", "-s", &pods[0].0, "ping", "-c", "1", "-W", "20", &pods[1].1,
        ])?;
        node.asks(&["rmp", "--all", "--force"])?;
        let left = leases(node, "wire");
        ensure!(
            left.is_empty(),
            "address leases of the plugin host-local still exist: {left:?}"
        );
        ensure!(
            Path::new("/sys/class/net/wire0").exists(),
            "the parent interface of the macvlan interfaces was deleted"
        );
        Ok(())
    });
    command("ip", ["link", "delete", "wire0"]).ok()?;
    tidy();
    tested
}

/// Returns the names of the pod's interfaces in its statistics.
fn reported(node: &Node, pod_id: &str) -> Result<Vec<String>> {
    let stats = node.json(&["statsp", "--id", pod_id])?["stats"][0].clone();
    let network = &stats["linux"]["network"];
    let more = network["interfaces"].as_array().into_iter().flatten();
    let all = std::iter::once(&network["defaultInterface"]).chain(more);
    Ok(all
        .filter_map(|one| one["name"].as_str())
        .map(str::to_owned)
        .collect())
}

/// A pod with the capability NET_ADMIN can create interfaces with any name.
fn strange_interfaces_of_a_pod_do_not_affect_the_statistics() -> Result {
    let tested = on_a_node(|node| {
        let list = json!({ "cniVersion": "1.0.0", "name": "strange", "plugins": [
            { "type": "bridge", "bridge": "cni0", "isGateway": true,
              "ipam": ipam(node, &["10.94.0.0/24"]) },
        ]});
        write(node, "10-strange.conflist", &list.to_string())?;
        let pod_id = node.runp(&node.pod("strange"))?;
        let namespace = format!("--net={}", node.join("state/netns").join(&pod_id).display());
        let add = |lines: Vec<u8>| -> Result {
            let file = node.join("interfaces");
            fs::write(&file, lines)?;
            let file = file.display().to_string();
            command("nsenter", [&namespace, "ip", "-batch", &file]).ok()?;
            Ok(())
        };
        add(b"link add \xff type veth peer name \xfe".to_vec())?;
        ensure_eq!(
            reported(node, &pod_id)?,
            ["eth0", "\u{fffd}"],
            "the names of the pod's interfaces"
        );
        let many =
            (0..40).map(|number| format!("link add a{number} type veth peer name b{number}\n"));
        add(many.collect::<String>().into_bytes())?;
        let names = reported(node, &pod_id)?;
        ensure!(
            names.len() == 64 && names[0] == "eth0",
            "the statistics of a pod with 83 interfaces contain {names:?}"
        );
        ensure!(
            node.log().contains("(stats_interfaces)"),
            "the server does not log that the pod has too many interfaces"
        );
        Ok(())
    });
    tidy();
    tested
}
