//! Tests of the host ports and of the IPv4 and IPv6 addresses in the embedded network. The tests
//! send real traffic.

use serde_json::json;

use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, METRICS, Node, WEB, is_rrun, on_a_node};
use crate::support::pod_network::{Uplink, addresses, mapped, node_fetches, pod_fetches, web};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_host_port_is_reachable_from_the_node_and_from_pods, A_NODE),
    test!(a_host_port_belongs_to_one_pod_only, A_NODE, Need::Rrun),
    test!(
        host_ports_work_after_the_server_is_killed_or_the_rules_are_flushed,
        A_NODE,
        Need::Rrun
    ),
    test!(
        the_servers_own_listeners_take_precedence_over_host_ports,
        A_NODE,
        Need::Rrun
    ),
    test!(
        the_server_listens_for_streams_on_a_port_of_no_pod,
        A_NODE,
        Need::Rrun
    ),
    test!(pods_have_an_ipv4_and_an_ipv6_address, A_NODE, Need::Rrun),
    test!(
        the_error_for_a_full_address_range_contains_the_range,
        A_NODE,
        Need::Rrun
    ),
];

fn a_host_port_is_reachable_from_the_node_and_from_pods() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        node.pull(WEB)?;
        let ports = json!([
            { "host_port": 8090, "container_port": 5000 },
            { "host_port": 8091, "container_port": 5000, "host_ip": Uplink::V4 },
            { "host_port": 8092, "container_port": 53, "protocol": 1 },
        ]);
        let (pod_id, own) = web(node, &mapped(node, "mapped", ports))?;
        let (_, other) = web(node, &node.pod("other"))?;
        for host in ["127.0.0.1", Uplink::V4] {
            node_fetches(&format!("http://{host}:8090/"))?;
        }
        node_fetches(&format!("http://{}:8091/", Uplink::V4))?;
        let refused = command(
            "curl",
            ["-fsS", "--max-time", "3", "http://127.0.0.1:8091/"],
        );
        ensure!(
            refused.end()?.code != 0,
            "a host port that was requested for one address is reachable at another address"
        );
        for client in [&own, &other] {
            for port in ["8090", "8091"] {
                pod_fetches(node, client, &format!("http://{}:{port}/", Uplink::V4))?;
            }
        }
        if is_rrun() {
            node_fetches(&format!("http://[{}]:8090/", Uplink::V6))?;
            for client in [&own, &other] {
                pod_fetches(node, client, &format!("http://[{}]:8090/", Uplink::V6))?;
            }
        }
        // A UDP packet to the host port at 127.0.0.1 gets an answer from the pod.
        let listen = [
            "exec",
            "-s",
            &own,
            "sh",
            "-c",
            "echo answer | timeout 20 nc -u -l -p 53",
        ];
        let listener = node.crictl(&listen).start()?;
        wait_for("an answer from the UDP host port", || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
            socket.set_read_timeout(Some(std::time::Duration::from_secs(1)))?;
            socket.send_to(b"question", "127.0.0.1:8092")?;
            let mut got = [0; 64];
            let answered = socket.recv(&mut got).is_ok_and(|n| n > 0);
            Ok((answered && got.starts_with(b"answer")).then_some(()))
        })?;
        drop(listener);
        node.asks(&["stopp", &pod_id])?;
        let gone = command(
            "curl",
            ["-fsS", "--max-time", "3", "http://127.0.0.1:8090/"],
        )
        .end()?;
        ensure!(
            gone.code != 0,
            "the host port still answers after the pod was stopped"
        );
        Ok(())
    })
}

fn a_host_port_belongs_to_one_pod_only() -> Result {
    on_a_node(|node| {
        let port = |host_ip: &str, host_port: i32| json!([{ "host_port": host_port, "container_port": 80, "host_ip": host_ip }]);
        let first = node.runp(&mapped(node, "first", port("", 8090)))?;
        let mut of_the_node = mapped(node, "node", port("", 8091));
        of_the_node["linux"]["security_context"]["namespace_options"]["network"] = json!(2);
        of_the_node
            .as_object_mut()
            .and_then(|pod| pod.remove("hostname"));
        let on_node = node.runp(&of_the_node)?;
        for (host_ip, host_port, owner) in [
            ("", 8090, "default/first"),
            ("127.0.0.1", 8090, "default/first"),
            ("", 8091, "default/node"),
        ] {
            let output = node.try_runp(&mapped(node, "second", port(host_ip, host_port)))?;
            let stderr = output.told();
            ensure!(
                output.code != 0
                    && stderr.contains(&format!("TCP port {host_port}"))
                    && stderr.contains(owner),
                "the error of runp does not contain the host port and the pod that uses this port: {stderr}"
            );
        }
        let output = node.try_runp(&mapped(node, "odd", port("", 65536)))?;
        ensure!(
            output.told().contains("port_mappings[0].host_port: 65536"),
            "the error of runp does not name the invalid host port: {}",
            output.told()
        );
        for stopped in [first, on_node] {
            node.asks(&["stopp", &stopped])?;
        }
        node.runp(&mapped(node, "second", port("", 8090)))?;
        node.runp(&mapped(node, "third", port("", 8091)))?;
        Ok(())
    })
}

fn host_ports_work_after_the_server_is_killed_or_the_rules_are_flushed() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        node.pull(WEB)?;
        let ports = json!([{ "host_port": 8090, "container_port": 5000 }]);
        web(node, &mapped(node, "mapped", ports))?;
        let url = "http://127.0.0.1:8090/";
        node_fetches(url)?;
        command("nft", ["add", "table", "inet", "others"]).ok()?;
        node.kill_server()?;
        node_fetches(url)?;
        node.start_server()?;
        node_fetches(url)?;
        let tables = command("nft", ["list", "tables"]).ok()?.text().to_owned();
        ensure!(
            tables.contains("inet others"),
            "the nftables table `inet others` of another program was removed; the remaining tables: {tables}"
        );
        // The server restores flushed rules on three occasions: its own start, the start of a pod,
        // and SIGHUP.
        node.kill_server()?;
        command("nft", ["flush", "ruleset"]).ok()?;
        node.start_server()?;
        node_fetches(url)?;
        command("nft", ["flush", "ruleset"]).ok()?;
        node.runp(&node.pod("next"))?;
        node_fetches(url)?;
        command("nft", ["flush", "ruleset"]).ok()?;
        node.hang_up_server();
        node_fetches(url)
    })
}

fn the_servers_own_listeners_take_precedence_over_host_ports() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        node.pull(WEB)?;
        let port = |host_port: i32| json!({ "host_port": host_port, "container_port": 5000 });
        let ports = json!([port(8090), port(9464)]);
        let (_, web) = web(node, &mapped(node, "web", ports))?;
        ensure!(
            fetched(&format!("http://{METRICS}/metrics"))?.contains("rrun_"),
            "the node's metrics at {METRICS} are not reachable while a pod has the same host port"
        );
        node_fetches(&format!("http://{}:9464/", Uplink::V4))?;
        refuses(node, "127.0.0.1", 9464, "metrics_listen")?;

        node_fetches("http://127.0.0.1:8090/")?;
        listen_for_streams(node, "127.0.0.1:8090")?;
        serves_streams(node, &web, "127.0.0.1:8090")?;
        node_fetches(&format!("http://{}:8090/", Uplink::V4))?;
        node_fetches(&format!("http://[{}]:8090/", Uplink::V6))?;
        command("nft", ["flush", "ruleset"]).ok()?;
        node_fetches(&format!("http://{}:8090/", Uplink::V4))?;
        serves_streams(node, &web, "127.0.0.1:8090")?;

        listen_for_streams(node, "0.0.0.0:8090")?;
        for address in ["127.0.0.1:8090", &format!("{}:8090", Uplink::V4)] {
            serves_streams(node, &web, address)?;
        }
        node_fetches(&format!("http://[{}]:8090/", Uplink::V6))?;
        refuses(node, "", 8090, "stream_listen")?;
        refuses(node, Uplink::V4, 8090, "stream_listen")?;

        listen_for_streams(node, "[::]:8090")?;
        for address in [Uplink::V4, &format!("[{}]", Uplink::V6)] {
            serves_streams(node, &web, &format!("{address}:8090"))?;
        }
        refuses(node, Uplink::V6, 8090, "stream_listen")
    })
}

fn the_server_listens_for_streams_on_a_port_of_no_pod() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        let ports: Vec<i32> = (40_000..40_030).collect();
        let mapped_ports = ports
            .iter()
            .map(|port| json!({ "host_port": port, "container_port": 5000 }));
        let (_, web) = web(node, &mapped(node, "web", mapped_ports.collect()))?;
        let range = "/proc/sys/net/ipv4/ip_local_port_range";
        let before = std::fs::read_to_string(range)?;
        std::fs::write(range, "40000 40031")?;
        let restarted = node.terminate_server().and_then(|()| node.start_server());
        std::fs::write(range, before)?;
        restarted?;
        for port in ports {
            node_fetches(&format!("http://127.0.0.1:{port}/"))?;
        }
        ensure_eq!(
            node.asks(&["exec", &web, "echo", "streamed"])?.trim(),
            "streamed",
            "the output of a command that `crictl exec` runs"
        );
        Ok(())
    })
}

/// Restarts the server, which then listens for streams on `address`.
fn listen_for_streams(node: &mut Node, address: &str) -> Result {
    let file = node.join("config.d/streams.toml");
    std::fs::write(file, format!("stream_listen = {address:?}\n"))?;
    node.terminate_server()?;
    node.start_server()
}

/// Checks that the streaming server receives the connections to `address`.
fn serves_streams(node: &Node, container: &str, address: &str) -> Result {
    let answer = fetched(&format!("http://{address}/"))?;
    ensure!(
        answer.contains("this URL is invalid or has expired"),
        "the streaming server does not answer at {address}; the answer: {answer}"
    );
    ensure_eq!(
        node.asks(&["exec", container, "echo", "streamed"])?.trim(),
        "streamed",
        "the output of a command that `crictl exec` runs"
    );
    Ok(())
}

fn refuses(node: &Node, host_ip: &str, host_port: i32, key: &str) -> Result {
    let ports = json!([{ "host_port": host_port, "container_port": 5000, "host_ip": host_ip }]);
    let output = node.try_runp(&mapped(node, "refused", ports))?;
    let stderr = output.told();
    ensure!(
        output.code != 0
            && stderr.contains(&format!("TCP port {host_port}"))
            && stderr.contains(key),
        "the error of runp does not contain the host port and {key}: {stderr}"
    );
    Ok(())
}

fn fetched(url: &str) -> Result<String> {
    let got = command("curl", ["-gsS", "--max-time", "5", url]).end()?;
    Ok(got.text().to_owned())
}

fn pods_have_an_ipv4_and_an_ipv6_address() -> Result {
    let _uplink = Uplink::new()?;
    on_a_node(|node| {
        node.pull(WEB)?;
        let mut pods = Vec::new();
        for name in ["here", "there"] {
            let (pod_id, id) = web(node, &node.pod(name))?;
            pods.push((addresses(node, &pod_id)?, id));
        }
        for (addresses, _) in &pods {
            let [v4, v6] = addresses.as_slice() else {
                return Err(format!("the pod does not have two addresses: {addresses:?}").into());
            };
            node_fetches(&format!("http://{v4}:5000/"))?;
            node_fetches(&format!("http://[{v6}]:5000/"))?;
            for (_, client) in &pods {
                node.asks(&["exec", "-s", client, "ping", "-c", "1", "-W", "5", v4])?;
                node.asks(&["exec", "-s", client, "ping", "-6", "-c", "1", "-W", "5", v6])?;
                pod_fetches(node, client, &format!("http://{v4}:5000/"))?;
                pod_fetches(node, client, &format!("http://[{v6}]:5000/"))?;
            }
        }
        let (own, id) = pods.first().ok_or("the test created no pod")?;
        let hosts = node.asks(&["exec", "-s", id, "cat", "/etc/hosts"])?;
        for address in own {
            ensure!(
                hosts.contains(&format!("{address}\there")),
                "the pod's address {address} is missing in the pod's /etc/hosts, which contains: {hosts}"
            );
        }
        let link = node.asks(&["exec", "-s", id, "cat", "/sys/class/net/eth0/mtu"])?;
        ensure_eq!(
            link.trim(),
            "1400",
            "the MTU of the pod's interface, which must equal the uplink's MTU"
        );
        let shown = node.asks(&["exec", "-s", id, "ip", "-6", "address"])?;
        ensure!(
            !shown.contains("tentative"),
            "the kernel still checks whether the pod's address is a duplicate; the output of `ip -6 address`: {shown}"
        );
        Ok(())
    })
}

fn the_error_for_a_full_address_range_contains_the_range() -> Result {
    on_a_node(|node| {
        std::fs::write(
            node.join("config.d/network.toml"),
            "[network]\nrange = \"10.77.0.0/30\"\nrange6 = \"\"\n",
        )?;
        node.pull(BUSYBOX)?;
        let old = node.pod("old");
        let old_id = node.runp(&old)?;
        let old_main = node.run(&old_id, &old, &node.container("old", &["sleep", "600"]))?;
        node.terminate_server()?;
        node.start_server()?;
        let one = node.runp(&node.pod("one"))?;
        ensure_eq!(
            addresses(node, &one)?,
            ["10.77.0.2"],
            "the addresses of the pod, which must get the only free address of the range"
        );
        let full = node.try_runp(&node.pod("two"))?;
        ensure!(
            full.code != 0 && full.told().contains("10.77.0.0/30"),
            "the error of runp does not name the full address range: {}",
            full.told()
        );
        // A pod with addresses from the earlier range keeps these addresses and its routes.
        let before = addresses(node, &old_id)?;
        ensure!(
            before.len() == 2 && before[0].starts_with("10.88."),
            "the pod `old` has lost its addresses from the earlier range: {before:?}"
        );
        for address in ["10.77.0.1", "10.77.0.2"] {
            let ping = ["ping", "-c", "1", "-W", "5", address];
            node.crictl(&["exec", "-s", &old_main]).args(ping).ok()?;
        }
        node.asks(&["rmp", "--force", &one])?;
        wait_for("the only address to be free again", || {
            let again = node.try_runp(&node.pod("two"))?;
            Ok((again.code == 0).then_some(()))
        })
    })
}
