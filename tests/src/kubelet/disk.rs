//! kubelet when the images' disk is full: what it is told of the disk, and which images it removes.
//! (Pods that it evicts after them want an API server, a static pod being critical: `cluster::eviction`.)

use std::fs;
use std::path::PathBuf;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use serde_json::Value;

use crate::kubelet::application::limits::MIB;
use crate::support::application::FLASK;
use crate::support::kubelet::{
    KUBELET, Kubelet, Options, PATIENCE, UNCOUNTED, busybox_pod, lives, without_limits,
};
use crate::support::machine::{Result, wait_for, wait_within};
use crate::support::needs::{Need, Test};
use crate::support::node::{BUSYBOX, Node, WEB, on_a_node};
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[
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

/// The size of the images' disk, in MiB, and how much of it is to be free.
const SIZE: u64 = 384;
pub const FREE: u64 = 96;

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

/// A disk of [`SIZE`] MiB.
pub struct Disk(PathBuf);

impl Disk {
    /// For what is kept in this directory.
    pub fn at(place: PathBuf) -> Result<Self> {
        let size = format!("size={SIZE}m,mode=755");
        let flags = MsFlags::empty();
        mount(
            Some("disk"),
            &place,
            Some("tmpfs"),
            flags,
            Some(size.as_str()),
        )?;
        Ok(Disk(place))
    }

    /// For the images and containers of a node that has none yet; it goes with the node.
    pub fn of_the_images(node: &mut Node) -> Result<Self> {
        node.terminate_server()?;
        let disk = Disk::at(node.join("root"))?;
        node.start_server()?;
        Ok(disk)
    }

    pub fn unmount(self) -> Result {
        Ok(umount2(&self.0, MntFlags::MNT_DETACH)?)
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    pub fn free(&self) -> Result<u64> {
        let told = statvfs(&self.0)?;
        Ok(told.blocks_available() * told.fragment_size())
    }

    /// Fills it until no more than this is free.
    fn leave(&self, bytes: u64) -> Result {
        let size = self.free()?.saturating_sub(bytes);
        let old = fs::metadata(self.ballast()).map_or(0, |file| file.len());
        let zeros = vec![0; usize::try_from(old + size)?];
        Ok(fs::write(self.ballast(), zeros)?)
    }
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
        "evictionHard: {{memory.available: 1Mi, nodefs.available: 1%, imagefs.available: {FREE}Mi}}\n\
         evictionPressureTransitionPeriod: 1s\n"
    );
    on_a_small_disk(&thresholds, |node, kubelet, disk| {
        the_disk_is_told_of(kubelet, disk)?;
        let before = lives(node, &kubelet.pods()?)?;
        ensure_eq!(images(node)?.len(), 3, "images");

        disk.leave((FREE - 8) * MIB)?;
        only_the_pods_image_stays(node)?;
        wait_for("the disk to have room again", || {
            let free = disk.free()?;
            ensure!(free > FREE * MIB, "{free} bytes are free");
            Ok(Some(()))
        })?;
        let pods = kubelet.ready(1)?;
        ensure_eq!(lives(node, &pods)?, before, "the pod that uses an image");

        Ok(fs::remove_file(disk.ballast())?)
    })
}

fn above_the_high_threshold_unused_images_go() -> Result {
    let used = 100 * (SIZE - FREE) / SIZE;
    let thresholds = format!(
        "imageGCHighThresholdPercent: {used}\nimageGCLowThresholdPercent: 1\nimageMinimumGCAge: 1s\n"
    );
    on_a_small_disk(&thresholds, |node, kubelet, disk| {
        let before = lives(node, &kubelet.pods()?)?;
        disk.leave((FREE - 8) * MIB)?;
        only_the_pods_image_stays(node)?;
        let pods = kubelet.ready(1)?;
        ensure_eq!(lives(node, &pods)?, before, "the pod that uses an image");
        Ok(fs::remove_file(disk.ballast())?)
    })
}

fn only_the_pods_image_stays(node: &Node) -> Result {
    wait_within(PATIENCE, "the unused images to go", || {
        let images = images(node)?;
        ensure!(images == [BUSYBOX], "{images:?}");
        Ok(Some(()))
    })
}

/// Whether kubelet tells the size of this disk, and what is free, which is given.
pub fn is_told(told: &Value, disk: &Disk) -> Result<u64> {
    let free = disk.free()?;
    ensure_eq!(told["capacityBytes"], SIZE * MIB, "the capacity in {told}");
    let available = told["availableBytes"].as_u64();
    ensure!(
        available.is_some_and(|available| available.abs_diff(free) < MIB),
        "free are {free}, told is {told}"
    );
    Ok(free)
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
        let used = SIZE * MIB - free;
        let told_used = number("usedBytes")?;
        ensure!(
            told_used.abs_diff(used) < used / 10,
            "used are {used}, told is {told}"
        );
        ensure!(number("inodesUsed")? > 1000, "{told}");
        Ok(Some(()))
    })
}
