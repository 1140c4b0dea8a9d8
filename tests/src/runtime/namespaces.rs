//! Namespaces: new ones, joined ones, the runtime's own; user namespaces and their maps.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::Result;
use crate::support::needs::Test;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(each_namespace_asked_for_is_new),
    test!(each_namespace_not_asked_for_is_the_runtimes),
    test!(namespaces_are_joined_by_path),
    test!(a_joined_pid_namespace_shows_its_processes),
    test!(the_first_process_is_number_1),
    test!(a_new_network_namespace_has_loopback_up),
    test!(hostname_and_domainname_are_set),
    test!(a_user_namespace_maps_ids),
    test!(a_user_namespace_owns_the_other_namespaces),
    test!(time_offsets_or_a_plain_time_namespace),
];

/// The configuration's names and those of /proc/PID/ns.
const KINDS: &[(&str, &str)] = &[
    ("pid", "pid"),
    ("network", "net"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("mount", "mnt"),
    ("cgroup", "cgroup"),
];

fn own(kind: &str) -> Result<Value> {
    Ok(json!(fs::read_link(format!("/proc/self/ns/{kind}"))?))
}

fn each_namespace_asked_for_is_new() -> Result {
    let report = Bundle::new(&[])?.report()?;
    for (_, kind) in KINDS {
        ensure!(
            report["namespaces"][kind] != own(kind)?,
            "the {kind} namespace is the runtime's"
        );
    }
    for kind in ["user", "time"] {
        ensure_eq!(
            report["namespaces"][kind],
            own(kind)?,
            "the {kind} namespace"
        );
    }
    Ok(())
}

fn each_namespace_not_asked_for_is_the_runtimes() -> Result {
    for (name, kind) in KINDS.iter().filter(|(name, _)| *name != "mount") {
        let mut bundle = Bundle::new(&[])?;
        bundle.without_namespace(name);
        match *name {
            // What can't be had without one's own.
            "uts" => drop(bundle.without("/hostname")),
            "network" => drop(without_mount(&mut bundle, "/sys")),
            "ipc" => drop(without_mount(&mut bundle, "/dev/mqueue")),
            _ => {}
        }
        let report = bundle.report().map_err(|failed| {
            format!("without {name}: {}", failed.message().unwrap_or_default())
        })?;
        ensure_eq!(
            report["namespaces"][kind],
            own(kind)?,
            "the {kind} namespace"
        );
    }
    Ok(())
}

fn without_mount<'b>(bundle: &'b mut Bundle, destination: &str) -> &'b mut Bundle {
    if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
        // With what is mounted below it.
        all.retain(|mount| {
            !mount["destination"]
                .as_str()
                .unwrap_or_default()
                .starts_with(destination)
        });
    }
    bundle
}

fn namespaces_are_joined_by_path() -> Result {
    let first = Bundle::new(&["sleep", "600"])?;
    first.start()?;
    let pid = first.pid()?;
    let mut second = Bundle::new(&[])?;
    for (name, kind) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
        second.without_namespace(name);
        let path = format!("/proc/{pid}/ns/{kind}");
        second.add("/linux/namespaces", json!({ "type": name, "path": path }));
    }
    second.without("/hostname");
    let report = second.report()?;
    for kind in ["net", "ipc", "uts"] {
        let there = fs::read_link(format!("/proc/{pid}/ns/{kind}"))?;
        ensure_eq!(
            report["namespaces"][kind],
            json!(there),
            "the {kind} namespace"
        );
    }
    ensure_eq!(
        report["hostname"],
        "rrun-e2e",
        "host name of the joined namespace"
    );
    first.end()?;
    Ok(())
}

fn a_joined_pid_namespace_shows_its_processes() -> Result {
    let first = Bundle::new(&["sleep", "600"])?;
    first.start()?;
    let mut second = Bundle::new(&["cat", "/proc/1/cmdline"])?;
    second.without_namespace("pid");
    let path = format!("/proc/{}/ns/pid", first.pid()?);
    second.add("/linux/namespaces", json!({ "type": "pid", "path": path }));
    let output = second.run()?;
    ensure_eq!(
        output.stdout,
        "/bin/inside\0sleep\x00600\0",
        "the namespace's first process"
    );
    first.end()?;
    Ok(())
}

fn the_first_process_is_number_1() -> Result {
    let report = Bundle::new(&[])?.report()?;
    ensure_eq!(
        (&report["pid"], &report["parent"]),
        (&json!(1), &json!(0)),
        "pid and parent"
    );
    ensure_eq!(report["session"], 1, "session");
    Ok(())
}

fn a_new_network_namespace_has_loopback_up() -> Result {
    let bundle = Bundle::new(&["cat", "/sys/class/net/lo/flags"])?;
    let flags = bundle.run()?.text().trim_start_matches("0x").to_owned();
    ensure!(
        u32::from_str_radix(&flags, 16)? & 1 == 1,
        "lo is down, its flags are {flags}"
    );
    Ok(())
}

fn hostname_and_domainname_are_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle
        .set("/hostname", json!("a-name"))
        .set("/domainname", json!("of.a.domain"));
    let report = bundle.report()?;
    ensure_eq!(report["hostname"], "a-name", "host name");
    ensure_eq!(report["domainname"], "of.a.domain", "domain name");
    Ok(())
}

/// A bundle in a user namespace whose root is 100000 outside.
fn in_user_namespace(args: &[&str]) -> Result<Bundle> {
    let mut bundle = Bundle::new(args)?;
    let maps = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", maps.clone())
        .set("/linux/gidMappings", maps);
    for dir in ["rootfs", "rootfs/data", "rootfs/tmp"] {
        std::os::unix::fs::chown(bundle.join(dir), Some(100_000), Some(100_000))?;
    }
    Ok(bundle)
}

fn a_user_namespace_maps_ids() -> Result {
    let mut bundle = in_user_namespace(&[])?;
    let report = bundle.report()?;
    ensure!(
        report["namespaces"]["user"] != own("user")?,
        "the user namespace is the runtime's"
    );
    ensure_eq!(report["uid"], 0, "uid inside");
    ensure_eq!(
        report["uid_map"],
        json!(["0", "100000", "65536"]),
        "uid map"
    );
    ensure_eq!(
        report["gid_map"],
        json!(["0", "100000", "65536"]),
        "gid map"
    );

    bundle.set("/root/readonly", json!(false));
    bundle.args(&["write", "/data/mine", "text"]).run()?;
    let owner =
        std::os::unix::fs::MetadataExt::uid(&fs::metadata(bundle.join("rootfs/data/mine"))?);
    ensure_eq!(owner, 100_000, "owner outside of what root wrote inside");
    // /data is the container's, /etc is the node's root's.
    bundle
        .args(&["write", "/etc/not-mine", "text"])
        .call(&["run"])?
        .exits(1)?;
    Ok(())
}

fn a_user_namespace_owns_the_other_namespaces() -> Result {
    let mut bundle = in_user_namespace(&["write", "/proc/sys/net/ipv4/ip_forward", "1"])?;
    // A capability over the network namespace is one that its owner's user namespace gives.
    for set in ["bounding", "permitted", "effective"] {
        bundle.add(
            &format!("/process/capabilities/{set}"),
            json!("CAP_NET_ADMIN"),
        );
    }
    bundle.set("/linux/readonlyPaths", json!([]));
    bundle.run()?;
    let mut bundle = in_user_namespace(&["report"])?;
    bundle.set(
        "/linux/sysctl",
        json!({ "net.ipv4.ip_unprivileged_port_start": "0" }),
    );
    bundle.run()?;
    Ok(())
}

fn time_offsets_or_a_plain_time_namespace() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.add("/linux/namespaces", json!({ "type": "time" }));
    let report = bundle.report()?;
    ensure!(
        report["namespaces"]["time"] != own("time")?,
        "the time namespace is the runtime's"
    );
    Ok(())
}
