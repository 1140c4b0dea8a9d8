//! A file system that never answers.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::support::machine::Result;
use crate::support::needs::Need;

/// What [`Hung`] needs.
pub(crate) const FUSE: Need = Need::File("/dev/fuse");

/// A file system that never answers. The file system is a FUSE mount, and its server does not read
/// the kernel's requests. When the value is dropped, every system call that waits for this file
/// system fails.
pub(crate) struct Hung {
    at: PathBuf,
    server: Option<File>,
}

impl Hung {
    pub(crate) fn mount(at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        let server = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")?;
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("hung"), at, Some("fuse"), flags, Some(data.as_str()))?;
        Ok(Hung {
            at: at.to_owned(),
            server: Some(server),
        })
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        drop(self.server.take());
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}
