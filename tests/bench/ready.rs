//! kubelet over either server: from a pod's manifest to Ready, and from its removal until it is
//! gone.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::report::{self, Table, figure, ratio};
use crate::service::Service;
use crate::{Result, cri};

#[derive(clap::Args)]
pub struct Options {
    /// containerd, rrun-cri; figures are compared with the first one's
    #[arg(long, value_delimiter = ',', default_value = "containerd,rrun-cri")]
    servers: Vec<String>,
    /// How many pods at a time
    #[arg(long, value_delimiter = ',', default_value = "3,20")]
    pods: Vec<usize>,
    /// A web server on port 5000; it is there before the pods are
    #[arg(long, default_value = "127.0.0.1:5000/demo/web:1")]
    image: String,
}

const MANIFESTS: &str = "/etc/kubernetes/manifests";

/// Enough for a guest that computes twenty times slower than a host.
const DEADLINE: Duration = Duration::from_secs(600);

/// Seconds from the manifests to the first pod's Ready, to the last one's, and from their removal
/// until kubelet knows of no pod and none runs.
#[derive(Clone, Copy, Debug)]
struct Times {
    first: f64,
    last: f64,
    gone: f64,
}

pub fn run(options: &Options, results: &Path) -> Result {
    let _registry = Service::start("registry")?;
    let mut table = Table::new(
        "kubelet, static pods with an HTTP readiness probe each second (seconds)",
        &[
            "",
            "first Ready",
            "all Ready",
            "× first",
            "gone after removal",
        ],
    );
    let mut skipped = Vec::new();
    let mut raw = Vec::new();
    // What is read from the disk for the first time would be charged to whoever comes first.
    for name in &options.servers {
        if let Err(error) = measure(name, 1, &options.image) {
            println!("{name}, warming up: {error}");
        }
    }
    for &pods in &options.pods {
        let mut first = None;
        for name in &options.servers {
            match measure(name, pods, &options.image) {
                Ok(times) => {
                    first = first.or(Some(times.last));
                    let cells = [
                        figure(Some(times.first)),
                        figure(Some(times.last)),
                        ratio(Some(times.last), first),
                        figure(Some(times.gone)),
                    ];
                    println!("{name}, {pods} pods: {times:?}");
                    table.row(&format!("{pods} pods, {name}"), cells);
                    raw.push(
                        json!({ "server": name, "pods": pods, "first_ready_s": times.first,
                        "all_ready_s": times.last, "gone_s": times.gone }),
                    );
                }
                Err(error) => {
                    println!("SKIPPED: {name}, {pods} pods: {error}");
                    skipped.push(format!("{name}, {pods} pods: {error}"));
                }
            }
        }
    }
    report::show(results, &table)?;
    let raw = json!({ "machine": report::machine(), "times": raw, "skipped": skipped });
    report::write_json(&results.join("ready.json"), &raw)
}

fn measure(name: &str, pods: usize, image: &str) -> Result<Times> {
    let server = Service::start(name)?;
    cri::pull_once(&server.address, image)?;
    let _ = fs::remove_dir_all(MANIFESTS);
    let _kubelet = Service::kubelet(&server.address, MANIFESTS)?;
    for number in 1..=pods {
        write_manifest(number, image)?;
    }
    let started = Instant::now();
    let mut first = None;
    let outcome = wait(started, &mut || {
        let ready = pods_that(&kubelet_pods()?, is_ready);
        if ready > 0 {
            first = first.or(Some(started.elapsed()));
        }
        Ok((ready == pods).then_some(()))
    });
    let last = started.elapsed();
    for number in 1..=pods {
        fs::remove_file(manifest(number))?;
    }
    let removed = Instant::now();
    wait(removed, &mut || {
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
            }],
        },
    });
    // kubelet passes over what begins with a dot: it never sees half a manifest.
    let partial = format!("{MANIFESTS}/.partial");
    fs::write(&partial, serde_json::to_vec(&pod)?)?;
    Ok(fs::rename(&partial, manifest(number))?)
}

fn wait(started: Instant, probe: &mut dyn FnMut() -> Result<Option<()>>) -> Result {
    loop {
        if let Some(()) = probe()? {
            return Ok(());
        }
        if started.elapsed() > DEADLINE {
            return Err(format!("not within {} s", DEADLINE.as_secs()).into());
        }
        sleep(Duration::from_millis(250));
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
