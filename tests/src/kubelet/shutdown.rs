//! A node that is being shut down: kubelet holds logind back until its pods have ended.

use std::fs;

use serde_json::{Value, json};

use crate::support::kubelet::{KUBELET, KUBELET_TIMEOUT, Kubelet, Options, static_pod};
use crate::support::machine::{Result, command, wait_for, wait_within};
use crate::support::needs::{Need, Test};
use crate::support::node::{BUSYBOX, Node, on_a_node};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[test!(
    pods_are_stopped_before_the_node_goes_down,
    Need::Systemd,
    Need::Program("dbus-send"),
    KUBELET,
)];

const CONFIG: &str = "\
shutdownGracePeriod: 60s
shutdownGracePeriodCriticalPods: 10s
";

/// Where kubelet asks logind for so much time.
const DELAY: &str = "/etc/systemd/logind.conf.d/99-kubelet.conf";

fn pods_are_stopped_before_the_node_goes_down() -> Result {
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
        wait_for("kubelet to hold a shutdown back", || {
            Ok(inhibitors()?.stdout.contains("kubelet").then_some(()))
        })?;
        // What logind says to all when somebody has asked for a shutdown.
        prepare_for_shutdown(true)?;
        wait_within(KUBELET_TIMEOUT, "the pod to be ended", || {
            let pods = kubelet.pods()?;
            let status = &pods.first().ok_or("it is gone")?["status"];
            ensure!(status["reason"] == "Terminated", "{status}");
            let running = node.asks(&["ps", "--quiet"])?;
            ensure!(running.is_empty(), "{running} run");
            Ok(Some(()))
        })?;
        let told = fs::read_to_string(node.join("host/stopped"))?;
        ensure!(told == "first the hook\nthen the signal\n", "{told}");
        wait_for("kubelet to let go", || {
            Ok((!inhibitors()?.stdout.contains("kubelet")).then_some(()))
        })?;
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
