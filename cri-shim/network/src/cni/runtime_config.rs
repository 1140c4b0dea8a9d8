//! The data that CNI plugins receive about a pod. The data consists of CNI_ARGS and the capability
//! arguments (`runtimeConfig`). The format of the data follows CONVENTIONS.md of the CNI project.
//! The names of the capabilities are the names that containerd uses.

use std::collections::BTreeMap;

use rrun_proto::v1::{PodSandboxConfig, PortMapping, Protocol};
use serde_json::{Map, Value, json};

use crate::error::NetworkError;
use crate::host_ports::{self, Listener};
use rrun_calls::error::{Error, Result};

/// The annotations for the bandwidth limits of a pod, in bits per second.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// The range of bandwidth limits that kubelet accepts, in bits per second.
const BANDWIDTH: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// The annotations for the hardware address and for the IP addresses of the pod's interface.
pub(super) const MAC: &str = "io.rrun/mac";
pub(super) const IPS: &str = "io.rrun/ips";

/// The name of the capability argument with all annotations of the pod.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// Returns the value of CNI_ARGS for a pod.
pub(super) fn arguments(pod: &str, config: &PodSandboxConfig) -> Result<String> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let pairs = [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", &metadata.namespace),
        ("K8S_POD_NAME", &metadata.name),
        ("K8S_POD_INFRA_CONTAINER_ID", pod),
        ("K8S_POD_UID", &metadata.uid),
    ];
    let mut all = Vec::new();
    for (key, value) in pairs {
        if value.contains([';', '=', '\0']) {
            return Err(Error::invalid(format!(
                "the pod's metadata contains {value:?}, which CNI_ARGS ({key}) cannot represent"
            )));
        }
        all.push(format!("{key}={value}"));
    }
    Ok(all.join(";"))
}

/// Returns the capability arguments of a pod. `ranges` are the node's pod ranges.
pub(super) fn capabilities(
    config: &PodSandboxConfig,
    ranges: &[String],
) -> Result<Map<String, Value>> {
    let mut all = Map::new();
    let ports: Vec<Value> = config.port_mappings.iter().filter_map(port).collect();
    if !ports.is_empty() {
        all.insert("portMappings".to_owned(), ports.into());
    }
    if let Some(bandwidth) = bandwidth(&config.annotations)? {
        all.insert("bandwidth".to_owned(), bandwidth);
    }
    if let Some(dns) = &config.dns_config {
        let dns = json!({
            "servers": dns.servers, "searches": dns.searches, "options": dns.options,
        });
        all.insert("dns".to_owned(), dns);
    }
    let parent = config.linux.as_ref().map(|linux| &linux.cgroup_parent);
    if let Some(parent) = parent.filter(|parent| !parent.is_empty()) {
        all.insert("cgroupPath".to_owned(), parent.as_str().into());
    }
    if !config.annotations.is_empty() {
        all.insert(ANNOTATIONS.to_owned(), json!(config.annotations));
    }
    if let Some(mac) = config.annotations.get(MAC) {
        if !is_mac(mac) {
            return Err(annotation(
                MAC,
                mac,
                "a hardware address such as 02:00:00:00:00:01",
            ));
        }
        all.insert("mac".to_owned(), mac.as_str().into());
    }
    if let Some(text) = config.annotations.get(IPS) {
        let ips: Vec<&str> = text.split(',').map(str::trim).collect();
        if !ips.iter().all(|ip| is_ip(ip)) {
            return Err(annotation(
                IPS,
                text,
                "a comma-separated list of IP addresses",
            ));
        }
        all.insert("ips".to_owned(), json!(ips));
    }
    if !ranges.is_empty() {
        // Each range is a separate set, because a plugin assigns one address from each set.
        let sets: Vec<Value> = ranges
            .iter()
            .map(|range| json!([{ "subnet": range }]))
            .collect();
        all.insert("ipRanges".to_owned(), sets.into());
    }
    Ok(all)
}

/// Returns an error if the server itself listens at an address of a host port. The plugins would
/// forward the connections of the server's clients to the pod.
pub(super) fn check_listeners(config: &PodSandboxConfig, listeners: &[Listener]) -> Result<()> {
    for port in config
        .port_mappings
        .iter()
        .filter_map(host_ports::for_plugins)
    {
        if let Some(listener) = listeners.iter().find(|listener| listener.shares(&port)) {
            return Err(NetworkError::of_listener(port, listener).into());
        }
    }
    Ok(())
}

/// Returns the numbers of the TCP host ports in the capability arguments of a pod.
pub(super) fn tcp_ports(capabilities: &Map<String, Value>) -> Vec<u16> {
    let ports = capabilities.get("portMappings").and_then(Value::as_array);
    let tcp = ports
        .into_iter()
        .flatten()
        .filter(|port| port["protocol"] == "tcp");
    tcp.filter_map(|port| port["hostPort"].as_u64()?.try_into().ok())
        .collect()
}

fn port(mapping: &PortMapping) -> Option<Value> {
    if mapping.host_port <= 0 {
        return None;
    }
    let protocol = match mapping.protocol() {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    Some(json!({
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": protocol,
        "hostIP": mapping.host_ip,
    }))
}

fn annotation(name: &str, value: &str, expected: &str) -> Error {
    Error::invalid(format!(
        "the pod's annotation {name} is {value:?}; it has to be {expected}"
    ))
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    parts.len() == 6
        && parts
            .iter()
            .all(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn is_ip(text: &str) -> bool {
    let address = text.split_once('/').map_or(text, |(address, _)| address);
    address.parse::<std::net::IpAddr>().is_ok()
}

fn bandwidth(annotations: &BTreeMap<String, String>) -> Result<Option<Value>> {
    let mut all = Map::new();
    for (name, rate, burst) in [
        (INGRESS, "ingressRate", "ingressBurst"),
        (EGRESS, "egressRate", "egressBurst"),
    ] {
        let Some(text) = annotations.get(name) else {
            continue;
        };
        let expected = "bits per second from 1k to 1P, such as 10M";
        let bits = quantity(text).filter(|bits| BANDWIDTH.contains(bits));
        let bits = bits.ok_or_else(|| annotation(name, text, expected))?;
        all.insert(rate.to_owned(), bits.into());
        // The burst is the largest possible number, as in containerd and kubelet. Only the plugin
        // then limits the burst.
        all.insert(burst.to_owned(), u32::MAX.into());
    }
    Ok((!all.is_empty()).then_some(Value::Object(all)))
}

/// Parses a Kubernetes quantity, such as `1.5Gi`, `100k` or `1e6`, and rounds it up to an integer.
/// Returns `None` if the text is not a valid quantity.
fn quantity(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, suffix) = text.split_at(end.unwrap_or(text.len()));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || digits.len() > 18 {
        return None;
    }
    let value: u128 = digits.parse().ok()?;
    let binary = |power: u32| Some((1u128 << (10 * power), 0));
    let (factor, tens) = match suffix {
        "" => Some((1, 0)),
        "n" => Some((1, -9)),
        "u" => Some((1, -6)),
        "m" => Some((1, -3)),
        "k" => Some((1, 3)),
        "M" => Some((1, 6)),
        "G" => Some((1, 9)),
        "T" => Some((1, 12)),
        "P" => Some((1, 15)),
        "E" => Some((1, 18)),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?.parse::<i32>().ok()?;
            (-18..=18).contains(&exponent).then_some((1, exponent))
        }
    }?;
    let tens = tens - i32::try_from(fraction.len()).ok()?;
    let value = value.checked_mul(factor)?;
    let power = 10u128.checked_pow(tens.unsigned_abs())?;
    let value = if tens >= 0 {
        value.checked_mul(power)?
    } else {
        value.div_ceil(power)
    };
    u64::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::{DnsConfig, LinuxPodSandboxConfig, PodSandboxMetadata};

    use super::*;

    #[test]
    fn quantities_are_parsed_in_the_notation_of_kubernetes() {
        let right = [
            ("10M", 10_000_000),
            ("1.5k", 1500),
            ("1Ki", 1024),
            ("0.5Gi", 1 << 29),
            ("1e6", 1_000_000),
            ("2E3", 2000),
            ("1500m", 2),
            (".5k", 500),
            ("7", 7),
        ];
        for (text, value) in right {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for text in [
            "",
            "k",
            "-1",
            "1kk",
            "1 k",
            "1e",
            "1e99",
            "9999999999999999999",
            "1..2",
        ] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn plugins_get_the_same_data_about_a_pod_as_with_containerd() -> Result<()> {
        let annotations = BTreeMap::from([(INGRESS.to_owned(), "1M".to_owned())]);
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "web".into(),
                uid: "u1".into(),
                namespace: "shop".into(),
                attempt: 0,
            }),
            port_mappings: vec![
                PortMapping {
                    protocol: Protocol::Udp.into(),
                    container_port: 53,
                    host_port: 5353,
                    host_ip: "127.0.0.1".into(),
                },
                PortMapping {
                    container_port: 80,
                    ..Default::default()
                },
            ],
            dns_config: Some(DnsConfig {
                servers: vec!["192.0.2.1".into()],
                ..Default::default()
            }),
            annotations: annotations.clone(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/p".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            arguments("abc", &config)?,
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;\
             K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u1"
        );
        assert_eq!(
            Value::Object(capabilities(&config, &["10.1.0.0/24".to_owned()])?),
            json!({
                "portMappings": [
                    {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}
                ],
                "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": u32::MAX},
                "dns": {"servers": ["192.0.2.1"], "searches": [], "options": []},
                "cgroupPath": "/kubepods/p",
                "io.kubernetes.cri.pod-annotations": annotations,
                "ipRanges": [[{"subnet": "10.1.0.0/24"}]],
            })
        );
        Ok(())
    }

    #[test]
    fn a_host_port_of_the_servers_own_listener_is_refused() -> Result<()> {
        let own = Listener {
            key: "stream_listen",
            address: ([127, 0, 0, 1], 9000).into(),
        };
        for (protocol, host_port, host_ip, expected) in [
            (0, 9000, "", true),
            (0, 9000, "127.0.0.1", true),
            (0, 9000, "localhost", true),
            (7, 9000, "", true),
            (0, 9000, "192.0.2.1", false),
            (0, 9001, "", false),
            (1, 9000, "", false),
        ] {
            let config = PodSandboxConfig {
                port_mappings: vec![PortMapping {
                    protocol,
                    container_port: 80,
                    host_port,
                    host_ip: host_ip.into(),
                }],
                ..Default::default()
            };
            let refused = check_listeners(&config, &[own]);
            assert_eq!(
                refused.is_err_and(|error| error.sentence().contains("stream_listen")),
                expected,
                "{protocol} {host_port} {host_ip}"
            );
            let known = tcp_ports(&capabilities(&config, &[])?);
            assert_eq!(
                known.first() == Some(&9000),
                protocol != 1 && host_port == 9000
            );
        }
        Ok(())
    }

    #[test]
    fn invalid_annotations_are_refused_with_their_names() {
        for (name, value) in [
            (INGRESS, "fast"),
            (EGRESS, "10"),
            (MAC, "xx"),
            (IPS, "1.2.3"),
        ] {
            let config = PodSandboxConfig {
                annotations: BTreeMap::from([(name.to_owned(), value.to_owned())]),
                ..Default::default()
            };
            let refused = capabilities(&config, &[]);
            assert!(
                refused.is_err_and(|error| error.sentence().contains(name)),
                "the annotation {name} with the invalid value {value:?} was accepted"
            );
        }
        let mut config = PodSandboxConfig::default();
        config.metadata.get_or_insert_default().name = "a;b=c".into();
        assert!(arguments("p", &config).is_err());
    }
}
