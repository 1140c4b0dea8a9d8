//! Directories that a layer uses without listing them. In each image they have the owner and mode
//! that the layers below give them, whatever other images share the layer.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;
use rrun_images::ImageSettings;
use rrun_store::{Change, Store, Table};
use serde_json::json;

use crate::build::{Archive, Compression, Failure, ITEM, Image, Item, digest, image};
use crate::node::{Node, open};
use crate::server::{Answer, Server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_directory_looks_as_the_layers_below_say_in_each_image",
            each_image,
        ),
        trial("images_that_share_a_layer_come_at_once", at_once),
        trial(
            "a_layer_of_an_aborted_pull_is_used_by_another_image",
            aborted,
        ),
        trial("a_removed_directory_gives_no_looks", removed),
        trial("looks_have_depth_attributes_and_times", attributes),
        trial(
            "a_layer_of_looks_is_counted_and_goes_with_its_image",
            counted,
        ),
        trial(
            "a_layer_that_an_older_version_unpacked_is_not_shared_on",
            older,
        ),
        trial("an_image_of_many_layers_has_its_looks", many),
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

/// The output of `stat` for files of an image, as a container sees them.
async fn stat(node: &Node, image: &str, format: &str, paths: &str) -> Result<String, Failure> {
    let id = node.images.find(image).ok_or("no such image")?.id.clone();
    let lowers = node.images.lease("test", &id).await?;
    let found = seen(&node.dir.0, &lowers, &format!("stat -c '{format}' {paths}"));
    node.images.release("test").await?;
    found
}

fn seen(dir: &Path, lowers: &[impl AsRef<Path>], script: &str) -> Result<String, Failure> {
    // An overlay that is read-only needs at least two layers.
    let (nothing, merged) = (dir.join("nothing"), dir.join("merged"));
    std::fs::create_dir_all(&nothing)?;
    std::fs::create_dir_all(&merged)?;
    let mut lowers: Vec<String> = lowers
        .iter()
        .map(|lower| lower.as_ref().display().to_string())
        .collect();
    lowers.push(nothing.display().to_string());
    let out = Command::new("unshare")
        .args(["--mount", "sh", "-ec"])
        .arg(format!(
            "mount -t overlay -o ro,lowerdir={} none {m}; cd {m}; {script}",
            lowers.join(":"),
            m = merged.display()
        ))
        .output()?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into());
    }
    Ok(String::from_utf8(out.stdout)?.replace('\n', " "))
}

const LOOKS: &str = "%n %a %u:%g %Y";

/// A layer that lists no directory.
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

/// No layer below lists the directories.
fn alone() -> Image {
    built(vec![Archive::new().file("bin/x", ""), shared()])
}

const OF_GOOD: &str = ". 755 0:0 etc 755 0:0 tmp 1777 0:0 ";
const OF_EVIL: &str = ". 777 9:9 etc 777 65534:65534 tmp 6777 1234:1234 ";
const OF_ALONE: &str = ". 755 0:0 etc 755 0:0 tmp 755 0:0 ";

async fn expected(node: &Node, server: &Server) -> Result<(), Failure> {
    for (name, looks) in [("good", OF_GOOD), ("evil", OF_EVIL), ("alone", OF_ALONE)] {
        let image = format!("{}/{name}:1", server.host());
        let found = stat(node, &image, "%n %a %u:%g", ". etc tmp").await?;
        assert_eq!(found, looks, "{name}");
        let files = stat(node, &image, "%n", "etc/app.conf tmp/seed").await?;
        assert_eq!(files, "etc/app.conf tmp/seed ", "{name}");
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
        assert_eq!(server.count(&layer), 1, "the layer is fetched once");
        let node = node.restart()?;
        expected(&node, &server).await?;
        for name in order {
            // Another pull changes nothing.
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

/// The pull of the first image fails at another layer, after the shared one has arrived.
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

/// Each case has a name, layers, lowest first, and the expected mode and owner of two directories.
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
        ("as it is", vec![below(), use_it()], kept),
        (
            "through a layer between that does not list it either",
            vec![below(), Archive::new().file("a/b/more", ""), use_it()],
            kept,
        ),
        (
            "the uppermost that lists it",
            vec![
                below(),
                Archive::new().item(&dir("a/", 0o750, 7)),
                Archive::new().file("a/x", ""),
                use_it(),
            ],
            "a 750 7:7 a/b 711 6:6 ",
        ),
        (
            "removed between",
            vec![below(), Archive::new().file(".wh.a", ""), use_it()],
            fresh,
        ),
        (
            "the inner one removed between",
            vec![below(), Archive::new().file("a/.wh.b", ""), use_it()],
            "a 700 5:5 a/b 755 0:0 ",
        ),
        (
            "emptied between",
            vec![below(), Archive::new().file("a/.wh..wh..opq", ""), use_it()],
            "a 700 5:5 a/b 755 0:0 ",
        ),
        (
            "emptied in the same layer",
            vec![below(), use_it().file("a/.wh..wh..opq", "")],
            "a 700 5:5 a/b 755 0:0 ",
        ),
        (
            "removed in the same layer, before its use",
            vec![
                below(),
                Archive::new().file(".wh.a", "").file("a/b/new", ""),
            ],
            fresh,
        ),
        (
            "removed in the same layer, after its use",
            vec![below(), use_it().file(".wh.a", "")],
            fresh,
        ),
        (
            "everything emptied between",
            vec![below(), Archive::new().file(".wh..wh..opq", ""), use_it()],
            fresh,
        ),
        (
            "a link between",
            vec![
                below(),
                Archive::new().file(".wh.a", "").symlink("a", "c"),
                use_it(),
            ],
            fresh,
        ),
        (
            "a link at the bottom, to a directory of the name",
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
            "a file at the bottom",
            vec![Archive::new().file("a", ""), use_it()],
            fresh,
        ),
        (
            "listed after its use",
            vec![below(), use_it().item(&dir("a/b/", 0o500, 8))],
            "a 700 5:5 a/b 500 8:8 ",
        ),
        (
            "made in a directory that passes its group on",
            vec![
                Archive::new()
                    .item(&dir("a/", 0o2777, 9))
                    .file("a/b/new", ""),
            ],
            "a 2777 9:9 a/b 755 0:0 ",
        ),
        (
            "used by a hard link",
            vec![
                below(),
                Archive::new()
                    .file("file", "")
                    .hard_link("a/b/link", "file"),
            ],
            kept,
        ),
        (
            "the same layer twice",
            vec![use_it(), below(), use_it()],
            kept,
        ),
    ];
    let node = Node::new()?;
    for (what, layers, looks) in cases {
        let built = built(layers);
        let server = Server::start(&[("app", &built)], |_| None)?;
        let name = format!("{}/app:1", server.host());
        node.images.pull(&name, None).await?;
        let found = stat(&node, &name, "%n %a %u:%g", "a a/b").await?;
        assert_eq!(found, looks, "{what}");
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
    let found = stat(&node, &name, LOOKS, "a a/b a/b/c").await?;
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
    let before = node.images.fs_usage();
    let image = node.images.pull(&name("good"), None).await?;
    // The lower layer and the layer of looks are new; the shared layer was there before.
    assert_eq!(node.leavings()?.len(), 4);
    assert_eq!(image.layers.len(), 2);
    let after = node.images.fs_usage();
    assert_eq!(after.inodes - before.inodes, 3 + 3);
    assert!(node.images.bytes_of(&image) >= 2 * 3 * 4096);
    // A container keeps the layers over the image's removal and a restart.
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

/// A store as commit 27ab645 wrote it: layers under their diff IDs, with the looks of one image.
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
    // Another pull makes the old image again, and its containers keep the old layers.
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
    let node = Node::new()?;
    node.images.pull(&name, None).await?;
    let lowers = node.images.lease("c", &built.id).await?;
    assert_eq!(lowers.len(), 202);
    // All paths do not fit into the one page of options of mount(2); those that matter do.
    let found = seen(
        &node.dir.0,
        &[&lowers[0], &lowers[1], &lowers[201]],
        "stat -c '%n %a %u:%g' a a/199",
    )?;
    assert_eq!(found, "a 1777 5:5 a/199 755 0:0 ");
    Ok(())
}
