//! A container's directory, ROOT/ID. A process reserves the container's id by creating this
//! directory. The lock on this directory is called the container's lock.
//!
//! The lock is an flock(2) lock on the directory. rrun holds the lock during the whole creation or
//! deletion of a container. So a deletion cannot miss a container that is being created. If an rrun
//! process dies, the kernel releases its lock.
//!
//! rrun replaces and removes files relative to an open descriptor of the directory. So if another
//! process replaces the directory, rrun does not change files in the new directory by mistake.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::{Context, Result, refuse};
use crate::lifecycle::notify_socket;
use crate::lifecycle::state_root::StateRoot;

/// The name of the start socket when the container can be started. See
/// [`crate::lifecycle::start_socket`].
pub(crate) const START_SOCKET: &str = "start";
/// The name of the start socket until the container can be started.
pub(crate) const START_SOCKET_PENDING: &str = "start.shut";
/// The name of the file that contains the container's state. See [`crate::lifecycle::state`].
pub(crate) const STATE_FILE: &str = "state.json";
/// The temporary name of a new state file. rrun then renames this file to [`STATE_FILE`].
pub(crate) const STATE_FILE_NEW: &str = "state.json.new";
/// The name of a symbolic link to the container's cgroup. rrun creates this link before it creates
/// the cgroup. Through the link, rrun finds the container's processes even if the state file is
/// missing or broken.
const CGROUP_LINK: &str = "cgroup";

/// The maximum time that rrun waits for another process to release a container's lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// The maximum number of attempts to create and lock a container's directory. An attempt fails if
/// another process removes the directory before rrun can lock it.
const CREATE_RETRIES: usize = 100;

pub(crate) struct ContainerDir {
    directory: PathBuf,
    fd: OwnedFd,
}

/// The result of an attempt to lock a container's directory.
pub(crate) enum Lock {
    Acquired(ContainerDir),
    /// The directory does not exist.
    Missing,
    /// Another process held the lock until the timeout.
    Busy,
}

impl AsFd for ContainerDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl ContainerDir {
    /// Creates and locks the directory of a container. The existence of the directory reserves the
    /// container's id.
    pub(crate) fn create(root: &StateRoot, id: &str) -> Result<ContainerDir> {
        let directory = directory(root, id)?;
        root.check()?;
        for _ in 0..CREATE_RETRIES {
            make_directory(&root.path, &directory, id)?;
            // Between mkdir and flock, another rrun process can remove the new directory. That
            // process cannot distinguish the new directory from a directory that a killed rrun
            // process left behind.
            match ContainerDir::lock(root, &directory, || {}) {
                Ok(Lock::Acquired(dir)) => return Ok(dir),
                Ok(Lock::Missing) => {}
                Ok(Lock::Busy) => break,
                Err(error) => {
                    // The directory is still empty, so rmdir(2) removes it.
                    let _ = rustix::fs::rmdir(&directory);
                    return Err(error);
                }
            }
        }
        refuse!("another process is removing container {id}")
    }

    /// Locks an existing directory. While another process holds the lock, this function calls
    /// `meanwhile` before each new attempt to lock the directory.
    ///
    /// # Errors
    /// Fails if another user can change the files in the directory (see [`check_owner`]) or can
    /// choose the directory (see [`StateRoot::check`]).
    pub(crate) fn lock(
        root: &StateRoot,
        directory: &Path,
        mut meanwhile: impl FnMut(),
    ) -> Result<Lock> {
        let doing = || format!("lock {}", directory.display());
        root.check()?;
        let fd = match rustix::fs::open(
            directory,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Err(Errno::NOENT) => return Ok(Lock::Missing),
            result => result.doing(doing)?,
        };
        check_owner(root, directory, &fd)?;
        let deadline = Instant::now() + LOCK_TIMEOUT;
        let mut pause = Duration::from_millis(1);
        loop {
            match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(errno) => return Err(errno).doing(doing),
            }
            let last = Instant::now() >= deadline;
            meanwhile();
            if last {
                return Ok(Lock::Busy);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        let dir = ContainerDir {
            directory: directory.to_owned(),
            fd,
        };
        Ok(if dir.is_linked()? {
            Lock::Acquired(dir)
        } else {
            Lock::Missing
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.directory
    }

    /// Returns whether this directory still exists. The link count of a removed directory is 0.
    pub(crate) fn is_linked(&self) -> Result<bool> {
        let stat =
            rustix::fs::fstat(&self.fd).doing(|| format!("stat {}", self.directory.display()))?;
        Ok(stat.st_nlink > 0)
    }

    /// Creates the symbolic link that records the path of the container's cgroup.
    pub(crate) fn link_cgroup(&self, cgroup: &Path) -> Result<()> {
        rustix::fs::symlinkat(cgroup, &self.fd, CGROUP_LINK).doing(|| {
            format!(
                "create symbolic link {}",
                self.directory.join(CGROUP_LINK).display()
            )
        })
    }

    /// Releases the lock, so that other processes can lock the directory.
    pub(crate) fn unlock(&self) {
        // Unlocking an open descriptor cannot fail, and closing the descriptor also releases the
        // lock.
        let _ = rustix::fs::flock(&self.fd, FlockOperation::Unlock);
    }

    /// Removes the directory and all files that rrun wrote into the directory, so that the
    /// container's id is free again. The state file is the last file that this function removes. So
    /// if the removal of another file fails, the container can be deleted again.
    pub(crate) fn remove(&self) -> Result<()> {
        let linked = self.is_linked()?;
        for name in [
            START_SOCKET,
            START_SOCKET_PENDING,
            STATE_FILE_NEW,
            CGROUP_LINK,
            STATE_FILE,
        ] {
            match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                result => {
                    result.doing(|| format!("remove {}", self.directory.join(name).display()))?;
                }
            }
        }
        if !linked {
            // Another process may have created a new directory at the same path, so rrun must not
            // remove the directory at this path.
            return Ok(());
        }
        let removed = match rustix::fs::rmdir(&self.directory) {
            // The container's directory still contains the directory of the notification socket,
            // which few containers have.
            Err(Errno::NOTEMPTY) => {
                notify_socket::remove(&self.directory)?;
                rustix::fs::rmdir(&self.directory)
            }
            removed => removed,
        };
        match removed {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            result => result.doing(|| format!("remove {}", self.directory.display())),
        }
    }
}

fn make_directory(root: &Path, directory: &Path, id: &str) -> Result<()> {
    let mode = Mode::from_raw_mode(0o700);
    let mut made = rustix::fs::mkdir(directory, mode);
    if made == Err(Errno::NOENT) {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .doing(|| format!("create --root directory {}", root.display()))?;
        made = rustix::fs::mkdir(directory, mode);
    }
    match made {
        Err(Errno::EXIST) => refuse!("container with given ID already exists: {id}"),
        result => result.doing(|| format!("create directory {}", directory.display())),
    }
}

/// Checks a container id.
///
/// # Errors
/// Fails if the id could name a path outside the --root directory, or if runc would refuse the id.
pub(crate) fn validate_id(id: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    if id.is_empty() || id == "." || id == ".." || !id.bytes().all(allowed) {
        refuse!("invalid container id {id:?}: only letters, digits and _ + - . are allowed");
    }
    if id.len() > 255 {
        refuse!(
            "invalid container id: it has {} characters, but at most 255 are allowed",
            id.len()
        );
    }
    Ok(())
}

/// Returns the path of a container's directory in the --root directory.
pub(crate) fn directory(root: &StateRoot, id: &str) -> Result<PathBuf> {
    validate_id(id)?;
    Ok(root.path.join(id))
}

/// Returns whether only rrun's caller and root can change the files in the open directory `fd`.
pub(crate) fn is_private(root: &StateRoot, directory: &Path, fd: impl AsFd) -> Result<bool> {
    let stat = rustix::fs::fstat(fd).doing(|| format!("stat {}", directory.display()))?;
    Ok(is_callers(&stat) && !root.is_users_mount(directory, &stat)?)
}

/// Returns whether only rrun's caller and root can change a file with the attributes `stat`.
pub(crate) fn is_callers(stat: &Stat) -> bool {
    let owner = stat.st_uid == 0 || stat.st_uid == rustix::process::geteuid().as_raw();
    let others = Mode::WGRP | Mode::WOTH;
    owner && !Mode::from_raw_mode(stat.st_mode).intersects(others)
}

/// Checks that no other user can change the files in the open directory `fd` of a container. The
/// state in these files names hooks, processes and cgroups, on which rrun acts with the rights of
/// its caller. [`StateRoot::check`] must have been called before the directory was opened.
pub(crate) fn check_owner(root: &StateRoot, directory: &Path, fd: impl AsFd) -> Result<()> {
    if !root.any_owner && !root.is_checked() {
        let root = root.path.display();
        return Err(Errno::NOENT)
            .doing(|| format!("check --root {root}, which another process has just created"));
    }
    if root.any_owner || is_private(root, directory, fd)? {
        return Ok(());
    }
    refuse!(
        "{}: another user owns this directory of a container or can write to it; run rrun as the user who created the container, or use --any-owner if you trust the other user",
        directory.display()
    )
}

/// Returns the path of a container's cgroup. A symbolic link in the container's directory contains
/// this path. Returns `None` if the link does not exist, or if the path is not in /sys/fs/cgroup.
pub(crate) fn linked_cgroup(directory: &Path) -> Option<PathBuf> {
    let link = rustix::fs::readlink(directory.join(CGROUP_LINK), Vec::new()).ok()?;
    let path = PathBuf::from(link.into_string().ok()?);
    crate::cgroup::is_path_of_cgroup(&path).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(name: &str) -> StateRoot {
        let name = format!("rrun-{name}-test-{}", std::process::id());
        StateRoot::new(std::env::temp_dir().join(name), false)
    }

    #[test]
    fn an_id_can_be_reserved_only_once_and_the_directory_records_the_cgroup() {
        let root = root("container-dir");
        let dir = ContainerDir::create(&root, "a").unwrap();
        assert!(ContainerDir::create(&root, "a").is_err());
        assert_eq!(linked_cgroup(dir.path()), None);
        dir.link_cgroup(Path::new("/sys/fs/cgroup/x/y")).unwrap();
        assert_eq!(
            linked_cgroup(dir.path()).as_deref(),
            Some(Path::new("/sys/fs/cgroup/x/y"))
        );
        // A `ContainerDir` whose directory was removed must not remove a new directory at the same
        // path.
        let path = &root.path;
        std::fs::rename(path.join("a"), path.join("b")).unwrap();
        std::fs::remove_file(path.join("b/cgroup")).unwrap();
        std::fs::remove_dir(path.join("b")).unwrap();
        let next = ContainerDir::create(&root, "a").unwrap();
        dir.remove().unwrap();
        assert!(next.is_linked().unwrap());
        next.remove().unwrap();
        assert!(matches!(
            ContainerDir::lock(&root, &path.join("a"), || {}).unwrap(),
            Lock::Missing
        ));
        std::fs::remove_dir_all(&root.path).unwrap();
    }

    #[test]
    fn a_recorded_path_outside_the_cgroup_hierarchy_is_ignored() {
        let root = root("cgroup");
        for path in ["/sys/fs/cgroup", "/sys/fs/cgroup/a/../..", "/tmp/x", "x"] {
            let dir = ContainerDir::create(&root, "a").unwrap();
            dir.link_cgroup(Path::new(path)).unwrap();
            assert_eq!(linked_cgroup(dir.path()), None, "{path}");
            dir.remove().unwrap();
        }
        std::fs::remove_dir_all(&root.path).unwrap();
    }

    #[test]
    fn an_id_cannot_name_a_path_outside_the_root_directory() {
        for id in ["a", "0af-_.+Z", "..a"] {
            assert!(validate_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "a b", "ä", "a\n"] {
            assert!(validate_id(id).is_err(), "{id}");
        }
    }
}
