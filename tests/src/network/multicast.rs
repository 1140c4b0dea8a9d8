//! Tests of multicast in the embedded network. A pod must not determine which pods receive the frames
//! to a multicast address. Neighbour solicitations of IPv6 are such frames.

use std::fs::File;
use std::net::Ipv6Addr;
use std::os::fd::AsFd;

use serde_json::Value;

use crate::support::frames::{IPV6, ethernet, link_local_of, mac_of_pod, multicast_query};
use crate::support::inside::traffic::send_frame;
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::network_view::{in_a_new_network, ip, within};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::pod_network::{addresses, allow_spoofing};
use crate::{ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_pod_that_sends_multicast_queries_does_not_cut_off_another_pod,
        A_NODE,
        Need::RrunCri,
        SNOOPING
    ),
    test!(
        the_server_switches_multicast_snooping_off_when_it_starts,
        A_NODE,
        Need::RrunCri,
        SNOOPING
    ),
];

/// Multicast snooping of bridges, and IPv6.
const SNOOPING: Need = Need::Works(
    "multicast snooping and IPv6",
    "test -e /proc/sys/net/ipv6/conf/all/accept_ra && ip link add rrunsnoop type bridge mcast_snooping 1; \
     ip -details link show rrunsnoop | grep -q 'mcast_snooping 1'; found=$?; \
     ip link delete rrunsnoop; exit $found",
);

const BRIDGE: &str = "rrun0";

/// A pod with a container that waits.
struct Pod {
    container: String,
    network: File,
    v6: Ipv6Addr,
    /// The pod's IPv4 address, from which its hardware address is derived.
    v4: std::net::Ipv4Addr,
}

impl Pod {
    fn new(node: &Node, name: &str) -> Result<Self> {
        node.pull(BUSYBOX)?;
        let pod = node.pod(name);
        let pod_id = node.runp(&pod)?;
        let container = node.run(&pod_id, &pod, &node.container(name, &["sleep", "600"]))?;
        let all = addresses(node, &pod_id)?;
        let [v4, v6] = all.as_slice() else {
            return Err(format!("the pod does not have two addresses: {all:?}").into());
        };
        Ok(Pod {
            network: File::open(format!("/proc/{}/ns/net", node.pid(&container)?))?,
            container,
            v6: v6.parse()?,
            v4: v4.parse()?,
        })
    }

    /// Sends a general query, and a query for the group of the victim's address. Only the bridge and
    /// no other pod receives the queries.
    fn query(&self, victim: &Pod) -> Result {
        let mac = mac_of_pod(self.v4);
        let nobody = [0x33, 0x33, 0, 0, 0, 0x99];
        let mut group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).octets();
        group[13..].copy_from_slice(&victim.v6.octets()[13..]);
        let queries = [
            (Ipv6Addr::UNSPECIFIED, "ff02::1".parse()?),
            (group.into(), group.into()),
        ];
        within(self.network.as_fd(), || {
            for (group, to) in queries {
                let query = multicast_query(link_local_of(mac), to, group);
                send_frame("eth0", &ethernet(nobody, mac, IPV6, &query))?;
            }
            Ok(())
        })
    }
}

fn snoops() -> Result<bool> {
    let links: Vec<Value> =
        serde_json::from_str(&ip(&format!("-details -json link show {BRIDGE}"))?)?;
    let snooping = links
        .first()
        .and_then(|link| link.pointer("/linkinfo/info_data/mcast_snooping"));
    let snooping = snooping.and_then(Value::as_i64);
    Ok(snooping.ok_or(format!(
        "the bridge has no property mcast_snooping: {links:?}"
    ))? != 0)
}

fn a_pod_that_sends_multicast_queries_does_not_cut_off_another_pod() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            // Without the protection against forged addresses, fewer frames are filtered.
            allow_spoofing(node)?;
            let attacker = Pod::new(node, "attacker")?;
            let victim = Pod::new(node, "victim")?;
            let witness = Pod::new(node, "witness")?;
            // The kernel of a new pod reports its groups during the first seconds. The bridge can
            // forget a group only after the last report.
            for _ in 0..5 {
                attacker.query(&victim)?;
                std::thread::sleep(std::time::Duration::from_secs(1));
                ip(&format!("-6 neighbor flush dev {BRIDGE}"))?;
                within(witness.network.as_fd(), || {
                    ip("-6 neighbor flush dev eth0").map(drop)
                })?;
                let address = victim.v6.to_string();
                let from_pod = [
                    "exec",
                    "-s",
                    &witness.container,
                    "ping",
                    "-c",
                    "3",
                    &address,
                ];
                node.asks(&from_pod)?;
            }
            Ok(())
        })
    })
}

fn the_server_switches_multicast_snooping_off_when_it_starts() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            Pod::new(node, "first")?;
            ip(&format!("link set {BRIDGE} type bridge mcast_snooping 1"))?;
            node.terminate_server()?;
            node.start_server()?;
            ensure_eq!(
                snoops()?,
                false,
                "whether the bridge snoops after a restart"
            );
            Ok(())
        })
    })
}
