//! Images, pods and containers by crictl, as the demonstration tells them.

use std::fs;

use serde_json::{Value, json};

use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::Test;
use crate::support::node::{A_NODE, BUSYBOX, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(the_server_says_who_it_is, A_NODE),
    test!(a_web_server_from_the_registry_to_its_removal, A_NODE),
    test!(images_are_pulled_by_tag_and_by_digest, A_NODE),
    test!(lists_are_filtered, A_NODE),
    test!(what_is_wrong_is_told, A_NODE),
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
