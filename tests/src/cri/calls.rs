//! What crictl has no command for: calls as kubelet makes them, by gRPC.

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
        a_call_joins_the_one_that_is_in_flight,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_caller_that_gave_up_gets_its_pod_by_calling_again,
        A_NODE,
        Need::RrunCri
    ),
    test!(a_log_is_whole_through_rotations, A_NODE),
    test!(events_tell_of_a_containers_life, A_NODE),
    test!(a_client_may_call_the_server_by_its_sockets_path, A_NODE),
    test!(
        a_pods_containers_are_told_newest_first,
        A_NODE,
        Need::RrunCri
    ),
    test!(removal_of_what_is_not_there_is_no_error, A_NODE),
    test!(methods_to_come_say_so, A_NODE, Need::RrunCri),
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

/// The same answer from everybody.
fn one_answer<T: PartialEq + std::fmt::Debug>(
    answers: Vec<std::result::Result<T, tonic::Status>>,
) -> Result<T> {
    let mut answers = answers
        .into_iter()
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let first = answers.pop().ok_or("no answer")?;
    ensure!(
        answers.iter().all(|answer| *answer == first),
        "not all of {answers:?} are {first:?}"
    );
    Ok(first)
}

/// Others answer that the name is reserved: why this test is here.
fn a_call_joins_the_one_that_is_in_flight() -> Result {
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
        ensure_eq!(count_pods(&calls)?, 1, "pods after eight calls for one");

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
            "containers"
        );
        Ok(())
    })
}

fn a_caller_that_gave_up_gets_its_pod_by_calling_again() -> Result {
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
            // Dropped in the middle, as a connection that breaks.
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
            "pods after twelve impatient callers"
        );
        Ok(())
    })
}

fn a_log_is_whole_through_rotations() -> Result {
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
            wait_for("some lines in the log", || {
                Ok((line_numbers(&fs::read_to_string(&log)?)?.len() > 20).then_some(()))
            })?;
            fs::rename(&log, old(round))?;
            let mut client = calls.runtime();
            let request = ReopenContainerLogRequest {
                container_id: id.clone(),
            };
            calls.wait(async move { client.reopen_container_log(request).await })??;
        }
        wait_for("lines in the last log", || {
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
        ensure!(status.is_err(), "the log of nobody was opened");
        Ok(())
    })
}

fn events_tell_of_a_containers_life() -> Result {
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
        let (mut heard, mut of_pod) = (Vec::new(), Vec::new());
        while !heard.contains(&ContainerEventType::ContainerDeletedEvent) {
            let event = calls.wait(stream.message())??.ok_or("the stream ended")?;
            if event.container_id == id {
                heard.push(event.container_event_type());
            } else if event.container_id == pod_id {
                of_pod.push(event.container_event_type());
            }
        }
        use ContainerEventType::{
            ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent,
            ContainerStoppedEvent,
        };
        ensure_eq!(
            heard,
            [
                ContainerCreatedEvent,
                ContainerStartedEvent,
                ContainerStoppedEvent,
                ContainerDeletedEvent
            ],
            "events of the container"
        );
        ensure_eq!(
            of_pod,
            [ContainerCreatedEvent, ContainerStartedEvent],
            "events of the pod"
        );
        Ok(())
    })
}

/// As gRPC in C++, Python and Java does, and Go's with a dialer of the caller's own.
fn a_client_may_call_the_server_by_its_sockets_path() -> Result {
    on_a_node(|node| {
        let message = node.join("empty-message");
        fs::write(&message, [0_u8; 5])?;
        let body = format!("@{}", message.display());
        let socket = node.socket();
        let path = socket.display().to_string();
        for authority in [&path, &path.replace('/', "%2F"), "localhost"] {
            // Twice on one connection: the second time it is in HPACK's table.
            let url = "http://localhost/runtime.v1.RuntimeService/Version";
            let answer = command("curl", ["-sS", "--http2-prior-knowledge", "--unix-socket"])
                .arg(&socket)
                .args(["-H", "content-type: application/grpc", "-H", "te: trailers"])
                .args(["-H", &format!("Host: {authority}"), "--data-binary", &body])
                .args(["-D", "-", url, url])
                .ok()?;
            let answers = answer.text().matches("grpc-status: 0").count();
            ensure_eq!(answers, 2, "answers to {authority}: {}", answer.told());
        }
        Ok(())
    })
}

/// Of several attempts at a container kubelet takes the first that it is told of, for one.
fn a_pods_containers_are_told_newest_first() -> Result {
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
            let told = calls.wait(async move { client.pod_sandbox_status(request).await })??;
            let told = attempts(&told.into_inner().containers_statuses);
            ensure_eq!(told, newest_first, "the pod's status");
            let event = loop {
                let event = calls.wait(events.message())??.ok_or("the stream ended")?;
                if event.container_id == id {
                    break event;
                }
            };
            let told = attempts(&event.containers_statuses);
            ensure_eq!(told, newest_first, "an event of the pod's");
        }
        Ok(())
    })
}

fn removal_of_what_is_not_there_is_no_error() -> Result {
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        let nobody = || "0123456789abcdef".repeat(4);
        let mut client = calls.runtime();
        calls.wait(async move {
            client
                .stop_pod_sandbox(StopPodSandboxRequest {
                    pod_sandbox_id: nobody(),
                })
                .await?;
            client
                .remove_pod_sandbox(RemovePodSandboxRequest {
                    pod_sandbox_id: nobody(),
                })
                .await?;
            client
                .remove_container(RemoveContainerRequest {
                    container_id: nobody(),
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

fn methods_to_come_say_so() -> Result {
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        let mut client = calls.runtime();
        let request = CheckpointContainerRequest::default();
        let answer = calls.wait(async move { client.checkpoint_container(request).await })?;
        let status = answer.err().ok_or("CheckpointContainer did something")?;
        ensure_eq!(
            status.code(),
            Code::Unimplemented,
            "code of CheckpointContainer"
        );
        ensure!(
            status.message().len() > 20,
            "no sentence: {:?}",
            status.message()
        );
        Ok(())
    })
}
