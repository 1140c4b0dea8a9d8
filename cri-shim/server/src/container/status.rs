//! Builds the CRI's messages about a container: its status, list entry and events.

use std::sync::Arc;

use rrun_proto::v1::{
    self as cri, ContainerEventResponse, ContainerEventType, ContainerFilter, ContainerResources,
    ContainerState, ContainerStatus, ContainerUser, ImageSpec, LinuxContainerUser, Signal,
};

use super::{Container, Phase};
use crate::clock::now;
use crate::node::Node;
use crate::report_size::{self, STATUS_BYTES};
use crate::sandbox::status::has_labels;
use crate::sandbox::{self, Sandbox};
use prost::Message;
use rrun_images::{Image, Name};
use serde_json::{Value, json};

/// The maximum number of bytes of the statuses in an event before they are shortened.
const EVENT_BYTES: usize = 1 << 20;

impl Phase {
    fn cri(self) -> ContainerState {
        match self {
            Phase::Created => ContainerState::ContainerCreated,
            Phase::Running => ContainerState::ContainerRunning,
            Phase::Exited => ContainerState::ContainerExited,
        }
    }
}

pub(crate) fn list_entry(container: &Container) -> cri::Container {
    cri::Container {
        id: container.id.clone(),
        pod_sandbox_id: container.sandbox.id.clone(),
        metadata: container.config.metadata.clone(),
        image: container.config.image.clone(),
        image_ref: container.image_ref.clone(),
        state: container.phase().cri().into(),
        created_at: container.created_at,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        image_id: container.image_id.clone(),
    }
}

/// Returns the image name for a container's status. Kubelet requests containers with the image's
/// id, but displays this name to users. The name is the full form of the name that the user
/// specified, or a tag of the image.
pub(crate) fn image_name(requested: Option<&ImageSpec>, image: &Image) -> String {
    let requested = requested.cloned().unwrap_or_default();
    let mut known = image.repo_tags.iter().chain(&image.repo_digests);
    let is_of_image = |name: &String| known.any(|known| known == name);
    [requested.user_specified_image, requested.image]
        .iter()
        .filter_map(|name| Some(Name::parse(name).ok()?.canonical()))
        .find(is_of_image)
        .or_else(|| image.repo_tags.first().cloned())
        .unwrap_or_default()
}

pub(crate) fn status(container: &Container) -> ContainerStatus {
    let state = container.state();
    let config = &container.config;
    let mut image = config.image.clone().unwrap_or_default();
    if !container.image_name.is_empty() {
        image.image.clone_from(&container.image_name);
    }
    let user = &container.user;
    let stop_signal = match config.stop_signal() {
        Signal::RuntimeDefault => signal_name(container.stop_signal),
        requested => requested,
    };
    ContainerStatus {
        id: container.id.clone(),
        metadata: config.metadata.clone(),
        state: state.phase.cri().into(),
        created_at: container.created_at,
        started_at: state.started_at,
        finished_at: state.finished_at,
        exit_code: state.exit_code,
        image: Some(image),
        image_ref: container.image_ref.clone(),
        reason: state.reason,
        message: state.message,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        mounts: config.mounts.clone(),
        log_path: container
            .log_path()
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default(),
        resources: Some(ContainerResources {
            linux: Some(state.resources),
            windows: None,
        }),
        image_id: container.image_id.clone(),
        user: Some(ContainerUser {
            linux: Some(LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: user.groups.iter().map(|gid| (*gid).into()).collect(),
            }),
        }),
        stop_signal: stop_signal.into(),
    }
}

/// Returns the CRI's signal for a signal number. The CRI names real-time signals by their distance
/// from SIGRTMIN or from SIGRTMAX.
fn signal_name(number: i32) -> Signal {
    let (first, last) = (libc::SIGRTMIN(), libc::SIGRTMAX());
    let name = if number == first {
        "SIGRTMIN".to_owned()
    } else if number == last {
        "SIGRTMAX".to_owned()
    } else if number > first && number <= first + 15 {
        format!("SIGRTMINPLUS{}", number - first)
    } else if number > first && number < last {
        format!("SIGRTMAXMINUS{}", last - number)
    } else {
        match nix::sys::signal::Signal::try_from(number) {
            Ok(signal) => signal.as_str().to_owned(),
            Err(_) => String::new(),
        }
    };
    Signal::from_str_name(&name).unwrap_or(Signal::RuntimeDefault)
}

/// Returns whether a container matches the filter. Every field that is set in the filter must
/// match. An id matches if it begins with the filter's text.
pub(crate) fn matches(filter: Option<&ContainerFilter>, container: &Container) -> bool {
    let Some(filter) = filter else { return true };
    let state = filter.state.as_ref();
    container.id.starts_with(&filter.id)
        && container.sandbox.id.starts_with(&filter.pod_sandbox_id)
        && state.is_none_or(|filter| filter.state() == container.phase().cri())
        && has_labels(&filter.label_selector, &container.config.labels)
}

/// Publishes an event about a container to the event subscribers.
pub(crate) fn publish(node: &Node, container: &Container, kind: ContainerEventType) {
    event(node, &container.sandbox, &container.id, kind);
}

/// Publishes an event about a pod to the event subscribers. The event's container id is the
/// sandbox's id, because in other CRI servers a sandbox is a container.
pub(crate) fn publish_sandbox(node: &Node, sandbox: &Sandbox, kind: ContainerEventType) {
    event(node, sandbox, &sandbox.id, kind);
}

/// Publishes an event. If the pod's statuses are too long for an event, they are shortened. (Kubelet
/// would regard an event without the containers' statuses as the removal of all containers.)
fn event(node: &Node, sandbox: &Sandbox, id: &str, kind: ContainerEventType) {
    node.events.publish(|| {
        let containers = node.containers_of(&sandbox.id);
        let share = EVENT_BYTES / (containers.len() + 1);
        let mut pod = sandbox::status::status(sandbox);
        report_size::limit(&mut pod, share);
        let shortened = |container: &Arc<Container>| {
            let mut status = status(container);
            report_size::limit(&mut status, share);
            status
        };
        ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind.into(),
            created_at: now(),
            pod_sandbox_status: Some(pod),
            containers_statuses: containers.iter().map(shortened).collect(),
        }
    });
}

/// Returns the statuses of a pod's containers, or `None` if they are too long for an answer.
pub(crate) fn of_pod(node: &Node, sandbox: &Sandbox) -> Option<Vec<ContainerStatus>> {
    let mut bytes = 0;
    let containers = node.containers_of(&sandbox.id);
    let within = |container: &Arc<Container>| {
        let status = status(container);
        bytes += status.encoded_len();
        (bytes <= STATUS_BYTES).then_some(status)
    };
    containers.iter().map(within).collect()
}

/// Returns the fields that `crictl inspect` shows in addition to the status. The configuration of
/// the runtime is left out if it is too long for an answer. Blocks while it reads the container's
/// config.json.
pub(crate) fn info(node: &Node, container: &Container) -> Value {
    let bundle = node.bundle(&container.sandbox.id, &container.id);
    // Ours: the server created the bundle, so opening its files by path is safe.
    let spec = std::fs::read(bundle.join("config.json"))
        .ok()
        .filter(|text| text.len() <= STATUS_BYTES)
        .and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    json!({
        "pid": container.state().pid,
        "sandboxID": container.sandbox.id,
        "bundle": bundle,
        "runtimeSpec": spec,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_shows_the_image_name_that_the_user_wrote() {
        let mut image = Image {
            id: "sha256:00".into(),
            repo_tags: vec![
                "docker.io/library/a:1".into(),
                "docker.io/library/a:2".into(),
            ],
            repo_digests: vec![format!("docker.io/library/a@sha256:{}", "0".repeat(64))],
            size: 0,
            config: Default::default(),
            layers: Vec::new(),
            unpacked: Vec::new(),
            large_config: false,
            pinned: false,
        };
        let shown = |requested: &str, user: &str, image: &Image| {
            let spec = ImageSpec {
                image: requested.into(),
                user_specified_image: user.into(),
                ..ImageSpec::default()
            };
            image_name(Some(&spec), image)
        };
        let id = format!("sha256:{}", "1".repeat(64));
        assert_eq!(shown(&id, "a:2", &image), "docker.io/library/a:2");
        assert_eq!(shown("a:2", "", &image), "docker.io/library/a:2");
        // The image's first tag is shown if the requested tag now belongs to another image. The
        // first tag is also shown if no name was requested.
        assert_eq!(shown(&id, "a:3", &image), "docker.io/library/a:1");
        assert_eq!(shown(&id, "", &image), "docker.io/library/a:1");
        let digest = image.repo_digests[0].clone();
        assert_eq!(shown(&id, &digest, &image), digest);
        image.repo_tags.clear();
        assert_eq!(shown(&id, &digest, &image), digest);
        assert_eq!(shown(&id, "a:2", &image), "");
    }

    #[test]
    fn signal_numbers_are_converted_to_the_cris_names() {
        assert_eq!(signal_name(libc::SIGTERM), Signal::Sigterm);
        assert_eq!(signal_name(libc::SIGRTMIN() + 3), Signal::Sigrtminplus3);
        assert_eq!(signal_name(libc::SIGRTMAX() - 2), Signal::Sigrtmaxminus2);
        assert_eq!(signal_name(0), Signal::RuntimeDefault);
    }
}
