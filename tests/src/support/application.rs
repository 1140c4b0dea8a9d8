//! The application of kubelet's tests, as its pods' manifests have it and as it answers: a Flask
//! service with all that such pods can have (`tests/images/app.py`).

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::ensure_eq;
use crate::support::kubelet::{pod_name, static_pod};
use crate::support::machine::{Result, command, wait_for};
use crate::support::node::{BUSYBOX, Node};

pub(crate) const FLASK: &str = "127.0.0.1:5000/demo/flask:1";

/// How many lines a container logs while kubelet rotates its log.
pub(crate) const LINES: usize = 9000;

/// What the pods mount from the host.
pub(crate) fn write_config(node: &Node) -> Result {
    for (name, text) in [
        ("config/greeting", "hello from a file"),
        ("secret/password", "not told to anyone"),
        ("host/.keep", ""),
    ] {
        let path = node.join(name);
        let dir = path.parent().ok_or("no directory")?;
        fs::create_dir_all(dir)?;
        fs::write(&path, text)?;
    }
    // Users other than root write to it.
    fs::set_permissions(node.join("host"), fs::Permissions::from_mode(0o777))?;
    Ok(())
}

/// The first process of a PID namespace ends at a SIGTERM only if it has said so.
const TRAP: &str = "trap exit TERM";

/// The manifest of one replica.
pub(crate) fn replica(node: &Node, number: usize) -> Value {
    let host_path = |name: &str| json!({ "path": node.join(name), "type": "Directory" });
    let talks = format!(
        "i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); \
         echo \"line $i of a log that is rotated while it is written, and must not lose any\"; \
         [ $((i % 1000)) -ne 0 ] || sleep 3; done;"
    );
    let talks = if number == 1 { &talks } else { "" };
    let neighbour = format!(
        "{TRAP}; {talks} \
         while :; do wget -q -O /shared/client http://localhost:5000/ready; sleep 2; done"
    );
    static_pod(
        &format!("app-{number}"),
        &json!({
            // Far more than any of them takes, under emulation too.
            "terminationGracePeriodSeconds": 60,
            "securityContext": { "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000 },
            "initContainers": [
                {
                    "name": "prepare",
                    "image": BUSYBOX,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", "echo prepared >/shared/init"],
                    "volumeMounts": [{ "name": "shared", "mountPath": "/shared" }],
                },
                {
                    "name": "sidecar",
                    "image": BUSYBOX,
                    "imagePullPolicy": "IfNotPresent",
                    "restartPolicy": "Always",
                    "command": ["sh", "-c", format!(
                        "{TRAP}; echo beside >/shared/sidecar; while :; do sleep 1; done")],
                    "volumeMounts": [{ "name": "shared", "mountPath": "/shared" }],
                },
            ],
            "containers": [
                {
                    "name": "web",
                    "image": FLASK,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", "echo yes >/shared/alive; exec python3 /srv/app.py"],
                    "ports": [{ "name": "http", "containerPort": 5000, "hostPort": host_port(number) }],
                    "env": [
                        { "name": "APP_COLOR", "value": "green" },
                        { "name": "APP_ADDRESS", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
                    ],
                    "resources": {
                        "requests": { "cpu": "100m", "memory": "48Mi" },
                        "limits": { "cpu": "500m", "memory": "128Mi" },
                    },
                    "securityContext": {
                        "allowPrivilegeEscalation": false,
                        "readOnlyRootFilesystem": true,
                        "capabilities": { "drop": ["ALL"] },
                    },
                    "startupProbe": {
                        "httpGet": { "path": "/live", "port": "http" },
                        "periodSeconds": 1, "timeoutSeconds": 20, "failureThreshold": 200,
                    },
                    "readinessProbe": {
                        "httpGet": { "path": "/ready", "port": "http" },
                        "periodSeconds": 2, "timeoutSeconds": 20,
                    },
                    "livenessProbe": {
                        "exec": { "command": ["cat", "/shared/alive"] },
                        "periodSeconds": 5, "timeoutSeconds": 30, "failureThreshold": 2,
                    },
                    "lifecycle": { "preStop": { "exec": { "command":
                        ["sh", "-c", format!("echo stopped >/host/app-{number}.stopped")] } } },
                    "volumeMounts": [
                        { "name": "config", "mountPath": "/config", "readOnly": true },
                        { "name": "secret", "mountPath": "/secret", "readOnly": true },
                        { "name": "shared", "mountPath": "/shared" },
                        { "name": "host", "mountPath": "/host" },
                        { "name": "downward", "mountPath": "/downward" },
                    ],
                },
                {
                    "name": "neighbour",
                    "image": BUSYBOX,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", neighbour],
                    "volumeMounts": [{ "name": "shared", "mountPath": "/shared" }],
                },
            ],
            "volumes": [
                { "name": "config", "hostPath": host_path("config") },
                { "name": "secret", "hostPath": host_path("secret") },
                { "name": "host", "hostPath": host_path("host") },
                { "name": "shared", "emptyDir": {} },
                { "name": "downward", "downwardAPI": { "items": [
                    { "path": "name", "fieldRef": { "fieldPath": "metadata.name" } },
                    { "path": "memory", "resourceFieldRef":
                        { "containerName": "web", "resource": "limits.memory" } },
                ] } },
            ],
        }),
    )
}

/// The node's port that leads to this replica.
fn host_port(number: usize) -> usize {
    18_080 + number
}

pub(crate) fn address(pod: &Value) -> Result<&str> {
    let address = pod["status"]["podIP"].as_str();
    Ok(address.ok_or(format!("no podIP: {}", pod["status"]))?)
}

/// POST to the application, which it answers with ok.
pub(crate) fn tells(pod: &Value, path: &str) -> Result {
    let url = format!("http://{}:5000{path}", address(pod)?);
    command("curl", ["-fsS", "-X", "POST", &url])
        .ok()?
        .says("ok")?;
    Ok(())
}

pub(crate) fn answers(pod: &Value) -> Result<Value> {
    let url = format!("http://{}:5000/", address(pod)?);
    command("curl", ["-fsS", &url]).ok()?.json()
}

pub(crate) fn answer_shows_what_it_was_given(pod: &Value, number: usize) -> Result {
    // The neighbour's first request is answered when it has talked.
    let told = answers(pod)?;
    for (what, is, should) in [
        ("version", &told["version"], json!("1")),
        ("host", &told["host"], pod["metadata"]["name"].clone()),
        ("user", &told["user"], json!([1000, 1000, [1000, 2000]])),
        (
            "APP_COLOR",
            &told["environment"]["APP_COLOR"],
            json!("green"),
        ),
        (
            "APP_ADDRESS",
            &told["environment"]["APP_ADDRESS"],
            pod["status"]["podIP"].clone(),
        ),
        (
            "config",
            &told["config"]["greeting"],
            json!("hello from a file"),
        ),
        (
            "secret",
            &told["secret"]["password"],
            json!("not told to anyone"),
        ),
        (
            "downward name",
            &told["downward"]["name"],
            pod["metadata"]["name"].clone(),
        ),
        (
            "init container",
            &told["shared"]["init"],
            json!("prepared\n"),
        ),
        ("sidecar", &told["shared"]["sidecar"], json!("beside\n")),
    ] {
        ensure_eq!(*is, should, "{what} of {}", pod_name(pod));
    }
    for node in ["127.0.0.1", "192.0.2.2"] {
        let url = format!("http://{node}:{}/", host_port(number));
        let told = command("curl", ["-fsS", &url]).ok()?.json()?;
        ensure_eq!(
            told["host"],
            pod["metadata"]["name"],
            "who answers on {url}"
        );
    }
    if number > 1 {
        wait_for("the second container to have reached the first", || {
            Ok((answers(pod)?["shared"]["client"] == "ok\n").then_some(()))
        })?;
    }
    Ok(())
}
