//! Tests of the server's reports about containers, pods and itself: statistics, metrics and
//! configuration.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rrun_proto::v1::{
    ListContainerStatsRequest, ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest,
    ListPodSandboxStatsRequest, Metric, PodSandboxMetrics, StreamContainerStatsRequest,
    StreamContainersRequest, StreamImagesRequest, StreamPodSandboxMetricsRequest,
    StreamPodSandboxStatsRequest, StreamPodSandboxesRequest, UpdatePodSandboxResourcesRequest,
};

use crate::support::calls::Calls;
use crate::support::machine::{Directory, Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, METRICS, Node, SERVER, on_a_node};
use crate::{ensure, ensure_eq, test};

const MEMORY: Need = Need::Controller("memory");

pub(crate) const TESTS: &[Test] = &[
    test!(
        every_metric_for_kubelet_has_a_matching_descriptor,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        metrics_report_the_values_of_the_cgroup_controllers,
        A_NODE,
        MEMORY,
        Need::RrunCri
    ),
    test!(
        streaming_calls_return_the_same_objects_as_list_calls,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        crictl_shows_statistics_and_metrics_and_the_state_of_the_server,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_metrics_endpoint_counts_calls_and_survives_invalid_requests,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_refusal_of_a_bad_configuration_names_the_file_and_the_line_and_the_key,
        SERVER,
        Need::RrunCri
    ),
    test!(sighup_reloads_the_configuration, A_NODE, Need::RrunCri),
];

fn metrics(node: &Node) -> Result<Vec<PodSandboxMetrics>> {
    let calls = Calls::new(node)?;
    let mut client = calls.runtime();
    let request = ListPodSandboxMetricsRequest {};
    let answer = calls.wait(async move { client.list_pod_sandbox_metrics(request).await })??;
    Ok(answer.into_inner().pod_metrics)
}

/// This test is for rrun only, because containerd 2.1 fails it. containerd's metric descriptors
/// name two labels, but containerd's metrics have four labels.
fn every_metric_for_kubelet_has_a_matching_descriptor() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("measured");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("sleeps", &["sleep", "600"]))?;
        let calls = Calls::new(node)?;
        let mut client = calls.runtime();
        let request = ListMetricDescriptorsRequest {};
        let described =
            calls.wait(async move { client.list_metric_descriptors(request).await })??;
        let described = described.into_inner().descriptors;
        let pods = metrics(node)?;
        ensure_eq!(pods.len(), 1, "number of pods with metrics");
        let pod = pods.first().ok_or("the metrics contain no pod")?;
        ensure_eq!(pod.pod_sandbox_id, pod_id, "id of the pod in the metrics");
        let container = pod
            .container_metrics
            .first()
            .ok_or("the pod's metrics contain no container")?;
        ensure_eq!(
            container.container_id,
            id,
            "id of the container in the metrics"
        );
        let all: Vec<&Metric> = pod.metrics.iter().chain(&container.metrics).collect();
        for metric in &all {
            let descriptor = described.iter().find(|one| one.name == metric.name);
            let descriptor = descriptor.ok_or(format!(
                "the server returned no descriptor for the metric {}",
                metric.name
            ))?;
            ensure_eq!(
                metric.label_values.len(),
                descriptor.label_keys.len(),
                "number of labels of the metric {}",
                metric.name
            );
            let label = |name: &str| {
                let at = descriptor.label_keys.iter().position(|key| key == name);
                at.and_then(|at| metric.label_values.get(at))
            };
            ensure_eq!(
                label("pod").map(String::as_str),
                Some("measured"),
                "value of a metric's label `pod`"
            );
            let namespace = label("namespace").map(String::as_str);
            ensure_eq!(
                namespace,
                Some("default"),
                "value of a metric's label `namespace`"
            );
        }
        // The server also returns these metrics on a node without cgroup controllers.
        let names: BTreeSet<&str> = container.metrics.iter().map(|m| m.name.as_str()).collect();
        for name in [
            "container_cpu_usage_seconds_total",
            "container_file_descriptors",
            "container_fs_limit_bytes",
            "container_fs_usage_bytes",
            "container_last_seen",
            "container_processes",
            "container_spec_memory_limit_bytes",
            "container_start_time_seconds",
        ] {
            ensure!(
                names.contains(name),
                "the metric {name} is missing among the container's metrics: {names:?}"
            );
        }
        ensure!(
            pod.metrics
                .iter()
                .any(|metric| metric.name == "container_network_receive_bytes_total"),
            "the pod's metrics contain no network metrics"
        );
        // kubelet drops all metrics if two series have the same name and the same labels.
        let mut series = BTreeSet::new();
        for metric in all {
            let one = (metric.name.clone(), metric.label_values.clone());
            ensure!(series.insert(one), "the series {metric:?} occurs twice");
        }
        Ok(())
    })
}

fn metrics_report_the_values_of_the_cgroup_controllers() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("uses");
        let pod_id = node.runp(&pod)?;
        let script =
            "head -c 20000000 /dev/zero > /file; cat /file > /dev/null; while :; do :; done";
        let mut config = node.container("busy", &["sh", "-c", script]);
        config["linux"]["resources"] =
            serde_json::json!({ "memory_limit_in_bytes": 64 << 20, "cpu_shares": 102 });
        node.run(&pod_id, &pod, &config)?;
        wait_for(
            "the server to report metrics that show the container's usage",
            || {
                let pods = metrics(node)?;
                let container = pods.first().and_then(|pod| pod.container_metrics.first());
                let container = container.ok_or("the metrics contain no container")?;
                let value = |name: &str| {
                    let metric = container.metrics.iter().find(|metric| metric.name == name);
                    let value = metric.and_then(|metric| metric.value.as_ref());
                    value.map_or(u64::MAX, |value| value.value)
                };
                for (name, least, most) in [
                    ("container_cpu_usage_seconds_total", 1, 10_000),
                    ("container_memory_usage_bytes", 100_000, 64 << 20),
                    ("container_memory_working_set_bytes", 1, 64 << 20),
                    ("container_memory_max_usage_bytes", 100_000, 64 << 20),
                    ("container_memory_cache", 0, 64 << 20),
                    ("container_memory_rss", 1, 64 << 20),
                    ("container_memory_swap", 0, 64 << 20),
                    ("container_oom_events_total", 0, 0),
                    ("container_pressure_cpu_waiting_seconds_total", 0, 10_000),
                    ("container_processes", 1, 3),
                    ("container_threads", 1, 3),
                    ("container_spec_memory_limit_bytes", 64 << 20, 64 << 20),
                    ("container_spec_cpu_shares", 102, 102),
                    ("container_fs_usage_bytes", 20_000_000, 40_000_000),
                ] {
                    let value = value(name);
                    ensure!(
                        (least..=most).contains(&value),
                        "the value of the metric {name} is {value}, but should be between {least} and {most}"
                    );
                }
                Ok(Some(()))
            },
        )
    })
}

fn streaming_calls_return_the_same_objects_as_list_calls() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut ids = BTreeSet::new();
        for name in ["one", "two", "three"] {
            let pod = node.pod(name);
            let pod_id = node.runp(&pod)?;
            node.run(&pod_id, &pod, &node.container("sleeps", &["sleep", "600"]))?;
            ids.insert(pod_id);
        }
        let calls = Calls::new(node)?;
        let mut client = calls.runtime();
        let mut images = calls.image();
        let expected = ids.clone();
        calls
            .wait(async move {
                macro_rules! ids {
                    ($call:expr, $items:ident, $id:expr) => {{
                        let mut stream = $call.await?.into_inner();
                        let mut ids = BTreeSet::new();
                        while let Some(message) = stream.message().await? {
                            ids.extend(message.$items.into_iter().map($id));
                        }
                        ids
                    }};
                }
                let attributes = |id: Option<String>| id.unwrap_or_default();
                let listed = ids!(
                    client.stream_pod_sandboxes(StreamPodSandboxesRequest::default()),
                    pod_sandboxes,
                    |pod| pod.id
                );
                let measured = ids!(
                    client.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest::default()),
                    pod_sandbox_metrics,
                    |pod| pod.pod_sandbox_id
                );
                let counted = ids!(
                    client.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest::default()),
                    pod_sandbox_stats,
                    |pod| attributes(pod.attributes.map(|one| one.id))
                );
                let of_containers = ids!(
                    client.stream_containers(StreamContainersRequest::default()),
                    containers,
                    |one| one.pod_sandbox_id
                );
                let containers = ids!(
                    client.stream_container_stats(StreamContainerStatsRequest::default()),
                    container_stats,
                    |one| attributes(one.attributes.map(|one| one.id))
                );
                let images = ids!(
                    images.stream_images(StreamImagesRequest::default()),
                    images,
                    |image| image.id
                );
                let stats = client
                    .list_pod_sandbox_stats(ListPodSandboxStatsRequest::default())
                    .await?;
                let container_stats = client
                    .list_container_stats(ListContainerStatsRequest::default())
                    .await?;
                let update = UpdatePodSandboxResourcesRequest {
                    pod_sandbox_id: expected.first().cloned().unwrap_or_default(),
                    ..UpdatePodSandboxResourcesRequest::default()
                };
                client.update_pod_sandbox_resources(update).await?;
                Ok::<_, tonic::Status>((
                    [listed, measured, counted, of_containers],
                    (containers.len(), images.len()),
                    (
                        stats.into_inner().stats.len(),
                        container_stats.into_inner().stats.len(),
                    ),
                ))
            })?
            .map_err(|status| status.to_string().into())
            .and_then(|(lists, streamed, listed)| {
                for list in lists {
                    ensure_eq!(list, ids, "pod ids in a streamed list");
                }
                ensure_eq!(
                    streamed,
                    (3, 1),
                    "numbers of streamed containers and images"
                );
                ensure_eq!(
                    listed,
                    (3, 3),
                    "numbers of pods and containers in the statistics that the list calls return"
                );
                Ok(())
            })
    })
}

fn crictl_shows_statistics_and_metrics_and_the_state_of_the_server() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("shown");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("sleeps", &["sleep", "600"]))?;
        let short = id.get(..12).unwrap_or_default();
        let short_pod = pod_id.get(..12).unwrap_or_default();
        for (args, expected) in [
            (vec!["stats"], short),
            (vec!["statsp"], short_pod),
            (vec!["metricsp"], "container_cpu_usage_seconds_total"),
            (vec!["metricdescs"], "container_memory_working_set_bytes"),
            (vec!["info"], "RuntimeReady"),
            (vec!["version"], "rrun"),
            (vec!["runtime-config"], "CGROUPFS"),
            (vec!["imagefsinfo"], "usedBytes"),
        ] {
            let output = node.crictl(&args).ok()?;
            ensure!(
                output.stdout.contains(expected),
                "the output does not contain {expected:?}: {}",
                output.told()
            );
        }
        node.asks(&["update-runtime-config", "10.5.0.0/16"])?;
        let refused = node
            .crictl(&["checkpoint", "--export", "/tmp/none", &id])
            .end()?;
        refused.fails_with("checkpoint")?;
        let mut events = node.crictl(&["events"]).start()?;
        let mut tries = 0;
        wait_for("crictl events to print an event", || {
            tries += 1;
            let name = format!("short-{tries}");
            node.run(&pod_id, &pod, &node.container(&name, &["true"]))?;
            let output = events.stdout();
            Ok(output.contains("CONTAINER_STARTED_EVENT").then_some(()))
        })
    })
}

/// Sends `bytes` to the metrics endpoint and returns the whole answer.
fn answer_to(bytes: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(METRICS)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    // The server can close the connection before all bytes are sent. This function therefore
    // ignores write errors.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn scrape() -> Result<String> {
    let answer = answer_to(b"GET /metrics HTTP/1.1\r\nHost: rrun\r\n\r\n")?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or("the answer has no complete HTTP head")?;
    ensure!(
        head.starts_with("HTTP/1.1 200 OK"),
        "the request to the metrics endpoint failed: {head}"
    );
    Ok(body.to_owned())
}

fn sample(text: &str, name: &str) -> Result<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line
        .ok_or(format!(
            "the metrics endpoint did not return the metric {name}:\n{text}"
        ))?
        .parse()?)
}

fn the_metrics_endpoint_counts_calls_and_survives_invalid_requests() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("counted");
        let pod_id = node.runp(&pod)?;
        let refused = node.crictl(&["pull", "127.0.0.1:5000/no/such:1"]).end()?;
        ensure!(
            refused.code != 0,
            "the pull of a missing image succeeded: {}",
            refused.told()
        );
        node.asks(&["pods"])?;
        let text = scrape()?;
        for (name, value) in [
            ("rrun_cri_operations_total{method=\"RunPodSandbox\"}", 1.0),
            (
                "rrun_cri_operations_duration_seconds_count{method=\"RunPodSandbox\"}",
                1.0,
            ),
            (
                "rrun_cri_operations_errors_total{method=\"PullImage\",code=\"NotFound\"}",
                1.0,
            ),
            ("rrun_cri_image_pull_seconds_count", 1.0),
            ("rrun_cri_image_pull_failures_total", 1.0),
            ("rrun_cri_monitors", 1.0),
            ("rrun_cri_pods{state=\"ready\"}", 1.0),
        ] {
            ensure_eq!(sample(&text, name)?, value, "value of the metric {name}");
        }
        ensure!(
            sample(&text, "rrun_cri_image_pull_bytes_total")? > 100_000.0,
            "the metric rrun_cri_image_pull_bytes_total is too small"
        );
        ensure!(
            sample(&text, "process_resident_memory_bytes")? > 1_000_000.0,
            "the metric process_resident_memory_bytes is too small"
        );
        // Every line of the metrics is a comment or a sample.
        for line in text.lines() {
            let sample = line.rsplit_once(' ').map(|(_, value)| value.parse::<f64>());
            ensure!(
                line.starts_with("# ") || matches!(sample, Some(Ok(_))),
                "this line of the metrics is neither a comment nor a sample: {line:?}"
            );
        }

        // These clients send nothing. The server closes their connections after a while, and
        // continues to serve other clients.
        let silent: Vec<TcpStream> = (0..20)
            .map(|_| TcpStream::connect(METRICS))
            .collect::<std::io::Result<_>>()?;
        let long = vec![b'x'; 1 << 20];
        for garbage in [
            &b""[..],
            b"\0\xff\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET /metrics\r\n\r\n",
            b"POST /metrics HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            &long,
        ] {
            let answer = answer_to(garbage)?;
            ensure!(
                !answer.contains(" 200 OK"),
                "the server answered an invalid request with status 200: {answer}"
            );
        }
        drop(silent);
        ensure!(
            answer_to(b"GET / HTTP/1.0\r\n\r\n")?.contains(" 404 "),
            "the server did not answer a request for a path other than /metrics with the status 404"
        );
        scrape()?;
        node.asks(&["inspectp", &pod_id])?;
        Ok(())
    })
}

fn the_refusal_of_a_bad_configuration_names_the_file_and_the_line_and_the_key() -> Result {
    let directory = Directory::new("config")?;
    let main = directory.join("config.toml");
    fs::create_dir(directory.join("config.d"))?;
    let drop_in = directory.join("config.d/50-here.toml");
    for (text, more, expected) in [
        (
            "debug = true\nrooot = \"/r\"\n",
            "",
            "config.toml, line 2, rooot",
        ),
        ("debug = 3\n", "", "config.toml, line 1, debug"),
        (
            "",
            "\n\nmetrics_listen = \"here\"\n",
            "50-here.toml, line 3, metrics_listen",
        ),
        (
            "",
            "cgroup_driver = \"none\"\n",
            "50-here.toml, line 1, cgroup_driver",
        ),
        ("listen = \"tcp://1\"\n", "", "listen: "),
        (
            "",
            "[runtime.runc]\npth = \"/x\"\n",
            "50-here.toml, line 2, pth",
        ),
    ] {
        fs::write(&main, text)?;
        fs::write(&drop_in, more)?;
        let output = command("rrun-cri", ["--config"]).arg(&main).exits(1)?;
        ensure!(
            output.stderr.contains(expected),
            "the output does not contain {expected:?}: {}",
            output.told()
        );
    }
    let default = command("rrun-cri", ["config", "default"]).ok()?.stdout;
    fs::write(&main, &default)?;
    for key in [
        "root",
        "state",
        "listen",
        "metrics_listen",
        "stream_listen",
        "debug",
    ] {
        ensure!(
            default.contains(&format!("{key} = ")),
            "the key {key} is missing in the default configuration:\n{default}"
        );
    }
    Ok(())
}

fn sighup_reloads_the_configuration() -> Result {
    on_a_node(|node| {
        let mode = fs::metadata(node.socket())?.permissions().mode() & 0o777;
        ensure_eq!(mode, 0o600, "mode of the CRI socket");
        let logged = |node: &mut Node, what: &str| {
            let what = what.to_owned();
            wait_for(&format!("the server to log {what:?}"), || {
                Ok(node.log().contains(&what).then_some(()))
            })
        };
        node.hang_up_server();
        logged(node, "the configuration has not changed")?;

        let config = node.join("config.toml");
        let text = fs::read_to_string(&config)?;
        let changed = text.replace(
            "debug = true",
            "debug = false\ndefault_cgroup_parent = \"/x\"",
        );
        fs::write(&config, changed)?;
        let hosts = node.join("certs.d/example.org");
        fs::create_dir(&hosts)?;
        fs::write(
            hosts.join("hosts.toml"),
            "server = \"https://127.0.0.1:1\"\n\nskip_verfy = true\n",
        )?;
        node.hang_up_server();
        logged(node, "debug is now false")?;
        logged(node, "take effect at the next start: default_cgroup_parent")?;
        logged(node, "example.org/hosts.toml has changed")?;
        logged(node, "example.org/hosts.toml, line 3, skip_verfy")?;

        fs::write(hosts.join("hosts.toml"), "server = 3\n")?;
        fs::write(&config, format!("nonsense = 1\n{text}"))?;
        node.hang_up_server();
        logged(node, "line 1, nonsense")?;
        logged(node, "example.org/hosts.toml, line 1, server")?;
        fs::write(&config, &text)?;
        node.hang_up_server();
        logged(node, "debug is now true")?;
        node.asks(&["version"])?;

        // Each pull reads hosts.toml again. A change of this file therefore takes effect without a
        // SIGHUP. The server logs an unknown key only once, but a restarted server logs the unknown
        // key again.
        let unknown = "example.org/hosts.toml, line 2, cpa";
        fs::write(
            hosts.join("hosts.toml"),
            "server = \"http://127.0.0.1:1\"\ncpa = \"x\"\n",
        )?;
        for _ in 0..2 {
            let pulled = node.asks(&["pull", "example.org/none:1"]);
            ensure!(
                pulled.is_err(),
                "a pull succeeded although no registry listens at the address"
            );
        }
        logged(node, unknown)?;
        ensure_eq!(
            node.log().matches(unknown).count(),
            1,
            "number of log lines that contain {unknown:?}"
        );
        node.terminate_server()?;
        node.start_server()?;
        wait_for("the restarted server to log the unknown key again", || {
            Ok((node.log().matches(unknown).count() == 2).then_some(()))
        })?;
        Ok(())
    })
}
