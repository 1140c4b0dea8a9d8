//! What the server tells of containers, pods and itself: statistics, metrics, configuration.

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
        metrics_for_kubelet_are_described_and_given,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        metrics_count_what_the_controllers_count,
        A_NODE,
        MEMORY,
        Need::RrunCri
    ),
    test!(streamed_lists_are_the_lists, A_NODE, Need::RrunCri),
    test!(
        crictl_shows_statistics_metrics_and_the_servers_state,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        prometheus_metrics_count_calls_and_garbage_is_harmless,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        bad_configuration_names_file_line_and_key,
        SERVER,
        Need::RrunCri
    ),
    test!(
        a_hangup_reads_the_configuration_again,
        A_NODE,
        Need::RrunCri
    ),
];

fn metrics(node: &Node) -> Result<Vec<PodSandboxMetrics>> {
    let calls = Calls::new(node)?;
    let mut client = calls.runtime();
    let request = ListPodSandboxMetricsRequest {};
    let answer = calls.wait(async move { client.list_pod_sandbox_metrics(request).await })??;
    Ok(answer.into_inner().pod_metrics)
}

/// containerd 2.1 describes two labels and gives four.
fn metrics_for_kubelet_are_described_and_given() -> Result {
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
        ensure_eq!(pods.len(), 1, "pods with metrics");
        let pod = pods.first().ok_or("no pod")?;
        ensure_eq!(pod.pod_sandbox_id, pod_id, "the pod's id");
        let container = pod.container_metrics.first().ok_or("no container")?;
        ensure_eq!(container.container_id, id, "the container's id");
        let all: Vec<&Metric> = pod.metrics.iter().chain(&container.metrics).collect();
        for metric in &all {
            let descriptor = described.iter().find(|one| one.name == metric.name);
            let descriptor = descriptor.ok_or(format!("{} is not described", metric.name))?;
            ensure_eq!(
                metric.label_values.len(),
                descriptor.label_keys.len(),
                "labels of {}",
                metric.name
            );
            let label = |name: &str| {
                let at = descriptor.label_keys.iter().position(|key| key == name);
                at.and_then(|at| metric.label_values.get(at))
            };
            ensure_eq!(label("pod").map(String::as_str), Some("measured"), "pod");
            let namespace = label("namespace").map(String::as_str);
            ensure_eq!(namespace, Some("default"), "namespace");
        }
        // Without any controller there are still these.
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
            ensure!(names.contains(name), "no {name} among {names:?}");
        }
        ensure!(
            pod.metrics
                .iter()
                .any(|metric| metric.name == "container_network_receive_bytes_total"),
            "no network metrics of the pod"
        );
        // Two series of one name and the same labels would make kubelet drop all of them.
        let mut series = BTreeSet::new();
        for metric in all {
            let one = (metric.name.clone(), metric.label_values.clone());
            ensure!(series.insert(one), "{metric:?} is there twice");
        }
        Ok(())
    })
}

fn metrics_count_what_the_controllers_count() -> Result {
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
        wait_for("figures of what the container uses", || {
            let pods = metrics(node)?;
            let container = pods.first().and_then(|pod| pod.container_metrics.first());
            let container = container.ok_or("no container")?;
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
                    "{name} is {value}, not {least} to {most}"
                );
            }
            Ok(Some(()))
        })
    })
}

fn streamed_lists_are_the_lists() -> Result {
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
                    ensure_eq!(list, ids, "a streamed list");
                }
                ensure_eq!(streamed, (3, 1), "containers and images streamed");
                ensure_eq!(listed, (3, 3), "statistics of pods and containers");
                Ok(())
            })
    })
}

fn crictl_shows_statistics_metrics_and_the_servers_state() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("shown");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("sleeps", &["sleep", "600"]))?;
        let short = id.get(..12).unwrap_or_default();
        let short_pod = pod_id.get(..12).unwrap_or_default();
        for (args, says) in [
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
                output.stdout.contains(says),
                "no {says} in {}",
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
        wait_for("an event in crictl", || {
            tries += 1;
            let name = format!("short-{tries}");
            node.run(&pod_id, &pod, &node.container(&name, &["true"]))?;
            let told = events.stdout();
            Ok(told.contains("CONTAINER_STARTED_EVENT").then_some(()))
        })
    })
}

/// What the metrics socket answers to these bytes, until it closes.
fn answer_to(bytes: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(METRICS)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    // It may have answered and closed before all was sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn scrape() -> Result<String> {
    let answer = answer_to(b"GET /metrics HTTP/1.1\r\nHost: rrun\r\n\r\n")?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    ensure!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    Ok(body.to_owned())
}

fn sample(text: &str, name: &str) -> Result<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.ok_or(format!("no {name} in\n{text}"))?.parse()?)
}

fn prometheus_metrics_count_calls_and_garbage_is_harmless() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("counted");
        let pod_id = node.runp(&pod)?;
        let refused = node.crictl(&["pull", "127.0.0.1:5000/no/such:1"]).end()?;
        ensure!(refused.code != 0, "{}", refused.told());
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
            ensure_eq!(sample(&text, name)?, value, "{name}");
        }
        ensure!(
            sample(&text, "rrun_cri_image_pull_bytes_total")? > 100_000.0,
            "bytes pulled"
        );
        ensure!(
            sample(&text, "process_resident_memory_bytes")? > 1_000_000.0,
            "memory"
        );
        // Every line is a comment or a sample.
        for line in text.lines() {
            let sample = line.rsplit_once(' ').map(|(_, value)| value.parse::<f64>());
            ensure!(
                line.starts_with("# ") || matches!(sample, Some(Ok(_))),
                "not a sample: {line:?}"
            );
        }

        // Whoever connects and says nothing holds a place for a while, and no more.
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
            ensure!(!answer.contains(" 200 OK"), "answered with 200: {answer}");
        }
        drop(silent);
        ensure!(
            answer_to(b"GET / HTTP/1.0\r\n\r\n")?.contains(" 404 "),
            "another path"
        );
        scrape()?;
        node.asks(&["inspectp", &pod_id])?;
        Ok(())
    })
}

fn bad_configuration_names_file_line_and_key() -> Result {
    let directory = Directory::new("config")?;
    let main = directory.join("config.toml");
    fs::create_dir(directory.join("config.d"))?;
    let drop_in = directory.join("config.d/50-here.toml");
    for (text, more, says) in [
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
            output.stderr.contains(says),
            "no {says} in {}",
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
            "no {key} in\n{default}"
        );
    }
    Ok(())
}

fn a_hangup_reads_the_configuration_again() -> Result {
    on_a_node(|node| {
        let mode = fs::metadata(node.socket())?.permissions().mode() & 0o777;
        ensure_eq!(mode, 0o600, "mode of the CRI's socket");
        let logged = |node: &mut Node, what: &str| {
            let what = what.to_owned();
            wait_for(&format!("{what:?} in the log"), || {
                Ok(node.log().contains(&what).then_some(()))
            })
        };
        node.hang_up_server();
        logged(node, "the configuration is as it was")?;

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
        logged(node, "debug is false now")?;
        logged(node, "in force with the next start: default_cgroup_parent")?;
        logged(node, "example.org/hosts.toml has changed")?;
        logged(node, "example.org/hosts.toml, line 3, skip_verfy")?;

        fs::write(hosts.join("hosts.toml"), "server = 3\n")?;
        fs::write(&config, format!("nonsense = 1\n{text}"))?;
        node.hang_up_server();
        logged(node, "line 1, nonsense")?;
        logged(node, "example.org/hosts.toml, line 1, server")?;
        fs::write(&config, &text)?;
        node.hang_up_server();
        logged(node, "debug is true now")?;
        node.asks(&["version"])?;

        // A pull reads what nobody has announced, and says so once; a start says it, too.
        let unknown = "example.org/hosts.toml, line 2, cpa";
        fs::write(
            hosts.join("hosts.toml"),
            "server = \"http://127.0.0.1:1\"\ncpa = \"x\"\n",
        )?;
        for _ in 0..2 {
            let pulled = node.asks(&["pull", "example.org/none:1"]);
            ensure!(pulled.is_err(), "pulled from nowhere");
        }
        logged(node, unknown)?;
        ensure_eq!(node.log().matches(unknown).count(), 1, "{unknown}");
        node.terminate_server()?;
        node.start_server()?;
        wait_for("the start to say it, too", || {
            Ok((node.log().matches(unknown).count() == 2).then_some(()))
        })?;
        Ok(())
    })
}
