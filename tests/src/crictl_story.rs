//! Images, pods and containers by crictl, as the demonstration tells them.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cgroup_use::{file, held_to};
use crate::machine::{Result, command, wait_for};
use crate::needs::{Need, Test};
use crate::node::{BUSYBOX, CRICTL, IMAGES, Node, REGISTRY, SERVER, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

const CPU: Need = Need::Controller("cpu");
const MEMORY: Need = Need::Controller("memory");

pub const TESTS: &[Test] = &[
    test!(the_server_says_who_it_is, CRICTL, SERVER, REGISTRY, IMAGES),
    test!(
        a_web_server_from_the_registry_to_its_removal,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        images_are_pulled_by_tag_and_by_digest,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        exit_codes_reasons_and_times_are_kept,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        stop_gives_the_grace_period_and_then_kills,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        a_pod_can_be_on_the_nodes_network,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        the_containers_of_a_pod_share_what_pods_share,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        pods_and_node_reach_each_other,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        a_container_gets_what_its_configuration_says,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(lists_are_filtered, CRICTL, SERVER, REGISTRY, IMAGES),
    test!(
        logs_have_both_streams_in_order,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        exec_gives_output_exit_code_and_ends_in_time,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(what_is_wrong_is_told, CRICTL, SERVER, REGISTRY, IMAGES),
    test!(
        limits_are_enforced_and_updated,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
        CPU,
        MEMORY
    ),
    test!(
        an_allocation_over_the_limit_is_oomkilled,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
        MEMORY
    ),
    test!(
        stats_tell_what_a_container_uses,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
        CPU,
        MEMORY
    ),
];

fn the_server_says_who_it_is() -> Result {
    on_a_node(|node| {
        let version = node.asks(&["version"])?;
        ensure!(
            version.contains("RuntimeApiVersion:  v1"),
            "version: {version}"
        );
        if is_rrun() {
            ensure!(version.contains("RuntimeName:  rrun"), "version: {version}");
        }
        let info = node.json(&["info"])?;
        let conditions = info["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        for kind in ["RuntimeReady", "NetworkReady"] {
            let condition = conditions
                .iter()
                .find(|condition| condition["type"] == kind);
            let condition = condition.ok_or(format!("no {kind} in {info}"))?;
            ensure_eq!(condition["status"], json!(true), "{kind} ({condition})");
        }
        Ok(())
    })
}

/// The long story: each step, and what it must say.
fn a_web_server_from_the_registry_to_its_removal() -> Result {
    on_a_node(|node| {
        node.crictl(&["pull", WEB])
            .ok()?
            .says("Image is up to date for")?;
        let images = node.asks(&["images"])?;
        ensure!(
            images.contains("127.0.0.1:5000/demo/web"),
            "images: {images}"
        );
        let image = node.json(&["inspecti", WEB])?;
        ensure_eq!(
            image["status"]["repoTags"],
            json!([WEB]),
            "tags of the image"
        );
        ensure!(
            image["status"]["size"]
                .as_str()
                .is_some_and(|size| size.parse::<u64>().is_ok_and(|size| size > 6 << 20)),
            "the size of the image is {}",
            image["status"]["size"]
        );

        let pod = node.pod("web");
        let pod_id = node.runp(&pod)?;
        let pods = node.asks(&["pods"])?;
        ensure!(
            pods.contains("Ready") && pods.contains("web"),
            "pods: {pods}"
        );
        let status = node.json(&["inspectp", &pod_id])?["status"].clone();
        ensure_eq!(status["state"], "SANDBOX_READY", "the pod's state");
        let address = status["network"]["ip"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        ensure!(
            address.parse::<std::net::Ipv4Addr>().is_ok(),
            "the pod's address is {address:?}"
        );

        let mut web = node.container("web", &[]);
        web["image"]["image"] = json!(WEB);
        let id = node.create(&pod_id, &pod, &web)?;
        ensure_eq!(
            node.status(&id)?["state"],
            "CONTAINER_CREATED",
            "state after create"
        );
        node.asks(&["start", &id])?;
        let status = node.status(&id)?;
        ensure_eq!(status["state"], "CONTAINER_RUNNING", "state after start");
        ensure_eq!(status["metadata"]["name"], "web", "name");
        ensure_eq!(status["image"]["image"], WEB, "image");

        let page = wait_for("the web server to answer", || {
            command("curl", ["-fsS", &format!("http://{address}:5000/")])
                .ok()
                .map(Some)
        })?;
        ensure_eq!(page.text(), "hello from rrun", "the page");
        let ps = node.asks(&["ps"])?;
        ensure!(ps.contains("Running") && ps.contains("web"), "ps: {ps}");
        wait_for("the request to be in the log", || {
            let output = node.crictl(&["logs", &id]).ok()?;
            Ok(output.stderr.contains("response:200").then_some(()))
        })?;

        let listing = node.asks(&["exec", "-s", &id, "ls", "/www"])?;
        ensure!(listing.contains("index.html"), "ls /www: {listing}");

        node.asks(&["stop", &id])?;
        let status = node.status(&id)?;
        ensure_eq!(status["state"], "CONTAINER_EXITED", "state after stop");
        ensure_eq!(
            node.asks(&["ps", "--quiet"])?,
            "",
            "running containers after stop"
        );
        node.asks(&["rm", &id])?;
        node.asks(&["stopp", &pod_id])?;
        let state = node.json(&["inspectp", &pod_id])?["status"]["state"].clone();
        ensure_eq!(state, "SANDBOX_NOTREADY", "the pod's state after stopp");
        node.asks(&["rmp", &pod_id])?;
        ensure_eq!(node.asks(&["pods", "--quiet"])?, "", "pods after rmp");
        node.asks(&["rmi", WEB])?;
        ensure!(
            !node.asks(&["images"])?.contains("demo/web"),
            "the image is still listed"
        );
        Ok(())
    })
}

fn images_are_pulled_by_tag_and_by_digest() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        let image = node.json(&["inspecti", WEB])?["status"].clone();
        let digest = image["repoDigests"][0]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        ensure!(
            digest.starts_with("127.0.0.1:5000/demo/web@sha256:"),
            "digests: {image}"
        );
        let id = image["id"].as_str().unwrap_or_default().to_owned();
        // Twice is as good as once.
        node.pull(WEB)?;
        node.asks(&["rmi", WEB])?;
        node.crictl(&["inspecti", WEB]).exits(1)?;

        node.pull(&digest)?;
        let image = node.json(&["inspecti", &digest])?["status"].clone();
        ensure_eq!(image["id"], json!(id), "the id of the image by digest");
        ensure_eq!(image["repoTags"], json!([]), "its tags");
        // By its id, too.
        node.asks(&["inspecti", &id])?;

        // Others count in the background.
        wait_for("the image's bytes to be counted", || {
            let used = node.json(&["imagefsinfo"])?;
            let bytes = used.pointer("/status/imageFilesystems/0/usedBytes/value");
            let bytes = bytes
                .and_then(Value::as_str)
                .and_then(|bytes| bytes.parse::<u64>().ok());
            ensure!(
                bytes.is_some_and(|bytes| bytes > 6 << 20),
                "imagefsinfo: {used}"
            );
            Ok(Some(()))
        })?;

        // A tag of this image and of none at all.
        let output = node
            .crictl(&["pull", "127.0.0.1:5000/demo/web:nosuch"])
            .exits(1)?;
        ensure!(output.stderr.contains("nosuch"), "{}", output.told());
        let wrong = format!("127.0.0.1:5000/demo/web@sha256:{}", "0".repeat(64));
        node.crictl(&["pull", &wrong]).exits(1)?;
        node.crictl(&["pull", "127.0.0.1:5000/no/such/image"])
            .exits(1)?;
        node.crictl(&["pull", "not a reference"]).exits(1)?;
        ensure_eq!(
            node.asks(&["images", "--quiet"])?.lines().count(),
            1,
            "images at the end"
        );
        Ok(())
    })
}

/// RFC 3339 to the second, and later than the year 2020.
fn is_time(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|time| time.len() >= 20 && time > "2020-01-01T00:00:00")
}

fn exit_codes_reasons_and_times_are_kept() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("exits");
        let pod_id = node.runp(&pod)?;
        for (name, command, code, reason) in [
            ("well", &["true"][..], 0, "Completed"),
            ("badly", &["sh", "-c", "exit 3"], 3, "Error"),
        ] {
            let id = node.run(&pod_id, &pod, &node.container(name, command))?;
            let status = node.exited(&id)?;
            ensure_eq!(status["exitCode"], json!(code), "exit code of {name}");
            ensure_eq!(status["reason"], reason, "reason of {name}");
            for time in ["createdAt", "startedAt", "finishedAt"] {
                ensure!(
                    is_time(&status[time]),
                    "{time} of {name} is {}",
                    status[time]
                );
            }
            ensure!(
                status["createdAt"].as_str() <= status["startedAt"].as_str()
                    && status["startedAt"].as_str() <= status["finishedAt"].as_str(),
                "the times of {name} are out of order: {status}"
            );
        }
        // containerd runs the runtime at start; CRI-O and rrun-cri do at create, and tell then.
        let nowhere = node.container("nowhere", &["/no/such/program"]);
        let failed = match node.create(&pod_id, &pod, &nowhere) {
            Err(failed) => failed,
            Ok(id) => {
                let failed = node.asks(&["start", &id]).err().ok_or("it started")?;
                let status = node.exited(&id)?;
                ensure_eq!(
                    status["exitCode"],
                    json!(128),
                    "exit code of what never started"
                );
                ensure_eq!(
                    status["reason"],
                    "StartError",
                    "reason of what never started"
                );
                failed
            }
        };
        let message = failed.message().unwrap_or_default();
        for part in ["/no/such/program", "no such file or directory"] {
            ensure!(message.contains(part), "no {part:?} in {message}");
        }
        Ok(())
    })
}

fn stop_gives_the_grace_period_and_then_kills() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("stops");
        let pod_id = node.runp(&pod)?;
        let obeys = node.run(
            &pod_id,
            &pod,
            &node.container("obeys", &["/inside", "wait"]),
        )?;
        let deaf = node.run(&pod_id, &pod, &node.container("deaf", &["/inside", "deaf"]))?;
        for (pod, id) in [("obeys", &obeys), ("deaf", &deaf)] {
            wait_for("it to be ready", || {
                Ok(node.log_of("stops", pod)?.contains("ready").then_some(id))
            })?;
        }
        let started = Instant::now();
        node.asks(&["stop", "--timeout", "20", &obeys])?;
        ensure!(
            started.elapsed() < Duration::from_secs(20),
            "it was not asked, but killed"
        );
        ensure_eq!(
            node.status(&obeys)?["exitCode"],
            json!(0),
            "exit code of the obedient one"
        );

        let started = Instant::now();
        node.asks(&["stop", "--timeout", "2", &deaf])?;
        ensure!(
            started.elapsed() >= Duration::from_secs(2),
            "it got no grace period"
        );
        ensure_eq!(
            node.status(&deaf)?["exitCode"],
            json!(137),
            "exit code of the deaf one"
        );
        // Once more is no error.
        node.asks(&["stop", &deaf])?;
        node.asks(&["rm", &deaf])?;
        // A running one is removed by force only.
        let running = node.run(&pod_id, &pod, &node.container("running", &["sleep", "600"]))?;
        node.crictl(&["rm", &running]).exits(1)?;
        node.asks(&["rm", "--force", &running])?;
        Ok(())
    })
}

fn a_pod_can_be_on_the_nodes_network() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("host");
        pod["linux"]["security_context"]["namespace_options"]["network"] = json!(2);
        pod.as_object_mut().and_then(|pod| pod.remove("hostname"));
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
        let inside = node.asks(&["exec", "-s", &id, "readlink", "/proc/self/ns/net"])?;
        let own = fs::read_link("/proc/self/ns/net")?;
        ensure_eq!(
            inside.trim(),
            own.to_string_lossy(),
            "its network namespace"
        );
        let status = node.json(&["inspectp", &pod_id])?["status"].clone();
        ensure_eq!(
            status.pointer("/linux/namespaces/options/network"),
            Some(&json!("NODE")),
            "its mode"
        );
        Ok(())
    })
}

fn the_containers_of_a_pod_share_what_pods_share() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("shares");
        pod["dns_config"] = json!({
            "servers": ["192.0.2.53"], "searches": ["example.org"], "options": ["ndots:5"],
        });
        let pod_id = node.runp(&pod)?;
        let one = node.run(&pod_id, &pod, &node.container("one", &["sleep", "600"]))?;
        let two = node.run(&pod_id, &pod, &node.container("two", &["sleep", "600"]))?;
        for (kind, shared) in [
            ("net", true),
            ("ipc", true),
            ("uts", true),
            ("pid", false),
            ("mnt", false),
        ] {
            let path = format!("/proc/self/ns/{kind}");
            let [first, second] =
                [&one, &two].map(|id| node.asks(&["exec", "-s", id, "readlink", &path]));
            let first = first?;
            ensure_eq!(first == second?, shared, "{kind} namespace is shared");
            let own = fs::read_link(&path)?;
            ensure!(
                first.trim() != own.to_string_lossy(),
                "the {kind} namespace is the node's"
            );
        }
        ensure_eq!(
            node.asks(&["exec", "-s", &one, "hostname"])?.trim(),
            "shares",
            "host name"
        );
        node.asks(&[
            "exec",
            "-s",
            &one,
            "sh",
            "-c",
            "echo shared > /dev/shm/file",
        ])?;
        let read = node.asks(&["exec", "-s", &two, "cat", "/dev/shm/file"])?;
        ensure_eq!(read.trim(), "shared", "/dev/shm in the other");
        let resolv = node.asks(&["exec", "-s", &two, "cat", "/etc/resolv.conf"])?;
        for line in [
            "nameserver 192.0.2.53",
            "search example.org",
            "options ndots:5",
        ] {
            ensure!(resolv.contains(line), "no {line:?} in {resolv:?}");
        }
        let hosts = node.asks(&["exec", "-s", &two, "cat", "/etc/hostname"])?;
        ensure_eq!(hosts.trim(), "shares", "/etc/hostname");

        // One namespace of processes, if that is asked for.
        let mut pod = node.pod("processes");
        pod["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
        let pod_id = node.runp(&pod)?;
        let mut ids = Vec::new();
        for name in ["first", "second"] {
            let mut container = node.container(name, &["sleep", "654"]);
            container["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
            ids.push(node.run(&pod_id, &pod, &container)?);
        }
        let ps = node.asks(&["exec", "-s", &ids[0], "ps"])?;
        ensure_eq!(ps.matches("sleep 654").count(), 2, "sleeps among {ps}");
        Ok(())
    })
}

fn address(node: &Node, pod_id: &str) -> Result<String> {
    let status = node.json(&["inspectp", pod_id])?;
    let address = status.pointer("/status/network/ip").and_then(Value::as_str);
    Ok(address.ok_or(format!("no address in {status}"))?.to_owned())
}

fn pods_and_node_reach_each_other() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        let mut pods = Vec::new();
        for name in ["here", "there"] {
            let pod = node.pod(name);
            let pod_id = node.runp(&pod)?;
            let mut web = node.container(&format!("web-{name}"), &[]);
            web["image"]["image"] = json!(WEB);
            let id = node.run(&pod_id, &pod, &web)?;
            pods.push((address(node, &pod_id)?, id));
        }
        ensure!(
            pods[0].0 != pods[1].0,
            "both have the address {}",
            pods[0].0
        );
        for (address, id) in [(&pods[1].0, &pods[0].1), (&pods[0].0, &pods[1].1)] {
            let url = format!("http://{address}:5000/");
            wait_for(&format!("{url} to answer"), || {
                let page = node.asks(&["exec", "-s", id, "wget", "-q", "-O", "-", &url])?;
                ensure_eq!(page.trim(), "hello from rrun", "the page");
                Ok(Some(()))
            })?;
            command("curl", ["-fsS", &url])
                .ok()?
                .says("hello from rrun")?;
        }
        // A pod sees itself by 127.0.0.1, and a way out.
        let id = &pods[0].1;
        let page = node.asks(&[
            "exec",
            "-s",
            id,
            "wget",
            "-q",
            "-O",
            "-",
            "http://127.0.0.1:5000/",
        ])?;
        ensure_eq!(page.trim(), "hello from rrun", "the page by 127.0.0.1");
        let routes = node.asks(&["exec", "-s", id, "ip", "route"])?;
        ensure!(
            routes.contains("default via"),
            "no default route in {routes}"
        );
        Ok(())
    })
}

fn a_container_gets_what_its_configuration_says() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("config");
        let pod_id = node.runp(&pod)?;
        let shared = node.join("shared");
        fs::create_dir(&shared)?;
        fs::write(shared.join("file"), "from the node")?;

        let mut container = node.container("report", &["/inside", "report"]);
        container["working_dir"] = json!("/tmp");
        container["envs"] = json!([{ "key": "ANSWER", "value": "42" }]);
        container["linux"]["security_context"] = json!({
                "namespace_options": { "pid": 1 },
                "run_as_user": { "value": 1000 },
                "run_as_group": { "value": 2000 },
                "supplemental_groups": [3000],
                "no_new_privs": true,
                "readonly_rootfs": true,
                "capabilities": { "drop_capabilities": ["ALL"], "add_capabilities": ["NET_BIND_SERVICE"] },
        });
        if let Some(mounts) = container["mounts"].as_array_mut() {
            mounts.push(
                json!({ "container_path": "/shared", "host_path": shared, "readonly": true }),
            );
        }
        let id = node.run(&pod_id, &pod, &container)?;
        node.exited(&id)?;
        let report: Value = serde_json::from_str(&node.asks(&["logs", &id])?)?;
        ensure_eq!(
            (&report["uid"], &report["gid"]),
            (&json!(1000), &json!(2000)),
            "user and group"
        );
        ensure!(
            report["groups"]
                .as_array()
                .is_some_and(|groups| groups.contains(&json!(3000))),
            "{}",
            report["groups"]
        );
        ensure_eq!(report["cwd"], "/tmp", "working directory");
        ensure_eq!(report["env"]["ANSWER"], "42", "environment");
        ensure!(
            report["env"]["PATH"]
                .as_str()
                .is_some_and(|path| path.contains("/bin")),
            "the image's environment"
        );
        ensure_eq!(report["status"]["NoNewPrivs"], "1", "no_new_privs");
        ensure_eq!(
            report["status"]["CapBnd"],
            "0000000000000400",
            "bounding set"
        );
        ensure_eq!(report["hostname"], "config", "host name");
        let mount = |point: &str| {
            let lines = report["mounts"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str);
            lines
                .filter(|line| line.split(' ').nth(4) == Some(point))
                .find_map(|line| line.split(' ').nth(5).map(str::to_owned))
        };
        for point in ["/", "/shared"] {
            let options = mount(point).ok_or(format!("nothing is mounted on {point}"))?;
            ensure!(
                options.split(',').any(|option| option == "ro"),
                "{point} is {options}"
            );
        }

        // What the image says is the default; a user by name is looked up in it.
        let mut container = node.container("name", &["/inside", "report"]);
        container["linux"]["security_context"]["run_as_username"] = json!("www-data");
        let id = node.run(&pod_id, &pod, &container)?;
        node.exited(&id)?;
        let report: Value = serde_json::from_str(&node.asks(&["logs", &id])?)?;
        ensure_eq!(
            (&report["uid"], &report["gid"]),
            (&json!(33), &json!(33)),
            "www-data"
        );

        let id = node.create(&pod_id, &pod, &node.container("labels", &["sleep", "600"]))?;
        let status = node.status(&id)?;
        ensure_eq!(
            status["mounts"].as_array().map(Vec::len),
            Some(1),
            "mounts in the status"
        );
        Ok(())
    })
}

fn lists_are_filtered() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut ids = Vec::new();
        for name in ["a", "b"] {
            let pod = node.pod(name);
            let pod_id = node.runp(&pod)?;
            let mut container = node.container(&format!("main-{name}"), &["sleep", "600"]);
            container["labels"] = json!({ "part": name });
            ids.push((pod_id.clone(), node.run(&pod_id, &pod, &container)?));
            node.create(
                &pod_id,
                &pod,
                &node.container(&format!("other-{name}"), &["true"]),
            )?;
        }
        let short = |id: &str| id.chars().take(13).collect::<String>();
        for (args, expected) in [
            (vec!["pods", "--quiet"], 2),
            (vec!["pods", "--quiet", "--name", "a"], 1),
            (vec!["pods", "--quiet", "--label", "app=b"], 1),
            (vec!["pods", "--quiet", "--state", "NotReady"], 0),
            (vec!["pods", "--quiet", "--id", &short(&ids[0].0)], 1),
            (vec!["ps", "--quiet"], 2),
            (vec!["ps", "--all", "--quiet"], 4),
            (vec!["ps", "--quiet", "--state", "Created"], 2),
            (vec!["ps", "--all", "--quiet", "--pod", &ids[1].0], 2),
            (vec!["ps", "--quiet", "--label", "part=a"], 1),
            (vec!["ps", "--quiet", "--id", &short(&ids[1].1)], 1),
            (vec!["ps", "--quiet", "--label", "part=c"], 0),
        ] {
            let listed = node.asks(&args)?;
            ensure_eq!(
                listed.lines().count(),
                expected,
                "lines of crictl {} ({listed})",
                args.join(" ")
            );
        }
        // By the beginning of an id, as people do.
        ensure_eq!(
            node.status(&short(&ids[0].1))?["id"],
            json!(ids[0].1),
            "id by its beginning"
        );
        Ok(())
    })
}

fn logs_have_both_streams_in_order() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("logs");
        let pod_id = node.runp(&pod)?;
        let script = "echo to stdout; echo to stderr >&2; printf 'no line end'";
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("both", &["sh", "-c", script]),
        )?;
        node.exited(&id)?;
        let output = node.crictl(&["logs", &id]).ok()?;
        ensure_eq!(output.stdout, "to stdout\nno line end", "standard output");
        ensure_eq!(output.stderr, "to stderr\n", "standard error");
        let file = node.log_of("logs", "both")?;
        let lines: Vec<Vec<&str>> = file
            .lines()
            .map(|line| line.splitn(4, ' ').collect())
            .collect();
        ensure_eq!(lines.len(), 3, "lines in {file:?}");
        for line in &lines {
            ensure_eq!(line.len(), 4, "parts of {line:?}");
            ensure!(is_time(&json!(line[0])), "the time of {line:?}");
        }
        ensure!(
            lines
                .iter()
                .any(|line| line[1..] == ["stdout", "F", "to stdout"]),
            "{file}"
        );
        ensure!(
            lines
                .iter()
                .any(|line| line[1..] == ["stderr", "F", "to stderr"]),
            "{file}"
        );
        ensure!(
            lines
                .iter()
                .any(|line| line[1] == "stdout" && line[3] == "no line end"),
            "{file}"
        );

        // As fast as it can, nothing is lost.
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("burst", &["/inside", "burst", "20000"]),
        )?;
        node.exited(&id)?;
        let text = node.asks(&["logs", &id])?;
        ensure!(
            text.lines()
                .enumerate()
                .all(|(at, line)| line == format!("line {}", at + 1)),
            "the lines are not in order"
        );
        ensure_eq!(text.lines().count(), 20_000, "lines");
        let tail = node.asks(&["logs", "--tail", "2", &id])?;
        ensure_eq!(tail, "line 19999\nline 20000", "the last two lines");

        // A line longer than a record is cut into parts, and given back whole.
        let long = "head -c 40000 /dev/zero | tr '\\0' x; echo";
        let id = node.run(&pod_id, &pod, &node.container("long", &["sh", "-c", long]))?;
        node.exited(&id)?;
        ensure_eq!(
            node.asks(&["logs", &id])?,
            "x".repeat(40_000),
            "the long line"
        );
        let file = node.log_of("logs", "long")?;
        ensure!(
            file.lines().any(|line| line.contains(" stdout P ")),
            "no partial record in the log"
        );
        Ok(())
    })
}

fn exec_gives_output_exit_code_and_ends_in_time() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("exec");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
        let script = "echo out; echo err >&2; exit 7";
        let output = node
            .crictl(&["exec", "-s", &id, "sh", "-c", script])
            .end()?;
        ensure!(output.code != 0, "{}", output.told());
        let told = format!("{}{}", output.stdout, output.stderr);
        for part in ["out", "err", "7"] {
            ensure!(told.contains(part), "no {part:?} in:\n{}", output.told());
        }
        let started = Instant::now();
        let output = node
            .crictl(&["exec", "-s", "--timeout", "2", &id, "sleep", "456"])
            .exits(1)?;
        ensure!(
            started.elapsed() < Duration::from_secs(60),
            "the deadline did not end it"
        );
        ensure!(
            output.stderr.contains("DeadlineExceeded")
                || output.stderr.contains("timeout")
                || output.stderr.contains("deadline"),
            "{}",
            output.told()
        );
        wait_for("the process to be gone", || {
            Ok((!node.asks(&["exec", "-s", &id, "ps"])?.contains("sleep 456")).then_some(()))
        })?;
        node.crictl(&["exec", "-s", &id, "/no/such/program"])
            .exits(1)?;
        node.asks(&["stop", "--timeout", "0", &id])?;
        let output = node.crictl(&["exec", "-s", &id, "true"]).exits(1)?;
        ensure!(
            output.stderr.contains("not running")
                || output.stderr.contains("exited")
                || output.stderr.contains("EXITED"),
            "{}",
            output.told()
        );
        Ok(())
    })
}

fn what_is_wrong_is_told() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for args in [
            ["inspect", "nobody"],
            ["inspectp", "nobody"],
            ["start", "nobody"],
        ] {
            let output = node.crictl(&args).exits(1)?;
            ensure!(
                output.stderr.contains("NotFound") || output.stderr.contains("not found"),
                "no NotFound:\n{}",
                output.told()
            );
        }
        let pod = node.pod("wrong");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("no-image", &["true"]);
        container["image"]["image"] = json!("127.0.0.1:5000/not/pulled:1");
        ensure!(
            node.create(&pod_id, &pod, &container).is_err(),
            "an image that is not here"
        );
        let mut container = node.container("no-mount", &["true"]);
        container["mounts"] = json!([{ "container_path": "/x", "host_path": "/proc/no/such" }]);
        ensure!(
            node.run(&pod_id, &pod, &container).is_err(),
            "a mount of nothing"
        );
        let mut container = node.container("no-user", &["true"]);
        container["linux"]["security_context"]["run_as_username"] = json!("no-such-user");
        ensure!(
            node.run(&pod_id, &pod, &container).is_err(),
            "a user that the image has not"
        );
        let mut other = node.pod("no-handler");
        other["metadata"]["uid"] = json!("other");
        let file = node.join("pod.json");
        fs::write(&file, other.to_string())?;
        let output = node
            .crictl(&["runp", "--runtime", "nosuch", &file.to_string_lossy()])
            .exits(1)?;
        ensure!(output.stderr.contains("nosuch"), "{}", output.told());
        if is_rrun() {
            let id = node.run(&pod_id, &pod, &node.container("good", &["sleep", "600"]))?;
            // A later issue brings it: until then a sentence says so.
            let output = node.crictl(&["exec", &id, "true"]).end()?;
            ensure!(
                output.code == 0 || output.stderr.contains("Unimplemented"),
                "{}",
                output.told()
            );
        }
        // What went wrong with them has not spoiled the pod.
        let id = node.run(&pod_id, &pod, &node.container("fine", &["true"]))?;
        ensure_eq!(
            node.exited(&id)?["exitCode"],
            json!(0),
            "exit code after all that"
        );
        Ok(())
    })
}

fn limits_are_enforced_and_updated() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("limits");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("spins", &["/inside", "spin", "600"]);
        container["linux"]["resources"] = json!({
            "cpu_period": 100_000, "cpu_quota": 50_000, "cpu_shares": 102,
            "memory_limit_in_bytes": 64 << 20,
        });
        let id = node.run(&pod_id, &pod, &container)?;
        let group = node.cgroup(&id)?;
        for (name, value) in [
            ("cpu.max", "50000 100000"),
            ("cpu.weight", "17"),
            ("memory.max", "67108864"),
        ] {
            ensure_eq!(file(&group, name)?, value, "{name}");
        }
        let used = held_to(0.5, &group)?;
        crate::machine::note(format!("a quota of 500m used {:.0}m", used * 1000.0));

        node.asks(&[
            "update",
            "--cpu-period",
            "100000",
            "--cpu-quota",
            "25000",
            "--cpu-share",
            "1024",
            "--memory",
            "100663296",
            &id,
        ])?;
        for (name, value) in [
            ("cpu.max", "25000 100000"),
            ("cpu.weight", "100"),
            ("memory.max", "100663296"),
        ] {
            ensure_eq!(file(&group, name)?, value, "{name} after the update");
        }
        let used = held_to(0.25, &group)?;
        crate::machine::note(format!(
            "after an update to 250m it used {:.0}m",
            used * 1000.0
        ));
        let resources = node.status(&id)?["resources"]["linux"].clone();
        ensure_eq!(
            resources["cpuQuota"],
            "25000",
            "quota in the status ({resources})"
        );
        ensure_eq!(
            resources["memoryLimitInBytes"],
            "100663296",
            "memory limit in the status"
        );
        Ok(())
    })
}

fn an_allocation_over_the_limit_is_oomkilled() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("memory");
        let pod_id = node.runp(&pod)?;
        let limit =
            json!({ "memory_limit_in_bytes": 48 << 20, "memory_swap_limit_in_bytes": 48 << 20 });
        let mut container = node.container("greedy", &["/inside", "allocate", "256"]);
        container["linux"]["resources"] = limit.clone();
        let id = node.run(&pod_id, &pod, &container)?;
        let status = node.exited(&id)?;
        ensure_eq!(status["reason"], "OOMKilled", "reason");
        ensure_eq!(status["exitCode"], json!(137), "exit code");
        // Killed otherwise is not that.
        let mut container = node.container("other", &["sleep", "600"]);
        container["linux"]["resources"] = limit;
        let id = node.run(&pod_id, &pod, &container)?;
        node.asks(&["stop", "--timeout", "0", &id])?;
        ensure_eq!(
            node.status(&id)?["reason"],
            "Error",
            "reason of what was killed"
        );
        Ok(())
    })
}

fn stats_tell_what_a_container_uses() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("stats");
        let pod_id = node.runp(&pod)?;
        let script =
            "head -c 20000000 /dev/zero > /file; cat /file > /dev/null; while :; do :; done";
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("busy", &["sh", "-c", script]),
        )?;
        let number = |value: Option<&Value>| {
            value
                .and_then(Value::as_str)
                .and_then(|text| text.parse::<u64>().ok())
                .unwrap_or_default()
        };
        wait_for("the container's figures", || {
            let stats = node.json(&["stats", "--all", "--id", &id])?["stats"][0].clone();
            let cpu = number(stats.pointer("/cpu/usageCoreNanoSeconds/value"));
            let memory = number(stats.pointer("/memory/workingSetBytes/value"));
            let written = number(stats.pointer("/writableLayer/usedBytes/value"));
            ensure!(
                cpu > 500_000_000 && memory > 0 && written >= 20_000_000,
                "CPU {cpu} ns, memory {memory}, written {written}: {stats}"
            );
            ensure_eq!(stats["attributes"]["id"], json!(id), "id");
            ensure_eq!(stats["attributes"]["metadata"]["name"], "busy", "name");
            Ok(Some(()))
        })?;
        // containerd wants a cgroup parent for that.
        if is_rrun() {
            let pods = node.json(&["statsp", "--id", &pod_id])?["stats"][0].clone();
            let used = number(pods.pointer("/linux/cpu/usageCoreNanoSeconds/value"));
            ensure!(used > 0, "of the pod: {pods}");
        }
        Ok(())
    })
}
