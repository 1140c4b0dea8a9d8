//! Test of a node that shuts down. kubelet makes logind delay the shutdown until the pods have
//! ended.

use std::fs;

use serde_json::{Value, json};

use crate::support::kubelet::{KUBELET, KUBELET_TIMEOUT, Kubelet, Options, static_pod};
use crate::support::machine::{Result, command, wait_for, wait_within};
use crate::support::needs::{Need, Test};
use crate::support::node::{BUSYBOX, Node, on_a_node};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[test!(
    kubelet_stops_pods_before_the_node_shuts_down,
    Need::Systemd,
    Need::Program("dbus-send"),
    KUBELET,
)];

const CONFIG: &str = "\
shutdownGracePeriod: 60s
shutdownGracePeriodCriticalPods: 10s
";

/// The configuration file that kubelet writes for logind. The file contains the longest time for
/// which kubelet can delay a shutdown.
const DELAY: &str = "/etc/systemd/logind.conf.d/99-kubelet.conf";

fn kubelet_stops_pods_before_the_node_shuts_down() -> Result {
    let result = on_a_node(|node| {
        fs::create_dir(node.join("host"))?;
        let options = Options {
            config: CONFIG,
            ..Options::default()
        };
        let kubelet = Kubelet::start(node, options)?;
        kubelet.write_manifest(&pod(node))?;
        kubelet.ready(1)?;
        let inhibitors = || command("systemd-inhibit", ["--list", "--no-pager"]).ok();
        wait_for(
            "kubelet to take its inhibitor lock, which delays shutdowns",
            || Ok(inhibitors()?.stdout.contains("kubelet").then_some(())),
        )?;
        // At the start of a real shutdown, logind sends a D-Bus signal to kubelet. The test sends
        // the same signal, and kubelet acts as in a real shutdown.
        prepare_for_shutdown(true)?;
        wait_within(KUBELET_TIMEOUT, "kubelet to terminate the pod", || {
            let pods = kubelet.pods()?;
            let status = &pods.first().ok_or("kubelet reports no pod")?["status"];
            ensure!(
                status["reason"] == "Terminated",
                "the pod is not Terminated; the pod's status: {status}"
            );
            let running = node.asks(&["ps", "--quiet"])?;
            ensure!(running.is_empty(), "these containers still run: {running}");
            Ok(Some(()))
        })?;
        let text = fs::read_to_string(node.join("host/stopped"))?;
        ensure!(
            text == "first the hook\nthen the signal\n",
            "the pod did not run its preStop hook and then receive SIGTERM; the content of the file that the pod wrote: {text}"
        );
        wait_for(
            "kubelet to release its inhibitor lock, which delays shutdowns",
            || Ok((!inhibitors()?.stdout.contains("kubelet")).then_some(())),
        )?;
        prepare_for_shutdown(false)
    });
    let _ = fs::remove_file(DELAY);
    result
}

fn prepare_for_shutdown(begins: bool) -> Result {
    let signal = "org.freedesktop.login1.Manager.PrepareForShutdown";
    command("dbus-send", ["--system", "--type=signal"])
        .args(["/org/freedesktop/login1", signal])
        .arg(format!("boolean:{begins}"))
        .ok()
        .map(|_| ())
}

fn pod(node: &Node) -> Value {
    let script = "trap 'echo then the signal >>/host/stopped; exit' TERM; \
                  while :; do sleep 1; done";
    static_pod(
        "stops",
        &json!({
            "terminationGracePeriodSeconds": 40,
            "containers": [{
                "name": "c",
                "image": BUSYBOX,
                "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", script],
                "lifecycle": { "preStop": { "exec": { "command":
                    ["sh", "-c", "echo first the hook >>/host/stopped"] } } },
                "volumeMounts": [{ "name": "host", "mountPath": "/host" }],
            }],
            "volumes": [{ "name": "host",
                "hostPath": { "path": node.join("host"), "type": "Directory" } }],
        }),
    )
}
