//! Tests of kubelet on a node whose disk for images is full. The tests check the disk usage that
//! kubelet reports, and the removal of unused images. (`cluster::eviction` tests the eviction of
//! pods. An eviction needs an API server, because kubelet never evicts a static pod.)

use std::fs;

use serde_json::Value;

use crate::support::application::FLASK;
use crate::support::disk::{DISK_MIB, Disk, FREE_MIB, kubelet_reports_the_disk};
use crate::support::kubelet::{
    KUBELET, KUBELET_TIMEOUT, Kubelet, Options, UNCOUNTED, busybox_pod, lives, without_limits,
};
use crate::support::machine::{MIB, Result, wait_for, wait_within};
use crate::support::needs::{Need, Test};
use crate::support::node::{BUSYBOX, Node, WEB, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        disk_pressure_makes_kubelet_remove_unused_images_but_no_pod,
        Need::Native,
        KUBELET,
    ),
    test!(
        image_garbage_collection_removes_unused_images_at_its_high_threshold,
        Need::Native,
        // kubelet checks the threshold for image garbage collection only every five minutes, so the
        // test takes a long time.
        Need::Long,
        KUBELET,
    ),
];

/// Runs the test on a node with a separate small disk for images and containers. The node has two
/// unused images, and one pod. The pod is Ready.
fn with_small_disk(
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

/// Returns the tags of all images.
fn images(node: &Node) -> Result<Vec<String>> {
    let list = node.json(&["images"])?;
    let images = list["images"].as_array().into_iter().flatten();
    let tags = images.flat_map(|image| image["repoTags"].as_array().cloned().unwrap_or_default());
    Ok(tags
        .filter_map(|tag| Some(tag.as_str()?.to_owned()))
        .collect())
}

fn disk_pressure_makes_kubelet_remove_unused_images_but_no_pod() -> Result {
    let thresholds = format!(
        "evictionHard: {{memory.available: 1Mi, nodefs.available: 100Mi, imagefs.available: {FREE_MIB}Mi}}\n\
         evictionPressureTransitionPeriod: 1s\n"
    );
    with_small_disk(&thresholds, |node, kubelet, disk| {
        check_reported_disk(kubelet, disk)?;
        let before = lives(node, &kubelet.pods()?)?;
        ensure_eq!(
            images(node)?.len(),
            3,
            "number of images before the disk is full"
        );

        disk.leave((FREE_MIB - 8) * MIB)?;
        only_the_image_of_the_pod_remains(node)?;
        wait_for("kubelet to free space on the disk", || {
            let free = disk.free()?;
            ensure!(
                free > FREE_MIB * MIB,
                "only {free} bytes of the disk are free"
            );
            Ok(Some(()))
        })?;
        let pods = kubelet.ready(1)?;
        ensure_eq!(
            lives(node, &pods)?,
            before,
            "container ids, process ids and restart counts of the pod after kubelet removed the unused images"
        );

        Ok(fs::remove_file(disk.ballast())?)
    })
}

fn image_garbage_collection_removes_unused_images_at_its_high_threshold() -> Result {
    let used = 100 * (DISK_MIB - FREE_MIB) / DISK_MIB;
    let thresholds = format!(
        "imageGCHighThresholdPercent: {used}\nimageGCLowThresholdPercent: 1\nimageMinimumGCAge: 1s\n"
    );
    with_small_disk(&thresholds, |node, kubelet, disk| {
        let before = lives(node, &kubelet.pods()?)?;
        disk.leave((FREE_MIB - 8) * MIB)?;
        only_the_image_of_the_pod_remains(node)?;
        let pods = kubelet.ready(1)?;
        ensure_eq!(
            lives(node, &pods)?,
            before,
            "container ids, process ids and restart counts of the pod after kubelet removed the unused images"
        );
        Ok(fs::remove_file(disk.ballast())?)
    })
}

fn only_the_image_of_the_pod_remains(node: &Node) -> Result {
    wait_within(
        KUBELET_TIMEOUT,
        "kubelet to remove the unused images",
        || {
            let images = images(node)?;
            ensure!(
                images == [BUSYBOX],
                "the node still has unused images, or lacks the pod's image: {images:?}"
            );
            Ok(Some(()))
        },
    )
}

/// Checks the disk figures that kubelet reports. kubelet decides by these figures whether it
/// removes images.
fn check_reported_disk(kubelet: &Kubelet, disk: &Disk) -> Result {
    wait_for(
        "kubelet to report the correct figures for the disk that stores the images",
        || {
            let summary = kubelet.asks("/stats/summary")?;
            let reported = &summary["node"]["runtime"]["imageFs"];
            let number = |name: &str| {
                let number = reported[name].as_u64();
                number.ok_or(format!("the field {name} is missing in kubelet's statistics of the images' file system: {reported}"))
            };
            let free = kubelet_reports_the_disk(reported, disk)?;
            // The disk contains only images and one container, and the container writes nothing.
            // The images therefore occupy almost all of the used space.
            let used = DISK_MIB * MIB - free;
            let reported_used = number("usedBytes")?;
            ensure!(
                reported_used.abs_diff(used) < used / 10,
                "{used} bytes of the disk are used, but kubelet reports {reported_used} bytes: {reported}"
            );
            ensure!(
                number("inodesUsed")? > 1000,
                "kubelet reports too few used inodes: {reported}"
            );
            Ok(Some(()))
        },
    )
}
