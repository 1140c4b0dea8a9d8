//! Path lookups inside a root filesystem whose content can come from an attacker.
//!
//! Every path is resolved with the root as `/` ([`rrun_kernel::in_root`]). A symbolic link therefore
//! can't lead out of the root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rrun_kernel::in_root;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat};
use rustix::io::Errno;

/// The root directory of a container or of an image, as an O_PATH descriptor.
pub(super) struct InRoot(OwnedFd);

impl AsFd for InRoot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl InRoot {
    pub(super) fn open(root: &Path) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // O_PATH opens no device.
        openat(CWD, root, flags, Mode::empty()).map(InRoot)
    }

    /// Returns an O_PATH descriptor of the file at `path`. Symbolic links are followed.
    pub(super) fn find(&self, path: impl AsRef<Path>) -> Result<OwnedFd, Errno> {
        // O_PATH opens no device.
        self.look_up(path.as_ref(), OFlags::PATH)
    }

    /// Opens the directory at `path` for reading. Symbolic links are followed.
    pub(super) fn open_directory(&self, path: impl AsRef<Path>) -> Result<OwnedFd, Errno> {
        // O_DIRECTORY makes this call fail for a device before its driver is called.
        self.look_up(path.as_ref(), OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// `flags` contains O_PATH or O_DIRECTORY.
    fn look_up(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = path.as_os_str().as_bytes();
        in_root::open(&self.0, path, flags, ResolveFlags::empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_cannot_lead_out_of_the_root() -> Result<(), Box<dyn std::error::Error>> {
        let dir = std::env::temp_dir().join(format!("rrun-in-root-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("root/etc"))?;
        std::fs::write(dir.join("root/etc/passwd"), "inside")?;
        std::fs::write(dir.join("secret"), "outside")?;
        for (name, target) in [
            ("up", "../../secret"),
            ("abs", "/etc/passwd"),
            ("loop", "loop"),
        ] {
            std::os::unix::fs::symlink(target, dir.join("root").join(name))?;
        }
        let root = InRoot::open(&dir.join("root"))?;
        assert_eq!(root.find("up").err(), Some(Errno::NOENT));
        assert!(root.find("abs").is_ok());
        assert_eq!(root.find("loop").err(), Some(Errno::LOOP));
        assert_eq!(root.open_directory("abs").err(), Some(Errno::NOTDIR));
        assert!(root.open_directory("../../etc").is_ok());
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }
}
