//! Tests of published vulnerabilities of CNI plugins that no other file covers. docs/security.md
//! lists the vulnerabilities.

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::machine::{Result, Running, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::support::pod_network::mapped;
use crate::{ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[test!(
    cve_2025_67499_a_host_port_takes_no_connection_to_another_host,
    A_NODE,
    Need::RrunCri
)];

/// A host in another network, whose neighbour is the node. A server on the host listens on TCP port
/// 8090. Dropping the value stops the server, and so removes the host.
struct OtherHost(Running);

impl OtherHost {
    const ADDRESS: &str = "203.0.113.9";

    fn new() -> Result<Self> {
        let inside = std::env::temp_dir().join("rrun-e2e-inside");
        let server = command("unshare", ["--net", "env", "RRUN_E2E_INSIDE=1"])
            .arg(inside)
            .args(["net", "serve", "8090", "other"])
            .start()?;
        let pid = server.pid();
        let namespace = || std::fs::read_link(format!("/proc/{pid}/ns/net"));
        let of_node = std::fs::read_link("/proc/self/ns/net")?;
        wait_for("the server to enter its network namespace", || {
            Ok((namespace()? != of_node).then_some(()))
        })?;
        let other = OtherHost(server);
        for line in [
            format!("ip link add near7 type veth peer name far7 netns {pid}"),
            "ip address add 203.0.113.1/24 dev near7".to_owned(),
            "ip link set near7 up".to_owned(),
            format!("nsenter --net=/proc/{pid}/ns/net ip address add 203.0.113.9/24 dev far7"),
            format!("nsenter --net=/proc/{pid}/ns/net ip link set far7 up"),
        ] {
            let mut words = line.split(' ');
            command(words.next().unwrap_or_default(), words).ok()?;
        }
        Ok(other)
    }
}

impl Drop for OtherHost {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGKILL);
        let _ = command("ip", ["link", "delete", "near7"]).end();
    }
}

/// In CVE-2025-67499, the plugin portmap redirected every connection to the number of a host port,
/// even if another host was its destination.
fn cve_2025_67499_a_host_port_takes_no_connection_to_another_host() -> Result {
    on_a_node(|node| {
        let _other = OtherHost::new()?;
        node.pull(BUSYBOX)?;
        let ports = json!([
            { "host_port": 8090, "container_port": 5000 },
            { "host_port": 8090, "container_port": 5000, "host_ip": OtherHost::ADDRESS, "protocol": 1 },
        ]);
        for (name, ports) in [("taker", ports), ("client", json!([]))] {
            let pod = mapped(node, name, ports);
            let pod_id = node.runp(&pod)?;
            let serve = node.container(name, &["/inside", "net", "serve", "5000", name]);
            let id = node.run(&pod_id, &pod, &serve)?;
            let address = format!("{}:8090", OtherHost::ADDRESS);
            let answer = wait_for(&format!("the server at {address} to answer"), || {
                let ask = ["exec", "-s", &id, "/inside", "net", "ask", &address];
                let output = node.crictl(&ask).end()?;
                Ok((output.code == 0).then(|| output.text().to_owned()))
            })?;
            ensure_eq!(
                answer,
                "other 203.0.113.1",
                "the answer to a connection from the pod {name} to another host"
            );
        }
        Ok(())
    })
}
