//! A whole cluster of one node over the CRI server, and kubectl on it.

use std::time::Duration;

use serde_json::Value;

use crate::support::kubelet::{Kubelet, Options, UNCOUNTED, without_limits};
use crate::support::machine::{Result, Run, command, deadline, note, wait_within};
use crate::support::needs::Need;
use crate::support::node::Node;

pub(crate) const APISERVER: Need = Need::Program("kube-apiserver");

const SCRIPT: &str = "/src/tests/setup/cluster.sh";

/// What the streams of kubectl go over: what it speaks now, and what it spoke before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Transport {
    WebSocket,
    Spdy,
}

pub(crate) const TRANSPORTS: [Transport; 2] = [Transport::WebSocket, Transport::Spdy];

/// A cluster; dropped, it is stopped, and what its parts keep is removed.
pub(crate) struct Cluster<'a> {
    pub(crate) kubelet: Kubelet<'a>,
}

/// How long a cluster takes at most for anything: its parts act on each other's clocks.
pub(crate) fn cluster_timeout() -> Duration {
    deadline() * 5
}

/// Waits until the cluster gives this. kubectl costs too much CPU time to be asked all the time.
pub(crate) fn eventually<T>(what: &str, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_within(cluster_timeout(), what, || {
        let found = probe();
        if !matches!(found, Ok(Some(_))) {
            std::thread::sleep(Duration::from_millis(300));
        }
        found
    })
}

/// How long a cluster takes at most, as kubectl's flag.
pub(crate) fn timeout_flag() -> String {
    format!("--timeout={}s", cluster_timeout().as_secs())
}

/// Whether limits can be set on this machine.
pub(crate) fn counts() -> bool {
    let controllers = ["cpu", "memory", "pids"].map(Need::Controller);
    controllers.iter().all(|need| need.lacking().is_none())
}

impl<'a> Cluster<'a> {
    pub(crate) fn start(node: &mut Node) -> Result<Self> {
        Self::configured(node, if counts() { "" } else { UNCOUNTED })
    }

    /// One whose kubelet has these lines in its configuration: [`UNCOUNTED`] where that is so.
    pub(crate) fn configured(node: &mut Node, config: &'a str) -> Result<Self> {
        if !counts() {
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
            "a cluster's node was Ready {:.0} s after its start",
            output.took.as_secs_f64()
        ));
        Ok(cluster)
    }

    /// Adds the metrics API to it.
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

    /// kubectl with these arguments, which must succeed: its standard output.
    pub(crate) fn asks(&self, args: &[&str]) -> Result<String> {
        Ok(self.kubectl(args).ok()?.text().to_owned())
    }

    pub(crate) fn json(&self, args: &[&str]) -> Result<Value> {
        self.kubectl(args).args(["-o", "json"]).ok()?.json()
    }

    /// What `kubectl get` lists of this, in the order of the names.
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

/// kubectl's environment, as words for env(1).
pub(crate) fn environment(transport: Transport) -> Vec<String> {
    let websockets = transport == Transport::WebSocket;
    vec![
        "KUBECONFIG=/run/cluster/admin.conf".to_owned(),
        "KUBECACHEDIR=/run/cluster/cache".to_owned(),
        format!("KUBECTL_REMOTE_COMMAND_WEBSOCKETS={websockets}"),
        format!("KUBECTL_PORT_FORWARD_WEBSOCKETS={websockets}"),
    ]
}
