//! AppArmor profiles of pods' containers.

use serde_json::{Value, json};

use crate::support::machine::{Result, command};
use crate::support::needs::{APPARMOR, Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        the_default_profile_is_there_unless_refused,
        A_NODE,
        APPARMOR,
        PARSER
    ),
    test!(
        a_profile_of_the_nodes_is_had_by_its_name,
        A_NODE,
        APPARMOR,
        PARSER
    ),
    test!(a_profile_that_can_not_be_had_is_refused, A_NODE),
];

const PARSER: Need = Need::Program("apparmor_parser");

/// A container's exit code and output, with this security context.
fn outcome(node: &mut Node, context: Value, args: &[&str]) -> Result<(Value, String)> {
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut pod = node.pod(&format!("apparmor{number}"));
    // A privileged container wants a privileged pod.
    pod["linux"]["security_context"]["privileged"] = json!(context["privileged"] == true);
    let pod_id = node.runp(&pod)?;
    let mut container = node.container("confined", args);
    container["linux"]["security_context"] = context;
    let id = node.run(&pod_id, &pod, &container)?;
    let status = node.exited(&id)?;
    let said = node.crictl(&["logs", &id]).ok()?;
    node.asks(&["rmp", "--force", &pod_id])?;
    Ok((status["exitCode"].clone(), said.stdout + &said.stderr))
}

fn the_default_profile_is_there_unless_refused() -> Result {
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
            let (code, said) = outcome(node, context.clone(), &["cat", "/proc/self/attr/current"])?;
            ensure_eq!((code, said.trim()), (json!(0), expected), "{context}");
        }
        // What a container does all day is not denied, nor is its end by the node.
        let (code, said) = outcome(
            node,
            json!({}),
            &[
                "sh",
                "-c",
                "sleep 600 & kill $! && touch /tmp/x && wget -T1 -q -O- 127.0.0.1; ls /proc/1/ns >/dev/null && exit 7",
            ],
        )?;
        ensure_eq!(code, json!(7), "exit code ({said})");
        let (_, said) = outcome(
            node,
            json!({ "capabilities": { "add_capabilities": ["SYS_ADMIN"] } }),
            &["sh", "-c", "mount -t tmpfs t /tmp || echo refused"],
        )?;
        ensure!(said.contains("refused"), "a mount is not refused: {said}");
        Ok(())
    })
}

fn a_profile_of_the_nodes_is_had_by_its_name() -> Result {
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
            let (code, said) = outcome(node, context.clone(), &["touch", "/tmp/x"])?;
            ensure!(code != json!(0), "{context}: it is not confined: {said}");
        }
        Ok(())
    });
    command("apparmor_parser", ["--remove"]).stdin(text).ok()?;
    tested
}

fn a_profile_that_can_not_be_had_is_refused() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("absent");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("refused", &["true"]);
        container["linux"]["security_context"] =
            json!({ "apparmor": { "profile_type": 2, "localhost_ref": "rrun-e2e-absent" } });
        let output = node.try_create(&pod_id, &pod, &container)?;
        ensure!(output.code != 0, "{}", output.told());
        ensure!(
            output.stderr.to_lowercase().contains("apparmor"),
            "{}",
            output.told()
        );
        Ok(())
    })
}
