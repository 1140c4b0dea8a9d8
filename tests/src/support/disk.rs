//! A small disk for what a node keeps.

use std::fs;
use std::path::PathBuf;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use serde_json::Value;

use crate::support::machine::{MIB, Result};
use crate::support::node::Node;
use crate::{ensure, ensure_eq};

/// The size of the disk.
pub(crate) const DISK_MIB: u64 = 384;

/// How much of it kubelet is to keep free.
pub(crate) const FREE_MIB: u64 = 96;

/// A disk of [`DISK_MIB`] MiB.
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// For what is kept in this directory.
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

    /// For the images and containers of a node that has none yet; it goes with the node.
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
        let told = statvfs(&self.0)?;
        Ok(told.blocks_available() * told.fragment_size())
    }

    /// Fills it until no more than this is free.
    pub(crate) fn leave(&self, bytes: u64) -> Result {
        let size = self.free()?.saturating_sub(bytes);
        let old = fs::metadata(self.ballast()).map_or(0, |file| file.len());
        let zeros = vec![0; usize::try_from(old + size)?];
        Ok(fs::write(self.ballast(), zeros)?)
    }
}

/// Whether kubelet tells the size of this disk, and what is free, which is given.
pub(crate) fn is_told(told: &Value, disk: &Disk) -> Result<u64> {
    let free = disk.free()?;
    ensure_eq!(
        told["capacityBytes"],
        DISK_MIB * MIB,
        "the capacity in {told}"
    );
    let available = told["availableBytes"].as_u64();
    ensure!(
        available.is_some_and(|available| available.abs_diff(free) < MIB),
        "free are {free}, told is {told}"
    );
    Ok(free)
}
