//! kubelet over either server: from a pod's manifest to Ready, and from its removal until it is
//! gone; and what a node full of probed pods uses.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::load::{self, Load};
use crate::report::{self, Table, figure, ratio};
use crate::samples::Samples;
use crate::service::Service;
use crate::{Result, cri};

#[derive(clap::Args)]
pub(crate) struct ReadyOptions {
    /// containerd, rrun-cri; figures are compared with the first one's
    #[arg(long, value_delimiter = ',', default_value = "containerd,rrun-cri")]
    servers: Vec<String>,
    /// How many pods at a time; the most of them stay, for what the node uses then
    #[arg(long, value_delimiter = ',', default_value = "1,30")]
    pods: Vec<usize>,
    /// How often few pods, five or less, come and go; more do so once
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// For how many seconds the node is watched
    #[arg(long, default_value_t = 20)]
    watch: u64,
    /// A web server on port 5000; it is there before the pods are
    #[arg(long, default_value = "127.0.0.1:5000/demo/web:1")]
    image: String,
}

const MANIFESTS: &str = "/etc/kubernetes/manifests";

/// Enough for a guest that computes twenty times slower than a host.
const READY_TIMEOUT: Duration = Duration::from_secs(600);

/// So many pods or less are few.
const FEW: usize = 5;

/// Seconds from the manifests to the first pod's Ready, to the last one's, and from their removal
/// until kubelet knows of no pod and none runs.
#[derive(Clone, Copy, Debug)]
struct Times {
    first: f64,
    last: f64,
    gone: f64,
}

pub(crate) fn run(options: &ReadyOptions, results: &Path) -> Result {
    let _registry = Service::start("registry")?;
    let mut times = Table::new(
        "kubelet, static pods with an HTTP readiness probe and an exec liveness probe each second (seconds, medians)",
        &[
            "",
            "first Ready",
            "all Ready",
            "× first",
            "gone after removal",
        ],
    );
    let most = options.pods.iter().copied().max().unwrap_or_default();
    let mut loads = load::table(most);
    let mut skipped = Vec::new();
    let mut raw = Vec::new();
    for &pods in &options.pods {
        let watch = (pods == most).then_some(options.watch);
        let (mut first_time, mut first_load) = (None, None);
        for name in &options.servers {
            let (all, load) = match measure(name, pods, options, watch) {
                Ok(measured) => measured,
                Err(error) => {
                    println!("SKIPPED: {name}, {pods} pods: {error}");
                    skipped.push(format!("{name}, {pods} pods: {error}"));
                    continue;
                }
            };
            println!("{name}, {pods} pods: {all:?}");
            let median =
                |of: fn(&Times) -> f64| Samples::new(all.iter().map(of).collect()).median();
            let [first, last, gone] = [
                median(|times| times.first),
                median(|times| times.last),
                median(|times| times.gone),
            ];
            first_time = first_time.or(last);
            let cells = [
                figure(first),
                figure(last),
                ratio(last, first_time),
                figure(gone),
            ];
            times.row(&format!("{pods} pods, {name}"), cells);
            raw.push(
                json!({ "server": name, "pods": pods, "first_ready_s": first, "all_ready_s": last,
                    "gone_s": gone, "load": load.as_ref().map(Load::raw) }),
            );
            if let Some(load) = load {
                load.row(&mut loads, name, first_load.get_or_insert(load.clone()));
            }
        }
    }
    report::show(results, &times)?;
    report::show(results, &loads)?;
    if counts_nothing() {
        println!(
            "  no cgroup v2 controllers here: both servers call their runtimes through a program that drops \
             limits (tests/bench/unlimited.c)"
        );
    }
    let raw = json!({ "machine": report::machine(), "times": raw, "skipped": skipped });
    report::write_json(&results.join("ready.json"), &raw)?;
    match skipped.as_slice() {
        [] => Ok(()),
        skipped => Err(skipped.join("; ").into()),
    }
}

/// Whether no limit can be set on this machine.
fn counts_nothing() -> bool {
    let told = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    !told.split_whitespace().any(|name| name == "cpu")
}

fn measure(
    name: &str,
    pods: usize,
    options: &ReadyOptions,
    watch: Option<u64>,
) -> Result<(Vec<Times>, Option<Load>)> {
    let environment: &[(&str, &str)] = if counts_nothing() {
        &[
            ("RRUN_BENCH_UNLIMITED", "1"),
            (
                "KUBELET_CONFIG",
                "cgroupsPerQOS: false\nenforceNodeAllocatable: []\ncpuCFSQuota: false\n",
            ),
        ]
    } else {
        &[]
    };
    let server = Service::with(name, environment)?;
    cri::pull_once(&server.address, &options.image)?;
    let _ = fs::remove_dir_all(MANIFESTS);
    let _kubelet = Service::kubelet(&server.address, MANIFESTS, environment)?;
    let mut all = Vec::new();
    let mut load = None;
    let rounds = if pods <= FEW { options.rounds } else { 1 };
    // What is read from the disk for the first time is charged to nobody.
    come_and_go(&server, 1, &options.image, &mut || Ok(()))?;
    for _ in 0..rounds {
        let times = come_and_go(&server, pods, &options.image, &mut || {
            load = watch.map(load::watch).transpose()?;
            Ok(())
        })?;
        all.push(times);
    }
    Ok((all, load))
}

fn come_and_go(
    server: &Service,
    pods: usize,
    image: &str,
    while_ready: &mut dyn FnMut() -> Result,
) -> Result<Times> {
    // Names that kubelet has never heard: what comes again under an old one is the old pod to it.
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let begin = NEXT.fetch_add(pods, Ordering::Relaxed);
    let numbers = begin..begin + pods;
    for number in numbers.clone() {
        write_manifest(number, image)?;
    }
    let started = Instant::now();
    let mut first = None;
    let mut outcome = wait(started, pods, &mut || {
        let ready = pods_that(&kubelet_pods()?, is_ready);
        if ready > 0 {
            first = first.or(Some(started.elapsed()));
        }
        Ok((ready == pods).then_some(()))
    });
    let last = started.elapsed();
    if outcome.is_ok() {
        outcome = while_ready();
    }
    for number in numbers {
        fs::remove_file(manifest(number))?;
    }
    let removed = Instant::now();
    wait(removed, pods, &mut || {
        let known = pods_that(&kubelet_pods()?, |_| true);
        let running = cri::running_pods(&server.address)?;
        Ok((known + running == 0).then_some(()))
    })?;
    outcome?;
    Ok(Times {
        first: first.unwrap_or(last).as_secs_f64(),
        last: last.as_secs_f64(),
        gone: removed.elapsed().as_secs_f64(),
    })
}

fn manifest(number: usize) -> String {
    format!("{MANIFESTS}/bench-{number}.json")
}

fn write_manifest(number: usize, image: &str) -> Result {
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": format!("bench-{number}"), "namespace": "default" },
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "web",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "resources": {
                    "requests": { "cpu": "20m", "memory": "16Mi" },
                    "limits": { "cpu": "500m", "memory": "64Mi" },
                },
                "readinessProbe": {
                    "httpGet": { "path": "/healthz", "port": 5000 },
                    "periodSeconds": 1,
                },
                "livenessProbe": {
                    "exec": { "command": ["true"] },
                    "periodSeconds": 1, "timeoutSeconds": 30, "failureThreshold": 10,
                },
            }],
        },
    });
    // kubelet passes over what begins with a dot: it never sees half a manifest.
    let partial = format!("{MANIFESTS}/.partial");
    fs::write(&partial, serde_json::to_vec(&pod)?)?;
    Ok(fs::rename(&partial, manifest(number))?)
}

/// Few pods are looked at more often: the answer is short.
fn wait(started: Instant, pods: usize, probe: &mut dyn FnMut() -> Result<Option<()>>) -> Result {
    loop {
        if let Some(()) = probe()? {
            return Ok(());
        }
        if started.elapsed() > READY_TIMEOUT {
            return Err(format!("not within {} s", READY_TIMEOUT.as_secs()).into());
        }
        sleep(Duration::from_millis(if pods <= FEW { 50 } else { 250 }));
    }
}

fn pods_that(pods: &Value, condition: fn(&Value) -> bool) -> usize {
    let items = pods.get("items").and_then(Value::as_array);
    items
        .into_iter()
        .flatten()
        .filter(|pod| condition(pod))
        .count()
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    conditions.into_iter().flatten().any(|condition| {
        condition.get("type").and_then(Value::as_str) == Some("Ready")
            && condition.get("status").and_then(Value::as_str) == Some("True")
    })
}

/// What kubelet's read-only port says of its pods.
fn kubelet_pods() -> Result<Value> {
    let address = SocketAddr::from(([127, 0, 0, 1], 10255));
    let mut stream = TcpStream::connect(address).map_err(|error| format!("kubelet: {error}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    // HTTP/1.0: one answer, whole, and the end of the connection.
    stream.write_all(b"GET /pods HTTP/1.0\r\nHost: kubelet\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = b"\r\n\r\n";
    let body = answer.windows(end.len()).position(|window| window == end);
    let body = body
        .and_then(|at| answer.get(at + end.len()..))
        .ok_or("kubelet: no answer")?;
    Ok(serde_json::from_slice(body).map_err(|error| format!("kubelet's /pods: {error}"))?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn a_pod_is_ready_by_its_condition_only() {
        let pod = |status: &str| {
            json!({ "status": { "phase": "Running", "conditions": [
                { "type": "PodScheduled", "status": "True" }, { "type": "Ready", "status": status }] } })
        };
        assert!(super::is_ready(&pod("True")));
        assert!(!super::is_ready(&pod("False")));
        assert!(!super::is_ready(&json!({})));
    }
}
