//! Pods' networks by Debian's CNI plugins, seen by their effect.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::cni::{FIREWALL, PLUGINS, tidy, write};
use crate::support::inside::traffic::pour;
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, WEB, on_a_node};
use crate::support::pod_network::{addresses, node_fetches};
use crate::{ensure, ensure_eq, test};

const SHAPING: Need = Need::Works(
    "ifb interfaces and tbf queues, which the plugin bandwidth is made of",
    "ip link add rrprobe type ifb && { tc qdisc add dev rrprobe root tbf rate 1mbit burst 10k latency 1s; code=$?; ip link delete rrprobe; exit $code; }",
);
const MACVLAN: Need = Need::Works(
    "macvlan interfaces",
    "ip link add rrprobe type dummy && { ip link add rrprobe1 link rrprobe type macvlan; code=$?; ip link delete rrprobe; exit $code; }",
);

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_chain_of_plugins_gives_both_families_host_ports_and_bandwidth,
        A_NODE,
        PLUGINS,
        SHAPING,
        FIREWALL
    ),
    test!(
        a_bandwidth_is_held,
        A_NODE,
        PLUGINS,
        SHAPING,
        Need::NativeOrLong
    ),
    test!(
        a_pod_has_an_interface_of_each_configuration_in_use,
        A_NODE,
        PLUGINS,
        Need::RrunCri
    ),
    test!(pods_reach_each_other_by_ptp, A_NODE, PLUGINS),
    test!(pods_reach_each_other_by_macvlan, A_NODE, PLUGINS, MACVLAN),
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

/// Leases of host-local.
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
    wait_for(&format!("{url} to answer"), || {
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

fn a_chain_of_plugins_gives_both_families_host_ports_and_bandwidth() -> Result {
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
            ensure_eq!(all.len(), 2, "addresses, {all:?}");
            ensure!(
                all[0].starts_with("10.98.0.") && all[1].starts_with("fd98::"),
                "the addresses are {all:?}"
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
            // By the host port: on loopback, and on an address of the node's.
            fetch("127.0.0.1", *port)?;
            fetch("10.98.0.1", *port)?;
            // The kernel looks for duplicates of what the plugins give for a while.
            node_fetches(&format!("http://[fd98::1]:{port}/"))?;
            fetch_inside(node, container, "10.98.0.1", *port)?;
            fetch_inside(node, container, "[fd98::1]", *port)?;
        }
        let queues = command("tc", ["qdisc", "show"]).ok()?;
        for rate in ["rate 80Mbit", "rate 90Mbit"] {
            ensure_eq!(
                queues.stdout.matches(rate).count(),
                2,
                "queues with {rate} among\n{}",
                queues.stdout
            );
        }
        let tuned = "/proc/sys/net/ipv4/conf/eth0/arp_notify";
        let tuned = node.asks(&["exec", "-s", &pods[0].0, "cat", tuned])?;
        ensure_eq!(tuned.trim(), "1", "what the plugin tuning sets");
        let stats = node.json(&["statsp", &pods[0].3])?.to_string();
        ensure!(stats.contains("eth0"), "no interface in {stats}");
        // Both shown by containerd's names.
        let info = node.json(&["info"])?;
        ensure_eq!(
            info.pointer("/cniconfig/Networks/0/Config/Name"),
            Some(&json!("chain")),
            "the configuration that crictl info shows"
        );
        ensure_eq!(
            info["lastCNILoadStatus"],
            json!("OK"),
            "the state of loading"
        );

        // The configuration may go: what was made by it goes too.
        fs::remove_file(node.join("cni/10-chain.conflist"))?;
        for (_, _, _, pod_id) in &pods {
            node.asks(&["stopp", pod_id])?;
            node.asks(&["rmp", pod_id])?;
        }
        let rules = command("iptables-save", [""; 0]).ok()?.stdout;
        for mark in ["10.98.0.2", "10.98.0.3", "18080", "18081"] {
            ensure!(!rules.contains(mark), "{mark} is left in\n{rules}");
        }
        let left = leases(node, "chain");
        ensure!(left.is_empty(), "leases are left: {left:?}");
        Ok(())
    });
    tidy();
    tested
}

/// Of what is let through at once nothing is known but that it is less than 2^32 bits: so much more
/// than that goes through that the rest takes three seconds, on any machine.
fn a_bandwidth_is_held() -> Result {
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
        wait_for("the sink to listen", || {
            Ok(std::net::TcpStream::connect(address).ok().map(|_| ()))
        })?;
        let took = pour(address, MEGABYTES).map_err(|error| error.to_string())?;
        let bits = (MEGABYTES as u64) << 23;
        let least = (bits - u64::from(u32::MAX)) as f64 / BITS_A_SECOND as f64;
        ensure!(
            took.as_secs_f64() >= least,
            "{MEGABYTES} MB took {took:?}, at {BITS_A_SECOND} bits a second at least {least} s"
        );
        Ok(())
    });
    tidy();
    tested
}

fn a_pod_has_an_interface_of_each_configuration_in_use() -> Result {
    let tested = on_a_node(|node| {
        fs::write(
            node.join("config.d/50-cni.toml"),
            "[cni]\nmax_conf_num = 2\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        // By their names, not by their age.
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
            // Those of the first one are the pod's; the others it has besides.
            let mut all = addresses(node, &pod_id)?;
            ensure_eq!(all.len(), 1, "addresses in the status, {all:?}");
            let eth1 = [
                "exec", "-s", &id, "ip", "-4", "-o", "address", "show", "eth1",
            ];
            let shown = node.asks(&eth1)?;
            let mut words = shown.split_whitespace().skip_while(|word| *word != "inet");
            let address = words.nth(1).and_then(|word| word.split('/').next());
            all.push(
                address
                    .ok_or(format!("no address in {shown:?}"))?
                    .to_owned(),
            );
            ensure!(
                all[0].starts_with("10.91.0.") && all[1].starts_with("10.92.0."),
                "the addresses are {all:?}"
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
            "the first"
        );
        let more: Vec<&Value> = network["interfaces"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|one| &one["name"])
            .collect();
        ensure_eq!(more, [&json!("eth1")], "the others");
        node.asks(&["rmp", "--all", "--force"])?;
        for network in ["first", "second", "third"] {
            let left = leases(node, network);
            ensure!(left.is_empty(), "leases of {network} are left: {left:?}");
        }
        Ok(())
    });
    // The first one's goes with the node.
    let _ = command("ip", ["link", "delete", "cni2"]).end();
    tidy();
    tested
}

fn pods_reach_each_other_by_ptp() -> Result {
    let tested = on_a_node(|node| {
        let ipam = ipam(node, &["10.97.0.0/24"]);
        // A single plugin's configuration, of an old version.
        let single = json!({
            "cniVersion": "0.3.1", "name": "pairs", "type": "ptp", "ipam": ipam,
        });
        write(node, "20-pairs.conf", &single.to_string())?;
        // By its name a later one: it does not count.
        write(node, "30-broken.conflist", "{ not JSON")?;
        node.pull(WEB)?;
        let mut pods = Vec::new();
        for name in ["here", "there"] {
            let pod = node.pod(name);
            let pod_id = node.runp(&pod)?;
            let all = addresses(node, &pod_id)?;
            ensure!(all[0].starts_with("10.97.0."), "the addresses are {all:?}");
            pods.push((web(node, &pod, &pod_id)?, all[0].clone()));
        }
        fetch_inside(node, &pods[0].0, &pods[1].1, 5000)?;
        fetch(&pods[0].1, 5000)?;
        node.asks(&["rmp", "--all", "--force"])?;
        let left = leases(node, "pairs");
        ensure!(left.is_empty(), "leases are left: {left:?}");
        Ok(())
    });
    tidy();
    tested
}

fn pods_reach_each_other_by_macvlan() -> Result {
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
            ensure_eq!(shown.trim(), mac, "the address of its interface");
            pods.push((id, addresses(node, &pod_id)?[0].clone()));
        }
        node.asks(&[
            "exec", "-s", &pods[0].0, "ping", "-c", "1", "-W", "20", &pods[1].1,
        ])?;
        node.asks(&["rmp", "--all", "--force"])?;
        let left = leases(node, "wire");
        ensure!(left.is_empty(), "leases are left: {left:?}");
        ensure!(
            Path::new("/sys/class/net/wire0").exists(),
            "the parent is gone"
        );
        Ok(())
    });
    command("ip", ["link", "delete", "wire0"]).ok()?;
    tidy();
    tested
}
