//! Pods in a user namespace, and their containers.

use serde_json::{Value, json};

use crate::support::node::Node;

/// The id on the node to which the pod's root user is mapped.
pub(crate) const FIRST: u32 = 1_000_000;

/// Returns the pod's id mapping, which is the same for user ids and for group ids.
pub(crate) fn ids() -> Value {
    json!([{ "host_id": FIRST, "container_id": 0, "length": 65536 }])
}

/// Returns the value of `userns_options` for a pod and for its containers.
pub(crate) fn options() -> Value {
    json!({ "mode": 0, "uids": ids(), "gids": ids() })
}

/// Returns the configuration of a pod with the id mapping of [`ids`]. `pid` is the mode of the
/// pod's PID namespace.
pub(crate) fn pod(node: &Node, name: &str, pid: i32) -> Value {
    let mut pod = node.pod(name);
    let context = &mut pod["linux"]["security_context"]["namespace_options"];
    context["pid"] = json!(pid);
    context["userns_options"] = options();
    pod
}

/// Returns the configuration of a container. The configuration of the container's pod must be the
/// result of [`pod`].
pub(crate) fn container(node: &Node, name: &str, pid: i32, command: &[&str]) -> Value {
    let mut container = node.container(name, command);
    container["linux"]["security_context"]["namespace_options"] =
        json!({ "pid": pid, "userns_options": options() });
    container
}
