//! Tests of the attributes and types of the files in a layer.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use libtest_mimic::Trial;
use serde_json::json;

use super::unpacked;
use crate::build::{Archive, Compression, Failure, ITEM, Item, image};
use crate::node::Node;
use crate::server::Server;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "the_owner_the_mode_the_time_and_the_attributes_of_files_are_kept",
            attributes,
        ),
        trial("devices_and_fifos_are_created", devices),
        trial(
            "an_unlisted_directory_has_the_metadata_of_the_layer_below",
            implied,
        ),
    ]
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let size = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).ok()?;
    value.truncate(size);
    Some(value)
}

async fn attributes() -> Result<(), Failure> {
    // The value of a security.capability attribute of version 2. The effective flag is set, and the
    // permitted set contains cap_net_bind_service.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let (_dir, fs) = unpacked(
        Archive::new()
            .item(&Item {
                path: b"./",
                kind: b'5',
                mode: 0o750,
                uid: 5,
                gid: 6,
                ..ITEM
            })
            .item(&Item {
                path: b"d/",
                kind: b'5',
                mode: 0o2775,
                mtime: 1_234_567,
                ..ITEM
            })
            .pax(&[
                ("SCHILY.xattr.security.capability", &capability),
                ("SCHILY.xattr.user.note", b"a=b\n\0c"),
                ("mtime", b"1000000000.25"),
            ])
            .item(&Item {
                path: b"d/ping",
                mode: 0o4755,
                uid: 70_000,
                gid: 80_000,
                content: b"elf",
                ..ITEM
            })
            .pax(&[
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ])
            .dir("e/", 0o755)
            .item(&Item {
                path: b"link",
                kind: b'2',
                link: b"nowhere",
                uid: 9,
                mtime: 42,
                ..ITEM
            })
            .file("d/last", ""),
    )?;
    let root = std::fs::metadata(&fs)?;
    assert_eq!(
        (root.mode() & 0o7777, root.uid(), root.gid()),
        (0o750, 5, 6)
    );
    let ping = std::fs::metadata(fs.join("d/ping"))?;
    assert_eq!(ping.mode() & 0o7777, 0o4755);
    assert_eq!((ping.uid(), ping.gid()), (70_000, 80_000));
    assert_eq!(
        (ping.mtime(), ping.mtime_nsec()),
        (1_000_000_000, 250_000_000)
    );
    assert_eq!(
        xattr(&fs.join("d/ping"), "security.capability").as_deref(),
        Some(capability.as_slice())
    );
    assert_eq!(
        xattr(&fs.join("d/ping"), "user.note").as_deref(),
        Some(b"a=b\n\0c".as_slice())
    );
    for name in ["redirect", "opaque"] {
        assert_eq!(
            xattr(&fs.join("e"), &format!("trusted.overlay.{name}")),
            None
        );
    }
    assert_eq!(xattr(&fs.join("e"), "user.overlay.opaque"), None);
    let link = fs.join("link").symlink_metadata()?;
    assert_eq!((link.uid(), link.mtime()), (9, 42));
    // The creation of files in the directory must not change the directory's time.
    let directory = std::fs::metadata(fs.join("d"))?;
    assert_eq!(
        (directory.mtime(), directory.mode() & 0o7777),
        (1_234_567, 0o2775)
    );
    Ok(())
}

async fn devices() -> Result<(), Failure> {
    let device = |path: &'static [u8], kind, device| Item {
        path,
        kind,
        device,
        mode: 0o666,
        ..ITEM
    };
    let (_dir, fs) = unpacked(
        Archive::new()
            .item(&device(b"dev/null", b'3', (1, 3)))
            .item(&device(b"dev/loop0", b'4', (7, 0)))
            .item(&device(b"pipe", b'6', (0, 0))),
    )?;
    let null = std::fs::metadata(fs.join("dev/null"))?;
    assert!(null.file_type().is_char_device());
    assert_eq!(
        (null.rdev(), null.mode() & 0o777),
        (rustix::fs::makedev(1, 3), 0o666)
    );
    assert!(
        std::fs::metadata(fs.join("dev/loop0"))?
            .file_type()
            .is_block_device()
    );
    assert!(std::fs::metadata(fs.join("pipe"))?.file_type().is_fifo());
    Ok(())
}

async fn implied() -> Result<(), Failure> {
    let gzip = |archive: Archive| (archive.end(), Compression::Gzip);
    let base = Archive::new().item(&Item {
        path: b"tmp/",
        kind: b'5',
        mode: 0o1777,
        uid: 3,
        gid: 4,
        mtime: 77,
        ..ITEM
    });
    let above = Archive::new().file("tmp/file", "");
    let built = image(&[gzip(base), gzip(above)], json!({}));
    let server = Server::start(&[("app", &built)], |_| None)?;
    let node = Node::new()?;
    let image = node
        .images
        .pull(&format!("{}/app:1", server.host()), None)
        .await?;
    let lowers = node.images.lease("c", &image.id).await?;
    let tmp = std::fs::metadata(lowers[0].join("tmp"))?;
    assert_eq!((tmp.mode() & 0o7777, tmp.uid(), tmp.gid()), (0o1777, 3, 4));
    assert_eq!(tmp.mtime(), 77);
    Ok(())
}
