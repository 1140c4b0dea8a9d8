//! The application of `tests/cluster/application.yaml` on a real cluster, by kubectl: from its first
//! replica to its removal, as an operator would see it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::cluster::{APISERVER, Cluster, cluster_timeout, eventually, timeout_flag};
use crate::support::kubelet::{KUBELET, Kubelet, container_id, is_ready, lives};
use crate::support::machine::{Result, deadline, note, wait_within};
use crate::support::needs::{Need, Test};
use crate::support::node::{BUSYBOX, Node, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        an_application_from_its_first_replica_to_its_removal,
        Need::NativeOrLong,
        APISERVER,
        KUBELET,
    ),
    test!(
        runtime_classes_and_drained_nodes,
        Need::NativeOrLong,
        APISERVER,
        KUBELET,
    ),
];

const MANIFEST: &str = "/src/tests/cluster/application.yaml";

fn an_application_from_its_first_replica_to_its_removal() -> Result {
    on_a_node(|node| {
        let cluster = Cluster::start(node)?;
        let started = Instant::now();
        cluster.asks(&["apply", "-f", MANIFEST])?;
        let pods = rolled_out(&cluster, 3)?;
        note(format!(
            "a Deployment's three replicas were Ready {:.1} s after kubectl apply, the images' pull included",
            started.elapsed().as_secs_f64()
        ));
        let service = service(&cluster)?;
        every_replica_answers(service, &pods)?;
        an_answer_shows_what_it_was_given(service)?;

        for replicas in [5, 2] {
            let scale = format!("--replicas={replicas}");
            cluster.asks(&["scale", "deployment/application", &scale])?;
            let pods = rolled_out(&cluster, replicas)?;
            every_replica_answers(service, &pods)?;
        }
        an_update_fails_no_request(&cluster, service)?;
        restarts_go_unnoticed(node, &cluster, service)?;

        cluster.asks(&["delete", "-f", MANIFEST, &timeout_flag()])?;
        eventually("the pods to be gone", || {
            Ok(pods_of(&cluster)?.is_empty().then_some(()))
        })?;
        Kubelet::has_stopped_everything(node)
    })
}

fn pods_of(cluster: &Cluster) -> Result<Vec<Value>> {
    cluster.list(&["pods", "--selector", "app=application"])
}

/// Waits until so many replicas are Ready, and no other pod of it is there.
fn rolled_out(cluster: &Cluster, replicas: usize) -> Result<Vec<Value>> {
    cluster.asks(&[
        "rollout",
        "status",
        "deployment/application",
        &timeout_flag(),
    ])?;
    eventually(&format!("{replicas} Ready replicas"), || {
        let pods = pods_of(cluster)?;
        let states: Vec<_> = pods.iter().map(|pod| &pod["status"]["phase"]).collect();
        ensure!(
            pods.len() == replicas && pods.iter().all(is_ready),
            "{states:?}"
        );
        Ok(Some(pods))
    })
}

/// Where the cluster's Service is to be had.
fn service(cluster: &Cluster) -> Result<SocketAddr> {
    let address = "jsonpath={.spec.clusterIP}:{.spec.ports[0].port}";
    let address = cluster.asks(&["get", "service", "application", "-o", address])?;
    let address = address.parse();
    Ok(address.map_err(|error| format!("the Service's address: {error}"))?)
}

/// One request, by a connection of its own, as kube-proxy counts them.
fn request(service: SocketAddr) -> Result<Value> {
    let mut stream = TcpStream::connect_timeout(&service, deadline())?;
    stream.set_read_timeout(Some(deadline()))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no end of a head")?;
    ensure!(head.contains(" 200 "), "{head}");
    Ok(serde_json::from_str(body).map_err(|error| format!("{error}: {body}"))?)
}

fn host(answer: &Value) -> String {
    answer["host"].as_str().unwrap_or_default().to_owned()
}

/// The Service finds each of these, and after a while none but these.
fn every_replica_answers(service: SocketAddr, pods: &[Value]) -> Result {
    let names: Vec<&str> = pods
        .iter()
        .filter_map(|pod| pod["metadata"]["name"].as_str())
        .collect();
    let mut wanted = names.clone();
    wait_within(cluster_timeout(), "an answer by every replica", || {
        let host = host(&request(service)?);
        ensure!(names.contains(&host.as_str()), "{host} answered");
        wanted.retain(|name| *name != host);
        ensure!(wanted.is_empty(), "no answer by {wanted:?}");
        Ok(Some(()))
    })
}

fn an_answer_shows_what_it_was_given(service: SocketAddr) -> Result {
    let told = request(service)?;
    for (what, is, should) in [
        ("version", &told["version"], json!("1")),
        ("user", &told["user"], json!([1000, 1000, [1000]])),
        (
            "the ConfigMap's key",
            &told["environment"]["APP_COLOR"],
            json!("green"),
        ),
        (
            "the ConfigMap's file",
            &told["config"]["greeting"],
            json!("hello from the ConfigMap"),
        ),
        (
            "the Secret",
            &told["secret"]["password"],
            json!("not told to anyone"),
        ),
        (
            "the pod's name",
            &told["downward"]["name"],
            told["host"].clone(),
        ),
        (
            "the memory limit",
            &told["downward"]["memory"],
            json!((128 << 20).to_string()),
        ),
        (
            "the init container's file",
            &told["shared"]["init"],
            json!("prepared\n"),
        ),
    ] {
        ensure_eq!(*is, should, "{what} in {told}");
    }
    Ok(())
}

/// Somebody who asks the Service all the time.
struct ConstantRequests {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(BTreeMap<String, usize>, Vec<String>)>,
}

impl ConstantRequests {
    fn start(service: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            let started = Instant::now();
            let mut versions = BTreeMap::new();
            let mut failures = Vec::new();
            while !told.load(Ordering::Relaxed) {
                match request(service) {
                    Ok(answer) => {
                        let version = answer["version"].as_str().unwrap_or_default();
                        *versions.entry(version.to_owned()).or_insert(0) += 1;
                    }
                    Err(failed) => failures.push(format!(
                        "{:.1} s after the first: {}",
                        started.elapsed().as_secs_f64(),
                        failed.message().unwrap_or_default()
                    )),
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            (versions, failures)
        });
        ConstantRequests { stop, thread }
    }

    /// How many requests each version of the application has answered; none may have failed.
    fn end(self) -> Result<BTreeMap<String, usize>> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        let (versions, failures) = ended.map_err(|_| "the client's thread broke")?;
        ensure!(
            failures.is_empty(),
            "{} requests failed beside {versions:?}:\n{}",
            failures.len(),
            failures.join("\n")
        );
        Ok(versions)
    }
}

fn an_update_fails_no_request(cluster: &Cluster, service: SocketAddr) -> Result {
    let client = ConstantRequests::start(service);
    let image = "web=127.0.0.1:5000/demo/flask:2";
    let updated = cluster
        .asks(&["set", "image", "deployment/application", image])
        .and_then(|_| rolled_out(cluster, 2));
    let versions = client.end()?;
    let pods = updated?;
    ensure!(
        versions.keys().eq(["1", "2"]),
        "answers by version: {versions:?}"
    );
    note(format!(
        "a rolling update failed no request: answers by version {versions:?}"
    ));
    every_replica_answers(service, &pods)
}

fn restarts_go_unnoticed(node: &mut Node, cluster: &Cluster, service: SocketAddr) -> Result {
    let pods = rolled_out(cluster, 2)?;
    let before = lives(node, &pods)?;
    let client = ConstantRequests::start(service);
    let restarted = restarts(node, cluster);
    client.end()?;
    restarted?;
    let pods = rolled_out(cluster, 2)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "containers, processes and restarts"
    );
    Ok(())
}

/// The server crashes, alone and while kubelet is away; kubelet comes back, and has looked at
/// everything again when an exec probe and a log come through.
fn restarts(node: &mut Node, cluster: &Cluster) -> Result {
    node.kill_server()?;
    node.start_server()?;
    through_everything(cluster)?;
    cluster.kubelet.stop()?;
    node.kill_server()?;
    node.start_server()?;
    cluster.kubelet.begin()?;
    through_everything(cluster)
}

/// The API server, kubelet, the CRI server and the pod, by an exec and a log.
fn through_everything(cluster: &Cluster) -> Result {
    cluster.kubelet.ready(2)?;
    let web = ["deployment/application", "--container", "web"];
    eventually("an exec after a restart", || {
        cluster
            .kubectl(&["exec"])
            .args(web)
            .args(["--", "cat", "/config/greeting"])
            .ok()?
            .says("hello")?;
        cluster.kubectl(&["logs"]).args(web).ok()?.says("GET /")?;
        Ok(Some(()))
    })
}

fn runtime_classes_and_drained_nodes() -> Result {
    on_a_node(|node| {
        let cluster = Cluster::start(node)?;
        runtime_classes_pick_runtimes(node, &cluster)?;
        a_node_is_drained_and_comes_back(node, &cluster)
    })
}

fn runtime_classes_pick_runtimes(node: &Node, cluster: &Cluster) -> Result {
    for handler in ["runc", "none-such"] {
        cluster.apply(&json!({
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": { "name": handler },
            "handler": handler,
        }))?;
        cluster.apply(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": format!("by-{handler}"), "namespace": "default" },
            "spec": {
                "runtimeClassName": handler,
                "terminationGracePeriodSeconds": 0,
                "containers": [{ "name": "main", "image": BUSYBOX, "command": ["sleep", "100000"] }],
            },
        }))?;
    }
    cluster.asks(&[
        "wait",
        "pod/by-runc",
        "--for=condition=Ready",
        &timeout_flag(),
    ])?;
    let pod = cluster.json(&["get", "pod", "by-runc"])?;
    let id = container_id(&pod, "main")?;
    if is_rrun() {
        let state = node.join("state/runtime/runc").join(&id).join("state.json");
        ensure!(state.exists(), "no {}: not by runc", state.display());
    }
    let echo = ["exec", "by-runc", "--", "echo", "through runc"];
    cluster.kubectl(&echo).ok()?.says("through runc")?;
    eventually("an event that names the handler", || {
        let about = "involvedObject.name=by-none-such,reason=FailedCreatePodSandBox";
        let events = cluster.asks(&["get", "events", "--field-selector", about])?;
        ensure!(events.contains("none-such"), "{events}");
        Ok(Some(()))
    })?;
    let delete = ["delete", "pod", "by-runc", "by-none-such", &timeout_flag()];
    cluster.asks(&delete)?;
    Ok(())
}

fn a_node_is_drained_and_comes_back(node: &Node, cluster: &Cluster) -> Result {
    cluster.asks(&["apply", "-f", MANIFEST])?;
    let before = rolled_out(cluster, 3)?;
    let name = before[0]["spec"]["nodeName"].as_str().unwrap_or_default();
    cluster.asks(&["drain", name, "--delete-emptydir-data", &timeout_flag()])?;
    // The replicas that take the evicted ones' places find no node.
    Kubelet::has_stopped_everything(node)?;
    for pod in pods_of(cluster)? {
        ensure_eq!(pod["status"]["phase"], "Pending", "a pod's phase");
    }
    cluster.asks(&["uncordon", name])?;
    let pods = rolled_out(cluster, 3)?;
    every_replica_answers(service(cluster)?, &pods)?;
    cluster.asks(&["delete", "-f", MANIFEST, &timeout_flag()])?;
    eventually("the pods to be gone", || {
        Ok(pods_of(cluster)?.is_empty().then_some(()))
    })?;
    Kubelet::has_stopped_everything(node)
}
