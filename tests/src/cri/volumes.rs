//! Tests of volumes: images as volumes, volumes that images declare, mount propagation, and
//! recursive read-only mounts.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::support::images::build::{Archive, ITEM, Item, image};
use crate::support::images::{pull_built, push_with, with_one_layer};
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(an_image_can_be_a_volume, A_NODE),
    test!(
        the_volume_of_an_image_without_layers_is_a_separate_file_system,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        many_volumes_of_one_image_are_one_mount_of_the_node,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_numbers_of_mounts_and_of_image_volumes_are_limited,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_file_systems_of_an_exited_container_are_unmounted,
        A_NODE,
        Need::RrunCri
    ),
    test!(a_volume_that_an_image_declares_is_a_separate_mount, A_NODE),
    test!(
        the_volumes_of_an_image_do_not_fill_the_disk,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_copy_of_a_volume_ends_when_its_pod_is_removed,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        immutable_files_are_removed_with_their_container,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_disk_usage_of_a_container_contains_deep_files_and_volumes,
        A_NODE,
        Need::RrunCri
    ),
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

/// A process can lock a directory while it reads it. It must not lock a directory that other pods use.
fn the_volume_of_an_image_without_layers_is_a_separate_file_system() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let empty = pull_built(node, "empty", &image(&[], json!({})))?;
        let pod = node.pod("empty");
        let pod_id = node.runp(&pod)?;
        let mut ids = Vec::new();
        for name in ["a", "b"] {
            let volume = json!({
                "container_path": "/data", "readonly": true, "image": { "image": empty },
            });
            let id = node.run(&pod_id, &pod, &with_mount(node, name, volume))?;
            let refused = inside(node, &id, "ls -A /data; touch /data/file 2>&1 || true")?;
            ensure!(
                refused.starts_with("touch") && refused.contains("Read-only"),
                "the output of reading and changing the empty volume: {refused}"
            );
            let directory = format!("/proc/{}/root/data", node.pid(&id)?);
            ids.push(fs::metadata(directory)?.dev());
        }
        ids.push(fs::metadata(node.join("root/layers/0/fs"))?.dev());
        let (count, distinct) = (ids.len(), BTreeSet::from_iter(ids).len());
        ensure_eq!(distinct, count, "number of different file systems");
        Ok(())
    })
}

/// Returns a container with `count` volumes of the image `image`. Every second volume is the
/// directory /www of the image.
fn with_image_volumes(node: &Node, name: &str, image: &str, count: usize) -> Value {
    let mut container = node.container(name, &["sleep", "600"]);
    let mounts = (0..count).map(|number| {
        json!({
            "container_path": format!("/data/{number}"), "readonly": true,
            "image": { "image": image },
            "image_sub_path": if number % 2 == 1 { "www" } else { "" },
        })
    });
    container["mounts"] = mounts.collect();
    container
}

/// The mount of an image with many layers is slow, and the kernel limits the number of mounts on
/// the node.
fn many_volumes_of_one_image_are_one_mount_of_the_node() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        node.pull(WEB)?;
        let pod = node.pod("many");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &with_image_volumes(node, "many", WEB, 300))?;
        let directory = format!("/{id}/images/");
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let count = mounts.lines().filter(|line| line.contains(&directory));
        ensure_eq!(count.count(), 1, "number of the node's mounts for volumes");
        for page in ["/data/298/www/index.html", "/data/299/index.html"] {
            let text = inside(node, &id, &format!("cat {page}; touch {page} 2>&1 || true"))?;
            ensure!(
                text.contains("hello from rrun") && text.contains("Read-only"),
                "output of reading and changing {page}: {text}"
            );
        }
        node.asks(&["rmp", "-f", &pod_id])?;
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(!mounts.contains(&directory), "a mount is left: {mounts}");
        Ok(())
    })
}

fn the_numbers_of_mounts_and_of_image_volumes_are_limited() -> Result {
    on_a_node(|node| {
        node.terminate_server()?;
        let file = node.join("config.toml");
        let text = fs::read_to_string(&file)?;
        let limits = "container_mounts = 5\ncontainer_image_volumes = 1\npod_image_volumes = 2\n";
        fs::write(&file, format!("{limits}{text}"))?;
        node.start_server()?;
        node.pull(BUSYBOX)?;
        node.pull(WEB)?;
        let pod = node.pod("limits");
        let pod_id = node.runp(&pod)?;
        node.run(&pod_id, &pod, &with_image_volumes(node, "fits", WEB, 5))?;
        let many = with_image_volumes(node, "many", WEB, 6);
        let mut two = with_image_volumes(node, "two", WEB, 2);
        two["mounts"][1]["image"]["image"] = json!(BUSYBOX);
        for (container, words) in [
            (
                many,
                "has 6 mounts, and the limit is 5 mounts (container_mounts)",
            ),
            (
                two,
                "mounts 2 different images, and the limit is 1 images (container_image_volumes)",
            ),
        ] {
            let output = node.try_create(&pod_id, &pod, &container)?;
            ensure!(
                output.code == 1 && output.stderr.contains(words),
                "the error does not contain {words:?}: {}",
                output.stderr
            );
        }
        node.run(&pod_id, &pod, &with_image_volumes(node, "second", WEB, 2))?;
        let third = with_image_volumes(node, "third", WEB, 1);
        let output = node.try_create(&pod_id, &pod, &third)?;
        let words = "mount 2 images already, and the limit is 2 images (pod_image_volumes)";
        ensure!(
            output.code == 1 && output.stderr.contains(words),
            "the error does not contain {words:?}: {}",
            output.stderr
        );
        Ok(())
    })
}

/// The kernel needs memory for each layer of each mount, and kubelet keeps exited containers.
fn the_file_systems_of_an_exited_container_are_unmounted() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        node.pull(WEB)?;
        let pod = node.pod("exits");
        let pod_id = node.runp(&pod)?;
        let mut container = with_image_volumes(node, "exits", WEB, 2);
        container["command"] = json!(["true"]);
        let id = node.run(&pod_id, &pod, &container)?;
        wait_for("the file systems of the container to be unmounted", || {
            let status = node.status(&id)?;
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            Ok((status["state"] == "CONTAINER_EXITED" && !mounts.contains(&id)).then_some(()))
        })?;
        node.asks(&["rm", &id])?;
        node.asks(&["rmp", "-f", &pod_id]).map(drop)
    })
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

/// Starts a registry with an image that declares `volumes`, and pulls the image. Returns the
/// configuration of a container with this image.
fn container_of(node: &Node, name: &str, archive: Archive, volumes: &[String]) -> Result<Value> {
    let volumes: serde_json::Map<String, Value> = volumes
        .iter()
        .map(|volume| (volume.clone(), json!({})))
        .collect();
    let config = json!({ "Cmd": ["/inside"], "Volumes": volumes });
    let reference = pull_built(node, name, &with_one_layer(archive, config))?;
    let mut container = node.container(name, &["/inside", "exit", "0"]);
    container["image"]["image"] = json!(reference);
    Ok(container)
}

/// Returns the number of bytes that a directory occupies on the disk.
fn disk_bytes(directory: &Path) -> Result<u64> {
    let output = command("du", ["-s", "--block-size=1"])
        .arg(directory)
        .ok()?;
    let bytes = output.text().split_whitespace().next();
    Ok(bytes.ok_or("du printed nothing")?.parse()?)
}

fn the_volumes_of_an_image_do_not_fill_the_disk() -> Result {
    on_a_node(|node| {
        const FILE: usize = 1 << 20;
        // A sparse file in GNU tar's format 1.0. Its map lists one piece of 512 bytes at offset 0.
        let mut sparse = b"1\n0\n512\n".to_vec();
        sparse.resize(512, 0);
        sparse.resize(1024, b'x');
        let mut archive = Archive::new().dir("data/", 0o755).pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"data/sparse"),
            ("GNU.sparse.realsize", b"1099511627776"),
        ]);
        for (path, content) in [("data/sparse", &*sparse), ("data/file", &[b'x'; FILE])] {
            archive = archive.item(&Item {
                path: path.as_bytes(),
                content,
                ..ITEM
            });
        }
        let mut volumes = vec!["/data".to_owned()];
        for number in 0..100 {
            archive = archive
                .hard_link(&format!("data/link-{number}"), "data/file")
                .symlink(&format!("volume-{number}"), "data");
            volumes.push(format!("/volume-{number}"));
        }
        let container = container_of(node, "huge", archive, &volumes)?;
        let pod = node.pod("huge");
        let pod_id = node.runp(&pod)?;
        let containers = node.join("root/containers");
        let id = node.run(&pod_id, &pod, &container)?;
        let used = disk_bytes(&containers)?;
        ensure!(
            used < 4 * FILE as u64,
            "the container's files occupy {used} bytes, although its image contains little more than {FILE} bytes"
        );
        let status = node.exited(&id)?;
        ensure_eq!(status["exitCode"], json!(0), "exit code of the container");
        node.asks(&["rm", "--force", &id])?;

        let drop_ins = node.join("config.d");
        fs::create_dir_all(&drop_ins)?;
        fs::write(
            drop_ins.join("volumes.toml"),
            "[image]\nvolume_bytes = 1000000\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        let refused = node.try_create(&pod_id, &pod, &container)?;
        ensure!(
            refused.code != 0
                && refused
                    .stderr
                    .contains("1000000 bytes (image.volume_bytes)"),
            "the server did not refuse volumes above the limit: {}",
            refused.told()
        );
        wait_for(
            "the server to remove the files of the refused container",
            || Ok((fs::read_dir(&containers)?.count() == 0).then_some(())),
        )
    })
}

fn the_copy_of_a_volume_ends_when_its_pod_is_removed() -> Result {
    on_a_node(|node| {
        let mut archive = Archive::new().dir("data/", 0o755);
        for number in 0..20_000 {
            archive = archive.file(&format!("data/{number}"), "");
        }
        let container = container_of(node, "many", archive, &["/data".to_owned()])?;
        let pod = node.pod("many");
        let pod_id = node.runp(&pod)?;
        let creating = node.start_create(&pod_id, &pod, &container)?;
        let containers = node.join("root/containers");
        wait_for("the server to begin the copy of the volume", || {
            let Some(directory) = fs::read_dir(&containers)?.next() else {
                return Ok(None);
            };
            let copied = fs::read_dir(directory?.path().join("volumes/0"));
            Ok(copied
                .is_ok_and(|mut copied| copied.next().is_some())
                .then_some(()))
        })?;
        node.asks(&["rmp", "--force", &pod_id])?;
        let created = creating.end()?;
        ensure!(
            created.code != 0
                && created.stderr.contains("create the volume")
                && created.stderr.contains("is not ready"),
            "the copy did not end with the pod: {}",
            created.told()
        );
        node.has_no_writable_layer()
    })
}

fn immutable_files_are_removed_with_their_container() -> Result {
    on_a_node(|node| {
        let image = push_with(node, "immutable", "Volumes", json!({ "/data": {} }))?;
        node.pull(&image)?;
        let pod = node.pod("immutable");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("immutable", &["sleep", "600"]);
        container["image"]["image"] = json!(image);
        container["linux"]["security_context"]["capabilities"] =
            json!({ "add_capabilities": ["LINUX_IMMUTABLE"] });
        let id = node.run(&pod_id, &pod, &container)?;
        for directory in ["/data", "/upper"] {
            let script = format!(
                "mkdir -p {directory}/a/b && cd {directory} && echo x > a/b/file && echo x > log
                 chattr +i a/b/file && chattr +a a/b log && chattr +i a && ! rm -rf a"
            );
            inside(node, &id, &script)?;
        }
        node.asks(&["rm", "--force", &id])?;
        node.has_no_writable_layer()
    })
}

fn the_disk_usage_of_a_container_contains_deep_files_and_volumes() -> Result {
    on_a_node(|node| {
        const WRITTEN: u64 = 30_000_000;
        let image = push_with(node, "usage", "Volumes", json!({ "/data": {} }))?;
        node.pull(&image)?;
        let pod = node.pod("usage");
        let pod_id = node.runp(&pod)?;
        // The path of the hidden file has more than 5,000 bytes. No path can have more than 4,096.
        let deep = format!(
            "for i in $(seq 25); do mkdir {0} && cd -P {0} || exit 1; done; \
             head -c {WRITTEN} /dev/zero >hidden; exec sleep 600",
            "n".repeat(200)
        );
        let volume = format!("head -c {WRITTEN} /dev/zero >/data/file; exec sleep 600");
        for (name, script) in [("deep", deep), ("volume", volume)] {
            let mut container = node.container(name, &["sh", "-c", &script]);
            container["image"]["image"] = json!(image);
            let id = node.run(&pod_id, &pod, &container)?;
            wait_for(
                &format!("the statistics of the container {name} to contain its file"),
                || {
                    let stats = node.json(&["stats", "--all", "--id", &id])?["stats"][0].clone();
                    let used = stats.pointer("/writableLayer/usedBytes/value");
                    let used = used.and_then(Value::as_str).unwrap_or_default();
                    let used: u64 = used.parse().unwrap_or_default();
                    Ok((used >= WRITTEN).then_some(()))
                },
            )?;
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
