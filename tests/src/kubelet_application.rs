//! kubelet and a real application: three replicas of a Flask service as static pods, with all that
//! such pods can have, from their manifests to their removal.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cgroup_use::{file, held_to};
use crate::cri_streaming::{message, reads, websocket};
use crate::kubelet::{
    ENDPOINT, Kubelet, Options, PATIENCE, container_id, container_status, is_ready, lives,
    static_pod,
};
use crate::machine::{Result, command, deadline, note, wait_for, wait_within};
use crate::needs::{Need, Test};
use crate::node::{BUSYBOX, CRICTL, IMAGES, Node, REGISTRY, SERVER, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[
    test!(
        three_replicas_from_their_manifests_to_their_removal,
        Need::Long,
        Need::OwnMachine,
        Need::Program("kubelet"),
        Need::Controller("cpu"),
        Need::Controller("memory"),
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
    ),
    test!(
        the_same_on_a_node_that_counts_nothing,
        Need::Native,
        Need::Program("kubelet"),
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
    ),
    test!(
        the_same_under_an_older_kubelet_and_by_events,
        Need::Long,
        Need::OwnMachine,
        Need::Program(OLDER),
        Need::Controller("cpu"),
        Need::Controller("memory"),
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
    ),
];

/// The kubelet of an older minor that is still supported.
const OLDER: &str = "/tools/kubelet-old/kubelet";

const FLASK: &str = "127.0.0.1:5000/demo/flask:1";

const MIB: u64 = 1 << 20;

/// How many lines a container logs while kubelet rotates its log.
const LINES: usize = 9000;

/// As a node's configuration has it.
const CONFIG: &str = "\
featureGates: {PodAndContainerStatsFromCRI: true, MemoryQoS: true, EventedPLEG: EVENTED}
memoryThrottlingFactor: 0.9
memorySwap: {swapBehavior: LimitedSwap}
seccompDefault: true
shutdownGracePeriod: 10s
shutdownGracePeriodCriticalPods: 5s
containerLogMaxSize: 64Ki
containerLogMaxFiles: 40
containerLogMonitorInterval: 3s
";

/// For this kernel's view without controllers: kubelet makes no groups, and no limit is held.
pub const UNCOUNTED: &str = "\
cgroupsPerQOS: false
enforceNodeAllocatable: []
cpuCFSQuota: false
";

/// The 1.36 kubelet protects memory only if told so; the older one does not know the key.
const RESERVATION: &str = "memoryReservationPolicy: TieredReservation\n";

fn three_replicas_from_their_manifests_to_their_removal() -> Result {
    let config = CONFIG.replace("EVENTED", "false") + RESERVATION;
    story(
        Options {
            config: &config,
            ..Options::default()
        },
        Some("memory.low"),
    )
}

/// All but the limits: twenty times quicker than in the guest.
fn the_same_on_a_node_that_counts_nothing() -> Result {
    let config = CONFIG
        .replace("EVENTED", "true")
        .replace("MemoryQoS: true, ", "")
        + UNCOUNTED;
    story(
        Options {
            config: &config,
            ..Options::default()
        },
        None,
    )
}

fn the_same_under_an_older_kubelet_and_by_events() -> Result {
    let config = CONFIG.replace("EVENTED", "true");
    story(
        Options {
            program: Some(OLDER),
            config: &config,
            ..Options::default()
        },
        Some("memory.min"),
    )
}

/// `protection`: where this kubelet puts the memory request, if anything counts memory at all.
fn story(options: Options, protection: Option<&str>) -> Result {
    on_a_node(|node| {
        if protection.is_none() {
            without_limits(node)?;
        }
        let kubelet = Kubelet::start(node, options)?;
        let mut manifests: Vec<Value> = (1..=3).map(|number| replica(node, number)).collect();
        if protection.is_none() {
            for pod in &mut manifests {
                pod["spec"]["containers"][0]["resources"] = json!({});
            }
        }
        write_config(node)?;
        let started = Instant::now();
        for pod in &manifests {
            kubelet.write_manifest(pod)?;
        }
        let pods = kubelet.ready(3)?;
        note(format!(
            "three replicas were Ready {:.1} s after their manifests, the images' pull included",
            started.elapsed().as_secs_f64()
        ));
        for (pod, number) in pods.iter().zip(1..) {
            answer_shows_what_it_was_given(pod, number)?;
        }
        streams_go_through_kubelet(&pods[0])?;
        if let Some(protection) = protection {
            limits_are_as_kubelet_means_them(node, &pods, protection)?;
            a_busy_loop_is_held_to_its_limit(node, &pods[0])?;
            statistics_are_plausible(&kubelet)?;
            allocations_are_oomkilled_and_backed_off(&kubelet, &pods[1])?;
        }
        a_failed_probe_takes_out_and_restarts(&kubelet, &pods[2])?;
        no_line_is_lost_by_rotation(&pods[0])?;
        restarts_go_unnoticed(node, &kubelet)?;
        let started = Instant::now();
        kubelet.removes(node, &manifests)?;
        note(format!(
            "everything of the pods was gone {:.1} s after their manifests",
            started.elapsed().as_secs_f64()
        ));
        for number in 1..=3 {
            let told = fs::read_to_string(node.join("host").join(format!("app-{number}.stopped")));
            ensure_eq!(
                told?,
                "stopped\n",
                "what the preStop hook of app-{number} left"
            );
        }
        Ok(())
    })
}

/// Has the server run its containers by runtimes that are told of no limits: kubelet asks for CPU
/// shares whatever it is told itself.
pub fn without_limits(node: &mut Node) -> Result {
    let mut config = "default_runtime = 'unlimited'\n".to_owned();
    for (handler, runtime) in [("unlimited", "rrun"), ("runc", "runc")] {
        let script = node.join(&format!("{runtime}-without-limits"));
        fs::write(
            &script,
            format!(
                "#!/bin/bash\n\
                 for ((i = 1; i < $#; i++)); do\n\
                   [[ ${{!i}} != --bundle ]] || {{ at=$((i + 1)); file=${{!at}}/config.json\n\
                     jq 'del(.linux.resources | .cpu, .memory, .pids, .unified, .hugepageLimits)' \"$file\" >\"$file.new\" &&\n\
                     cat \"$file.new\" >\"$file\"; rm \"$file.new\"; }}\n\
                 done\n\
                 exec {runtime} \"$@\"\n"
            ),
        )?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        config += &format!("[runtime.{handler}]\npath = {script:?}\n");
    }
    fs::write(node.join("config.d/50-unlimited.toml"), config)?;
    node.terminate_server()?;
    node.start_server()
}

/// What the pods mount from the host.
fn write_config(node: &Node) -> Result {
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

fn replica(node: &Node, number: usize) -> Value {
    let host_path = |name: &str| json!({ "path": node.join(name), "type": "Directory" });
    let talk = format!(
        "i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); \
         echo \"line $i of a log that is rotated while it is written, and must not lose any\"; \
         [ $((i % 1000)) -ne 0 ] || sleep 3; done; \
         while :; do wget -q -O /shared/client http://localhost:5000/ready; sleep 2; done"
    );
    let ask = "while :; do wget -q -O /shared/client http://localhost:5000/ready; sleep 2; done";
    let neighbour = if number == 1 { &talk } else { ask };
    static_pod(
        &format!("app-{number}"),
        &json!({
            "terminationGracePeriodSeconds": 5,
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
                    "command": ["sh", "-c", "echo beside >/shared/sidecar; exec sleep 100000"],
                    "volumeMounts": [{ "name": "shared", "mountPath": "/shared" }],
                },
            ],
            "containers": [
                {
                    "name": "web",
                    "image": FLASK,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", "echo yes >/shared/alive; exec python3 /srv/app.py"],
                    "ports": [{ "name": "http", "containerPort": 5000} ],
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

fn address(pod: &Value) -> Result<&str> {
    let address = pod["status"]["podIP"].as_str();
    Ok(address.ok_or(format!("no podIP: {}", pod["status"]))?)
}

fn name(pod: &Value) -> &str {
    pod["metadata"]["name"].as_str().unwrap_or_default()
}

/// POST to the application, which it answers with ok.
fn tells(pod: &Value, path: &str) -> Result {
    let url = format!("http://{}:5000{path}", address(pod)?);
    command("curl", ["-fsS", "-X", "POST", &url])
        .ok()?
        .says("ok")?;
    Ok(())
}

fn answers(pod: &Value) -> Result<Value> {
    let url = format!("http://{}:5000/", address(pod)?);
    command("curl", ["-fsS", &url]).ok()?.json()
}

fn answer_shows_what_it_was_given(pod: &Value, number: usize) -> Result {
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
        ensure_eq!(*is, should, "{what} of {}", name(pod));
    }
    if number > 1 {
        wait_for("the second container to have reached the first", || {
            Ok((answers(pod)?["shared"]["client"] == "ok\n").then_some(()))
        })?;
    }
    Ok(())
}

fn limits_are_as_kubelet_means_them(node: &Node, pods: &[Value], protection: &str) -> Result {
    // floor((request + 0.9 * (limit - request)) / 4096) * 4096
    let high = (48 * MIB + 80 * MIB * 9 / 10) / 4096 * 4096;
    for pod in pods {
        let group = node.cgroup(&container_id(pod, "web")?)?;
        for (name, value) in [
            ("cpu.weight", "17".to_owned()),
            ("cpu.max", "50000 100000".to_owned()),
            ("memory.max", (128 * MIB).to_string()),
            ("memory.high", high.to_string()),
            (protection, (48 * MIB).to_string()),
        ] {
            ensure_eq!(file(&group, name)?, value, "{name} of {}", group.display());
        }
        let told = group.to_string_lossy().into_owned();
        ensure!(
            told.contains("kubepods") && told.contains("burstable"),
            "the container is in {told}"
        );
        // The pod's own group: 100m and two shares for each container that asks for nothing.
        let of_pod = group.parent().ok_or("no parent")?;
        ensure_eq!(
            file(of_pod, protection)?,
            (48 * MIB).to_string(),
            "{protection} of the pod"
        );
    }
    Ok(())
}

fn a_busy_loop_is_held_to_its_limit(node: &Node, pod: &Value) -> Result {
    let group = node.cgroup(&container_id(pod, "web")?)?;
    tells(pod, "/burn/20")?;
    let used = held_to(0.5, &group)?;
    note(format!(
        "a busy loop under kubelet's limit of 500m used {:.0}m",
        used * 1000.0
    ));
    Ok(())
}

fn stream(path: &str, pod: &Value, rest: &str) -> Result<TcpStream> {
    let url = format!("{ENDPOINT}/{path}/default/{}{rest}", name(pod));
    websocket(&url, "v4.channel.k8s.io")
}

/// Exec, attach, port-forward and logs by kubelet's own endpoint.
fn streams_go_through_kubelet(pod: &Value) -> Result {
    let command_line = "/web?output=1&command=cat&command=/config/greeting";
    let mut exec = stream("exec", pod, command_line)?;
    reads(&mut exec, b"hello from a file")?;
    let mut attach = stream("attach", pod, "/web?output=1&error=1")?;
    tells(pod, "/fail/nothing")?;
    reads(&mut attach, b"POST /fail/nothing")?;
    let mut port = stream("portForward", pod, "?port=5000")?;
    port.write_all(&message(0, b"GET /ready HTTP/1.0\r\n\r\n"))?;
    reads(&mut port, b"ok\n")?;
    let url = format!(
        "{ENDPOINT}/containerLogs/default/{}/web?tailLines=50",
        name(pod)
    );
    command("curl", ["-fsS", &url])
        .ok()?
        .says("POST /fail/nothing")?;
    Ok(())
}

/// What kubelet says of its pods' use, which it asks the CRI server for.
fn statistics_are_plausible(kubelet: &Kubelet) -> Result {
    wait_for("three replicas' statistics", || {
        let summary = kubelet.asks("/stats/summary")?;
        let pods = summary["pods"].as_array().cloned().unwrap_or_default();
        ensure_eq!(pods.len(), 3, "pods in {summary}");
        for pod in &pods {
            let containers = pod["containers"].as_array();
            let web = containers
                .into_iter()
                .flatten()
                .find(|one| one["name"] == "web");
            let web = web.ok_or(format!("no web in {pod}"))?;
            let number = |value: &Value, what: &str| {
                let number = value.pointer(what).and_then(Value::as_u64);
                number.ok_or(format!("no {what} in {value}"))
            };
            let memory = number(web, "/memory/workingSetBytes")?;
            ensure!(
                (8 * MIB..128 * MIB).contains(&memory),
                "working set of {memory} bytes: {web}"
            );
            // Python's start takes a good while under emulation, and some time anywhere.
            let cpu = number(web, "/cpu/usageCoreNanoSeconds")?;
            ensure!(cpu > 100_000_000, "{cpu} ns of CPU time: {web}");
            number(web, "/cpu/usageNanoCores")?;
            ensure!(number(web, "/rootfs/usedBytes")? < 64 * MIB, "{web}");
            ensure!(number(web, "/logs/usedBytes")? > 0, "{web}");
            ensure!(number(pod, "/network/rxBytes")? > 1000, "{pod}");
            ensure!(
                number(pod, "/memory/workingSetBytes")? >= memory / 2,
                "{pod}"
            );
            ensure!(number(pod, "/process_stats/process_count")? >= 3, "{pod}");
        }
        let images = summary.pointer("/node/runtime/imageFs/usedBytes");
        ensure!(
            images.and_then(Value::as_u64) > Some(10 * MIB),
            "the images' file system: {}",
            summary["node"]["runtime"]
        );
        Ok(Some(()))
    })?;
    if is_rrun() {
        let metrics = command("curl", ["-fsS", "http://127.0.0.1:10255/metrics/cadvisor"]).ok()?;
        for name in [
            "container_cpu_usage_seconds_total",
            "container_memory_working_set_bytes",
        ] {
            let pods: BTreeSet<&str> = metrics
                .stdout
                .lines()
                .filter(|line| line.starts_with(name) && line.contains("container=\"web\""))
                .filter_map(|line| line.split("pod=\"").nth(1)?.split('"').next())
                .collect();
            ensure_eq!(pods.len(), 3, "pods with {name}");
        }
    }
    Ok(())
}

/// Waits until the application of this pod has been restarted so often.
fn restarted(kubelet: &Kubelet, pod: &Value, count: i64) -> Result<Value> {
    wait_within(
        PATIENCE,
        &format!("restart {count} of {}", name(pod)),
        || {
            let web = container_status(&kubelet.pod(pod)?, "web")?;
            ensure!(web["restartCount"] == count, "{web}");
            Ok(Some(web))
        },
    )
}

/// A replica allocates more than it may, twice.
fn allocations_are_oomkilled_and_backed_off(kubelet: &Kubelet, pod: &Value) -> Result {
    // The application's end takes the answer along.
    let grow = || {
        let url = format!("http://{}:5000/grow/200", address(pod)?);
        command("curl", ["-sS", "-m", "60", "-X", "POST", &url]).end()
    };
    grow()?;
    let web = restarted(kubelet, pod, 1)?;
    let last = &web["lastState"]["terminated"];
    ensure!(
        last["reason"] == "OOMKilled" && last["exitCode"] == 137,
        "{web}"
    );
    kubelet.ready(3)?;
    grow()?;
    wait_within(PATIENCE, "a back-off", || {
        let now = container_status(&kubelet.pod(pod)?, "web")?;
        ensure!(
            now["state"]["waiting"]["reason"] == "CrashLoopBackOff"
                && now["lastState"]["terminated"]["reason"] == "OOMKilled",
            "{now}"
        );
        Ok(Some(()))
    })?;
    restarted(kubelet, pod, 2)?;
    kubelet.ready(3).map(|_| ())
}

/// The third replica fails its readiness, which takes it out; then its liveness, which restarts it.
fn a_failed_probe_takes_out_and_restarts(kubelet: &Kubelet, pod: &Value) -> Result {
    tells(pod, "/fail/ready")?;
    wait_within(PATIENCE, "the failing replica to be not Ready", || {
        let now = kubelet.pod(pod)?;
        ensure_eq!(
            container_status(&now, "web")?["restartCount"],
            0,
            "restarts"
        );
        Ok((!is_ready(&now)).then_some(()))
    })?;
    let remove = "/web?error=1&output=1&command=rm&command=-v&command=/shared/alive";
    reads(&mut stream("exec", pod, remove)?, b"removed")?;
    let web = restarted(kubelet, pod, 1)?;
    // Python ends by itself when told to.
    ensure_eq!(web["lastState"]["terminated"]["exitCode"], 0, "{web}");
    for pod in &kubelet.ready(3)? {
        answers(pod)?;
        let neighbour = container_status(pod, "neighbour")?;
        ensure_eq!(neighbour["restartCount"], 0, "the neighbour's restarts");
    }
    Ok(())
}

/// All that the first replica's second container has said, in whichever files, compressed or not.
fn no_line_is_lost_by_rotation(pod: &Value) -> Result {
    let uid = pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str();
    let uid = uid.ok_or(format!("no hash in {}", pod["metadata"]))?;
    let dir = format!("/var/log/pods/default_{}_{uid}/neighbour", name(pod));
    wait_within(PATIENCE, "the log's last line", || {
        let mut files: Vec<_> = fs::read_dir(&dir)
            .map_err(|error| format!("{dir}: {error}"))?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| !path.to_string_lossy().ends_with(".tmp"))
            .collect();
        files.sort();
        // `0.log` is the newest; the others' names end with their time.
        files.rotate_left(1);
        let mut numbers = Vec::new();
        for path in &files {
            let text = log_text(path)?;
            let lines = text
                .lines()
                .filter_map(|line| line.split(" F line ").nth(1));
            numbers.extend(lines.filter_map(|line| line.split(' ').next()?.parse::<usize>().ok()));
        }
        ensure!(
            numbers.last() == Some(&LINES),
            "the last line is {:?}, in {files:?}",
            numbers.last()
        );
        let all: Vec<usize> = (1..=LINES).collect();
        ensure!(numbers == all, "{} lines in {files:?}", numbers.len());
        ensure!(files.len() > 3, "only {files:?}");
        Ok(Some(()))
    })
}

fn log_text(path: &Path) -> Result<String> {
    if path.extension().is_some_and(|extension| extension == "gz") {
        let output = command("gzip", ["-dc"]).arg(path).ok()?;
        return Ok(output.stdout);
    }
    let mut text = String::new();
    fs::File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

fn restarts_go_unnoticed(node: &mut Node, kubelet: &Kubelet) -> Result {
    let pods = kubelet.ready(3)?;
    let before = lives(node, &pods)?;

    node.kill_server()?;
    // The web servers answer while there is nobody to ask about them.
    for pod in &pods {
        answers(pod)?;
    }
    node.start_server()?;
    kubelet.stop()?;
    node.terminate_server()?;
    node.start_server()?;
    kubelet.begin()?;

    let pods = kubelet.ready(3)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "containers, processes and restarts"
    );
    // Probes and all, for some rounds more.
    std::thread::sleep(Duration::from_secs(12).min(deadline()));
    let pods = kubelet.ready(3)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "containers, processes and restarts a little later"
    );
    for pod in &pods {
        answers(pod)?;
    }
    Ok(())
}
