//! kubelet when the images' disk is full: what it is told of the disk, and which images it removes.
//! (Pods that it evicts after them want an API server, a static pod being critical: `cluster::eviction`.)

use std::fs;

use serde_json::Value;

use crate::support::application::FLASK;
use crate::support::disk::{DISK_MIB, Disk, FREE_MIB, is_told};
use crate::support::kubelet::{
    KUBELET, KUBELET_TIMEOUT, Kubelet, Options, UNCOUNTED, busybox_pod, lives, without_limits,
};
use crate::support::machine::{MIB, Result, wait_for, wait_within};
use crate::support::needs::{Need, Test};
use crate::support::node::{BUSYBOX, Node, WEB, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        under_pressure_unused_images_go_and_the_pod_stays,
        Need::Native,
        KUBELET,
    ),
    test!(
        above_the_high_threshold_unused_images_go,
        Need::Native,
        // kubelet looks once in five minutes.
        Need::Long,
        KUBELET,
    ),
];

/// A node whose images and containers have a disk to themselves, with two images that no pod uses
/// and a pod that is Ready.
fn on_a_small_disk(
    thresholds: &str,
    test: impl FnOnce(&mut Node, &Kubelet, &Disk) -> Result,
) -> Result {
    on_a_node(|node| {
        without_limits(node)?;
        let disk = Disk::of_the_images(node)?;
        node.pull(FLASK)?;
        node.pull(WEB)?;
        let config = format!("{thresholds}{UNCOUNTED}");
        let kubelet = Kubelet::start(
            node,
            Options {
                config: &config,
                ..Options::default()
            },
        )?;
        kubelet.write_manifest(&pod())?;
        kubelet.ready(1)?;
        test(node, &kubelet, &disk)
    })
}

fn pod() -> Value {
    busybox_pod("stays", &["sleep", "100000"])
}

/// The tags of all images.
fn images(node: &Node) -> Result<Vec<String>> {
    let told = node.json(&["images"])?;
    let images = told["images"].as_array().into_iter().flatten();
    let tags = images.flat_map(|image| image["repoTags"].as_array().cloned().unwrap_or_default());
    Ok(tags
        .filter_map(|tag| Some(tag.as_str()?.to_owned()))
        .collect())
}

fn under_pressure_unused_images_go_and_the_pod_stays() -> Result {
    let thresholds = format!(
        "evictionHard: {{memory.available: 1Mi, nodefs.available: 1%, imagefs.available: {FREE_MIB}Mi}}\n\
         evictionPressureTransitionPeriod: 1s\n"
    );
    on_a_small_disk(&thresholds, |node, kubelet, disk| {
        the_disk_is_told_of(kubelet, disk)?;
        let before = lives(node, &kubelet.pods()?)?;
        ensure_eq!(images(node)?.len(), 3, "images");

        disk.leave((FREE_MIB - 8) * MIB)?;
        only_the_pods_image_stays(node)?;
        wait_for("the disk to have room again", || {
            let free = disk.free()?;
            ensure!(free > FREE_MIB * MIB, "{free} bytes are free");
            Ok(Some(()))
        })?;
        let pods = kubelet.ready(1)?;
        ensure_eq!(lives(node, &pods)?, before, "the pod that uses an image");

        Ok(fs::remove_file(disk.ballast())?)
    })
}

fn above_the_high_threshold_unused_images_go() -> Result {
    let used = 100 * (DISK_MIB - FREE_MIB) / DISK_MIB;
    let thresholds = format!(
        "imageGCHighThresholdPercent: {used}\nimageGCLowThresholdPercent: 1\nimageMinimumGCAge: 1s\n"
    );
    on_a_small_disk(&thresholds, |node, kubelet, disk| {
        let before = lives(node, &kubelet.pods()?)?;
        disk.leave((FREE_MIB - 8) * MIB)?;
        only_the_pods_image_stays(node)?;
        let pods = kubelet.ready(1)?;
        ensure_eq!(lives(node, &pods)?, before, "the pod that uses an image");
        Ok(fs::remove_file(disk.ballast())?)
    })
}

fn only_the_pods_image_stays(node: &Node) -> Result {
    wait_within(KUBELET_TIMEOUT, "the unused images to go", || {
        let images = images(node)?;
        ensure!(images == [BUSYBOX], "{images:?}");
        Ok(Some(()))
    })
}

/// Of what kubelet decides by.
fn the_disk_is_told_of(kubelet: &Kubelet, disk: &Disk) -> Result {
    wait_for("kubelet to tell the images' disk as it is", || {
        let summary = kubelet.asks("/stats/summary")?;
        let told = &summary["node"]["runtime"]["imageFs"];
        let number = |name: &str| {
            let number = told[name].as_u64();
            number.ok_or(format!("no {name} in {told}"))
        };
        let free = is_told(told, disk)?;
        // All that is on it are images and one container that writes nothing.
        let used = DISK_MIB * MIB - free;
        let told_used = number("usedBytes")?;
        ensure!(
            told_used.abs_diff(used) < used / 10,
            "used are {used}, told is {told}"
        );
        ensure!(number("inodesUsed")? > 1000, "{told}");
        Ok(Some(()))
    })
}
