//! Tests of a container's namespaces. A namespace can be new, joined, or shared with the runtime.
//! The tests also cover the id mappings of user namespaces.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, command};
use crate::support::needs::{Need, Test};
use crate::support::refusals::refused;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(each_requested_namespace_is_new),
    test!(the_container_shares_each_namespace_that_is_not_requested),
    test!(a_container_joins_namespaces_by_path),
    test!(
        a_namespace_of_the_host_is_not_the_containers_own,
        Need::Rrun
    ),
    test!(
        the_runtime_does_not_enter_the_mount_namespace_of_the_host,
        Need::Rrun
    ),
    test!(a_container_sees_the_processes_of_a_joined_pid_namespace),
    test!(the_first_process_has_process_id_1),
    test!(the_loopback_interface_is_up_in_a_new_network_namespace),
    test!(hostname_and_domainname_are_set),
    test!(a_user_namespace_maps_ids),
    test!(a_user_namespace_owns_the_other_namespaces),
    test!(a_requested_time_namespace_is_new),
    test!(a_container_that_joins_a_time_namespace_with_offsets_is_running),
];

/// The namespace types. Each entry contains the name in the configuration and the name in
/// /proc/PID/ns.
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

fn each_requested_namespace_is_new() -> Result {
    let report = Bundle::new(&[])?.report()?;
    for (_, kind) in KINDS {
        ensure!(
            report["namespaces"][kind] != own(kind)?,
            "the container shares the runtime's {kind} namespace instead of having a new one"
        );
    }
    for kind in ["user", "time"] {
        ensure_eq!(
            report["namespaces"][kind],
            own(kind)?,
            "the container's {kind} namespace, which must be the namespace of the runtime"
        );
    }
    Ok(())
}

fn the_container_shares_each_namespace_that_is_not_requested() -> Result {
    for (name, kind) in KINDS.iter().filter(|(name, _)| *name != "mount") {
        let mut bundle = Bundle::new(&[])?;
        bundle.without_namespace(name);
        match *name {
            // The host name and the mounts on /sys and /dev/mqueue require separate namespaces.
            // Therefore, the test removes them from the configuration.
            "uts" => drop(bundle.without("/hostname")),
            "network" => drop(without_mount(&mut bundle, "/sys")),
            "ipc" => drop(without_mount(&mut bundle, "/dev/mqueue")),
            _ => {}
        }
        let report = bundle.report().map_err(|failed| {
            format!(
                "the container has no separate {name} namespace; the failure: {}",
                failed.message().unwrap_or_default()
            )
        })?;
        ensure_eq!(
            report["namespaces"][kind],
            own(kind)?,
            "the container's {kind} namespace, which must be the namespace of the runtime"
        );
    }
    Ok(())
}

fn without_mount<'b>(bundle: &'b mut Bundle, destination: &str) -> &'b mut Bundle {
    if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
        // The paths of mounts below `destination` also begin with `destination`. Therefore,
        // `retain` removes these mounts too.
        all.retain(|mount| {
            !mount["destination"]
                .as_str()
                .unwrap_or_default()
                .starts_with(destination)
        });
    }
    bundle
}

fn a_container_joins_namespaces_by_path() -> Result {
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
        let joined = fs::read_link(format!("/proc/{pid}/ns/{kind}"))?;
        ensure_eq!(
            report["namespaces"][kind],
            json!(joined),
            "the container's {kind} namespace, which must be that of the first container"
        );
    }
    ensure_eq!(
        report["hostname"],
        "rrun-e2e",
        "the host name of the joined namespace"
    );
    first.end()?;
    Ok(())
}

/// The runtime must not treat a namespace of the host as the container's own. The values in the
/// configurations are the host's own values, so that a failure of the test changes nothing. Only the
/// host name differs, because the runtime accepts the host's own name.
fn a_namespace_of_the_host_is_not_the_containers_own() -> Result {
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname")?;
    let domainname = fs::read_to_string("/proc/sys/kernel/domainname")?;
    for process in ["self", "1"] {
        let with_path = |name: &str, kind: &str| -> Result<Bundle> {
            let mut bundle = Bundle::new(&[])?;
            bundle.without_namespace(name).without("/hostname");
            let path = format!("/proc/{process}/ns/{kind}");
            bundle.add("/linux/namespaces", json!({ "type": name, "path": path }));
            Ok(bundle)
        };
        for (name, kind, field, value) in [
            ("uts", "uts", "/hostname", json!("another-name")),
            ("uts", "uts", "/domainname", json!(domainname.trim())),
            sysctl("network", "net", "net.ipv4.tcp_fin_timeout")?,
            sysctl("ipc", "ipc", "kernel.shm_rmid_forced")?,
        ] {
            let mut bundle = with_path(name, kind)?;
            bundle.set(field, value).write_config()?;
            let words: &[&str] = match field {
                "/linux/sysctl" => &["linux.sysctl", "would be set for the host"],
                _ => &["would change the host's"],
            };
            refused(&bundle, words)?;
        }
        let mut bundle = with_path("uts", "uts")?;
        bundle.set("/hostname", json!(hostname.trim()));
        let report = bundle.report()?;
        ensure_eq!(
            report["hostname"],
            hostname.trim(),
            "the host name in the UTS namespace of the host"
        );
        let bundle = with_path("user", "user")?;
        bundle.write_config()?;
        refused(&bundle, &["user namespace of the host"])?;

        let report = with_path("network", "net")?.report()?;
        ensure_eq!(
            report["namespaces"]["net"],
            own("net")?,
            "the container's network namespace, which must be the namespace of the host"
        );
        let mut bundle = with_path("cgroup", "cgroup")?;
        ensure_eq!(
            bundle
                .args(&["cat", "/sys/fs/cgroup/cgroup.procs"])
                .run()?
                .text(),
            "1",
            "the processes in the cgroup at the top of the container's /sys/fs/cgroup"
        );
    }
    Ok(())
}

fn sysctl(
    name: &'static str,
    kind: &'static str,
    parameter: &str,
) -> Result<(&'static str, &'static str, &'static str, Value)> {
    let path = format!("/proc/sys/{}", parameter.replace('.', "/"));
    let value = fs::read_to_string(path)?;
    let value = json!({ parameter: value.trim() });
    Ok((name, kind, "/linux/sysctl", value))
}

/// unshare(1) creates another mount namespace, because the runtime would otherwise change the root
/// of this test if it did not refuse the path. In the second case, the runtime has another mount
/// namespace than process 1.
fn the_runtime_does_not_enter_the_mount_namespace_of_the_host() -> Result {
    for (process, inner) in [("self", ""), ("1", ""), ("1", "unshare --mount ")] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.without_namespace("mount");
        let path = format!("/proc/{process}/ns/mnt");
        bundle.add(
            "/linux/namespaces",
            json!({ "type": "mount", "path": path }),
        );
        bundle.write_config()?;
        let call = format!(
            "{inner}{} --root {} run {}",
            runtime_program(),
            bundle.root().display(),
            bundle.id()
        );
        let outer = [
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
            "sh",
            "-c",
            &call,
        ];
        let output = command("unshare", outer).dir(bundle.path()).exits(1)?;
        ensure!(
            output.stderr.contains("the mount namespace of the host"),
            "`run` with the mount namespace {path}:\n{}",
            output.told()
        );
    }
    Ok(())
}

fn a_container_sees_the_processes_of_a_joined_pid_namespace() -> Result {
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
        "the command line of the joined namespace's first process"
    );
    first.end()?;
    Ok(())
}

fn the_first_process_has_process_id_1() -> Result {
    let report = Bundle::new(&[])?.report()?;
    ensure_eq!(
        (&report["pid"], &report["parent"]),
        (&json!(1), &json!(0)),
        "the process ids of the first process and of its parent"
    );
    ensure_eq!(report["session"], 1, "the session id of the first process");
    Ok(())
}

fn the_loopback_interface_is_up_in_a_new_network_namespace() -> Result {
    let bundle = Bundle::new(&["cat", "/sys/class/net/lo/flags"])?;
    let flags = bundle.run()?.text().trim_start_matches("0x").to_owned();
    ensure!(
        u32::from_str_radix(&flags, 16)? & 1 == 1,
        "the interface lo is down; its flags: {flags}"
    );
    Ok(())
}

fn hostname_and_domainname_are_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle
        .set("/hostname", json!("a-name"))
        .set("/domainname", json!("of.a.domain"));
    let report = bundle.report()?;
    ensure_eq!(
        report["hostname"],
        "a-name",
        "the host name in the container"
    );
    ensure_eq!(
        report["domainname"],
        "of.a.domain",
        "the domain name in the container"
    );
    Ok(())
}

/// Returns a bundle with a user namespace. The user namespace maps its root user to user 100000 on
/// the host.
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
        "the container shares the runtime's user namespace instead of having a new one"
    );
    ensure_eq!(report["uid"], 0, "the user id in the container");
    ensure_eq!(
        report["uid_map"],
        json!(["0", "100000", "65536"]),
        "the uid_map of the user namespace"
    );
    ensure_eq!(
        report["gid_map"],
        json!(["0", "100000", "65536"]),
        "the gid_map of the user namespace"
    );

    bundle.set("/root/readonly", json!(false));
    bundle.args(&["write", "/data/mine", "text"]).run()?;
    let owner =
        std::os::unix::fs::MetadataExt::uid(&fs::metadata(bundle.join("rootfs/data/mine"))?);
    ensure_eq!(
        owner,
        100_000,
        "the owner on the host of the file that the container's root wrote"
    );
    // The container's root owns /data, but the host's root owns /etc, so the write to /etc must
    // fail.
    bundle
        .args(&["write", "/etc/not-mine", "text"])
        .call(&["run"])?
        .exits(1)?;
    Ok(())
}

fn a_user_namespace_owns_the_other_namespaces() -> Result {
    let mut bundle = in_user_namespace(&["write", "/proc/sys/net/ipv4/ip_forward", "1"])?;
    // The container's user namespace owns the container's network namespace. Therefore,
    // CAP_NET_ADMIN in this user namespace allows the write to ip_forward.
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

fn a_requested_time_namespace_is_new() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.add("/linux/namespaces", json!({ "type": "time" }));
    let report = bundle.report()?;
    ensure!(
        report["namespaces"]["time"] != own("time")?,
        "the container shares the runtime's time namespace instead of having a new one"
    );
    Ok(())
}

/// The start time in /proc/PID/stat depends on the time namespace of the process that reads the
/// file. crun refuses to join a time namespace that has offsets.
fn a_container_that_joins_a_time_namespace_with_offsets_is_running() -> Result {
    let mut first = Bundle::new(&["sleep", "600"])?;
    let offset = json!({ "secs": 100_000 });
    first
        .add("/linux/namespaces", json!({ "type": "time" }))
        .set(
            "/linux/timeOffsets",
            json!({ "boottime": offset, "monotonic": offset }),
        );
    first.start()?;
    let path = format!("/proc/{}/ns/time", first.pid()?);
    let time = fs::read_link(&path)?;
    let mut second = Bundle::new(&["sleep", "600"])?;
    second.add("/linux/namespaces", json!({ "type": "time", "path": path }));
    second.start()?;
    ensure_eq!(second.status()?, "running", "the second container's status");
    let joined = fs::read_link(format!("/proc/{}/ns/time", second.pid()?))?;
    ensure_eq!(joined, time, "the second container's time namespace");
    second.exec(&[], &["exit", "0"]).ok()?;
    second.runtime(&["delete", second.id()]).exits(1)?;
    second.runtime(&["kill", second.id(), "KILL"]).ok()?;
    second.wait_status("stopped")?;
    second.delete()?;
    first.end()?;
    Ok(())
}
