//! Tests that list, inspect and remove images with crictl.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use rrun_proto::v1::{ImageFsInfoRequest, ImageSpec, RemoveImageRequest};
use serde_json::{Value, json};

use crate::support::calls::Calls;
use crate::support::images::build::{Archive, Compression, ITEM, Item, image};
use crate::support::images::pull;
use crate::support::images::server::Server;
use crate::support::machine::{Result, command, note, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(inspecti_shows_the_configuration_of_an_image, A_NODE),
    test!(
        the_status_of_a_container_shows_the_name_of_its_image,
        A_NODE
    ),
    test!(
        the_reported_size_of_an_image_is_its_size_on_the_disk,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        pinned_images_are_marked_and_survive_a_prune,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_container_sees_the_files_of_all_image_layers,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        image_fs_info_waits_until_removed_layers_are_deleted,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        an_image_can_be_removed_while_its_container_runs,
        A_NODE,
        Need::RrunCri
    ),
];

fn inspecti_shows_the_configuration_of_an_image() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        let image = node.json(&["inspecti", WEB])?;
        let spec = &image["info"]["imageSpec"];
        ensure_eq!(spec["config"]["Cmd"], json!(["web"]), "the image's command");
        ensure_eq!(
            spec["config"]["WorkingDir"],
            "/www",
            "the image's working directory"
        );
        let layers = spec["rootfs"]["diff_ids"].as_array().map_or(0, Vec::len);
        ensure_eq!(layers, 7, "number of layers of the image");
        if is_rrun() {
            node.kill_server()?;
            node.start_server()?;
            let again = node.json(&["inspecti", WEB])?;
            ensure_eq!(
                again["info"],
                image["info"],
                "information about the image after a restart of the server"
            );
        }
        let named = "gcr.io/k8s-staging-cri-tools/test-image-user-username:latest";
        node.pull(named)?;
        let image = node.json(&["inspecti", named])?["status"].clone();
        ensure_eq!(image["username"], "www-data", "the image's user name");
        ensure_eq!(image["uid"], Value::Null, "the image's user id");
        let numbered = "gcr.io/k8s-staging-cri-tools/test-image-user-uid-group:latest";
        node.pull(numbered)?;
        let image = node.json(&["inspecti", numbered])?["status"].clone();
        ensure_eq!(image["uid"]["value"], "1003", "the image's user id");
        Ok(())
    })
}

fn number(value: &Value) -> Result<u64> {
    let number = value.as_str().and_then(|text| text.parse().ok());
    number.ok_or_else(|| format!("this JSON value is not a number in a string: {value}").into())
}

fn the_status_of_a_container_shows_the_name_of_its_image() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let image = node.json(&["inspecti", BUSYBOX])?["status"]["id"].clone();
        let pod = node.pod("named");
        let pod_id = node.runp(&pod)?;
        // kubelet requests the image by its id, but shows users the name in the container's status.
        let mut config = node.container("main", &["sleep", "600"]);
        config["image"] = json!({ "image": image, "user_specified_image": BUSYBOX });
        let id = node.create(&pod_id, &pod, &config)?;
        ensure_eq!(
            node.status(&id)?["image"]["image"],
            BUSYBOX,
            "the image's name in the container's status"
        );
        if is_rrun() {
            node.kill_server()?;
            node.start_server()?;
            ensure_eq!(
                node.status(&id)?["image"]["image"],
                BUSYBOX,
                "the image's name in the container's status after the server was killed and restarted"
            );
            // The container's status keeps the image's name even after the name was removed.
            // (containerd shows the image's id instead.)
            node.asks(&["rmi", BUSYBOX])?;
            ensure_eq!(
                node.status(&id)?["image"]["image"],
                BUSYBOX,
                "the image's name in the container's status after the image's removal"
            );
        }
        Ok(())
    })
}

fn the_reported_size_of_an_image_is_its_size_on_the_disk() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        let usage = |node: &Node| -> Result<(u64, u64)> {
            let info = node.json(&["imagefsinfo"])?;
            let images = &info["status"]["imageFilesystems"][0];
            let bytes = number(&images["usedBytes"]["value"])?;
            Ok((bytes, number(&images["inodesUsed"]["value"])?))
        };
        let (used, inodes) = usage(node)?;
        let size = number(&node.json(&["inspecti", WEB])?["status"]["size"])?;
        let store = fs::metadata(node.join("root/meta.redb"))?.blocks() * 512;
        ensure!(
            size <= used && used <= size + store,
            "imagefsinfo reports {used} used bytes, but the only image has {size} bytes and the store {store} bytes"
        );
        let du = command("du", ["-s", "-B1"])
            .arg(node.join("root/layers"))
            .ok()?;
        let on_disk: u64 = du.stdout.split_whitespace().next().unwrap_or("0").parse()?;
        ensure!(
            size.abs_diff(on_disk) * 20 < on_disk,
            "the image's size is {size} bytes, but its layers occupy {on_disk} bytes on the disk"
        );
        // If several images share a layer, imagefsinfo counts this layer only once.
        node.pull(BUSYBOX)?;
        ensure_eq!(
            usage(node)?.1,
            inodes,
            "number of used inodes in imagefsinfo after the pull of another image with the same layers"
        );
        Ok(())
    })
}

/// Returns whether the list of images marks the image `name` as pinned.
fn is_pinned(node: &Node, name: &str) -> Result<bool> {
    let list = node.json(&["images"])?;
    let images = list["images"].as_array().cloned().unwrap_or_default();
    let image = images
        .iter()
        .find(|image| image["repoTags"][0] == name)
        .ok_or_else(|| format!("crictl images does not list the image {name}: {list}"))?;
    Ok(image["pinned"] == true)
}

fn pinned_images_are_marked_and_survive_a_prune() -> Result {
    on_a_node(|node| {
        let drop_ins = node.join("config.d");
        std::fs::create_dir_all(&drop_ins)?;
        std::fs::write(
            drop_ins.join("pins.toml"),
            "[image]\npinned = [\"127.0.0.1:5000/demo/w*:1\"]\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        node.pull(WEB)?;
        node.pull(BUSYBOX)?;
        ensure!(is_pinned(node, WEB)?, "{WEB} is not pinned");
        ensure!(!is_pinned(node, BUSYBOX)?, "{BUSYBOX} is pinned");
        node.asks(&["rmi", "--prune"])?;
        ensure_eq!(
            node.asks(&["images", "--quiet"])?.lines().count(),
            1,
            "number of images after crictl rmi --prune"
        );
        // A removal by name also removes a pinned image.
        node.asks(&["rmi", WEB])?;
        ensure_eq!(
            node.asks(&["images", "--quiet"])?,
            "",
            "ids of the images after the removal by name"
        );
        Ok(())
    })
}

/// Checks file capabilities, device nodes, sparse files, and files that an upper layer hides or
/// changes.
fn a_container_sees_the_files_of_all_image_layers() -> Result {
    on_a_node(|node| {
        // `capability` is the value of the extended attribute `security.capability`. The value has
        // version 2, sets the effective flag, and grants cap_net_bind_service (number 10).
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let program = std::fs::read("/proc/self/exe")?;
        let lower = Archive::new()
            .pax(&[("SCHILY.xattr.security.capability", &capability)])
            .item(&Item {
                path: b"bin/inside",
                mode: 0o755,
                content: &program,
                ..ITEM
            })
            .item(&Item {
                path: b"srv/null",
                kind: b'3',
                device: (1, 3),
                mode: 0o666,
                ..ITEM
            })
            .pax(&[
                ("GNU.sparse.realsize", b"1073741824"),
                ("GNU.sparse.map", b"0,3,1073741821,3"),
            ])
            .file("srv/holes", "onetwo")
            .file("srv/gone", "x")
            .file("srv/changed", "old");
        let upper = Archive::new()
            .file("srv/.wh.gone", "")
            .file("srv/changed", "new");
        let layers = [
            (lower.end(), Compression::None),
            (upper.end(), Compression::Zstd),
        ];
        let built = image(&layers, json!({ "User": "1000:1000" }));
        let server =
            Server::start(&[("held", &built)], |_| None).map_err(|error| error.to_string())?;
        let name = format!("{}/held:1", server.host());
        let calls = Calls::new(node)?;
        pull(&calls, &name, None)??;
        let pod = node.pod("layers");
        let pod_id = node.runp(&pod)?;
        let mut config = node.container("report", &["/bin/inside", "report"]);
        config["image"]["image"] = json!(name);
        let report = node.report(&pod_id, &pod, &config)?;
        ensure_eq!(report["uid"], json!(1000), "user id of the container");
        ensure_eq!(
            report["status"]["CapEff"],
            "0000000000000400",
            "effective capabilities, which the program's file grants to its process"
        );
        let mut config = node.container("waits", &["/bin/inside", "spin", "1000"]);
        config["image"]["image"] = json!(name);
        let id = node.run(&pod_id, &pod, &config)?;
        let inside = |args: &[&str]| {
            let all = [&["exec", "-s", &id, "/bin/inside"], args].concat();
            node.crictl(&all).end()
        };
        let root = std::path::PathBuf::from(format!("/proc/{}/root", node.pid(&id)?));
        let holes = std::fs::metadata(root.join("srv/holes"))?;
        ensure_eq!(holes.len(), 1 << 30, "the length of a sparse file");
        ensure!(
            holes.blocks() * 512 < 1 << 20,
            "the sparse file occupies {} blocks on the disk",
            holes.blocks()
        );
        ensure_eq!(
            inside(&["cat", "/srv/changed"])?.text(),
            "new",
            "content of the file that an upper layer replaces"
        );
        ensure!(
            inside(&["cat", "/srv/gone"])?.code != 0,
            "a file that the upper layer hides is readable"
        );
        // The file has the device number of /dev/null. Every container is allowed to use this
        // device.
        ensure_eq!(
            inside(&["cat", "/srv/null"])?.code,
            0,
            "exit code of a read from the device"
        );
        ensure_eq!(
            inside(&["write", "/srv/null", "x"])?.code,
            0,
            "exit code of a write to the device"
        );
        Ok(())
    })
}

/// When the disk is full, kubelet removes images, calls ImageFsInfo, and then measures the disk
/// itself. If the removed layers are still on the disk during this measurement, kubelet evicts
/// pods.
fn image_fs_info_waits_until_removed_layers_are_deleted() -> Result {
    /// The longest time that ImageFsInfo waits for the deletion of layers (services/image.rs).
    const IMAGE_FS_INFO_TIMEOUT: Duration = Duration::from_secs(5);
    const FILES: usize = 30_000;
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        for _ in 0..5 {
            node.pull(BUSYBOX)?;
            let mut layers = Vec::new();
            for layer in std::fs::read_dir(node.join("root/layers"))? {
                let layer = layer?.path();
                if std::fs::read_dir(layer.join("fs")).is_ok_and(|mut all| all.next().is_some()) {
                    layers.push(layer);
                }
            }
            // The deletion of a layer with many files takes a long time, so ImageFsInfo must wait
            // for the deletion.
            let layer = layers.first().ok_or("no layer of the image has files")?;
            let many = layer.join("fs/many");
            std::fs::create_dir(&many)?;
            for number in 0..FILES {
                std::fs::write(many.join(number.to_string()), "")?;
            }
            let mut client = calls.image();
            let removal = RemoveImageRequest {
                image: Some(ImageSpec {
                    image: BUSYBOX.to_owned(),
                    ..ImageSpec::default()
                }),
            };
            let waited = calls.wait(async move {
                client.remove_image(removal).await?;
                let started = Instant::now();
                client.image_fs_info(ImageFsInfoRequest {}).await?;
                Ok::<_, tonic::Status>(started.elapsed())
            })?;
            let left = layers.iter().any(|layer| layer.exists());
            // On a busy machine, ImageFsInfo can time out before the layers are deleted. In that
            // case, the test tries again.
            if waited? < IMAGE_FS_INFO_TIMEOUT {
                ensure!(
                    !left,
                    "the server did not delete all layers of the removed image before it answered ImageFsInfo; paths of the layers: {layers:?}"
                );
                return Ok(());
            }
            wait_for("the server to delete the layers", || {
                Ok((!layers.iter().any(|layer| layer.exists())).then_some(()))
            })?;
        }
        note(
            "ImageFsInfo timed out in all five attempts, so the test could not check that ImageFsInfo waits"
                .to_owned(),
        );
        Ok(())
    })
}

fn an_image_can_be_removed_while_its_container_runs() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("user");
        let pod_id = node.runp(&pod)?;
        let container = node.container("user", &["sleep", "1000"]);
        let id = node.run(&pod_id, &pod, &container)?;
        node.asks(&["rmi", BUSYBOX])?;
        ensure_eq!(
            node.asks(&["images", "--quiet"])?,
            "",
            "ids of the images after the removal"
        );
        node.kill_server()?;
        node.start_server()?;
        let read = node.asks(&["exec", "--sync", &id, "cat", "/etc/passwd"])?;
        ensure!(
            read.contains("root"),
            "the container can no longer read its /etc/passwd: {read}"
        );
        node.asks(&["rmp", "--force", &pod_id])?;
        wait_for(
            "the server to delete all layers except the empty layer",
            || {
                let left = std::fs::read_dir(node.join("root/layers"))?.count();
                Ok((left == 1).then_some(()))
            },
        )
    })
}
