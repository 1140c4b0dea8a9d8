//! Tests of gRPC calls that kubelet makes, but that crictl cannot make.

use std::fs;
use std::time::Duration;

use rrun_proto::v1::{
    CheckpointContainerRequest, ContainerEventType, ContainerStatus, CreateContainerRequest,
    GetEventsRequest, ListPodSandboxRequest, PodSandboxStatusRequest, PullImageRequest,
    RemoveContainerRequest, RemovePodSandboxRequest, ReopenContainerLogRequest,
    RunPodSandboxRequest, RuntimeConfigRequest, StopPodSandboxRequest,
};
use tonic::Code;

use crate::support::calls::{Calls, container, image, pod};
use crate::support::counted_lines::{line_numbers, without_gap};
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, WEB, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_call_joins_an_identical_call_in_flight,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_retry_of_a_cancelled_pod_creation_creates_no_second_pod,
        A_NODE,
        Need::RrunCri
    ),
    test!(log_rotations_lose_no_line, A_NODE),
    test!(events_report_each_step_of_a_container_life_cycle, A_NODE),
    test!(
        a_client_can_send_the_socket_path_as_the_http2_authority,
        A_NODE
    ),
    test!(
        the_server_lists_the_newest_container_of_a_pod_first,
        A_NODE,
        Need::RrunCri
    ),
    test!(the_removal_of_a_missing_pod_or_container_succeeds, A_NODE),
    test!(
        a_grpc_method_that_is_not_implemented_returns_unimplemented,
        A_NODE,
        Need::RrunCri
    ),
];

fn count_pods(calls: &Calls) -> Result<usize> {
    let mut client = calls.runtime();
    let list = calls.wait(async move {
        client
            .list_pod_sandbox(ListPodSandboxRequest::default())
            .await
    })?;
    Ok(list?.into_inner().items.len())
}

/// Returns the answer to identical calls, or an error if a call failed or the answers differ.
fn one_answer<T: PartialEq + std::fmt::Debug>(
    answers: Vec<std::result::Result<T, tonic::Status>>,
) -> Result<T> {
    let mut answers = answers
        .into_iter()
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let first = answers
        .pop()
        .ok_or("there is no answer, because no CRI call was made")?;
    ensure!(
        answers.iter().all(|answer| *answer == first),
        "identical CRI calls returned different answers: one answer is {first:?}, and the others are {answers:?}"
    );
    Ok(first)
}

/// In other CRI servers, a call reserves the name of its pod or container. These servers refuse an
/// identical second call. rrun-cri must return the same answer to both calls.
fn a_call_joins_an_identical_call_in_flight() -> Result {
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        one_answer(calls.together((0..8).map(|_| {
            let mut client = calls.image();
            async move {
                let request = PullImageRequest {
                    image: Some(image(BUSYBOX)),
                    ..PullImageRequest::default()
                };
                client
                    .pull_image(request)
                    .await
                    .map(|answer| answer.into_inner().image_ref)
            }
        }))?)?;

        let pod_id = one_answer(calls.together((0..8).map(|_| {
            let mut client = calls.runtime();
            async move {
                let request = RunPodSandboxRequest {
                    config: Some(pod("one")),
                    ..RunPodSandboxRequest::default()
                };
                client
                    .run_pod_sandbox(request)
                    .await
                    .map(|answer| answer.into_inner().pod_sandbox_id)
            }
        }))?)?;
        ensure_eq!(
            count_pods(&calls)?,
            1,
            "number of pods after eight RunPodSandbox calls for the same pod"
        );

        one_answer(calls.together((0..8).map(|_| {
            let mut client = calls.runtime();
            let request = CreateContainerRequest {
                pod_sandbox_id: pod_id.clone(),
                config: Some(container("one", &["sleep", "600"])),
                sandbox_config: Some(pod("one")),
            };
            async move {
                client
                    .create_container(request)
                    .await
                    .map(|answer| answer.into_inner().container_id)
            }
        }))?)?;
        ensure_eq!(
            node.asks(&["ps", "--all", "--quiet"])?.lines().count(),
            1,
            "number of containers after eight CreateContainer calls for the same container"
        );
        Ok(())
    })
}

fn a_retry_of_a_cancelled_pod_creation_creates_no_second_pod() -> Result {
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        for round in 0..12u64 {
            let name = format!("impatient-{round}");
            let request = || RunPodSandboxRequest {
                config: Some(pod(&name)),
                ..RunPodSandboxRequest::default()
            };
            let timeout = Duration::from_millis(round * 3);
            let mut client = calls.runtime();
            let first = request();
            // The timeout cancels RunPodSandbox early, like a broken connection.
            let _ = calls.wait(async move {
                tokio::time::timeout(timeout, client.run_pod_sandbox(first))
                    .await
                    .is_ok()
            })?;
            let mut client = calls.runtime();
            let again = request();
            calls.wait(async move { client.run_pod_sandbox(again).await })??;
        }
        ensure_eq!(
            count_pods(&calls)?,
            12,
            "number of pods after twelve clients cancelled RunPodSandbox and repeated it"
        );
        Ok(())
    })
}

fn log_rotations_lose_no_line() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("rotated");
        let pod_id = node.runp(&pod)?;
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("counts", &["/inside", "count", "2"]),
        )?;
        let calls = Calls::new(node)?;
        let log = node.join("logs/rotated/counts.log");
        let old = |round: usize| node.join(&format!("logs/rotated/counts.log.{round}"));
        for round in 0..5 {
            wait_for("the container's log to contain more than 20 lines", || {
                Ok((line_numbers(&fs::read_to_string(&log)?)?.len() > 20).then_some(()))
            })?;
            fs::rename(&log, old(round))?;
            let mut client = calls.runtime();
            let request = ReopenContainerLogRequest {
                container_id: id.clone(),
            };
            calls.wait(async move { client.reopen_container_log(request).await })??;
        }
        wait_for("the newest log file to contain lines", || {
            Ok((!fs::read_to_string(&log)?.is_empty()).then_some(()))
        })?;
        node.asks(&["stop", "--timeout", "0", &id])?;
        let mut all = String::new();
        for round in 0..5 {
            all += &fs::read_to_string(old(round))?;
        }
        all += &fs::read_to_string(&log)?;
        without_gap(&line_numbers(&all)?)?;

        let mut client = calls.runtime();
        let request = ReopenContainerLogRequest {
            container_id: "nobody".to_owned(),
        };
        let status = calls.wait(async move { client.reopen_container_log(request).await })?;
        ensure!(
            status.is_err(),
            "ReopenContainerLog succeeded for a container that does not exist"
        );
        Ok(())
    })
}

fn events_report_each_step_of_a_container_life_cycle() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let calls = Calls::new(node)?;
        let mut client = calls.runtime();
        let stream =
            calls.wait(async move { client.get_container_events(GetEventsRequest {}).await })??;
        let mut stream = stream.into_inner();
        let pod = node.pod("events");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("short", &["true"]))?;
        node.exited(&id)?;
        node.asks(&["rm", &id])?;
        let (mut of_container, mut of_pod) = (Vec::new(), Vec::new());
        while !of_container.contains(&ContainerEventType::ContainerDeletedEvent) {
            let event = calls
                .wait(stream.message())??
                .ok_or("the stream of container events ended")?;
            if event.container_id == id {
                of_container.push(event.container_event_type());
            } else if event.container_id == pod_id {
                of_pod.push(event.container_event_type());
            }
        }
        use ContainerEventType::{
            ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent,
            ContainerStoppedEvent,
        };
        ensure_eq!(
            of_container,
            [
                ContainerCreatedEvent,
                ContainerStartedEvent,
                ContainerStoppedEvent,
                ContainerDeletedEvent
            ],
            "types of the events about the container"
        );
        ensure_eq!(
            of_pod,
            [ContainerCreatedEvent, ContainerStartedEvent],
            "types of the events about the pod"
        );
        Ok(())
    })
}

/// The gRPC libraries for C++, Python and Java send the socket's path as the `:authority` of a
/// request. The gRPC library for Go also sends the socket's path if the caller supplies its own
/// dialer.
fn a_client_can_send_the_socket_path_as_the_http2_authority() -> Result {
    on_a_node(|node| {
        let message = node.join("empty-message");
        fs::write(&message, [0_u8; 5])?;
        let body = format!("@{}", message.display());
        let socket = node.socket();
        let path = socket.display().to_string();
        for authority in [&path, &path.replace('/', "%2F"), "localhost"] {
            // curl sends two requests on one connection. In the second request, HPACK replaces the
            // authority with its index in the dynamic table.
            let url = "http://localhost/runtime.v1.RuntimeService/Version";
            let answer = command("curl", ["-sS", "--http2-prior-knowledge", "--unix-socket"])
                .arg(&socket)
                .args(["-H", "content-type: application/grpc", "-H", "te: trailers"])
                .args(["-H", &format!("Host: {authority}"), "--data-binary", &body])
                .args(["-D", "-", url, url])
                .ok()?;
            let answers = answer.text().matches("grpc-status: 0").count();
            ensure_eq!(
                answers,
                2,
                "number of successful answers to two requests with the authority {authority} (output of curl: {})",
                answer.told()
            );
        }
        Ok(())
    })
}

/// If the list contains several attempts of a container, kubelet uses the first attempt in the
/// list.
fn the_server_lists_the_newest_container_of_a_pod_first() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let calls = Calls::new(node)?;
        let mut client = calls.runtime();
        let events =
            calls.wait(async move { client.get_container_events(GetEventsRequest {}).await })??;
        let mut events = events.into_inner();
        let pod = node.pod("attempts");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("again", &["true"]);
        let attempts = |statuses: &[ContainerStatus]| -> Vec<u32> {
            let metadata = statuses.iter().flat_map(|status| &status.metadata);
            metadata.map(|metadata| metadata.attempt).collect()
        };
        for attempt in 0..5 {
            container["metadata"]["attempt"] = attempt.into();
            let id = node.create(&pod_id, &pod, &container)?;
            let newest_first: Vec<u32> = (0..=attempt).rev().collect();
            let mut client = calls.runtime();
            let request = PodSandboxStatusRequest {
                pod_sandbox_id: pod_id.clone(),
                verbose: false,
            };
            let listed = calls.wait(async move { client.pod_sandbox_status(request).await })??;
            let listed = attempts(&listed.into_inner().containers_statuses);
            ensure_eq!(
                listed,
                newest_first,
                "attempt numbers of the containers in the pod's status"
            );
            let event = loop {
                let event = calls
                    .wait(events.message())??
                    .ok_or("the stream of container events ended")?;
                if event.container_id == id {
                    break event;
                }
            };
            let listed = attempts(&event.containers_statuses);
            ensure_eq!(
                listed,
                newest_first,
                "attempt numbers of the containers in the event of the newest container"
            );
        }
        Ok(())
    })
}

fn the_removal_of_a_missing_pod_or_container_succeeds() -> Result {
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        let missing = || "0123456789abcdef".repeat(4);
        let mut client = calls.runtime();
        calls.wait(async move {
            client
                .stop_pod_sandbox(StopPodSandboxRequest {
                    pod_sandbox_id: missing(),
                })
                .await?;
            client
                .remove_pod_sandbox(RemovePodSandboxRequest {
                    pod_sandbox_id: missing(),
                })
                .await?;
            client
                .remove_container(RemoveContainerRequest {
                    container_id: missing(),
                })
                .await
        })??;
        let mut client = calls.runtime();
        let config =
            calls.wait(async move { client.runtime_config(RuntimeConfigRequest {}).await })??;
        ensure!(
            config.into_inner().linux.is_some(),
            "RuntimeConfig does not name the cgroup driver"
        );
        let mut client = calls.image();
        let request = PullImageRequest {
            image: Some(image(WEB)),
            ..PullImageRequest::default()
        };
        calls.wait(async move { client.pull_image(request).await })??;
        Ok(())
    })
}

fn a_grpc_method_that_is_not_implemented_returns_unimplemented() -> Result {
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        let mut client = calls.runtime();
        let request = CheckpointContainerRequest::default();
        let answer = calls.wait(async move { client.checkpoint_container(request).await })?;
        let status = answer.err().ok_or("CheckpointContainer succeeded")?;
        ensure_eq!(
            status.code(),
            Code::Unimplemented,
            "gRPC code of CheckpointContainer"
        );
        ensure!(
            status.message().len() > 20,
            "the error message of CheckpointContainer is too short: {:?}",
            status.message()
        );
        Ok(())
    })
}
