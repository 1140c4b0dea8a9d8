//! Tests of the AppArmor profiles of containers.

use serde_json::{Value, json};

use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{APPARMOR, Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::support::seccomp::CALLS_32;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        containers_run_under_the_default_apparmor_profile_unless_they_opt_out,
        A_NODE,
        APPARMOR,
        PARSER
    ),
    test!(
        the_default_apparmor_profile_denies_the_sockets_that_a_seccomp_filter_can_not_deny,
        A_NODE,
        APPARMOR,
        PARSER,
        Need::RrunCri,
        CALLS_32
    ),
    test!(
        the_default_apparmor_profile_protects_processes_of_the_runtime,
        A_NODE,
        APPARMOR,
        PARSER,
        Need::RrunCri
    ),
    test!(
        a_new_server_replaces_the_default_apparmor_profile_of_an_earlier_version,
        A_NODE,
        APPARMOR,
        PARSER,
        Need::RrunCri
    ),
    test!(
        a_container_can_use_an_apparmor_profile_that_the_node_has_loaded,
        A_NODE,
        APPARMOR,
        PARSER
    ),
    test!(
        a_container_is_refused_if_its_apparmor_profile_is_not_loaded,
        A_NODE
    ),
];

const PARSER: Need = Need::Program("apparmor_parser");

/// The number of the system call socket(2).
#[cfg(target_arch = "x86_64")]
const SOCKET: &str = "41";
#[cfg(target_arch = "aarch64")]
const SOCKET: &str = "198";

/// Runs a container with the security context `context`. Returns the container's exit code and
/// output.
fn outcome(node: &mut Node, context: Value, args: &[&str]) -> Result<(Value, String)> {
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut pod = node.pod(&format!("apparmor{number}"));
    // A privileged container requires a privileged pod.
    pod["linux"]["security_context"]["privileged"] = json!(context["privileged"] == true);
    let pod_id = node.runp(&pod)?;
    let mut container = node.container("confined", args);
    container["linux"]["security_context"] = context;
    let id = node.run(&pod_id, &pod, &container)?;
    let status = node.exited(&id)?;
    let output = node.crictl(&["logs", &id]).ok()?;
    node.asks(&["rmp", "--force", &pod_id])?;
    Ok((status["exitCode"].clone(), output.stdout + &output.stderr))
}

fn containers_run_under_the_default_apparmor_profile_unless_they_opt_out() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let default = if is_rrun() {
            "rrun-default (enforce)"
        } else {
            "cri-containerd.apparmor.d (enforce)"
        };
        for (context, expected) in [
            (json!({}), default),
            (json!({ "apparmor": { "profile_type": 0 } }), default),
            (json!({ "apparmor": { "profile_type": 1 } }), "unconfined"),
            (json!({ "apparmor_profile": "unconfined" }), "unconfined"),
            (json!({ "privileged": true }), "unconfined"),
        ] {
            let (code, output) =
                outcome(node, context.clone(), &["cat", "/proc/self/attr/current"])?;
            ensure_eq!(
                (code, output.trim()),
                (json!(0), expected),
                "exit code and AppArmor profile of a container with the security context {context}"
            );
        }
        // The default profile permits ordinary work inside the container, and the signals with
        // which the server stops the container.
        let (code, output) = outcome(
            node,
            json!({}),
            &[
                "sh",
                "-c",
                "sleep 600 & kill $! && touch /tmp/x && wget -T1 -q -O- 127.0.0.1; ls /proc/1/ns >/dev/null && exit 7",
            ],
        )?;
        ensure_eq!(
            code,
            json!(7),
            "exit code of a script that does ordinary work under the default profile (output of the script: {output})"
        );
        let (_, output) = outcome(
            node,
            json!({ "capabilities": { "add_capabilities": ["SYS_ADMIN"] } }),
            &["sh", "-c", "mount -t tmpfs t /tmp || echo refused"],
        )?;
        ensure!(
            output.contains("refused"),
            "the default profile does not refuse a mount; output of the mount command: {output}"
        );
        Ok(())
    })
}

fn the_default_apparmor_profile_denies_the_sockets_that_a_seccomp_filter_can_not_deny() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let default = json!({ "seccomp": { "profile_type": 0 } });
        for (family, expected) in [("38", "EACCES"), ("40", "EACCES"), ("1", "3"), ("2", "3")] {
            let command = ["/inside", "socketcall", "1", family, "1"];
            let (_, output) = outcome(node, default.clone(), &command)?;
            ensure_eq!(
                output.trim(),
                expected,
                "result of socketcall(2) for a socket of the family {family}"
            );
        }
        // Without AppArmor, the seccomp filter denies socketcall.
        let mut unconfined = default;
        unconfined["apparmor"] = json!({ "profile_type": 1 });
        let (_, output) = outcome(node, unconfined, &["/inside", "socketcall", "1", "1", "1"])?;
        ensure_eq!(
            output.trim(),
            "ENOSYS",
            "result of socketcall(2) in a container without an AppArmor profile"
        );
        // AppArmor also restricts a container without a seccomp filter.
        let (_, output) = outcome(node, json!({}), &["/inside", "call", SOCKET, "38", "5"])?;
        ensure_eq!(
            output.trim(),
            "EACCES",
            "result of socket(AF_ALG) in a container without a seccomp filter"
        );
        Ok(())
    })
}

/// Without AppArmor, a container with CAP_SYS_PTRACE can control these processes.
fn the_default_apparmor_profile_protects_processes_of_the_runtime() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("seized");
        let pod_id = node.runp(&pod)?;
        let command = ["/inside", "attack", "seize", "30"];
        let mut container = node.container("attacker", &command);
        container["linux"]["security_context"]["capabilities"] =
            json!({ "add_capabilities": ["SYS_PTRACE"] });
        let id = node.run(&pod_id, &pod, &container)?;
        let log = || node.asks(&["logs", &id]);
        wait_for("the attacker to start", || {
            Ok(log()?.contains("ready").then_some(()))
        })?;
        while node.asks(&["exec", "-s", &id, "true"]).is_ok() {}
        node.exited(&id)?;
        let log = log()?;
        ensure!(
            log.contains("done") && !log.contains("done, 0 ") && !log.contains("took control"),
            "the attacker saw no process of rrun, or took control of one: {log}"
        );
        Ok(())
    })
}

fn a_new_server_replaces_the_default_apparmor_profile_of_an_earlier_version() -> Result {
    let earlier = "profile rrun-default flags=(attach_disconnected,mediate_deleted) {\n  file,\n  network,\n  capability,\n}\n";
    command("apparmor_parser", ["--replace", "--skip-cache"])
        .stdin(earlier)
        .ok()?;
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let (_, output) = outcome(node, json!({}), &["/inside", "call", SOCKET, "38", "5"])?;
        ensure_eq!(
            output.trim(),
            "EACCES",
            "result of socket(AF_ALG) in a container of the new server"
        );
        Ok(())
    })
}

fn a_container_can_use_an_apparmor_profile_that_the_node_has_loaded() -> Result {
    let text =
        "profile rrun-e2e-node flags=(attach_disconnected) {\n  file,\n  deny /tmp/** w,\n}\n";
    command("apparmor_parser", ["--replace", "--skip-cache"])
        .stdin(text)
        .ok()?;
    let tested = on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for context in [
            json!({ "apparmor": { "profile_type": 2, "localhost_ref": "rrun-e2e-node" } }),
            json!({ "apparmor": { "profile_type": 2, "localhost_ref": "localhost/rrun-e2e-node" } }),
            json!({ "apparmor_profile": "localhost/rrun-e2e-node" }),
        ] {
            let (code, output) = outcome(node, context.clone(), &["touch", "/tmp/x"])?;
            ensure!(
                code != json!(0),
                "the loaded profile does not deny a write to /tmp in a container with the security context {context}; output of the container: {output}"
            );
        }
        Ok(())
    });
    command("apparmor_parser", ["--remove"]).stdin(text).ok()?;
    tested
}

fn a_container_is_refused_if_its_apparmor_profile_is_not_loaded() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("absent");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("refused", &["true"]);
        container["linux"]["security_context"] =
            json!({ "apparmor": { "profile_type": 2, "localhost_ref": "rrun-e2e-absent" } });
        let output = node.try_create(&pod_id, &pod, &container)?;
        ensure!(
            output.code != 0,
            "the server created a container with a profile that is not loaded: {}",
            output.told()
        );
        ensure!(
            output.stderr.to_lowercase().contains("apparmor"),
            "the error does not name AppArmor: {}",
            output.told()
        );
        Ok(())
    })
}
