//! The namespaces of a random config.json.

use serde_json::{Value, json};

use super::{Choices, HOLDER, Part, push, set};

pub(super) const PARTS: &[Part] = &[(20, namespaces), (15, user_namespace)];

/// Removes namespaces, or replaces them by namespaces of the holder.
fn namespaces(dice: &mut Choices, config: &mut Value) {
    let Some(Value::Array(all)) = config.pointer_mut("/linux/namespaces") else {
        return;
    };
    all.retain(|namespace| {
        if namespace["type"] == "mount" {
            !dice.errs(20)
        } else {
            !dice.one_in(4)
        }
    });
    for namespace in all.iter_mut() {
        let name = match namespace["type"].as_str() {
            Some("network") => "net",
            Some(kind @ ("uts" | "ipc" | "cgroup")) => kind,
            _ => continue,
        };
        if dice.one_in(5) {
            let usual = format!("/proc/{HOLDER}/ns/{name}");
            let odd = [
                "/no/such".to_owned(),
                format!("/proc/{HOLDER}/ns/mnt"),
                format!("/proc/self/ns/{name}"),
            ];
            let odd = odd.each_ref().map(String::as_str);
            let path = dice.either(&[usual.as_str()], &odd);
            namespace["path"] = json!(path);
        }
    }
    if dice.one_in(4) {
        all.push(json!({ "type": "time" }));
    }
    if dice.errs(8) {
        all.push(json!({ "type": dice.pick(&["pid", "uts", "no-such", ""]) }));
    }
}

fn user_namespace(dice: &mut Choices, config: &mut Value) {
    push(config, "/linux", "namespaces", json!({ "type": "user" }));
    let host = dice.pick(&[0, 100_000, 100_000, 1_000_000]);
    let size = dice.either(&[65536, 65536, u32::MAX - host], &[1, 1000]);
    let whole = json!([{ "containerID": 0, "hostID": host, "size": size }]);
    let split = json!([
        { "containerID": 0, "hostID": host, "size": 1 },
        { "containerID": 1, "hostID": host + 5, "size": 65535 },
    ]);
    let overlapping = json!([
        { "containerID": 0, "hostID": host, "size": 10 },
        { "containerID": 5, "hostID": host + 100, "size": 10 },
    ]);
    let usual = [&whole, &whole, &whole, &split];
    let uids = dice.either(&usual, &[&overlapping, &json!([])]).clone();
    let gids = if dice.errs(6) {
        dice.pick(&[&whole, &split, &overlapping, &json!([])])
            .clone()
    } else {
        uids.clone()
    };
    set(config, "/linux", "uidMappings", uids);
    set(config, "/linux", "gidMappings", gids);
}

/// Changes what a runtime must refuse because of the namespaces. A file without mistakes needs this,
/// because the parts of the file do not depend on each other.
pub(super) fn fit(config: &mut Value) {
    if has(config, "user") {
        fit_user_namespace(config);
    }
    let missing = |kind| !has(config, kind);
    let (uts, ipc, network) = (missing("uts"), missing("ipc"), missing("network"));
    if let Some(Value::Object(keys)) = config.pointer_mut("/linux/sysctl") {
        keys.retain(|key, _| match key {
            _ if key.starts_with("net") => !network,
            _ if key.ends_with("name") => !uts,
            _ => !ipc,
        });
    }
    if let Value::Object(config) = config
        && uts
    {
        config.remove("hostname");
        config.remove("domainname");
    }
}

fn has(config: &Value, kind: &str) -> bool {
    let all = config["linux"]["namespaces"].as_array();
    all.is_some_and(|all| all.iter().any(|namespace| namespace["type"] == kind))
}

/// Gives the container all namespaces that the mounts need in a user namespace, maps all users of
/// the process, and removes devices and mount points that the container's root cannot create.
fn fit_user_namespace(config: &mut Value) {
    for kind in ["pid", "network", "ipc", "mount"] {
        if !has(config, kind) {
            push(config, "/linux", "namespaces", json!({ "type": kind }));
        }
    }
    let namespaces = config.pointer_mut("/linux/namespaces");
    for namespace in namespaces
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Value::Object(namespace) = namespace {
            namespace.remove("path");
        }
    }
    let is_large = |id: &Value| id.as_u64() >= Some(65536);
    let user = &config["process"]["user"];
    let groups = user["additionalGids"].as_array();
    let many = groups.is_some_and(|all| all.iter().any(is_large));
    if many || is_large(&user["uid"]) || is_large(&user["gid"]) {
        let all = json!([{ "containerID": 0, "hostID": 0, "size": u32::MAX }]);
        set(config, "/linux", "uidMappings", all.clone());
        set(config, "/linux", "gidMappings", all);
    }
    if let Some(Value::Object(linux)) = config.get_mut("linux") {
        linux.remove("devices");
    }
    if let Some(Value::Array(mounts)) = config.get_mut("mounts") {
        mounts.retain(|mount| {
            let point = mount["destination"].as_str();
            !point.is_some_and(|point| point.starts_with("/new"))
        });
    }
}
