//! The CRI's view of a pod.

use std::collections::BTreeMap;

use rrun_proto::v1::{
    LinuxPodSandboxStatus, Namespace, PodIp, PodSandbox, PodSandboxFilter, PodSandboxNetworkStatus,
    PodSandboxState, PodSandboxStatus,
};

use super::{Sandbox, State, namespaces};

impl State {
    fn cri(&self) -> PodSandboxState {
        if self.ready {
            PodSandboxState::SandboxReady
        } else {
            PodSandboxState::SandboxNotready
        }
    }
}

pub fn list_entry(sandbox: &Sandbox) -> PodSandbox {
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

pub fn status(sandbox: &Sandbox) -> PodSandboxStatus {
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

/// Whether the filter lets the pod through; everything set must match, an id by its beginning.
pub fn matches(filter: Option<&PodSandboxFilter>, sandbox: &Sandbox) -> bool {
    let Some(filter) = filter else { return true };
    let state = filter.state.as_ref();
    sandbox.id.starts_with(&filter.id)
        && state.is_none_or(|wanted| wanted.state() == sandbox.state().cri())
        && has_labels(&filter.label_selector, &sandbox.config.labels)
}

/// Whether every wanted pair is among the labels.
pub fn has_labels(wanted: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
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
