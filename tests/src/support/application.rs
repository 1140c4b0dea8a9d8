//! The application that the kubelet and cluster tests run: a Flask service (`tests/images/app.py`).
//! Its pods use features that applications often need, such as volumes, probes and init containers.
//! This module contains the pods' manifests and checks the service's responses.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::ensure_eq;
use crate::support::kubelet::{pod_name, static_pod};
use crate::support::machine::{Result, command, wait_for};
use crate::support::node::{BUSYBOX, Node};

pub(crate) const FLASK: &str = "127.0.0.1:5000/demo/flask:1";

/// The number of lines in the log of a container whose log kubelet rotates.
pub(crate) const LINES: usize = 9000;

/// Writes the files that the pods mount from the host.
pub(crate) fn write_config(node: &Node) -> Result {
    for (name, text) in [
        ("config/greeting", "hello from a file"),
        ("secret/password", "a password from the Secret"),
        ("host/.keep", ""),
    ] {
        let path = node.join(name);
        let dir = path.parent().ok_or("the path has no parent directory")?;
        fs::create_dir_all(dir)?;
        fs::write(&path, text)?;
    }
    // The pods write to this directory as a user other than root.
    fs::set_permissions(node.join("host"), fs::Permissions::from_mode(0o777))?;
    Ok(())
}

/// The shell command that makes a container exit on SIGTERM. The first process of a PID namespace
/// exits on SIGTERM only if it handles SIGTERM explicitly.
const TRAP: &str = "trap exit TERM";

/// Returns the manifest of one replica of the application.
pub(crate) fn replica(node: &Node, number: usize) -> Value {
    let host_path = |name: &str| json!({ "path": node.join(name), "type": "Directory" });
    let talks = format!(
        "i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); \
         echo \"line $i of a log that kubelet rotates while the container writes it\"; \
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
            // The grace period is far longer than any container needs to exit, even under
            // emulation.
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

/// Returns the host port of the replica `number`.
fn host_port(number: usize) -> usize {
    18_080 + number
}

pub(crate) fn address(pod: &Value) -> Result<&str> {
    let address = pod["status"]["podIP"].as_str();
    Ok(address.ok_or(format!(
        "the pod's status contains no podIP: {}",
        pod["status"]
    ))?)
}

/// Sends a POST request to the application, which must respond with "ok".
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

pub(crate) fn answer_shows_the_manifests_values(pod: &Value, number: usize) -> Result {
    // The container `neighbour` of the first replica sends its first request only after it has
    // written all its log lines. So this function checks the requests of `neighbour` only for other
    // replicas.
    let answer = answers(pod)?;
    for (field, actual, expected) in [
        ("version", &answer["version"], json!("1")),
        ("host", &answer["host"], pod["metadata"]["name"].clone()),
        ("user", &answer["user"], json!([1000, 1000, [1000, 2000]])),
        (
            "environment.APP_COLOR",
            &answer["environment"]["APP_COLOR"],
            json!("green"),
        ),
        (
            "environment.APP_ADDRESS",
            &answer["environment"]["APP_ADDRESS"],
            pod["status"]["podIP"].clone(),
        ),
        (
            "config.greeting",
            &answer["config"]["greeting"],
            json!("hello from a file"),
        ),
        (
            "secret.password",
            &answer["secret"]["password"],
            json!("a password from the Secret"),
        ),
        (
            "downward.name",
            &answer["downward"]["name"],
            pod["metadata"]["name"].clone(),
        ),
        (
            "shared.init",
            &answer["shared"]["init"],
            json!("prepared\n"),
        ),
        (
            "shared.sidecar",
            &answer["shared"]["sidecar"],
            json!("beside\n"),
        ),
    ] {
        ensure_eq!(
            *actual,
            expected,
            "the field `{field}` in the response of the pod {}",
            pod_name(pod)
        );
    }
    for node in ["127.0.0.1", "192.0.2.2"] {
        let url = format!("http://{node}:{}/", host_port(number));
        let answer = command("curl", ["-fsS", &url]).ok()?.json()?;
        ensure_eq!(
            answer["host"],
            pod["metadata"]["name"],
            "the name of the pod that responds at {url}"
        );
    }
    if number > 1 {
        wait_for(
            "the container `neighbour` to receive a response from the container `web`",
            || Ok((answers(pod)?["shared"]["client"] == "ok\n").then_some(())),
        )?;
    }
    Ok(())
}
