//! A Kubernetes cluster with one node that uses the CRI server under test, and kubectl calls to
//! this cluster.

use std::time::Duration;

use serde_json::Value;

use crate::support::kubelet::{Kubelet, Options, UNCOUNTED, without_limits};
use crate::support::machine::{Result, Run, command, deadline, note, wait_within};
use crate::support::needs::Need;
use crate::support::node::Node;

pub(crate) const APISERVER: Need = Need::Program("kube-apiserver");

const SCRIPT: &str = "/src/tests/setup/cluster.sh";

/// The protocol of kubectl's streams. kubectl uses WebSocket by default, and older versions used
/// SPDY.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Transport {
    WebSocket,
    Spdy,
}

pub(crate) const TRANSPORTS: [Transport; 2] = [Transport::WebSocket, Transport::Spdy];

/// A cluster. Dropping the value stops the cluster and removes the cluster's files.
pub(crate) struct Cluster<'a> {
    pub(crate) kubelet: Kubelet<'a>,
}

/// Returns the timeout for each operation of a cluster. The timeout is long because the cluster's
/// components wait for each other's periodic loops.
pub(crate) fn cluster_timeout() -> Duration {
    deadline() * 5
}

/// Calls `probe` until it returns a value. `probe` runs kubectl, which needs much CPU time. So this
/// function pauses between two calls of `probe`.
pub(crate) fn eventually<T>(what: &str, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_within(cluster_timeout(), what, || {
        let found = probe();
        if !matches!(found, Ok(Some(_))) {
            std::thread::sleep(Duration::from_millis(300));
        }
        found
    })
}

/// Returns the cluster's timeout as a kubectl flag.
pub(crate) fn timeout_flag() -> String {
    format!("--timeout={}s", cluster_timeout().as_secs())
}

/// Returns whether this machine has the cgroup controllers that the pods' limits require.
pub(crate) fn has_controllers() -> bool {
    let controllers = ["cpu", "memory", "pids"].map(Need::Controller);
    controllers.iter().all(|need| need.lacking().is_none())
}

impl<'a> Cluster<'a> {
    pub(crate) fn start(node: &mut Node) -> Result<Self> {
        Self::configured(node, if has_controllers() { "" } else { UNCOUNTED })
    }

    /// Starts a cluster. `config` contains additional lines for kubelet's configuration. On a
    /// machine without cgroup controllers, the caller must pass [`UNCOUNTED`].
    pub(crate) fn configured(node: &mut Node, config: &'a str) -> Result<Self> {
        if !has_controllers() {
            without_limits(node)?;
        }
        let options = Options {
            config,
            kubeconfig: Some("/run/cluster/node.conf"),
            ..Options::default()
        };
        let cluster = Cluster {
            kubelet: Kubelet::new(node, options),
        };
        let output = cluster.kubelet.launch(&[SCRIPT, "start"])?;
        note(format!(
            "the cluster's node was Ready {:.0} s after the start of the cluster",
            output.took.as_secs_f64()
        ));
        Ok(cluster)
    }

    /// Adds the metrics API to the cluster.
    pub(crate) fn serve_metrics(&self) -> Result {
        let metrics = command(SCRIPT, ["metrics"]).within(cluster_timeout());
        metrics.ok().map(|_| ())
    }

    pub(crate) fn kubectl(&self, args: &[&str]) -> Run {
        self.kubectl_over(Transport::WebSocket, args)
    }

    pub(crate) fn kubectl_over(&self, transport: Transport, args: &[&str]) -> Run {
        command("env", environment(transport))
            .arg("kubectl")
            .args(args)
            .within(cluster_timeout())
    }

    /// Runs kubectl with the arguments `args`. kubectl must succeed. Returns the standard output.
    pub(crate) fn asks(&self, args: &[&str]) -> Result<String> {
        Ok(self.kubectl(args).ok()?.text().to_owned())
    }

    pub(crate) fn json(&self, args: &[&str]) -> Result<Value> {
        self.kubectl(args).args(["-o", "json"]).ok()?.json()
    }

    /// Returns the objects that `kubectl get` lists for the arguments `what`, in the order of the
    /// objects' names.
    pub(crate) fn list(&self, what: &[&str]) -> Result<Vec<Value>> {
        let list = self.json(&[&["get"], what].concat())?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    pub(crate) fn apply(&self, manifest: &Value) -> Result {
        let apply = self.kubectl(&["apply", "-f", "-"]);
        apply.stdin(serde_json::to_vec(manifest)?).ok()?;
        Ok(())
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        let _ = command(SCRIPT, ["stop"]).within(cluster_timeout()).end();
    }
}

/// Returns kubectl's environment variables in the form `NAME=VALUE`, as arguments for env(1).
pub(crate) fn environment(transport: Transport) -> Vec<String> {
    let websockets = transport == Transport::WebSocket;
    vec![
        "KUBECONFIG=/run/cluster/admin.conf".to_owned(),
        "KUBECACHEDIR=/run/cluster/cache".to_owned(),
        format!("KUBECTL_REMOTE_COMMAND_WEBSOCKETS={websockets}"),
        format!("KUBECTL_PORT_FORWARD_WEBSOCKETS={websockets}"),
    ]
}
