//! Path lookups inside a root filesystem whose content can come from an attacker.
//!
//! The kernel resolves every path with the root as `/` (RESOLVE_IN_ROOT). A symbolic link therefore
//! can't lead out of the root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

/// The maximum number of times that a lookup is repeated. A rename during a lookup makes the
/// repetition necessary.
const LOOKUP_RETRIES: usize = 128;

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

    fn look_up(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut again = 0;
        loop {
            // O_PATH or O_DIRECTORY is in `flags`.
            match openat2(&self.0, path, flags, Mode::empty(), resolve) {
                // EAGAIN means that a file was renamed during this lookup, possibly as an attack.
                // The kernel requires that the caller repeats the lookup.
                Err(Errno::AGAIN) if again < LOOKUP_RETRIES => again += 1,
                result => return result,
            }
        }
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
