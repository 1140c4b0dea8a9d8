//! A small disk for a node's files.

use std::fs;
use std::path::PathBuf;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use serde_json::Value;

use crate::support::machine::{MIB, Result};
use crate::support::node::Node;
use crate::{ensure, ensure_eq};

/// The size of a [`Disk`].
pub(crate) const DISK_MIB: u64 = 384;

/// The eviction threshold in the tests' kubelet configuration. If less space on the disk is free,
/// kubelet removes unused images and evicts pods.
pub(crate) const FREE_MIB: u64 = 96;

/// A tmpfs of [`DISK_MIB`] MiB that a test uses as a small disk.
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// Mounts a disk at the directory `place`.
    pub(crate) fn at(place: PathBuf) -> Result<Self> {
        let size = format!("size={DISK_MIB}m,mode=755");
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

    /// Mounts a disk for the images and containers of `node`. `node` must not have images or
    /// containers yet. Dropping the node also unmounts the disk.
    pub(crate) fn of_the_images(node: &mut Node) -> Result<Self> {
        node.terminate_server()?;
        let disk = Disk::at(node.join("root"))?;
        node.start_server()?;
        Ok(disk)
    }

    pub(crate) fn unmount(self) -> Result {
        Ok(umount2(&self.0, MntFlags::MNT_DETACH)?)
    }

    pub(crate) fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    pub(crate) fn free(&self) -> Result<u64> {
        let statistics = statvfs(&self.0)?;
        Ok(statistics.blocks_available() * statistics.fragment_size())
    }

    /// Fills the disk until at most `bytes` bytes are free.
    pub(crate) fn leave(&self, bytes: u64) -> Result {
        let size = self.free()?.saturating_sub(bytes);
        let old = fs::metadata(self.ballast()).map_or(0, |file| file.len());
        let zeros = vec![0; usize::try_from(old + size)?];
        Ok(fs::write(self.ballast(), zeros)?)
    }
}

/// Checks that kubelet reports the size and the free space of `disk` correctly. Returns the free
/// space in bytes.
pub(crate) fn kubelet_reports_the_disk(reported: &Value, disk: &Disk) -> Result<u64> {
    let free = disk.free()?;
    ensure_eq!(
        reported["capacityBytes"],
        DISK_MIB * MIB,
        "capacity of the disk in kubelet's report {reported}"
    );
    let available = reported["availableBytes"].as_u64();
    ensure!(
        available.is_some_and(|available| available.abs_diff(free) < MIB),
        "{free} bytes of the disk are free, but kubelet reports {available:?} bytes: {reported}"
    );
    Ok(free)
}
