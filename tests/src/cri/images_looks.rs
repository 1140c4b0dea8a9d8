//! Tests of images that share a layer. The owner and mode of a directory in one image must not
//! affect another image.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use serde_json::json;

use crate::support::images::build::{Archive, Compression, ITEM, Image, Item, image};
use crate::support::images::server;
use crate::support::machine::Result;
use crate::support::needs::Test;
use crate::support::node::{A_NODE, Node, is_rrun, on_a_node};
use crate::{ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[test!(
    a_directory_has_the_owner_and_the_mode_that_its_own_image_sets,
    A_NODE
)];

fn dir<'a>(path: &'a str, mode: u32, owner: u64) -> Item<'a> {
    Item {
        path: path.as_bytes(),
        kind: b'5',
        mode,
        uid: owner,
        gid: owner,
        ..ITEM
    }
}

/// Returns an image of three layers. The first layer contains a program. The second layer has
/// entries for the directories `/`, `etc` and `tmp`. The third layer has files in these
/// directories, but no entries for the directories.
fn tenant(root: (u32, u64), etc: (u32, u64), tmp: (u32, u64)) -> Result<Image> {
    let program = Archive::new().item(&Item {
        path: b"inside",
        mode: 0o755,
        content: &std::fs::read("/proc/self/exe")?,
        ..ITEM
    });
    let directories = Archive::new()
        .item(&dir("./", root.0, root.1))
        .item(&dir("etc/", etc.0, etc.1))
        .item(&dir("tmp/", tmp.0, tmp.1));
    let shared = Archive::new().file("etc/app.conf", "").file("tmp/seed", "");
    let layers = [program, directories, shared].map(|layer| (layer.end(), Compression::Gzip));
    Ok(image(&layers, json!({})))
}

/// Returns the modes and owners of `/`, `/etc` and `/tmp` in a container of the image.
fn seen(node: &Node, pod: &str, image: &str) -> Result<String> {
    let config = node.pod(pod);
    let pod_id = node.runp(&config)?;
    let mut container = node.container("looks", &["/inside", "spin", "1000"]);
    container["image"]["image"] = json!(image);
    container["mounts"] = json!([]);
    let id = node.run(&pod_id, &config, &container)?;
    let root = PathBuf::from(format!("/proc/{}/root", node.pid(&id)?));
    let mut text = String::new();
    for path in [".", "etc", "tmp"] {
        let looks = std::fs::metadata(root.join(path))?;
        let (mode, uid, gid) = (looks.mode() & 0o7777, looks.uid(), looks.gid());
        text += &format!("{path} {mode:o} {uid}:{gid} ");
    }
    node.asks(&["rmp", "--force", &pod_id])?;
    Ok(text)
}

fn a_directory_has_the_owner_and_the_mode_that_its_own_image_sets() -> Result {
    on_a_node(|node| {
        let evil = tenant((0o777, 99), (0o777, 65534), (0o777, 1234))?;
        let good = tenant((0o711, 0), (0o755, 0), (0o1777, 0))?;
        let server = server::Server::start(&[("evil", &evil), ("good", &good)], |_| None)
            .map_err(|error| error.to_string())?;
        let name = |name: &str| format!("{}/{name}:1", server.host());
        let looks = [
            ("evil", ". 777 99:99 etc 777 65534:65534 tmp 777 1234:1234 "),
            ("good", ". 711 0:0 etc 755 0:0 tmp 1777 0:0 "),
        ];
        for order in [[0, 1], [1, 0]] {
            for at in order {
                node.pull(&name(looks[at].0))?;
            }
            for (image, looks) in looks {
                let pod = format!("{image}-{}", order[0]);
                ensure_eq!(
                    seen(node, &pod, &name(image))?,
                    looks,
                    "modes and owners of the directories in the image {image}"
                );
            }
            if is_rrun() {
                node.kill_server()?;
                node.start_server()?;
                let pod = format!("again-{}", order[0]);
                ensure_eq!(
                    seen(node, &pod, &name("good"))?,
                    looks[1].1,
                    "modes and owners of the directories in the image after the server was killed and restarted"
                );
            }
            for (image, _) in looks {
                node.asks(&["rmi", &name(image)])?;
            }
        }
        ensure_eq!(
            server.count(&good.layers[2]),
            if is_rrun() { 2 } else { 4 },
            "number of downloads of the shared layer"
        );
        Ok(())
    })
}
