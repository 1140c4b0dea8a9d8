//! Measures kubelet with each server. The first figure is the time from writing a manifest until
//! the pod is Ready. The second figure is the time from deleting the manifest until the pod is
//! removed. The third figure is the load of a node full of probed pods.

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
    /// Servers to measure: containerd, rrun-cri; figures are compared with those of the first
    /// server
    #[arg(long, value_delimiter = ',', default_value = "containerd,rrun-cri")]
    servers: Vec<String>,
    /// Numbers of pods to start at once; the node's load is measured with the largest number
    #[arg(long, value_delimiter = ',', default_value = "1,30")]
    pods: Vec<usize>,
    /// Number of rounds for five pods or fewer; a larger number of pods is started only once
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Number of seconds for which the node's load is measured
    #[arg(long, default_value_t = 20)]
    watch: u64,
    /// Image with a web server on port 5000, which is pulled before the pods start
    #[arg(long, default_value = "127.0.0.1:5000/demo/web:1")]
    image: String,
}

const MANIFESTS: &str = "/etc/kubernetes/manifests";

/// The timeout for pods to be ready. This time suffices for a guest that is twenty times slower
/// than a host.
const READY_TIMEOUT: Duration = Duration::from_secs(600);

/// The maximum number of pods for which the benchmark runs several rounds and polls kubelet more
/// often.
const FEW: usize = 5;

/// The times of one round, in seconds.
#[derive(Clone, Copy, Debug)]
struct Times {
    /// The time from writing the manifests until the first pod is Ready.
    first: f64,
    /// The time from writing the manifests until all pods are Ready.
    last: f64,
    /// The time from deleting the manifests until kubelet lists no pods and the server has no
    /// running pods.
    removed: f64,
}

pub(crate) fn run(options: &ReadyOptions, results: &Path) -> Result {
    let _registry = Service::start("registry")?;
    let mut times = Table::new(
        "kubelet, static pods with an HTTP readiness probe and an exec liveness probe each second (seconds, medians)",
        &["", "first Ready", "all Ready", "× first", "removed"],
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
            let [first, last, removed] = [
                median(|times| times.first),
                median(|times| times.last),
                median(|times| times.removed),
            ];
            first_time = first_time.or(last);
            let cells = [
                figure(first),
                figure(last),
                ratio(last, first_time),
                figure(removed),
            ];
            times.row(&format!("{pods} pods, {name}"), cells);
            raw.push(
                json!({ "server": name, "pods": pods, "first_ready_s": first, "all_ready_s": last,
                    "gone_s": removed, "load": load.as_ref().map(Load::raw) }),
            );
            if let Some(load) = load {
                load.row(&mut loads, name, first_load.get_or_insert(load.clone()));
            }
        }
    }
    report::show(results, &times)?;
    report::show(results, &loads)?;
    if has_no_controllers() {
        println!(
            "  this kernel has no cgroup v2 controllers, so both servers call their runtimes through a \
             program that removes the limits (tests/bench/unlimited.c)"
        );
    }
    let raw = json!({ "machine": report::machine(), "times": raw, "skipped": skipped });
    report::write_json(&results.join("ready.json"), &raw)?;
    match skipped.as_slice() {
        [] => Ok(()),
        skipped => Err(skipped.join("; ").into()),
    }
}

/// Returns whether this machine has no cgroup v2 controllers. On such a machine, the runtime cannot
/// set the limits of containers.
fn has_no_controllers() -> bool {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    !controllers.split_whitespace().any(|name| name == "cpu")
}

fn measure(
    name: &str,
    pods: usize,
    options: &ReadyOptions,
    watch: Option<u64>,
) -> Result<(Vec<Times>, Option<Load>)> {
    let environment: &[(&str, &str)] = if has_no_controllers() {
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
    // The times of the first pod are ignored, because its start loads files from the disk.
    start_and_remove(&server, 1, &options.image, &mut || Ok(()))?;
    for _ in 0..rounds {
        let times = start_and_remove(&server, pods, &options.image, &mut || {
            load = watch.map(load::watch).transpose()?;
            Ok(())
        })?;
        all.push(times);
    }
    Ok((all, load))
}

/// Writes the manifests of `pods` pods, waits until they are ready, calls `while_ready`, and
/// removes them.
fn start_and_remove(
    server: &Service,
    pods: usize,
    image: &str,
    while_ready: &mut dyn FnMut() -> Result,
) -> Result<Times> {
    // Each round uses new names. kubelet would mistake a new pod for an earlier pod of the same
    // name.
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
    let deleted = Instant::now();
    wait(deleted, pods, &mut || {
        let known = pods_that(&kubelet_pods()?, |_| true);
        let running = cri::running_pods(&server.address)?;
        Ok((known + running == 0).then_some(()))
    })?;
    outcome?;
    Ok(Times {
        first: first.unwrap_or(last).as_secs_f64(),
        last: last.as_secs_f64(),
        removed: deleted.elapsed().as_secs_f64(),
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
    // kubelet ignores files whose names begin with a dot. It therefore never reads an incomplete
    // manifest.
    let partial = format!("{MANIFESTS}/.partial");
    fs::write(&partial, serde_json::to_vec(&pod)?)?;
    Ok(fs::rename(&partial, manifest(number))?)
}

/// Calls `probe` until it returns a value. If there are at most [`FEW`] pods, kubelet returns only
/// a short list of pods, so this function calls `probe` more often.
fn wait(started: Instant, pods: usize, probe: &mut dyn FnMut() -> Result<Option<()>>) -> Result {
    loop {
        if let Some(()) = probe()? {
            return Ok(());
        }
        if started.elapsed() > READY_TIMEOUT {
            return Err(format!(
                "the pods did not reach the expected state within {} s",
                READY_TIMEOUT.as_secs()
            )
            .into());
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

/// Returns the list of pods from kubelet's read-only port.
fn kubelet_pods() -> Result<Value> {
    let address = SocketAddr::from(([127, 0, 0, 1], 10255));
    let mut stream = TcpStream::connect(address)
        .map_err(|error| format!("cannot connect to kubelet: {error}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    // With HTTP/1.0, kubelet sends one complete answer and then closes the connection.
    stream.write_all(b"GET /pods HTTP/1.0\r\nHost: kubelet\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = b"\r\n\r\n";
    let body = answer.windows(end.len()).position(|window| window == end);
    let body = body
        .and_then(|at| answer.get(at + end.len()..))
        .ok_or("kubelet's answer contains no body")?;
    Ok(serde_json::from_slice(body)
        .map_err(|error| format!("kubelet's response for /pods is not JSON: {error}"))?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn a_pod_is_ready_only_if_its_condition_ready_is_true() {
        let pod = |status: &str| {
            json!({ "status": { "phase": "Running", "conditions": [
                { "type": "PodScheduled", "status": "True" }, { "type": "Ready", "status": status }] } })
        };
        assert!(super::is_ready(&pod("True")));
        assert!(!super::is_ready(&pod("False")));
        assert!(!super::is_ready(&json!({})));
    }
}
