//! A cgroup for each exec, below the container's: what the exec starts can be killed as one, and
//! can't leave by setsid(2) and a second fork.
//!
//! No controller is enabled for it, so that it may stand beside the container's own processes
//! (cgroup-v2.rst, "No Internal Process Constraint"), and all that is counted or limited is so
//! in the container's. Inside, the program sees it as its cgroup. A daemon that a command leaves
//! behind on purpose keeps it; it goes when that ends.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

use rrun_kernel::cgroup;

/// The most leftover cgroups that are watched; the rest go with their containers.
pub(crate) const MAX_LEFTOVERS: usize = 64;

/// Removed when it is dropped, if it is empty then.
#[derive(Debug)]
pub(crate) struct ExecCgroup {
    path: PathBuf,
    name: String,
}

impl ExecCgroup {
    /// `number` has never been given for this container. None where the container's cgroup can
    /// have no such one below it: there is no cgroup v2, the container has made its own a
    /// threaded one or bounded how many there are below. Then the exec does without.
    pub(crate) fn make(container: &Path, number: u64) -> Option<Self> {
        let name = format!("rrun-exec-{number}");
        let path = container.join(&name);
        rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755)).ok()?;
        let made = ExecCgroup { path, name };
        let mut kind = [0; 32];
        let file = File::open(made.path.join("cgroup.type")).ok()?;
        let length = file.read_at(&mut kind, 0).ok()?;
        (kind.get(..length) == Some(b"domain\n")).then_some(made)
    }

    /// From the container's cgroup.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Kills all in it. False if there was nothing: a runtime may not do as its `--cgroup` says.
    pub(crate) fn kill(&self) -> bool {
        cgroup::is_populated(&self.path) && cgroup::kill(&self.path).is_ok()
    }

    /// What is left in it once its first process has ended, if anything.
    pub(crate) fn into_leftover(self) -> Option<LeftoverCgroup> {
        if cgroup::remove_tree(&self.path).is_ok() {
            return None;
        }
        let events = File::open(self.path.join("cgroup.events")).ok()?;
        Some(LeftoverCgroup { own: self, events })
    }
}

impl Drop for ExecCgroup {
    fn drop(&mut self) {
        // One that is still in use goes with the container's, and one that is gone needs nothing.
        let _ = rustix::fs::rmdir(&self.path);
    }
}

/// A cgroup whose exec has ended and left something running.
#[derive(Debug)]
pub(crate) struct LeftoverCgroup {
    own: ExecCgroup,
    events: File,
}

impl LeftoverCgroup {
    /// Whether it is gone: it was empty and has been removed, or its container has. If not, the
    /// kernel tells when that changes.
    pub(crate) fn is_gone(&self) -> bool {
        let mut text = [0; 128];
        let populated = match self.events.read_at(&mut text, 0) {
            Ok(length) => text
                .get(..length)
                .is_some_and(|text| text.starts_with(b"populated 1")),
            Err(_) => return true,
        };
        !populated && cgroup::remove_tree(&self.own.path).is_ok()
    }

    pub(crate) fn is_below(&self, container: &Path) -> bool {
        self.own.path.starts_with(container)
    }
}

/// The kernel says `POLLPRI` when cgroup.events has changed since it was read.
impl AsFd for LeftoverCgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}
