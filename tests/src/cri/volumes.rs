//! Tests of volumes: images as volumes, volumes that images declare, mount propagation, and
//! recursive read-only mounts.

use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::support::machine::{Result, command};
use crate::support::needs::Test;
use crate::support::node::{A_NODE, BUSYBOX, Node, PORT, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(an_image_can_be_a_volume, A_NODE),
    test!(a_volume_that_an_image_declares_is_a_separate_mount, A_NODE),
    test!(
        a_mount_has_the_access_mode_and_the_propagation_that_its_container_requests,
        A_NODE
    ),
];

fn with_mount(node: &Node, name: &str, mount: Value) -> Value {
    let mut container = node.container(name, &["sleep", "600"]);
    if let Some(mounts) = container["mounts"].as_array_mut() {
        mounts.push(mount);
    }
    container
}

fn inside(node: &Node, id: &str, script: &str) -> Result<String> {
    node.asks(&["exec", "-s", id, "sh", "-c", script])
}

fn an_image_can_be_a_volume() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        node.pull(WEB)?;
        let pod = node.pod("images");
        let pod_id = node.runp(&pod)?;
        let volume = |sub_path: &str| {
            json!({
                "container_path": "/data", "readonly": true, "image": { "image": WEB },
                "image_sub_path": sub_path,
            })
        };
        let whole = node.run(&pod_id, &pod, &with_mount(node, "whole", volume("")))?;
        let part = node.run(&pod_id, &pod, &with_mount(node, "part", volume("www")))?;
        for (id, page) in [
            (&whole, "/data/www/index.html"),
            (&part, "/data/index.html"),
        ] {
            let text = inside(node, id, &format!("cat {page}"))?;
            ensure_eq!(text.trim(), "hello from rrun", "content of {page}");
            ensure!(
                inside(node, id, &format!("echo x > {page}")).is_err(),
                "the container wrote to {page} in an image volume"
            );
            ensure!(
                inside(node, id, "touch /data/new").is_err(),
                "the container created a file in an image volume"
            );
        }
        if is_rrun() {
            let mounts = node.status(&part)?["mounts"].clone();
            let digest = mounts[1].pointer("/image/imageRef").and_then(Value::as_str);
            ensure!(
                digest.is_some_and(|digest| digest.contains("sha256:")),
                "the container's status has no digest of the image volume: {mounts}"
            );
            // `rmi` removes only the image's name. While a container uses the image as a volume,
            // the files remain, even after a restart of the server.
            node.asks(&["rmi", WEB])?;
            node.kill_server()?;
            node.start_server()?;
            for (id, page) in [
                (&whole, "/data/www/index.html"),
                (&part, "/data/index.html"),
            ] {
                let text = inside(node, id, &format!("cat {page}"))?;
                ensure_eq!(
                    text.trim(),
                    "hello from rrun",
                    "content of {page} after the image's removal"
                );
            }
            node.pull(WEB)?;
            for (name, sub_path, words) in [
                ("out", "../etc", ".."),
                ("none", "no/such", "no/such"),
                ("file", "www/index.html", "not a directory"),
            ] {
                let wrong = with_mount(node, name, volume(sub_path));
                let failed = node.create(&pod_id, &pod, &wrong).err().ok_or(format!(
                    "the server created the container {name} although its image_sub_path {sub_path:?} is invalid"
                ))?;
                let message = failed.message().unwrap_or_default();
                ensure!(
                    message.contains(words),
                    "the error message about the image_sub_path {sub_path:?} does not contain {words:?}: {message}"
                );
            }
            let mut absent = with_mount(node, "absent", volume(""));
            absent["mounts"][1]["image"]["image"] = json!("127.0.0.1:5000/no/such:1");
            let failed = node.create(&pod_id, &pod, &absent).err().ok_or(
                "the server created a container although the image of its volume is missing",
            )?;
            let message = failed.message().unwrap_or_default();
            ensure!(
                message.contains("127.0.0.1:5000/no/such:1"),
                "the error message does not name the missing image of the volume: {message}"
            );
        }
        Ok(())
    })
}

/// Pushes a copy of demo/busybox with the additional key `key` in its configuration, and returns
/// the copy's reference.
fn push_with(node: &Node, name: &str, key: &str, value: Value) -> Result<String> {
    let url = |rest: &str| format!("http://127.0.0.1:{PORT}/v2/demo/{rest}");
    let accept = "Accept: application/vnd.oci.image.manifest.v1+json";
    let manifest = command(
        "curl",
        ["-fsS", "-H", accept, &url("busybox/manifests/latest")],
    )
    .ok()?;
    let mut manifest: Value = serde_json::from_str(manifest.text())?;
    let digest = manifest["config"]["digest"].as_str().unwrap_or_default();
    let config = command("curl", ["-fsSL", &url(&format!("busybox/blobs/{digest}"))]).ok()?;
    let mut config: Value = serde_json::from_str(config.text())?;
    config["config"][key] = value;
    let file = node.join(name);
    fs::write(&file, config.to_string())?;
    let sum = command("sha256sum", [&file]).ok()?;
    let digest = format!(
        "sha256:{}",
        sum.text().split(' ').next().unwrap_or_default()
    );
    let upload = command(
        "curl",
        [
            "-fsS",
            "-X",
            "POST",
            "-D",
            "-",
            &url("busybox/blobs/uploads/"),
        ],
    )
    .ok()?;
    let place = upload.stdout.lines().find_map(|line| {
        let (header, value) = line.split_once(": ")?;
        header
            .eq_ignore_ascii_case("location")
            .then(|| value.trim().to_owned())
    });
    let place = place.ok_or("the registry returned no upload location")?;
    let to = format!("{place}&digest={digest}");
    let data = format!("@{}", file.display());
    let binary = "Content-Type: application/octet-stream";
    command(
        "curl",
        [
            "-fsS",
            "-X",
            "PUT",
            "-H",
            binary,
            "--data-binary",
            &data,
            &to,
        ],
    )
    .ok()?;
    manifest["config"]["digest"] = json!(digest);
    manifest["config"]["size"] = json!(fs::metadata(&file)?.len());
    fs::write(&file, manifest.to_string())?;
    let kind = "Content-Type: application/vnd.oci.image.manifest.v1+json";
    let to = url(&format!("busybox/manifests/{name}"));
    command(
        "curl",
        ["-fsS", "-X", "PUT", "-H", kind, "--data-binary", &data, &to],
    )
    .ok()?;
    Ok(format!("127.0.0.1:{PORT}/demo/busybox:{name}"))
}

fn a_volume_that_an_image_declares_is_a_separate_mount() -> Result {
    on_a_node(|node| {
        let image = push_with(
            node,
            "declares",
            "Volumes",
            json!({ "/etc": {}, "/fresh": {}, "/own": {} }),
        )?;
        node.pull(&image)?;
        let pod = node.pod("declares");
        let pod_id = node.runp(&pod)?;
        let own = node.join("own");
        fs::create_dir(&own)?;
        let mut container = with_mount(
            node,
            "declares",
            json!({ "container_path": "/own", "host_path": own }),
        );
        container["image"]["image"] = json!(image);
        let id = node.run(&pod_id, &pod, &container)?;
        let inside = |script: &str| node.asks(&["exec", "-s", &id, "sh", "-c", script]);
        ensure!(
            inside("cat /etc/passwd")?.contains("root:"),
            "the server did not copy the image's files to the volume"
        );
        inside("echo a > /fresh/a && echo b > /etc/b && echo c > /own/c")?;
        let mounts = inside("cat /proc/mounts")?;
        for place in ["/etc", "/fresh"] {
            let line = mounts
                .lines()
                .find(|line| line.split(' ').nth(1) == Some(place));
            let line = line.ok_or(format!(
                "nothing is mounted on {place} in the container; its mounts:\n{mounts}"
            ))?;
            ensure!(
                !line.starts_with("overlay"),
                "no volume is mounted on {place}; the directory is a part of the container's writable layer"
            );
        }
        ensure_eq!(
            fs::read_to_string(own.join("c"))?,
            "c\n",
            "content of the file on the node after the container wrote to the file through its mount"
        );
        if is_rrun() {
            let upper = node.join("root/containers").join(&id).join("upper");
            ensure!(
                !upper.join("fresh/a").exists(),
                "the volume's file is in the writable layer"
            );
        }
        Ok(())
    })
}

fn a_mount_has_the_access_mode_and_the_propagation_that_its_container_requests() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("mounts");
        let pod_id = node.runp(&pod)?;
        let source = node.join("source");
        fs::create_dir_all(source.join("below"))?;
        let at = |path: &Path| path.display().to_string();
        let (top, below) = (at(&source), at(&source.join("below")));
        mount(
            Some(&*top),
            &*top,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )?;
        mount(
            None::<&str>,
            &*top,
            None::<&str>,
            MsFlags::MS_PRIVATE,
            None::<&str>,
        )?;
        tmpfs(&below)?;
        let result = propagation(node, &pod_id, &pod, &top, &below);
        for path in [&format!("{below}/later"), &below, &top] {
            let _ = umount2(&**path, MntFlags::MNT_DETACH);
        }
        result
    })
}

fn tmpfs(place: &str) -> Result {
    Ok(mount(
        Some("none"),
        place,
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )?)
}

fn propagation(node: &Node, pod_id: &str, pod: &Value, top: &str, below: &str) -> Result {
    let mounting = |name: &str, more: Value| {
        let mut mount = json!({ "container_path": "/m", "host_path": top });
        for (key, value) in more.as_object().into_iter().flatten() {
            mount[key] = value.clone();
        }
        with_mount(node, name, mount)
    };
    let writes = |id: &str, path: &str| {
        let script = format!("echo x > {path}");
        node.asks(&["exec", "-s", id, "sh", "-c", &script]).is_ok()
    };
    let top_only = node.run(pod_id, pod, &mounting("ro", json!({ "readonly": true })))?;
    ensure!(
        !writes(&top_only, "/m/x") && writes(&top_only, "/m/below/x"),
        "a mount with the setting readonly is writable, or the mount below it is read-only"
    );
    let all = mounting(
        "rro",
        json!({ "readonly": true, "recursive_read_only": true }),
    );
    let all = node.run(pod_id, pod, &all)?;
    ensure!(
        !writes(&all, "/m/x") && !writes(&all, "/m/below/x"),
        "a mount with the setting recursive_read_only, or the mount below it, is writable"
    );
    for (name, wrong) in [
        ("not-ro", json!({ "recursive_read_only": true })),
        ("slave", json!({ "propagation": 1 })),
        ("shared", json!({ "propagation": 2 })),
    ] {
        ensure!(
            node.create(pod_id, pod, &mounting(name, wrong))
                .and_then(|id| node.asks(&["start", &id]))
                .is_err(),
            "the server started the container {name} although the options of its mount are invalid"
        );
    }
    let shared = MsFlags::MS_SHARED | MsFlags::MS_REC;
    mount(None::<&str>, top, None::<&str>, shared, None::<&str>)?;
    let slave = node.run(
        pod_id,
        pod,
        &mounting("slaves", json!({ "propagation": 1 })),
    )?;
    fs::create_dir(format!("{below}/later"))?;
    tmpfs(&format!("{below}/later"))?;
    fs::write(format!("{below}/later/file"), "later")?;
    let text = node.asks(&["exec", "-s", &slave, "cat", "/m/below/later/file"])?;
    ensure_eq!(
        text.trim(),
        "later",
        "content of a file on a file system mounted after the container's start"
    );
    // If the source of a mount does not exist on the node, the server creates the source as a
    // directory.
    let missing = node.join("missing/dir");
    let mount = json!({ "container_path": "/missing", "host_path": missing });
    node.run(pod_id, pod, &with_mount(node, "missing", mount))?;
    ensure!(
        missing.is_dir(),
        "the server did not create the missing source as a directory"
    );
    Ok(())
}
