//! The results of ADD. See the CNI specification, section 5. For each network, the server stores
//! the result of the last plugin.

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::configuration::{Version, shown};

/// Converts a plugin's result to the format of the network's CNI version. The server passes the
/// converted result as prevResult to the next plugin, and to CHECK and DEL. The formats of the
/// supported CNI versions differ only in `ips[].version`, which version 1.0.0 of the specification
/// removed.
pub(super) fn in_version(mut result: Value, version: Version) -> Value {
    let Some(all) = result.as_object_mut() else {
        return result;
    };
    all.insert("cniVersion".to_owned(), version.as_str().into());
    let ips = all.get_mut("ips").and_then(Value::as_array_mut);
    for ip in ips.into_iter().flatten().filter_map(Value::as_object_mut) {
        if version >= Version::V1_0_0 {
            ip.remove("version");
        } else if !ip.contains_key("version") {
            let family = match address(ip) {
                Some(IpAddr::V6(_)) => "6",
                _ => "4",
            };
            ip.insert("version".to_owned(), family.into());
        }
    }
    result
}

fn address(ip: &Map<String, Value>) -> Option<IpAddr> {
    let text = ip.get("address")?.as_str()?;
    let (address, _prefix) = text.split_once('/')?;
    address.parse().ok()
}

/// Returns the addresses of the pod's `interface`, beginning with the primary address. The primary
/// address is the first IPv4 address, or the first address if there is no IPv4 address. By default,
/// containerd chooses the same primary address. If the result does not specify the interface of an
/// address, the address counts as an address of `interface`.
pub(super) fn addresses(result: &Value, interface: &str) -> Result<Vec<IpAddr>, String> {
    let none = Vec::new();
    let ips = result.get("ips").and_then(Value::as_array).unwrap_or(&none);
    let mut addresses = Vec::new();
    for ip in ips {
        let read = ip.as_object().and_then(address);
        let read = read.ok_or_else(|| {
            let ip = shown(ip);
            format!("the field ips of the result contains {ip}, which is not an address")
        })?;
        if is_of(result, ip, interface)? {
            addresses.push(read);
        }
    }
    if let Some(at) = addresses.iter().position(IpAddr::is_ipv4) {
        let primary = addresses.remove(at);
        addresses.insert(0, primary);
    }
    Ok(addresses)
}

fn is_of(result: &Value, ip: &Value, interface: &str) -> Result<bool, String> {
    let Some(index) = ip.get("interface").filter(|index| !index.is_null()) else {
        return Ok(true);
    };
    // A plugin that reports no interfaces can set the field `interface` of an address to a negative
    // index. An address with a negative index counts as an address without an interface.
    if index.as_i64().is_some_and(|index| index < 0) {
        return Ok(true);
    }
    let at = index.as_u64().and_then(|index| usize::try_from(index).ok());
    let named = at.and_then(|at| result.get("interfaces")?.get(at)?.get("name")?.as_str());
    match named {
        Some(name) => Ok(name == interface),
        None => Err(format!(
            "{} refers to the interface {}, which the result does not contain",
            shown(ip),
            shown(index)
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_ipv4_address_of_the_pods_interface_is_the_primary_one() {
        let result = json!({
            "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/n"}],
            "ips": [
                {"address": "fd00::2/64", "interface": 1},
                {"address": "10.0.0.1/24", "interface": 0},
                {"address": "10.0.0.2/24", "interface": 1},
                {"address": "10.0.0.3/24"},
            ],
        });
        let addresses = addresses(&result, "eth0").map(|all| {
            let text = all.iter().map(ToString::to_string);
            text.collect::<Vec<_>>().join(" ")
        });
        assert_eq!(addresses.as_deref(), Ok("10.0.0.2 fd00::2 10.0.0.3"));
    }

    #[test]
    fn an_invalid_address_is_refused() {
        for ips in [
            json!([{"address": "10.0.0.2"}]),
            json!([3]),
            json!([{"address": "10.0.0.2/24", "interface": 7}]),
        ] {
            assert!(addresses(&json!({"ips": ips}), "eth0").is_err(), "{ips}");
        }
        assert_eq!(addresses(&json!({}), "eth0"), Ok(Vec::new()));
    }

    #[test]
    fn a_result_is_converted_to_the_networks_version() {
        let result = json!({"cniVersion": "1.0.0", "ips": [{"address": "fd00::2/64"}]});
        let old = in_version(result, Version::V0_4_0);
        assert_eq!(
            old,
            json!({"cniVersion": "0.4.0", "ips": [{"address": "fd00::2/64", "version": "6"}]})
        );
        let new = in_version(old, Version::V1_1_0);
        assert_eq!(
            new,
            json!({"cniVersion": "1.1.0", "ips": [{"address": "fd00::2/64"}]})
        );
    }
}
