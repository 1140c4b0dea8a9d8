//! Images as crictl shows and removes them.

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
    test!(an_image_is_inspected_with_its_configuration, A_NODE),
    test!(a_container_tells_its_images_name, A_NODE),
    test!(
        an_images_size_is_what_it_takes_on_the_disk,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        pinned_images_say_so_and_outlive_a_prune,
        A_NODE,
        Need::RrunCri
    ),
    test!(what_layers_hold_is_seen_from_inside, A_NODE, Need::RrunCri),
    test!(
        the_disk_is_told_of_when_removed_images_are_gone_from_it,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        an_image_in_use_can_be_removed_under_its_container,
        A_NODE,
        Need::RrunCri
    ),
];

fn an_image_is_inspected_with_its_configuration() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        let image = node.json(&["inspecti", WEB])?;
        let spec = &image["info"]["imageSpec"];
        ensure_eq!(spec["config"]["Cmd"], json!(["web"]), "the command");
        ensure_eq!(spec["config"]["WorkingDir"], "/www", "the directory");
        let layers = spec["rootfs"]["diff_ids"].as_array().map_or(0, Vec::len);
        ensure_eq!(layers, 7, "layers");
        if is_rrun() {
            node.kill_server()?;
            node.start_server()?;
            let again = node.json(&["inspecti", WEB])?;
            ensure_eq!(again["info"], image["info"], "after a restart");
        }
        let named = "gcr.io/k8s-staging-cri-tools/test-image-user-username:latest";
        node.pull(named)?;
        let image = node.json(&["inspecti", named])?["status"].clone();
        ensure_eq!(image["username"], "www-data", "the user");
        ensure_eq!(image["uid"], Value::Null, "the user's number");
        let numbered = "gcr.io/k8s-staging-cri-tools/test-image-user-uid-group:latest";
        node.pull(numbered)?;
        let image = node.json(&["inspecti", numbered])?["status"].clone();
        ensure_eq!(image["uid"]["value"], "1003", "the user's number");
        Ok(())
    })
}

fn number(value: &Value) -> Result<u64> {
    let number = value.as_str().and_then(|text| text.parse().ok());
    number.ok_or_else(|| format!("{value} is no number").into())
}

fn a_container_tells_its_images_name() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let image = node.json(&["inspecti", BUSYBOX])?["status"]["id"].clone();
        let pod = node.pod("named");
        let pod_id = node.runp(&pod)?;
        // Kubelet asks by the id, and shows users what the container's status has.
        let mut asked = node.container("main", &["sleep", "600"]);
        asked["image"] = json!({ "image": image, "user_specified_image": BUSYBOX });
        let id = node.create(&pod_id, &pod, &asked)?;
        ensure_eq!(node.status(&id)?["image"]["image"], BUSYBOX, "image");
        if is_rrun() {
            node.kill_server()?;
            node.start_server()?;
            ensure_eq!(node.status(&id)?["image"]["image"], BUSYBOX, "after a kill");
            // The name stays when the image loses it: it is what runs. (containerd has the id.)
            node.asks(&["rmi", BUSYBOX])?;
            ensure_eq!(node.status(&id)?["image"]["image"], BUSYBOX, "without it");
        }
        Ok(())
    })
}

fn an_images_size_is_what_it_takes_on_the_disk() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        let used = node.json(&["imagefsinfo"])?;
        let used = number(&used["status"]["imageFilesystems"][0]["usedBytes"]["value"])?;
        let size = number(&node.json(&["inspecti", WEB])?["status"]["size"])?;
        ensure_eq!(size, used, "the size of the only image");
        let du = command("du", ["-s", "-B1"])
            .arg(node.join("root/layers"))
            .ok()?;
        let on_disk: u64 = du.stdout.split_whitespace().next().unwrap_or("0").parse()?;
        ensure!(
            size.abs_diff(on_disk) * 20 < on_disk,
            "the image has {size} bytes, on the disk are {on_disk}"
        );
        // What it shares with others counts once for the file system.
        node.pull(BUSYBOX)?;
        let both = node.json(&["imagefsinfo"])?;
        let both = number(&both["status"]["imageFilesystems"][0]["usedBytes"]["value"])?;
        ensure_eq!(both, used, "used bytes with an image of the same layers");
        Ok(())
    })
}

/// Whether the list of images says of this one that it is pinned.
fn is_pinned(node: &Node, name: &str) -> Result<bool> {
    let list = node.json(&["images"])?;
    let images = list["images"].as_array().cloned().unwrap_or_default();
    let image = images
        .iter()
        .find(|image| image["repoTags"][0] == name)
        .ok_or_else(|| format!("{name} is not in {list}"))?;
    Ok(image["pinned"] == true)
}

fn pinned_images_say_so_and_outlive_a_prune() -> Result {
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
            "images after the prune"
        );
        // Who names it means it.
        node.asks(&["rmi", WEB])?;
        ensure_eq!(node.asks(&["images", "--quiet"])?, "", "images at the end");
        Ok(())
    })
}

/// File capabilities, device nodes, holes, what an upper layer hides.
fn what_layers_hold_is_seen_from_inside() -> Result {
    on_a_node(|node| {
        // Version 2, effective: cap_net_bind_service, the tenth.
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
        ensure_eq!(report["uid"], json!(1000), "user");
        ensure_eq!(
            report["status"]["CapEff"],
            "0000000000000400",
            "what the file's capability gives"
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
            "a sparse file takes {} blocks",
            holes.blocks()
        );
        ensure_eq!(inside(&["cat", "/srv/changed"])?.text(), "new", "a file");
        ensure!(inside(&["cat", "/srv/gone"])?.code != 0, "a file is hidden");
        // The device is one that every container may use.
        ensure_eq!(inside(&["cat", "/srv/null"])?.code, 0, "a device");
        ensure_eq!(inside(&["write", "/srv/null", "x"])?.code, 0, "a device");
        Ok(())
    })
}

/// Kubelet removes images when the disk is full, asks for its state and then looks at the disk
/// itself: pods are evicted if what was removed is still there.
fn the_disk_is_told_of_when_removed_images_are_gone_from_it() -> Result {
    /// ImageFsInfo waits this long at most (services/image.rs).
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
            // What takes a while to remove.
            let layer = layers.first().ok_or("no layer has files")?;
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
            let asked = calls.wait(async move {
                client.remove_image(removal).await?;
                let asked = Instant::now();
                client.image_fs_info(ImageFsInfoRequest {}).await?;
                Ok::<_, tonic::Status>(asked.elapsed())
            })?;
            let left = layers.iter().any(|layer| layer.exists());
            // On a machine that is too busy for that, it is not waited for to the end.
            if asked? < IMAGE_FS_INFO_TIMEOUT {
                ensure!(!left, "removed layers are still there: {layers:?}");
                return Ok(());
            }
            wait_for("the layers to go", || {
                Ok((!layers.iter().any(|layer| layer.exists())).then_some(()))
            })?;
        }
        note("the removal took longer than ImageFsInfo waits, five times".to_owned());
        Ok(())
    })
}

fn an_image_in_use_can_be_removed_under_its_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("user");
        let pod_id = node.runp(&pod)?;
        let container = node.container("user", &["sleep", "1000"]);
        let id = node.run(&pod_id, &pod, &container)?;
        node.asks(&["rmi", BUSYBOX])?;
        ensure_eq!(node.asks(&["images", "--quiet"])?, "", "images");
        node.kill_server()?;
        node.start_server()?;
        let read = node.asks(&["exec", "--sync", &id, "cat", "/etc/passwd"])?;
        ensure!(
            read.contains("root"),
            "the container lost its files: {read}"
        );
        node.asks(&["rmp", "--force", &pod_id])?;
        wait_for("no layer to be left but the empty one", || {
            let left = std::fs::read_dir(node.join("root/layers"))?.count();
            Ok((left == 1).then_some(()))
        })
    })
}
