//! Tests of containers, images and requests that try to give the server work without end. The
//! server limits this work, and answers other requests in the meantime.

use std::fs;

use rrun_proto::v1::{ListPodSandboxMetricsRequest, ListPodSandboxStatsRequest, PodSandboxMetrics};
use serde_json::json;

use crate::support::calls::Calls;
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        processes_that_a_command_leaves_behind_do_not_delay_its_result,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_client_accepts_the_output_of_a_command_that_writes_too_much,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_path_that_is_too_long_is_refused_immediately,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_pod_with_too_many_descriptors_or_cgroups_affects_only_its_own_statistics,
        A_NODE,
        Need::RrunCri
    ),
];

/// The commands leave processes behind that write to the commands' stdout without a pause. The
/// server has two worker threads, so two such commands would occupy the server.
fn processes_that_a_command_leaves_behind_do_not_delay_its_result() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("floods");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("floods", &["sleep", "600"]))?;
        let script = "for n in 1 2 3 4 5 6 7 8; do setsid dd if=/dev/zero bs=1M & done; sleep 1; exec echo started >&2";
        let exec = ["exec", "-s", &id, "sh", "-c", script];
        let commands = [node.crictl(&exec).start()?, node.crictl(&exec).start()?];
        for _ in 0..5 {
            node.asks(&["version"])?;
        }
        for command in commands {
            let output = command.end()?;
            ensure!(
                output.code == 0 && output.stdout.contains("started"),
                "a command that left writing processes behind failed: exit code {}, stderr {:?}",
                output.code,
                output.stderr
            );
        }
        node.asks(&["stopp", &pod_id])?;
        Ok(())
    })
}

/// crictl and kubelet refuse a message of more than 16 MiB. crictl writes stdout and stderr of the
/// command to its stdout.
fn the_client_accepts_the_output_of_a_command_that_writes_too_much() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("writes");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("writes", &["sleep", "600"]))?;
        let note = "[rrun: the rest of the output was dropped]\n\n";
        for (script, end) in [
            ("yes | head -c 17000000; echo end >&2", "end\n\n"),
            ("yes | head -c 17000000; yes | head -c 17000000 >&2", note),
        ] {
            let exec = node.crictl(&["exec", "-s", &id, "sh", "-c", script]);
            let output = exec.ok()?;
            let length = output.stdout.len();
            ensure!(
                length > 16_700_000 && output.stdout.ends_with(end) && output.stdout.contains(note),
                "crictl receives {length} bytes from {script:?}, which do not end with {end:?}"
            );
        }
        Ok(())
    })
}

/// The creation of a million nested directories would take hours, and the pod could not be removed
/// in the meantime.
fn a_path_that_is_too_long_is_refused_immediately() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("long");
        let pod_id = node.runp(&pod)?;
        let long = "/a".repeat(1_000_000);
        let path = node.join("volume");
        fs::create_dir(&path)?;
        let mount = |image: serde_json::Value, host: &str, to: &str, sub_path: &str| {
            json!([{
                "container_path": to, "host_path": host, "image": image,
                "image_sub_path": sub_path, "readonly": true,
            }])
        };
        let image = json!({ "image": BUSYBOX });
        let host = path.to_string_lossy();
        for (number, (key, value)) in [
            ("working_dir", json!(long)),
            ("mounts", mount(json!(null), &host, &long, "")),
            ("mounts", mount(json!(null), &long, "/mnt", "")),
            ("mounts", mount(image, "", "/mnt", &long[1..])),
        ]
        .into_iter()
        .enumerate()
        {
            let mut container = node.container(&format!("long-{number}"), &["sleep", "600"]);
            container[key] = value;
            let output = node.try_create(&pod_id, &pod, &container)?;
            // The middle of a long error is left out, so only one reason is checked.
            ensure!(
                output.code == 1
                    && (key != "working_dir" || output.stderr.contains("at most 4095 bytes")),
                "the creation of a container with a long path in {key} (number {number}) ended with the exit code {} and the error {:.500}",
                output.code,
                output.stderr
            );
        }
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id])?;
        Ok(())
    })
}

/// Returns the value of a metric of the pod's only container.
fn metric(pod: &PodSandboxMetrics, name: &str) -> Option<u64> {
    let container = pod.container_metrics.first()?;
    let metric = container
        .metrics
        .iter()
        .find(|metric| metric.name == name)?;
    metric.value.as_ref().map(|value| value.value)
}

/// Sets limits that the first pod exceeds.
fn a_pod_with_too_many_descriptors_or_cgroups_affects_only_its_own_statistics() -> Result {
    on_a_node(|node| {
        node.terminate_server()?;
        let file = node.join("config.toml");
        let text = fs::read_to_string(&file)?;
        fs::write(
            &file,
            format!("stats_descriptors = 10\nstats_cgroups = 4\n{text}"),
        )?;
        node.start_server()?;
        node.pull(BUSYBOX)?;
        let run = |node: &Node, name: &str, command: &str| -> Result<(String, String)> {
            let pod = node.pod(name);
            let pod_id = node.runp(&pod)?;
            let container = node.container(name, &["sh", "-c", command]);
            let id = node.run(&pod_id, &pod, &container)?;
            Ok((pod_id, id))
        };
        let command = "for n in 1 2 3 4 5 6 7; do sleep 600 & done; wait";
        let (large, container) = run(node, "large", command)?;
        let (small, _) = run(node, "small", "exec sleep 600")?;
        let group = node.cgroup(&container)?;
        let nested = group.join("1/2/3/4/5/6");
        fs::create_dir_all(&nested)?;

        let calls = Calls::new(node)?;
        let mut client = calls.runtime();
        let request = ListPodSandboxMetricsRequest {};
        let answer =
            calls.wait(async move { client.list_pod_sandbox_metrics(request).await })??;
        let all = answer.into_inner().pod_metrics;
        let find = |id: &str| all.iter().find(|pod| pod.pod_sandbox_id == id);
        let (Some(one), Some(other)) = (find(&large), find(&small)) else {
            return Err(format!("the metrics contain only the pods {all:?}").into());
        };
        let sockets = metric(one, "container_sockets");
        let descriptors = metric(one, "container_file_descriptors");
        ensure!(
            sockets.is_none() && descriptors.is_none_or(|count| count >= 24),
            "the container with eight processes has {sockets:?} sockets and {descriptors:?} descriptors"
        );
        ensure_eq!(
            metric(other, "container_sockets"),
            Some(0),
            "number of sockets of the other pod's container"
        );

        let mut client = calls.runtime();
        let request = ListPodSandboxStatsRequest::default();
        let answer = calls.wait(async move { client.list_pod_sandbox_stats(request).await })??;
        ensure_eq!(answer.into_inner().stats.len(), 2, "number of pods");
        let log = node.log();
        for key in ["stats_descriptors", "stats_cgroups"] {
            let lines = log
                .lines()
                .filter(|line| line.contains(&format!("({key})")));
            ensure_eq!(
                lines.count(),
                1,
                "number of log lines about the limit {key}"
            );
        }
        for dir in nested.ancestors().take(6) {
            fs::remove_dir(dir)?;
        }
        Ok(())
    })
}
