//! The CRI's messages about a pod.

use std::collections::BTreeMap;
use std::path::PathBuf;

use rrun_proto::v1::{
    LinuxPodSandboxStatus, Namespace, NamespaceMode, PodIp, PodSandbox, PodSandboxFilter,
    PodSandboxNetworkStatus, PodSandboxState, PodSandboxStatus,
};

use serde_json::{Value, json};

use super::{Sandbox, SandboxState, namespaces};
use crate::node::Node;

impl SandboxState {
    fn cri(&self) -> PodSandboxState {
        if self.ready {
            PodSandboxState::SandboxReady
        } else {
            PodSandboxState::SandboxNotready
        }
    }
}

pub(crate) fn list_entry(sandbox: &Sandbox) -> PodSandbox {
    PodSandbox {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox.state().cri().into(),
        created_at: sandbox.created_at,
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.handler.clone(),
    }
}

pub(crate) fn status(sandbox: &Sandbox) -> PodSandboxStatus {
    let (state, addresses) = {
        let state = sandbox.state();
        (state.cri(), state.addresses.clone())
    };
    let mut addresses = addresses.iter().map(ToString::to_string);
    let network = addresses.next().map(|ip| PodSandboxNetworkStatus {
        ip,
        additional_ips: addresses.map(|ip| PodIp { ip }).collect(),
    });
    PodSandboxStatus {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: state.into(),
        created_at: sandbox.created_at,
        network: Some(network.unwrap_or_default()),
        linux: Some(LinuxPodSandboxStatus {
            namespaces: Some(Namespace {
                options: Some(namespaces::options(&sandbox.config)),
            }),
        }),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.handler.clone(),
    }
}

/// Returns the verbose part of PodSandboxStatus, with the same keys as in containerd. `pid` is the
/// id of a process in the pod's namespaces, or 0 if no such process exists. `pid` is never the
/// monitor's process id, because the monitor is in the node's network namespace. `runtimeSpec`
/// contains the paths of the pod's namespaces.
pub(crate) async fn info(node: &Node, sandbox: &Sandbox) -> Value {
    let state = sandbox.state().clone();
    let netns = node.netns(&sandbox.id);
    let own_network = namespaces::options(&sandbox.config).network() == NamespaceMode::Pod;
    let in_containers = node.containers_of(&sandbox.id).into_iter();
    let pid = in_containers
        .map(|container| container.state().pid)
        .find(|pid| *pid > 0)
        .or(state.holder.filter(|_| state.monitor > 0));
    json!({
        "pid": pid.unwrap_or_default(),
        "monitor": state.monitor,
        "cgroup": sandbox.cgroup,
        "runtimeHandler": node.config.handler_name(&sandbox.handler),
        "namespaces": sandbox.namespaces(),
        "directory": node.sandbox_dir(&sandbox.id),
        "networkNamespace": netns,
        "netNamespaceClosed": own_network && !netns.exists(),
        "runtimeSpec": {
            "linux": {
                "cgroupsPath": sandbox.cgroup,
                "namespaces": shown_namespaces(node, sandbox),
            },
        },
        "pid1": state.pid1,
        "selinux": sandbox.selinux,
        "cniResult": node.network.results(&sandbox.id).await,
    })
}

/// Returns the pod's own namespaces in the format of config.json (OCI runtime-spec,
/// config-linux.md).
fn shown_namespaces(node: &Node, sandbox: &Sandbox) -> Vec<Value> {
    let Ok(sharing) = namespaces::sharing(&sandbox.config) else {
        return Vec::new();
    };
    let state = sandbox.state().clone();
    // After the exit of the monitor or of the pause process, the kernel may have assigned the process
    // ids to other processes. The status then contains no paths with these ids.
    let holder = sandbox.namespaces();
    let of = |pid: Option<i32>, kind: &str| {
        let pid = pid.filter(|_| state.monitor > 0)?;
        Some(PathBuf::from(format!("/proc/{pid}/ns/{kind}")))
    };
    let network: PathBuf = node.netns(&sandbox.id);
    [
        ("network", sharing.own_network.then_some(network)),
        ("ipc", of(holder, "ipc").filter(|_| sharing.own_ipc)),
        ("uts", of(holder, "uts").filter(|_| sharing.own_uts)),
        ("user", of(holder, "user").filter(|_| sharing.own_users)),
        ("pid", of(state.pid1, "pid")),
    ]
    .into_iter()
    .filter_map(|(kind, path)| Some(json!({ "type": kind, "path": path? })))
    .collect()
}

/// Returns whether the pod matches the filter. Every field that is set in the filter must match.
/// The pod's id matches if it begins with the id in the filter.
pub(crate) fn matches(filter: Option<&PodSandboxFilter>, sandbox: &Sandbox) -> bool {
    let Some(filter) = filter else { return true };
    let state = filter.state.as_ref();
    sandbox.id.starts_with(&filter.id)
        && state.is_none_or(|required| required.state() == sandbox.state().cri())
        && has_labels(&filter.label_selector, &sandbox.config.labels)
}

/// Returns whether the labels contain every required name with its value.
pub(crate) fn has_labels(
    required: &BTreeMap<String, String>,
    labels: &BTreeMap<String, String>,
) -> bool {
    required
        .iter()
        .all(|(name, value)| labels.get(name) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_matches_only_if_all_its_labels_match() {
        let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            let owned = pairs.iter();
            owned.map(|(k, v)| ((*k).into(), (*v).into())).collect()
        };
        let had = labels(&[("a", "1"), ("b", "2")]);
        assert!(has_labels(&labels(&[]), &had));
        assert!(has_labels(&labels(&[("a", "1")]), &had));
        assert!(!has_labels(&labels(&[("a", "2")]), &had));
        assert!(!has_labels(&labels(&[("a", "1"), ("c", "3")]), &had));
    }
}
