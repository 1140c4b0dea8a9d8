//! Tests of directories that a layer uses without listing them. In each image, such a directory
//! must have the same owner and mode as in the image's lower layers. The owner and mode must also
//! be right if images with different lower layers share the layer.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;
use rrun_images::ImageSettings;
use rrun_store::{Change, Store, Table};
use serde_json::json;

use crate::build::{Archive, Compression, Failure, ITEM, Image, Item, digest, image};
use crate::node::{Node, in_overlay, open};
use crate::server::{Answer, Server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "an_unlisted_directory_has_the_metadata_from_the_lower_layers_of_each_image",
            each_image,
        ),
        trial("images_that_share_a_layer_are_pulled_in_parallel", at_once),
        trial(
            "a_layer_of_an_aborted_pull_is_used_by_another_image",
            aborted,
        ),
        trial(
            "a_directory_that_a_layer_hides_does_not_determine_metadata",
            removed,
        ),
        trial(
            "nested_directories_have_the_metadata_from_the_layers_below",
            attributes,
        ),
        trial(
            "a_directory_layer_counts_as_disk_usage_and_is_removed_with_its_image",
            counted,
        ),
        trial(
            "a_layer_that_an_older_version_unpacked_is_not_shared_with_other_images",
            older,
        ),
        trial(
            "an_image_of_two_hundred_layers_gets_a_directory_layer",
            many,
        ),
    ]
}

fn dir<'a>(path: &'a str, mode: u32, owner: u64) -> Item<'a> {
    Item {
        path: path.as_bytes(),
        kind: b'5',
        mode,
        uid: owner,
        gid: owner,
        mtime: 77,
        ..ITEM
    }
}

fn built(layers: Vec<Archive>) -> Image {
    let layers: Vec<_> = layers
        .into_iter()
        .map(|archive| (archive.end(), Compression::Gzip))
        .collect();
    image(&layers, json!({}))
}

/// Returns the output of `stat` for files of an image, as a container sees them.
async fn stat(node: &Node, image: &str, format: &str, paths: &str) -> Result<String, Failure> {
    let id = node
        .images
        .find(image)
        .ok_or("the image is not on the node")?
        .id
        .clone();
    let lowers = node.images.lease("test", &id).await?;
    let found = seen(&node.dir.0, &lowers, &format!("stat -c '{format}' {paths}"));
    node.images.release("test").await?;
    found
}

fn seen(dir: &Path, lowers: &[impl AsRef<Path>], script: &str) -> Result<String, Failure> {
    // A read-only overlay needs at least two lower directories, so the empty directory `nothing` is
    // added.
    let nothing = dir.join("nothing");
    std::fs::create_dir_all(&nothing)?;
    let lowers = lowers.iter().map(AsRef::as_ref);
    let lowers: Vec<&Path> = lowers.chain([nothing.as_path()]).collect();
    Ok(in_overlay(dir, &lowers, script)?.replace('\n', " "))
}

const METADATA: &str = "%n %a %u:%g %Y";

/// Returns a layer that uses the directories `etc` and `tmp` without listing them.
fn shared() -> Archive {
    Archive::new()
        .file("etc/app.conf", "x")
        .file("tmp/seed", "x")
}

fn good() -> Image {
    let below = Archive::new()
        .item(&dir("etc/", 0o755, 0))
        .item(&dir("tmp/", 0o1777, 0));
    built(vec![below, shared()])
}

fn evil() -> Image {
    let below = Archive::new()
        .item(&dir("./", 0o777, 9))
        .item(&dir("etc/", 0o777, 65534))
        .item(&dir("tmp/", 0o6777, 1234));
    built(vec![below, shared()])
}

/// Returns an image in which no layer lists the directories `etc` and `tmp`.
fn alone() -> Image {
    built(vec![Archive::new().file("bin/x", ""), shared()])
}

const OF_GOOD: &str = ". 755 0:0 etc 755 0:0 tmp 1777 0:0 ";
const OF_EVIL: &str = ". 777 9:9 etc 777 65534:65534 tmp 6777 1234:1234 ";
const OF_ALONE: &str = ". 755 0:0 etc 755 0:0 tmp 755 0:0 ";

async fn expected(node: &Node, server: &Server) -> Result<(), Failure> {
    for (name, metadata) in [("good", OF_GOOD), ("evil", OF_EVIL), ("alone", OF_ALONE)] {
        let image = format!("{}/{name}:1", server.host());
        let found = stat(node, &image, "%n %a %u:%g", ". etc tmp").await?;
        assert_eq!(found, metadata, "metadata in the image {name}");
        let files = stat(node, &image, "%n", "etc/app.conf tmp/seed").await?;
        assert_eq!(files, "etc/app.conf tmp/seed ", "files in the image {name}");
    }
    Ok(())
}

async fn each_image() -> Result<(), Failure> {
    let (good, evil, alone) = (good(), evil(), alone());
    let layer = good.layers[1].clone();
    assert_eq!(layer, evil.layers[1]);
    let images = [("good", &good), ("evil", &evil), ("alone", &alone)];
    for order in [
        ["evil", "good", "alone"],
        ["good", "alone", "evil"],
        ["alone", "evil", "good"],
    ] {
        let server = Server::start(&images, |_| None)?;
        let node = Node::new()?;
        for name in order {
            let name = format!("{}/{name}:1", server.host());
            node.images.pull(&name, None).await?;
        }
        expected(&node, &server).await?;
        assert_eq!(
            server.count(&layer),
            1,
            "the shared layer was not fetched exactly once"
        );
        let node = node.restart()?;
        expected(&node, &server).await?;
        for name in order {
            // Pulling an image again changes nothing.
            let name = format!("{}/{name}:1", server.host());
            node.images.pull(&name, None).await?;
        }
        expected(&node, &server).await?;
        for name in order {
            let name = format!("{}/{name}:1", server.host());
            node.images.remove(&name).await?;
        }
        node.becomes_clean().await?;
    }
    Ok(())
}

async fn at_once() -> Result<(), Failure> {
    let (good, evil, alone) = (good(), evil(), alone());
    let images = [("good", &good), ("evil", &evil), ("alone", &alone)];
    for _ in 0..10 {
        let server = Server::start(&images, |_| None)?;
        let node = Node::new()?;
        let pull = |name: &str| {
            let (images, name) = (node.images.clone(), format!("{}/{name}:1", server.host()));
            async move { images.pull(&name, None).await }
        };
        let (a, b, c) = tokio::join!(pull("evil"), pull("good"), pull("alone"));
        a?;
        b?;
        c?;
        expected(&node, &server).await?;
    }
    Ok(())
}

/// In this test, the pull of the image `evil` fails at its lower layer after the shared layer has
/// arrived. The concurrent pull of the image `good`, which also uses the shared layer, succeeds.
async fn aborted() -> Result<(), Failure> {
    let (good, evil, alone) = (good(), evil(), alone());
    let images = [("good", &good), ("evil", &evil), ("alone", &alone)];
    let (of_evil, layer) = (evil.layers[0].clone(), evil.layers[1].clone());
    let served = AtomicBool::new(false);
    let server = Server::start(&images, move |request| {
        if request.path.ends_with(&layer) {
            served.store(true, Ordering::Relaxed);
        }
        if !request.path.ends_with(&of_evil) {
            return None;
        }
        while !served.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(300));
        Some(Answer::new(404, ""))
    })?;
    let node = Node::new()?;
    let name = |name: &str| format!("{}/{name}:1", server.host());
    let (of_evil, of_good) = (name("evil"), name("good"));
    let both = tokio::join!(
        node.images.pull(&of_evil, None),
        node.images.pull(&of_good, None)
    );
    assert!(both.0.is_err());
    both.1?;
    let found = stat(&node, &name("good"), "%n %a %u:%g", ". etc tmp").await?;
    assert_eq!(found, OF_GOOD);
    Ok(())
}

/// Tests the directories `a` and `a/b` in several images. The images' layers list, remove or
/// replace these directories, or only use them. Each case has a description, the image's layers
/// (lowest first), and the expected mode and owner of the two directories.
async fn removed() -> Result<(), Failure> {
    let below = || {
        Archive::new()
            .item(&dir("a/", 0o700, 5))
            .item(&dir("a/b/", 0o711, 6))
            .file("a/b/old", "")
    };
    let use_it = || Archive::new().file("a/b/new", "");
    let fresh = "a 755 0:0 a/b 755 0:0 ";
    let kept = "a 700 5:5 a/b 711 6:6 ";
    let cases: Vec<(&str, Vec<Archive>, &str)> = vec![
        (
            "the lower layer lists the directories",
            vec![below(), use_it()],
            kept,
        ),
        (
            "neither the middle layer nor the uppermost layer lists the directories",
            vec![below(), Archive::new().file("a/b/more", ""), use_it()],
            kept,
        ),
        (
            "the uppermost layer that lists a directory determines its metadata",
            vec![
                below(),
                Archive::new().item(&dir("a/", 0o750, 7)),
                Archive::new().file("a/x", ""),
                use_it(),
            ],
            "a 750 7:7 a/b 711 6:6 ",
        ),
        (
            "a middle layer removes the outer directory",
            vec![below(), Archive::new().file(".wh.a", ""), use_it()],
            fresh,
        ),
        (
            "a middle layer removes the inner directory",
            vec![below(), Archive::new().file("a/.wh.b", ""), use_it()],
            "a 700 5:5 a/b 755 0:0 ",
        ),
        (
            "a middle layer makes the outer directory opaque",
            vec![below(), Archive::new().file("a/.wh..wh..opq", ""), use_it()],
            "a 700 5:5 a/b 755 0:0 ",
        ),
        (
            "the layer that uses the directories makes the outer directory opaque",
            vec![below(), use_it().file("a/.wh..wh..opq", "")],
            "a 700 5:5 a/b 755 0:0 ",
        ),
        (
            "a layer removes the outer directory and then uses the outer directory",
            vec![
                below(),
                Archive::new().file(".wh.a", "").file("a/b/new", ""),
            ],
            fresh,
        ),
        (
            "a layer uses the outer directory and then removes the outer directory",
            vec![below(), use_it().file(".wh.a", "")],
            fresh,
        ),
        (
            "a middle layer makes the root opaque",
            vec![below(), Archive::new().file(".wh..wh..opq", ""), use_it()],
            fresh,
        ),
        (
            "a middle layer replaces the outer directory with a symbolic link",
            vec![
                below(),
                Archive::new().file(".wh.a", "").symlink("a", "c"),
                use_it(),
            ],
            fresh,
        ),
        (
            "in the lowest layer, the outer directory is a symbolic link to a directory with the same contents",
            vec![
                Archive::new()
                    .item(&dir("c/", 0o700, 5))
                    .item(&dir("c/b/", 0o700, 5))
                    .symlink("a", "c"),
                use_it(),
            ],
            fresh,
        ),
        (
            "in the lowest layer, a file has the name of the outer directory",
            vec![Archive::new().file("a", ""), use_it()],
            fresh,
        ),
        (
            "a layer uses the inner directory and then lists the inner directory",
            vec![below(), use_it().item(&dir("a/b/", 0o500, 8))],
            "a 700 5:5 a/b 500 8:8 ",
        ),
        (
            "the parent directory has the set-group-ID bit",
            vec![
                Archive::new()
                    .item(&dir("a/", 0o2777, 9))
                    .file("a/b/new", ""),
            ],
            "a 2777 9:9 a/b 755 0:0 ",
        ),
        (
            "a layer uses the directories only for a hard link",
            vec![
                below(),
                Archive::new()
                    .file("file", "")
                    .hard_link("a/b/link", "file"),
            ],
            kept,
        ),
        (
            "the image contains the same layer twice",
            vec![use_it(), below(), use_it()],
            kept,
        ),
    ];
    let node = Node::new()?;
    for (what, layers, metadata) in cases {
        let built = built(layers);
        let server = Server::start(&[("app", &built)], |_| None)?;
        let name = format!("{}/app:1", server.host());
        node.images.pull(&name, None).await?;
        let found = stat(&node, &name, "%n %a %u:%g", "a a/b").await?;
        assert_eq!(found, metadata, "{what}");
    }
    Ok(())
}

async fn attributes() -> Result<(), Failure> {
    let below = Archive::new()
        .pax(&[
            ("SCHILY.xattr.user.mark", b"of below"),
            ("mtime", b"77.000000005"),
        ])
        .item(&dir("a/", 0o1711, 5))
        .item(&dir("a/b/", 0o755, 0))
        .item(&dir("a/b/c/", 0o2750, 6));
    let above = Archive::new().file("a/b/c/d/e/file", "");
    let built = built(vec![below, above]);
    let server = Server::start(&[("app", &built)], |_| None)?;
    let name = format!("{}/app:1", server.host());
    let node = Node::new()?;
    node.images.pull(&name, None).await?;
    let found = stat(&node, &name, METADATA, "a a/b a/b/c").await?;
    assert_eq!(found, "a 1711 5:5 77 a/b 755 0:0 77 a/b/c 2750 6:6 77 ");
    let found = stat(&node, &name, "%a %u:%g", "a/b/c/d a/b/c/d/e").await?;
    assert_eq!(found, "755 0:0 755 0:0 ");
    let found = stat(&node, &name, "%y", "a").await?;
    assert!(found.contains(".000000005"), "{found}");
    let lowers = node.images.lease("c", &built.id).await?;
    let mut value = [0; 16];
    let path = lowers[0].join("a");
    let length = rustix::fs::getxattr(&path, "user.mark", &mut value[..])?;
    assert_eq!(&value[..length], b"of below");
    Ok(())
}

async fn counted() -> Result<(), Failure> {
    let (good, alone) = (good(), alone());
    let server = Server::start(&[("good", &good), ("alone", &alone)], |_| None)?;
    let name = |name: &str| format!("{}/{name}:1", server.host());
    let node = Node::new()?;
    node.images.pull(&name("alone"), None).await?;
    assert_eq!(node.leavings()?.len(), 2);
    let before = node.images.fs_usage()?;
    let image = node.images.pull(&name("good"), None).await?;
    // The lower layer and the directory layer of the image `good` are new. The shared layer was
    // already unpacked for the image `alone`.
    assert_eq!(node.leavings()?.len(), 4);
    assert_eq!(image.layers.len(), 2);
    let after = node.images.fs_usage()?;
    assert_eq!(after.inodes - before.inodes, 3 + 3);
    assert!(node.images.bytes_of(&image) >= 2 * 3 * 4096);
    // A container's lease keeps the layers when the image is removed and the server restarts.
    let lowers = node.images.lease("c", &good.id).await?;
    assert_eq!(lowers.len(), 3);
    node.images.remove(&name("good")).await?;
    node.images.remove(&name("alone")).await?;
    let node = node.restart()?;
    assert!(lowers.iter().all(|lower| lower.is_dir()));
    assert_eq!(node.images.lease("c", &good.id).await?, lowers);
    node.images.release("c").await?;
    node.becomes_clean().await
}

/// Tests that the server can use a store in the format of an older version (commit `27ab645`). The
/// older version stored each layer under its diff ID. The owner and mode of the layer's directories
/// were correct for only one of the images.
async fn older() -> Result<(), Failure> {
    let evil = evil();
    let diff_ids: Vec<String> = [
        Archive::new()
            .item(&dir("./", 0o777, 9))
            .item(&dir("etc/", 0o777, 65534))
            .item(&dir("tmp/", 0o6777, 1234)),
        shared(),
    ]
    .into_iter()
    .map(|archive| digest(&archive.end()))
    .collect();
    let node = Node::new()?;
    let Node { images, dir } = node;
    drop(images);
    for number in [7, 8] {
        let fs = dir.0.join(format!("layers/{number}/fs"));
        std::fs::create_dir_all(fs.join("etc"))?;
        std::fs::write(fs.join("etc/app.conf"), "x")?;
        std::os::unix::fs::chown(fs.join("etc"), Some(65534), Some(65534))?;
    }
    let mut changes = Vec::new();
    for (number, diff_id) in (7..).zip(&diff_ids) {
        let layer = json!({"number": number, "bytes": 4096, "inodes": 3, "opaque_root": false});
        changes.push(Change::put(Table::LAYERS, diff_id, &layer)?);
    }
    let layers: Vec<_> = diff_ids
        .iter()
        .zip(&evil.layers)
        .map(|(diff_id, digest)| json!({"diff_id": diff_id, "digest": digest, "size": 1}))
        .collect();
    let record = json!({
        "id": evil.id, "repo_tags": ["r.example/evil:1"], "repo_digests": [], "size": 1,
        "config": {}, "layers": layers, "created": null, "pinned": false,
    });
    changes.push(Change::put(Table::IMAGES, &evil.id, &record)?);
    let lease = json!({"image": evil.id, "layers": diff_ids});
    changes.push(Change::put(Table::LEASES, "container", &lease)?);
    let mut tries = 0;
    let store = loop {
        match Store::open(&dir.0.join("meta.redb")) {
            Ok(store) => break store,
            Err(error) if tries == 200 => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
        tries += 1;
    };
    store.commit(changes).await?;
    drop(store);

    let images = open(&dir.0, ImageSettings::default())?;
    let node = Node { images, dir };
    let old = [
        node.root().join("layers/8/fs"),
        node.root().join("layers/7/fs"),
    ];
    assert_eq!(node.images.lease("container", &evil.id).await?, old);
    assert_eq!(node.images.lease("another", &evil.id).await?, old);
    let good = good();
    let server = Server::start(&[("good", &good), ("evil", &evil)], |_| None)?;
    let name = |name: &str| format!("{}/{name}:1", server.host());
    node.images.pull(&name("good"), None).await?;
    let found = stat(&node, &name("good"), "%n %a %u:%g", ". etc tmp").await?;
    assert_eq!(found, OF_GOOD);
    // Pulling the image `evil` again unpacks its layers again, while its containers keep the old
    // layers.
    node.images.pull(&name("evil"), None).await?;
    let found = stat(&node, &name("evil"), "%n %a %u:%g", ". etc tmp").await?;
    assert_eq!(found, OF_EVIL);
    assert_eq!(node.images.lease("container", &evil.id).await?, old);
    node.images.release("container").await?;
    node.images.release("another").await?;
    node.images.removed(Duration::from_secs(10)).await;
    assert!(!old.iter().any(|layer| layer.exists()));
    Ok(())
}

async fn many() -> Result<(), Failure> {
    let mut layers = vec![Archive::new().item(&dir("a/", 0o1777, 5))];
    layers.extend((0..200).map(|n| Archive::new().file(&format!("a/{n}/file"), "")));
    let built = built(layers);
    let server = Server::start(&[("app", &built)], |_| None)?;
    let name = format!("{}/app:1", server.host());
    let node = Node::with(ImageSettings {
        layers: 201,
        ..ImageSettings::default()
    })?;
    node.images.pull(&name, None).await?;
    let lowers = node.images.lease("c", &built.id).await?;
    assert_eq!(lowers.len(), 202);
    // mount(2) accepts only one page of options, and the paths of all layers do not fit into this
    // page. The test therefore mounts only the layers that it needs.
    let found = seen(
        &node.dir.0,
        &[&lowers[0], &lowers[1], &lowers[201]],
        "stat -c '%n %a %u:%g' a a/199",
    )?;
    assert_eq!(found, "a 1777 5:5 a/199 755 0:0 ");
    Ok(())
}
