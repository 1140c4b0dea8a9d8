//! The CRI's view of a pod.

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

/// What PodSandboxStatus tells beside the status, where clients look for it in containerd's:
/// `pid` is of a process in the pod's namespaces, 0 while there is none, `runtimeSpec` has where
/// the namespaces are. The monitor's process is in the node's network.
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

/// The pod's own namespaces, as a runtime's configuration has them (OCI runtime-spec,
/// config-linux.md).
fn shown_namespaces(node: &Node, sandbox: &Sandbox) -> Vec<Value> {
    let Ok(sharing) = namespaces::sharing(&sandbox.config) else {
        return Vec::new();
    };
    let state = sandbox.state().clone();
    // Without a monitor these are numbers that others may have by now.
    let holder = state.holder.unwrap_or(state.monitor);
    let of =
        |pid: i32, kind: &str| (state.monitor > 0).then(|| format!("/proc/{pid}/ns/{kind}").into());
    let network: PathBuf = node.netns(&sandbox.id);
    [
        ("network", sharing.own_network.then_some(network)),
        ("ipc", of(holder, "ipc").filter(|_| sharing.own_ipc)),
        ("uts", of(holder, "uts").filter(|_| sharing.own_uts)),
        ("user", of(holder, "user").filter(|_| sharing.own_users)),
        ("pid", state.pid1.and_then(|pid| of(pid, "pid"))),
    ]
    .into_iter()
    .filter_map(|(kind, path)| Some(json!({ "type": kind, "path": path? })))
    .collect()
}

/// Whether the filter lets the pod through; everything set must match, an id by its beginning.
pub(crate) fn matches(filter: Option<&PodSandboxFilter>, sandbox: &Sandbox) -> bool {
    let Some(filter) = filter else { return true };
    let state = filter.state.as_ref();
    sandbox.id.starts_with(&filter.id)
        && state.is_none_or(|wanted| wanted.state() == sandbox.state().cri())
        && has_labels(&filter.label_selector, &sandbox.config.labels)
}

/// Whether every wanted pair is among the labels.
pub(crate) fn has_labels(
    wanted: &BTreeMap<String, String>,
    labels: &BTreeMap<String, String>,
) -> bool {
    wanted
        .iter()
        .all(|(name, value)| labels.get(name) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wanted_label_must_be_there() {
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
