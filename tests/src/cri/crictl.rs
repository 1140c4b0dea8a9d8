//! Tests that use images, pods and containers through crictl. The tests send the requests of the
//! demo (`make demo`), and requests that the server refuses.

use std::fs;

use serde_json::{Value, json};

use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::Test;
use crate::support::node::{A_NODE, BUSYBOX, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        the_server_reports_its_name_its_version_and_its_conditions,
        A_NODE
    ),
    test!(crictl_controls_a_web_server_from_pull_to_removal, A_NODE),
    test!(images_are_pulled_by_tag_and_by_digest, A_NODE),
    test!(crictl_filters_lists_of_pods_and_containers, A_NODE),
    test!(
        invalid_requests_are_refused_and_leave_the_pod_usable,
        A_NODE
    ),
];

fn the_server_reports_its_name_its_version_and_its_conditions() -> Result {
    on_a_node(|node| {
        let version = node.asks(&["version"])?;
        ensure!(
            version.contains("RuntimeApiVersion:  v1"),
            "the API version is not v1: {version}"
        );
        if is_rrun() {
            ensure!(
                version.contains("RuntimeName:  rrun"),
                "the runtime is not rrun: {version}"
            );
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
            let condition = condition.ok_or(format!(
                "crictl info does not list the condition {kind}: {info}"
            ))?;
            ensure_eq!(
                condition["status"],
                json!(true),
                "status of the condition {kind} ({condition})"
            );
        }
        Ok(())
    })
}

/// Runs every step from the pull of the image to its removal, and checks the output of each step.
fn crictl_controls_a_web_server_from_pull_to_removal() -> Result {
    on_a_node(|node| {
        node.crictl(&["pull", WEB])
            .ok()?
            .says("Image is up to date for")?;
        let images = node.asks(&["images"])?;
        ensure!(
            images.contains("127.0.0.1:5000/demo/web"),
            "crictl images does not list the image: {images}"
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
            "the size that crictl reports for the image is not larger than 6 MiB: {}",
            image["status"]["size"]
        );

        let pod = node.pod("web");
        let pod_id = node.runp(&pod)?;
        let pods = node.asks(&["pods"])?;
        ensure!(
            pods.contains("Ready") && pods.contains("web"),
            "crictl pods does not list the pod as Ready: {pods}"
        );
        let status = node.json(&["inspectp", &pod_id])?["status"].clone();
        ensure_eq!(
            status["state"],
            "SANDBOX_READY",
            "the pod's state after crictl runp"
        );
        let address = status["network"]["ip"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        ensure!(
            address.parse::<std::net::Ipv4Addr>().is_ok(),
            "the pod's address is not an IPv4 address: {address:?}"
        );

        let mut web = node.container("web", &[]);
        web["image"]["image"] = json!(WEB);
        let id = node.create(&pod_id, &pod, &web)?;
        ensure_eq!(
            node.status(&id)?["state"],
            "CONTAINER_CREATED",
            "the container's state after crictl create"
        );
        node.asks(&["start", &id])?;
        let status = node.status(&id)?;
        ensure_eq!(
            status["state"],
            "CONTAINER_RUNNING",
            "the container's state after crictl start"
        );
        ensure_eq!(status["metadata"]["name"], "web", "the container's name");
        ensure_eq!(status["image"]["image"], WEB, "the container's image");

        let page = wait_for("the web server to answer", || {
            command("curl", ["-fsS", &format!("http://{address}:5000/")])
                .ok()
                .map(Some)
        })?;
        ensure_eq!(page.text(), "hello from rrun", "the page of the web server");
        let ps = node.asks(&["ps"])?;
        ensure!(
            ps.contains("Running") && ps.contains("web"),
            "crictl ps does not list the container as Running: {ps}"
        );
        wait_for("the web server to log the request", || {
            let output = node.crictl(&["logs", &id]).ok()?;
            Ok(output.stderr.contains("response:200").then_some(()))
        })?;

        let listing = node.asks(&["exec", "-s", &id, "ls", "/www"])?;
        ensure!(
            listing.contains("index.html"),
            "index.html is missing in /www: {listing}"
        );

        node.asks(&["stop", &id])?;
        let status = node.status(&id)?;
        ensure_eq!(
            status["state"],
            "CONTAINER_EXITED",
            "the container's state after crictl stop"
        );
        ensure_eq!(
            node.asks(&["ps", "--quiet"])?,
            "",
            "ids of the running containers after crictl stop"
        );
        node.asks(&["rm", &id])?;
        node.asks(&["stopp", &pod_id])?;
        let state = node.json(&["inspectp", &pod_id])?["status"]["state"].clone();
        ensure_eq!(
            state,
            "SANDBOX_NOTREADY",
            "the pod's state after crictl stopp"
        );
        node.asks(&["rmp", &pod_id])?;
        ensure_eq!(
            node.asks(&["pods", "--quiet"])?,
            "",
            "ids of the pods after crictl rmp"
        );
        node.asks(&["rmi", WEB])?;
        ensure!(
            !node.asks(&["images"])?.contains("demo/web"),
            "crictl images still lists the image after crictl rmi"
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
            "the image has no repository digest that names its registry: {image}"
        );
        let id = image["id"].as_str().unwrap_or_default().to_owned();
        // A second pull of the same image succeeds too.
        node.pull(WEB)?;
        node.asks(&["rmi", WEB])?;
        node.crictl(&["inspecti", WEB]).exits(1)?;

        node.pull(&digest)?;
        let image = node.json(&["inspecti", &digest])?["status"].clone();
        ensure_eq!(
            image["id"],
            json!(id),
            "id of the image that was pulled by digest"
        );
        ensure_eq!(
            image["repoTags"],
            json!([]),
            "tags of the image pulled by digest"
        );
        // inspecti also finds the image by its id.
        node.asks(&["inspecti", &id])?;

        // Other CRI servers count the image's bytes in the background, so the test waits for the
        // result.
        wait_for("imagefsinfo to count the image's bytes", || {
            let used = node.json(&["imagefsinfo"])?;
            let bytes = used.pointer("/status/imageFilesystems/0/usedBytes/value");
            let bytes = bytes
                .and_then(Value::as_str)
                .and_then(|bytes| bytes.parse::<u64>().ok());
            ensure!(
                bytes.is_some_and(|bytes| bytes > 6 << 20),
                "crictl imagefsinfo reports fewer bytes than the image has: {used}"
            );
            Ok(Some(()))
        })?;

        // The server cannot pull a missing tag, digest or repository, and refuses an invalid
        // reference.
        let output = node
            .crictl(&["pull", "127.0.0.1:5000/demo/web:nosuch"])
            .exits(1)?;
        ensure!(
            output.stderr.contains("nosuch"),
            "the error of crictl pull does not name the missing tag: {}",
            output.told()
        );
        let wrong = format!("127.0.0.1:5000/demo/web@sha256:{}", "0".repeat(64));
        node.crictl(&["pull", &wrong]).exits(1)?;
        node.crictl(&["pull", "127.0.0.1:5000/no/such/image"])
            .exits(1)?;
        node.crictl(&["pull", "not a reference"]).exits(1)?;
        ensure_eq!(
            node.asks(&["images", "--quiet"])?.lines().count(),
            1,
            "number of images after the refused pulls"
        );
        Ok(())
    })
}

fn crictl_filters_lists_of_pods_and_containers() -> Result {
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
                "number of lines that crictl {} prints ({listed})",
                args.join(" ")
            );
        }
        // Users abbreviate ids, so crictl must find a container by the beginning of its id.
        ensure_eq!(
            node.status(&short(&ids[0].1))?["id"],
            json!(ids[0].1),
            "id of the container that crictl found by an abbreviated id"
        );
        Ok(())
    })
}

fn invalid_requests_are_refused_and_leave_the_pod_usable() -> Result {
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
                "the error of crictl does not contain NotFound:\n{}",
                output.told()
            );
        }
        let pod = node.pod("wrong");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("no-image", &["true"]);
        container["image"]["image"] = json!("127.0.0.1:5000/not/pulled:1");
        ensure!(
            node.create(&pod_id, &pod, &container).is_err(),
            "the server created a container from an image that was not pulled"
        );
        let mut container = node.container("no-mount", &["true"]);
        container["mounts"] = json!([{ "container_path": "/x", "host_path": "/proc/no/such" }]);
        ensure!(
            node.run(&pod_id, &pod, &container).is_err(),
            "the server runs a container although the source of its mount does not exist"
        );
        let mut container = node.container("no-user", &["true"]);
        container["linux"]["security_context"]["run_as_username"] = json!("no-such-user");
        ensure!(
            node.run(&pod_id, &pod, &container).is_err(),
            "the server runs a container as a user that does not exist in the image"
        );
        let mut other = node.pod("no-handler");
        other["metadata"]["uid"] = json!("other");
        let file = node.join("pod.json");
        fs::write(&file, other.to_string())?;
        let output = node
            .crictl(&["runp", "--runtime", "nosuch", &file.to_string_lossy()])
            .exits(1)?;
        ensure!(
            output.stderr.contains("nosuch"),
            "the error of crictl runp does not name the unknown runtime handler: {}",
            output.told()
        );
        if is_rrun() {
            let id = node.run(&pod_id, &pod, &node.container("good", &["sleep", "600"]))?;
            // The server either supports exec over a streaming connection, or refuses it with the
            // gRPC code Unimplemented.
            let output = node.crictl(&["exec", &id, "true"]).end()?;
            ensure!(
                output.code == 0 || output.stderr.contains("Unimplemented"),
                "crictl exec over a streaming connection failed: {}",
                output.told()
            );
        }
        // The refused requests have not damaged the pod: a new container still runs in the pod.
        let id = node.run(&pod_id, &pod, &node.container("fine", &["true"]))?;
        ensure_eq!(
            node.exited(&id)?["exitCode"],
            json!(0),
            "exit code of a container after the refused requests"
        );
        Ok(())
    })
}
