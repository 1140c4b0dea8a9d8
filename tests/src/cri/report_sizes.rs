//! Tests of pods whose labels, annotations or groups are very long. Kubelet refuses an answer of
//! more than 16 MiB, and must nevertheless see and stop all pods.

use rrun_proto::v1::{
    ContainerConfig, ContainerStatusRequest, CreateContainerRequest, GetEventsRequest,
    ListContainerStatsRequest, ListContainersRequest, ListPodSandboxRequest,
    ListPodSandboxStatsRequest, PodSandboxStatusRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopPodSandboxRequest,
};

use crate::support::calls::{Calls, RuntimeClient, container, pod};
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_pod_with_very_long_reports_is_seen_and_stopped,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        pods_with_very_long_annotations_hide_no_other_pod,
        A_NODE,
        Need::RrunCri
    ),
];

/// The limit of kubelet on the length of an answer.
const KUBELET_BYTES: usize = 16 << 20;

/// The length of an annotation with which three pods or containers exceed kubelet's limit.
const LONG_BYTES: usize = (6 << 20) - 4096;

/// The label with which kubelet recognises a container.
const NAME: &str = "io.kubernetes.container.name";

/// Returns a client with the limits of kubelet.
fn kubelet(calls: &Calls) -> RuntimeClient {
    calls.runtime().max_decoding_message_size(KUBELET_BYTES)
}

fn long_container(name: &str) -> ContainerConfig {
    let mut config = container(name, &["sleep", "1000"]);
    let annotation = "x".repeat(LONG_BYTES);
    config.annotations = [("a".to_owned(), annotation)].into();
    config.labels = [(NAME.to_owned(), name.to_owned())].into();
    config
}

fn run_pod(calls: &Calls, name: &str, annotation: usize) -> Result<String> {
    let mut config = pod(name);
    config.annotations = [("a".to_owned(), "x".repeat(annotation))].into();
    let request = RunPodSandboxRequest {
        config: Some(config),
        ..RunPodSandboxRequest::default()
    };
    let mut client = kubelet(calls);
    let answer = calls.wait(async move { client.run_pod_sandbox(request).await })??;
    Ok(answer.into_inner().pod_sandbox_id)
}

fn run_container(calls: &Calls, pod_id: &str, config: ContainerConfig) -> Result<String> {
    let mut client = kubelet(calls);
    let request = CreateContainerRequest {
        pod_sandbox_id: pod_id.to_owned(),
        config: Some(config),
        sandbox_config: Some(pod("long")),
    };
    calls.wait(async move {
        let created = client.create_container(request).await?;
        let container_id = created.into_inner().container_id;
        let request = StartContainerRequest {
            container_id: container_id.clone(),
        };
        client.start_container(request).await?;
        Ok(container_id)
    })?
}

/// An operator can permit such configurations, and a pod of an earlier version can have them.
fn a_pod_with_very_long_reports_is_seen_and_stopped() -> Result {
    on_a_node(|node| {
        node.restart_with("pod_configuration_bytes = 100000000")?;
        node.pull(BUSYBOX)?;
        let calls = Calls::new(node)?;
        let mut client = kubelet(&calls);
        let events =
            calls.wait(async move { client.get_container_events(GetEventsRequest {}).await })??;
        let mut events = events.into_inner();
        let pod_id = run_pod(&calls, "long", 0)?;
        let names = ["a", "b", "c"];
        let ids = names.map(|name| run_container(&calls, &pod_id, long_container(name)));
        let ids = ids.into_iter().collect::<Result<Vec<_>>>()?;

        let mut client = kubelet(&calls);
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod_id.clone(),
            verbose: true,
        };
        let status = calls.wait(async move { client.pod_sandbox_status(request).await })??;
        let status = status.into_inner();
        // If the timestamp is 0, kubelet requests the status of each container.
        ensure_eq!(status.timestamp, 0, "timestamp of the pod's status");
        ensure_eq!(
            status.containers_statuses.len(),
            0,
            "number of the containers' statuses in the pod's status"
        );
        for id in &ids {
            let mut client = kubelet(&calls);
            let request = ContainerStatusRequest {
                container_id: id.clone(),
                verbose: true,
            };
            let status = calls.wait(async move { client.container_status(request).await })??;
            let annotations = status.into_inner().status.unwrap_or_default().annotations;
            ensure_eq!(
                annotations["a"].len(),
                LONG_BYTES,
                "length of the annotation"
            );
        }
        let event = loop {
            let event = calls
                .wait(events.message())??
                .ok_or("the stream of container events ended")?;
            if event.containers_statuses.len() == names.len() {
                break event;
            }
        };
        ensure!(
            event.pod_sandbox_status.is_some(),
            "an event contains no status of the pod"
        );
        for status in &event.containers_statuses {
            ensure!(
                names.contains(&status.labels[NAME].as_str()) && status.annotations.is_empty(),
                "the status of a container in an event was not shortened"
            );
        }
        stop(&calls, &pod_id)
    })
}

/// Stops and removes a pod.
fn stop(calls: &Calls, id: &str) -> Result {
    let mut client = kubelet(calls);
    let pod_sandbox_id = id.to_owned();
    calls.wait(async move {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        client.stop_pod_sandbox(request).await?;
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        client.remove_pod_sandbox(request).await
    })??;
    Ok(())
}

fn pods_with_very_long_annotations_hide_no_other_pod() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let calls = Calls::new(node)?;
        let names = ["a", "b", "c"];
        let pods = names.map(|name| run_pod(&calls, name, LONG_BYTES));
        let pods = pods.into_iter().collect::<Result<Vec<_>>>()?;
        for (name, pod) in names.iter().zip(&pods) {
            run_container(&calls, pod, long_container(name))?;
        }
        run_pod(&calls, "other", 100)?;

        let mut client = kubelet(&calls);
        let request = ListPodSandboxRequest::default();
        let listed = calls.wait(async move { client.list_pod_sandbox(request).await })??;
        let lengths =
            |item: &rrun_proto::v1::PodSandbox| item.annotations.get("a").map(String::len);
        let items = listed.into_inner().items;
        let mut kept: Vec<usize> = items.iter().filter_map(lengths).collect();
        kept.sort_unstable();
        ensure_eq!(items.len(), 4, "number of listed pods");
        ensure_eq!(kept, [100], "lengths of the listed annotations");

        let mut client = kubelet(&calls);
        let request = ListContainersRequest::default();
        let listed = calls.wait(async move { client.list_containers(request).await })??;
        for listed in listed.into_inner().containers {
            let name = &listed.labels[NAME];
            ensure!(names.contains(&name.as_str()), "listed container {name}");
        }
        let mut client = kubelet(&calls);
        let request = ListContainerStatsRequest::default();
        let stats = calls.wait(async move { client.list_container_stats(request).await })??;
        ensure_eq!(stats.into_inner().stats.len(), 3, "number of containers");
        let mut client = kubelet(&calls);
        let request = ListPodSandboxStatsRequest::default();
        let stats = calls.wait(async move { client.list_pod_sandbox_stats(request).await })??;
        ensure_eq!(stats.into_inner().stats.len(), 4, "number of pods");
        Ok(())
    })
}
