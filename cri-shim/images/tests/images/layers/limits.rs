//! Tests with layers that are larger than a limit.

use libtest_mimic::Trial;
use rrun_images::layer::{self, Bounds, LayerError};
use rrun_images::{ImageSettings, Kind};
use serde_json::json;

use super::descriptor;
use crate::build::{Archive, Compression, Failure, ITEM, Item, image};
use crate::node::{Dir, Node};
use crate::registry::failure;
use crate::server::Server;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("a_too_large_layer_is_refused", bounds),
        trial("a_decompression_bomb_is_stopped_at_the_limit", bomb),
    ]
}

/// Adds `count` items with different names.
fn repeat(archive: Archive, count: u32, add: impl Fn(Archive, &str) -> Archive) -> Archive {
    (0..count).fold(archive, |archive, number| add(archive, &number.to_string()))
}

async fn bounds() -> Result<(), Failure> {
    let dir = Dir::new()?;
    let bomb = Archive::new()
        .item(&Item {
            path: b"zeros",
            content: &vec![0; 8 << 20],
            ..ITEM
        })
        .end();
    let blob = Compression::Gzip.apply(&bomb);
    let tight = Bounds {
        bytes: 1 << 20,
        entries: 10,
    };
    let result = layer::unpack(
        blob.as_slice(),
        &dir.0.join("a"),
        &descriptor(&bomb, &blob),
        &tight,
        &|| Ok(()),
    );
    assert!(matches!(result, Err(LayerError::Bound(_))), "{result:?}");
    let many = (0..20).fold(Archive::new(), |archive, n| {
        archive.file(&n.to_string(), "")
    });
    let many = many.end();
    let result = layer::unpack(
        many.as_slice(),
        &dir.0.join("b"),
        &descriptor(&many, &many),
        &tight,
        &|| Ok(()),
    );
    assert!(matches!(result, Err(LayerError::Bound(_))), "{result:?}");
    // Each piece of a sparse file needs a whole block on the disk. These 1,000 pieces of one byte
    // need 4 MB.
    let map: String = (0..1000).map(|n| format!("{}\n1\n", n << 13)).collect();
    let mut content = format!("1000\n{map}").into_bytes();
    content.resize(content.len().next_multiple_of(512), 0);
    content.resize(content.len() + 1000, b'x');
    for size in ["", "18446744073709551615"] {
        let mut records = vec![
            ("GNU.sparse.major", &b"1"[..]),
            ("GNU.sparse.realsize", b"8192000"),
        ];
        if !size.is_empty() {
            records = vec![("size", size.as_bytes())];
        }
        let pieces = Archive::new().pax(&records).item(&Item {
            path: b"sparse",
            content: &content,
            ..ITEM
        });
        let pieces = pieces.end();
        let result = layer::unpack(
            pieces.as_slice(),
            &dir.0.join(format!("sparse{size}")),
            &descriptor(&pieces, &pieces),
            &tight,
            &|| Ok(()),
        );
        assert!(
            matches!(&result, Err(LayerError::Bound(why)) if why.contains("image.layer_bytes")),
            "{result:?}"
        );
    }
    // Everything that needs space on the disk counts, not only the contents of files. Each of these
    // archives needs more than the limit of 100 KiB.
    let attribute: [(&str, &[u8]); 1] = [("SCHILY.xattr.user.a", &[b'x'; 1000])];
    let target = "x".repeat(100);
    let first = Archive::new().file("first", "");
    let parts = [
        repeat(Archive::new(), 30, |it, n| it.symlink(n, &target)),
        repeat(Archive::new(), 30, |it, n| it.pax(&attribute).file(n, "")),
        repeat(Archive::new(), 30, |it, _| {
            it.pax(&attribute).dir("d/", 0o755)
        }),
        repeat(Archive::new(), 30, |it, n| it.file(&format!("{n}/a"), "")),
        repeat(first, 1200, |it, n| {
            it.hard_link(&format!("{n}-{}", "x".repeat(90)), "first")
        }),
    ];
    for (number, archive) in parts.into_iter().enumerate() {
        let archive = archive.end();
        for (bytes, refused) in [(100 << 10, true), (1 << 20, false)] {
            let result = layer::unpack(
                archive.as_slice(),
                &dir.0.join(format!("part-{number}-{bytes}")),
                &descriptor(&archive, &archive),
                &Bounds {
                    bytes,
                    entries: 10_000,
                },
                &|| Ok(()),
            );
            match result {
                Err(LayerError::Bound(why)) => {
                    assert!(
                        refused && why.contains("image.layer_bytes"),
                        "{number}: {why}"
                    );
                }
                Ok(unpacked) => assert!(!refused && unpacked.bytes > 100 << 10, "{number}"),
                Err(error) => return Err(error.into()),
            }
        }
    }
    // Directories that the archive uses but does not list count towards the limit of entries, too.
    let deep = Archive::new().file(&"d/".repeat(40), "").end();
    let result = layer::unpack(
        deep.as_slice(),
        &dir.0.join("c"),
        &descriptor(&deep, &deep),
        &tight,
        &|| Ok(()),
    );
    assert!(result.is_ok_and(|unpacked| unpacked.inodes == 41));
    Ok(())
}

async fn bomb() -> Result<(), Failure> {
    let archive = Archive::new().item(&Item {
        path: b"zeros",
        content: &vec![0; 16 << 20],
        ..ITEM
    });
    let built = image(&[(archive.end(), Compression::Gzip)], json!({}));
    let server = Server::start(&[("app", &built)], |_| None)?;
    let node = Node::with(ImageSettings {
        layer_bytes: 1 << 20,
        ..ImageSettings::default()
    })?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::ResourceExhausted, "{error}");
    Ok(())
}
