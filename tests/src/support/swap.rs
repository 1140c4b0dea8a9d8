//! Swap space of the machine.

use std::fs;

use crate::support::machine::{Result, command};

/// An enabled swap file. Dropping the value disables and deletes the swap file.
pub(crate) struct Swap;

impl Swap {
    const FILE: &str = "/var/tmp/kubelet-swap";

    pub(crate) fn on() -> Result<Self> {
        Self::of(256)
    }

    /// Enables a swap file of `size` MiB.
    pub(crate) fn of(size: u64) -> Result<Self> {
        let swap = Swap;
        let length = format!("{size}M");
        command("fallocate", ["--length", &length, Self::FILE]).ok()?;
        command("chmod", ["600", Self::FILE]).ok()?;
        command("mkswap", [Self::FILE]).ok()?;
        command("swapon", [Self::FILE]).ok()?;
        Ok(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = command("swapoff", [Self::FILE]).end();
        let _ = fs::remove_file(Self::FILE);
    }
}
