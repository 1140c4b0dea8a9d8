//! A separate cgroup for each exec, below the container's cgroup. Through this cgroup, the monitor
//! can kill all processes of the exec. Even a process that calls setsid(2) and forks again remains
//! in the cgroup.
//!
//! No controller is enabled for the exec's cgroup. For this reason, the container's cgroup can
//! contain both processes and the exec's cgroup (cgroup-v2.rst, "No Internal Process Constraint").
//! The container's limits also apply to the exec. The kernel adds the exec's resource usage to the
//! usage of the container's cgroup. The exec's processes see the exec's cgroup in
//! /proc/self/cgroup. A command can leave a daemon behind on purpose. The daemon then remains in
//! the exec's cgroup. When the daemon exits, the monitor removes this cgroup.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;

use rrun_kernel::cgroup;

/// The cgroup of an exec. Dropping the `ExecCgroup` removes the cgroup if it is empty.
#[derive(Debug)]
pub(crate) struct ExecCgroup {
    path: PathBuf,
    name: String,
}

impl ExecCgroup {
    /// Creates the cgroup for the exec with this number. Returns `None` if the node has no cgroup
    /// v2 or the container's cgroup is threaded. Also returns `None` if the container has limited
    /// the number of its child cgroups. Without a separate cgroup, the exec's processes are in the
    /// container's cgroup.
    pub(crate) fn make(container: &Path, number: u64) -> Option<Self> {
        let name = format!("rrun-exec-{number}");
        let path = container.join(&name);
        rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755)).ok()?;
        let made = ExecCgroup { path, name };
        let mut kind = [0; 32];
        let file = cgroup::open_file(&made.path.join("cgroup.type")).ok()?;
        let length = file.read_at(&mut kind, 0).ok()?;
        (kind.get(..length) == Some(b"domain\n")).then_some(made)
    }

    /// Returns the cgroup's name, which is its path relative to the container's cgroup.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the cgroup if it contains no processes. Returns true if the cgroup no longer exists.
    pub(crate) fn remove_if_empty(&self) -> bool {
        match rustix::fs::rmdir(&self.path) {
            Ok(()) | Err(Errno::NOENT) => true,
            Err(_) => !cgroup::is_populated(&self.path) && cgroup::remove_tree(&self.path).is_ok(),
        }
    }

    pub(crate) fn is_below(&self, container: &Path) -> bool {
        self.path.starts_with(container)
    }
}

impl Drop for ExecCgroup {
    fn drop(&mut self) {
        // An error of rmdir(2) can be ignored. If the cgroup still contains processes, the monitor
        // removes it later, together with the container's cgroup. If the cgroup no longer exists,
        // it need not be removed.
        let _ = rustix::fs::rmdir(&self.path);
    }
}

/// The cgroup of an exec that has exited and left processes running. The kernel reports the
/// cgroup's changes.
#[derive(Debug)]
pub(crate) struct WatchedCgroup {
    own: ExecCgroup,
    events: File,
}

impl WatchedCgroup {
    /// Opens the descriptor through which the kernel reports changes. If this fails, returns the
    /// cgroup.
    pub(crate) fn open(own: ExecCgroup) -> Result<Self, ExecCgroup> {
        match cgroup::open_file(&own.path.join("cgroup.events")) {
            Ok(events) => Ok(WatchedCgroup { own, events }),
            Err(_) => Err(own),
        }
    }

    /// Removes the cgroup if it is empty. Returns true if the cgroup no longer exists. If the
    /// cgroup still exists, the kernel reports the cgroup's next change through the descriptor
    /// [`Self::as_fd`].
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

    pub(crate) fn cgroup(&self) -> &ExecCgroup {
        &self.own
    }

    pub(crate) fn into_cgroup(self) -> ExecCgroup {
        self.own
    }
}

/// The descriptor of the file cgroup.events. The kernel reports `POLLPRI` when the file has changed
/// since the last read.
impl AsFd for WatchedCgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}
