//! Tests of processes that keep a directory of a container locked. The kernel locks a directory while a
//! process reads it, and the process can read into memory that is slow.

use std::fs;

use nix::mount::{MsFlags, mount, umount};
use serde_json::Value;

use crate::support::kernel_locks::SlowCopy;
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, WEB, on_a_node};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_locked_directory_delays_only_the_removal_of_one_container,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_locked_directory_freezes_only_the_disk_usage_of_one_container,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_locked_rename_delays_no_pull_and_no_removal,
        A_NODE,
        Need::RrunCri
    ),
];

/// Starts a pod with one container, and returns the container's id.
fn start(node: &Node, name: &str) -> Result<String> {
    let pod = node.pod(name);
    let pod_id = node.runp(&pod)?;
    node.run(&pod_id, &pod, &node.container("c", &["/inside", "wait"]))
}

fn a_locked_directory_delays_only_the_removal_of_one_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let [locked, other] = [start(node, "locked")?, start(node, "other")?];
        let layer = |id: &str| node.join("root/containers").join(id);
        let directory = layer(&locked).join("upper/directory");
        fs::create_dir(&directory)?;
        fs::write(directory.join("file"), "")?;
        let lock = SlowCopy::of_directory(&directory)?;
        for id in [&locked, &other] {
            node.asks(&["rm", "--force", id])?;
        }
        wait_for("the server to remove the other container's files", || {
            Ok((!layer(&other).exists()).then_some(()))
        })?;
        ensure!(
            directory.join("file").exists(),
            "the file in the locked directory was removed"
        );
        drop(lock);
        node.has_no_writable_layer()
    })
}

fn a_locked_directory_freezes_only_the_disk_usage_of_one_container() -> Result {
    const WRITTEN: u64 = 5_000_000;
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let upper = |id: &str| node.join("root/containers").join(id).join("upper");
        let locked = start(node, "locked")?;
        let directory = upper(&locked).join("directory");
        fs::create_dir(&directory)?;
        let lock = SlowCopy::of_directory(&directory)?;
        for number in 0..5 {
            let id = start(node, &format!("other-{number}"))?;
            fs::write(upper(&id).join("file"), vec![b'x'; WRITTEN as usize])?;
        }
        wait_for(
            "the statistics of the other containers to contain their files",
            || {
                let stats = node.json(&["stats", "--all"])?;
                let stats = stats["stats"].as_array().cloned().unwrap_or_default();
                let used = stats.iter().filter_map(|stats| {
                    let used = stats.pointer("/writableLayer/usedBytes/value");
                    used.and_then(Value::as_str)?.parse::<u64>().ok()
                });
                Ok((used.filter(|used| *used >= WRITTEN).count() == 5).then_some(()))
            },
        )?;
        drop(lock);
        Ok(())
    })
}

/// The root directory of the server is on a separate file system, because the kernel can't create the
/// root file systems of containers while renames are locked.
fn a_locked_rename_delays_no_pull_and_no_removal() -> Result {
    on_a_node(|node| {
        let root = node.join("root");
        node.terminate_server()?;
        mount(
            None::<&str>,
            &root,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )?;
        node.start_server()?;
        node.pull(BUSYBOX)?;
        let id = start(node, "removed")?;
        let lock = SlowCopy::of_renames(&root.join("other"))?;
        node.asks(&["rm", "--force", &id])?;
        node.pull(WEB)?;
        drop(lock);
        node.asks(&["rmp", "--all", "--force"])?;
        node.terminate_server()?;
        umount(&root)?;
        node.start_server()
    })
}
