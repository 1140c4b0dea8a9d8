//! Tests of the application in `tests/cluster/application.yaml` on a real cluster. The tests
//! deploy, scale, update and remove the application with kubectl, as an operator does.

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
        kubectl_controls_an_application_from_deployment_to_removal,
        Need::NativeOrLong,
        APISERVER,
        KUBELET,
    ),
    test!(
        runtime_classes_select_runtimes_and_a_node_can_be_drained,
        Need::NativeOrLong,
        APISERVER,
        KUBELET,
    ),
];

const MANIFEST: &str = "/src/tests/cluster/application.yaml";

fn kubectl_controls_an_application_from_deployment_to_removal() -> Result {
    on_a_node(|node| {
        let cluster = Cluster::start(node)?;
        let started = Instant::now();
        cluster.asks(&["apply", "-f", MANIFEST])?;
        let pods = rolled_out(&cluster, 3)?;
        note(format!(
            "the three replicas of a Deployment were Ready {:.1} s after kubectl apply (this includes the pull of the images)",
            started.elapsed().as_secs_f64()
        ));
        let service = service(&cluster)?;
        every_replica_answers(service, &pods)?;
        the_application_answers_with_its_configured_values(service)?;

        for replicas in [5, 2] {
            let scale = format!("--replicas={replicas}");
            cluster.asks(&["scale", "deployment/application", &scale])?;
            let pods = rolled_out(&cluster, replicas)?;
            every_replica_answers(service, &pods)?;
        }
        no_request_fails_during_a_rolling_update(&cluster, service)?;
        no_request_fails_during_restarts_of_the_server_and_of_kubelet(node, &cluster, service)?;

        cluster.asks(&["delete", "-f", MANIFEST, &timeout_flag()])?;
        eventually("the pods to be deleted", || {
            Ok(pods_of(&cluster)?.is_empty().then_some(()))
        })?;
        Kubelet::has_stopped_everything(node)
    })
}

fn pods_of(cluster: &Cluster) -> Result<Vec<Value>> {
    cluster.list(&["pods", "--selector", "app=application"])
}

/// Waits until the application has exactly `replicas` replicas, and all replicas are Ready.
fn rolled_out(cluster: &Cluster, replicas: usize) -> Result<Vec<Value>> {
    cluster.asks(&[
        "rollout",
        "status",
        "deployment/application",
        &timeout_flag(),
    ])?;
    eventually(
        &format!("the Deployment to have exactly {replicas} Ready replicas"),
        || {
            let pods = pods_of(cluster)?;
            let states: Vec<_> = pods.iter().map(|pod| &pod["status"]["phase"]).collect();
            ensure!(
                pods.len() == replicas && pods.iter().all(is_ready),
                "the number of Ready replicas is not {replicas}; the phases of all replicas are {states:?}"
            );
            Ok(Some(pods))
        },
    )
}

/// Returns the address of the application's Service.
fn service(cluster: &Cluster) -> Result<SocketAddr> {
    let address = "jsonpath={.spec.clusterIP}:{.spec.ports[0].port}";
    let address = cluster.asks(&["get", "service", "application", "-o", address])?;
    let address = address.parse();
    Ok(address.map_err(|error| format!("the Service's address is invalid: {error}"))?)
}

/// Sends one request on a new connection, because kube-proxy distributes connections, not requests,
/// among the replicas.
fn request(service: SocketAddr) -> Result<Value> {
    let mut stream = TcpStream::connect_timeout(&service, deadline())?;
    stream.set_read_timeout(Some(deadline()))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or("the answer has no complete HTTP head")?;
    ensure!(
        head.contains(" 200 "),
        "the answer's HTTP status is not 200; the head of the answer: {head}"
    );
    Ok(serde_json::from_str(body).map_err(|error| {
        format!("cannot parse the body of the application's answer: {error}; the body: {body}")
    })?)
}

fn host(answer: &Value) -> String {
    answer["host"].as_str().unwrap_or_default().to_owned()
}

/// Waits until each pod in `pods` has answered a request to the Service. At first, the Service can
/// still forward requests to other pods. The wait ignores the answers of other pods.
fn every_replica_answers(service: SocketAddr, pods: &[Value]) -> Result {
    let names: Vec<&str> = pods
        .iter()
        .filter_map(|pod| pod["metadata"]["name"].as_str())
        .collect();
    let mut missing = names.clone();
    wait_within(
        cluster_timeout(),
        "every replica of the Service to answer",
        || {
            let host = host(&request(service)?);
            ensure!(
                names.contains(&host.as_str()),
                "the pod {host} answered, which is not one of the expected replicas"
            );
            missing.retain(|name| *name != host);
            ensure!(
                missing.is_empty(),
                "these pods have not answered: {missing:?}"
            );
            Ok(Some(()))
        },
    )
}

fn the_application_answers_with_its_configured_values(service: SocketAddr) -> Result {
    let answer = request(service)?;
    for (what, is, should) in [
        ("the version", &answer["version"], json!("1")),
        (
            "the user and groups",
            &answer["user"],
            json!([1000, 1000, [1000]]),
        ),
        (
            "the ConfigMap's key",
            &answer["environment"]["APP_COLOR"],
            json!("green"),
        ),
        (
            "the ConfigMap's file",
            &answer["config"]["greeting"],
            json!("hello from the ConfigMap"),
        ),
        (
            "the Secret",
            &answer["secret"]["password"],
            json!("a password from the Secret"),
        ),
        (
            "the pod's name",
            &answer["downward"]["name"],
            answer["host"].clone(),
        ),
        (
            "the memory limit",
            &answer["downward"]["memory"],
            json!((128 << 20).to_string()),
        ),
        (
            "the init container's file",
            &answer["shared"]["init"],
            json!("prepared\n"),
        ),
    ] {
        ensure_eq!(*is, should, "{what} in the application's answer {answer}");
    }
    Ok(())
}

/// A client that constantly sends requests to the Service.
struct ConstantRequests {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(BTreeMap<String, usize>, Vec<String>)>,
}

impl ConstantRequests {
    fn start(service: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let started = Instant::now();
            let mut versions = BTreeMap::new();
            let mut failures = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                match request(service) {
                    Ok(answer) => {
                        let version = answer["version"].as_str().unwrap_or_default();
                        *versions.entry(version.to_owned()).or_insert(0) += 1;
                    }
                    Err(failed) => failures.push(format!(
                        "{:.1} s after the first request: {}",
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

    /// Stops the client and returns how many requests each version of the application answered.
    /// Returns an error if a request failed.
    fn end(self) -> Result<BTreeMap<String, usize>> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        let (versions, failures) = ended.map_err(|_| "the client's thread panicked")?;
        ensure!(
            failures.is_empty(),
            "{} requests failed (number of answers from each version of the application: {versions:?}):\n{}",
            failures.len(),
            failures.join("\n")
        );
        Ok(versions)
    }
}

fn no_request_fails_during_a_rolling_update(cluster: &Cluster, service: SocketAddr) -> Result {
    let client = ConstantRequests::start(service);
    let image = "web=127.0.0.1:5000/demo/flask:2";
    let updated = cluster
        .asks(&["set", "image", "deployment/application", image])
        .and_then(|_| rolled_out(cluster, 2));
    let versions = client.end()?;
    let pods = updated?;
    ensure!(
        versions.keys().eq(["1", "2"]),
        "the answers must be from both versions of the application (1 and 2): {versions:?}"
    );
    note(format!(
        "no request failed during a rolling update (number of answers from each version of the application: {versions:?})"
    ));
    every_replica_answers(service, &pods)
}

fn no_request_fails_during_restarts_of_the_server_and_of_kubelet(
    node: &mut Node,
    cluster: &Cluster,
    service: SocketAddr,
) -> Result {
    let pods = rolled_out(cluster, 2)?;
    let before = lives(node, &pods)?;
    let client = ConstantRequests::start(service);
    let restarted = restart_server_and_kubelet(node, cluster);
    client.end()?;
    restarted?;
    let pods = rolled_out(cluster, 2)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "container ids, process ids and restart counts of the replicas after the restarts"
    );
    Ok(())
}

/// Kills and restarts the CRI server twice: first while kubelet runs, and then while kubelet is
/// stopped. After each restart, waits until the pods are Ready, and kubectl exec and kubectl logs
/// work.
fn restart_server_and_kubelet(node: &mut Node, cluster: &Cluster) -> Result {
    node.kill_server()?;
    node.start_server()?;
    kubectl_exec_and_logs_work(cluster)?;
    cluster.kubelet.stop()?;
    node.kill_server()?;
    node.start_server()?;
    cluster.kubelet.begin()?;
    kubectl_exec_and_logs_work(cluster)
}

/// Waits until the pods are Ready, and kubectl exec and kubectl logs work. Both commands reach the
/// pod through the API server, kubelet and the CRI server.
fn kubectl_exec_and_logs_work(cluster: &Cluster) -> Result {
    cluster.kubelet.ready(2)?;
    let web = ["deployment/application", "--container", "web"];
    eventually(
        "kubectl exec and kubectl logs to work after a restart",
        || {
            cluster
                .kubectl(&["exec"])
                .args(web)
                .args(["--", "cat", "/config/greeting"])
                .ok()?
                .says("hello")?;
            cluster.kubectl(&["logs"]).args(web).ok()?.says("GET /")?;
            Ok(Some(()))
        },
    )
}

fn runtime_classes_select_runtimes_and_a_node_can_be_drained() -> Result {
    on_a_node(|node| {
        let cluster = Cluster::start(node)?;
        runtime_classes_select_runtimes(node, &cluster)?;
        a_node_is_drained_and_used_again(node, &cluster)
    })
}

fn runtime_classes_select_runtimes(node: &Node, cluster: &Cluster) -> Result {
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
        ensure!(
            state.exists(),
            "runc does not run the container, because its state file {} does not exist",
            state.display()
        );
    }
    let echo = ["exec", "by-runc", "--", "echo", "through runc"];
    cluster.kubectl(&echo).ok()?.says("through runc")?;
    eventually(
        "kubelet to report an event that names the missing handler",
        || {
            let about = "involvedObject.name=by-none-such,reason=FailedCreatePodSandBox";
            let events = cluster.asks(&["get", "events", "--field-selector", about])?;
            ensure!(
                events.contains("none-such"),
                "no event names the missing handler: {events}"
            );
            Ok(Some(()))
        },
    )?;
    let delete = ["delete", "pod", "by-runc", "by-none-such", &timeout_flag()];
    cluster.asks(&delete)?;
    Ok(())
}

fn a_node_is_drained_and_used_again(node: &Node, cluster: &Cluster) -> Result {
    cluster.asks(&["apply", "-f", MANIFEST])?;
    let before = rolled_out(cluster, 3)?;
    let name = before[0]["spec"]["nodeName"].as_str().unwrap_or_default();
    cluster.asks(&["drain", name, "--delete-emptydir-data", &timeout_flag()])?;
    // The cluster has only this node. The scheduler therefore finds no node for the new replicas,
    // and this node must become empty.
    Kubelet::has_stopped_everything(node)?;
    for pod in pods_of(cluster)? {
        ensure_eq!(
            pod["status"]["phase"],
            "Pending",
            "the phase of a replica while the node is drained"
        );
    }
    cluster.asks(&["uncordon", name])?;
    let pods = rolled_out(cluster, 3)?;
    every_replica_answers(service(cluster)?, &pods)?;
    cluster.asks(&["delete", "-f", MANIFEST, &timeout_flag()])?;
    eventually("the pods to be deleted", || {
        Ok(pods_of(cluster)?.is_empty().then_some(()))
    })?;
    Kubelet::has_stopped_everything(node)
}
