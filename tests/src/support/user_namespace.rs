//! Pods in a user namespace, and their containers.

use serde_json::{Value, json};

use crate::support::node::Node;

/// The id on the node of root in the pod.
pub(crate) const FIRST: u32 = 1_000_000;

/// The mapping of the pod's ids.
pub(crate) fn ids() -> Value {
    json!([{ "host_id": FIRST, "container_id": 0, "length": 65536 }])
}

/// `userns_options` of a pod and of its containers.
pub(crate) fn options() -> Value {
    json!({ "mode": 0, "uids": ids(), "gids": ids() })
}

/// A pod with that mapping; `pid` is its PID namespace's mode.
pub(crate) fn pod(node: &Node, name: &str, pid: i32) -> Value {
    let mut pod = node.pod(name);
    let context = &mut pod["linux"]["security_context"]["namespace_options"];
    context["pid"] = json!(pid);
    context["userns_options"] = options();
    pod
}

/// A container of such a pod.
pub(crate) fn container(node: &Node, name: &str, pid: i32, command: &[&str]) -> Value {
    let mut container = node.container(name, command);
    container["linux"]["security_context"]["namespace_options"] =
        json!({ "pid": pid, "userns_options": options() });
    container
}
