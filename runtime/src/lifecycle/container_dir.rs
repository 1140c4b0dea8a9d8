//! A container's directory, ROOT/ID: whoever makes it has the id, and it carries a lock.
//!
//! Who makes or removes a container holds the lock (flock(2) on the directory) as long as
//! that takes, so that a removal can not overlook what is being made. It ends with its
//! holder, whatever that dies of. Everything in the directory is reached through the
//! descriptor: who lost the directory to another can not touch that other's by its name.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Context, Result, refuse};
use crate::lifecycle::notify_socket;

/// The start socket, once the container can be started: see [`crate::lifecycle::start_socket`].
pub(crate) const START_SOCKET: &str = "start";
/// Its name until then.
pub(crate) const START_SOCKET_PENDING: &str = "start.shut";
/// The container's state: see [`crate::lifecycle::state`].
pub(crate) const STATE_FILE: &str = "state.json";
pub(crate) const STATE_FILE_NEW: &str = "state.json.new";
/// A link to the container's cgroup, made before the cgroup is: whatever becomes of the
/// state's file, what lives of the container can be found.
const CGROUP_LINK: &str = "cgroup";

/// How long to wait for another process to be done with a container.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a directory is made again that another process removed at once.
const CREATE_RETRIES: usize = 100;

pub(crate) struct ContainerDir {
    directory: PathBuf,
    fd: OwnedFd,
}

/// What came of trying to hold a container's directory.
pub(crate) enum Lock {
    Acquired(ContainerDir),
    /// There is no such directory.
    Missing,
    /// Another process has held it all the time.
    Busy,
}

impl AsFd for ContainerDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl ContainerDir {
    /// Claims an id by making its directory.
    pub(crate) fn create(root: &Path, id: &str) -> Result<ContainerDir> {
        let directory = directory(root, id)?;
        for _ in 0..CREATE_RETRIES {
            make_directory(root, &directory, id)?;
            // Between its making and its locking, another process may have taken it for
            // the remains of a killed one, and removed it.
            match ContainerDir::lock(&directory, || {})? {
                Lock::Acquired(dir) => return Ok(dir),
                Lock::Missing => {}
                Lock::Busy => break,
            }
        }
        refuse!("container {id} is being removed by another process")
    }

    /// Takes an existing directory. While another process has it, `meanwhile` is called now
    /// and then.
    pub(crate) fn lock(directory: &Path, mut meanwhile: impl FnMut()) -> Result<Lock> {
        let doing = || format!("lock {}", directory.display());
        let fd = match rustix::fs::open(
            directory,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Err(Errno::NOENT) => return Ok(Lock::Missing),
            result => result.doing(doing)?,
        };
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

    /// Whether nobody has removed it.
    pub(crate) fn is_linked(&self) -> Result<bool> {
        let stat = rustix::fs::fstat(&self.fd)
            .doing(|| format!("look at {}", self.directory.display()))?;
        Ok(stat.st_nlink > 0)
    }

    /// Writes down where the container's cgroup will be.
    pub(crate) fn link_cgroup(&self, cgroup: &Path) -> Result<()> {
        rustix::fs::symlinkat(cgroup, &self.fd, CGROUP_LINK)
            .doing(|| format!("make link {}", self.directory.join(CGROUP_LINK).display()))
    }

    /// Lets others lock it.
    pub(crate) fn unlock(&self) {
        // It cannot fail for a descriptor of our own; the lock ends with the descriptor anyway.
        let _ = rustix::fs::flock(&self.fd, FlockOperation::Unlock);
    }

    /// Removes it with all that rrun wrote into it, so that the id is free again.
    pub(crate) fn remove(&self) -> Result<()> {
        let same = self.is_linked()?;
        for name in [
            STATE_FILE,
            START_SOCKET,
            START_SOCKET_PENDING,
            STATE_FILE_NEW,
            CGROUP_LINK,
        ] {
            match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                result => {
                    result.doing(|| format!("remove {}", self.directory.join(name).display()))?;
                }
            }
        }
        if !same {
            // Another's may stand at its path by now.
            return Ok(());
        }
        let removed = match rustix::fs::rmdir(&self.directory) {
            // Few containers have a notification socket.
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
            .doing(|| format!("make --root directory {}", root.display()))?;
        made = rustix::fs::mkdir(directory, mode);
    }
    match made {
        Err(Errno::EXIST) => refuse!("container with given ID already exists: {id}"),
        result => result.doing(|| format!("make directory {}", directory.display())),
    }
}

/// # Errors
/// An id that could lead out of the root directory, or that runc would not take.
pub(crate) fn validate_id(id: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    if id.is_empty() || id == "." || id == ".." || !id.bytes().all(allowed) {
        refuse!("invalid container id {id:?}: letters, digits and _ + - . are allowed");
    }
    if id.len() > 255 {
        refuse!(
            "invalid container id: it has {} characters, 255 are allowed",
            id.len()
        );
    }
    Ok(())
}

/// A container's directory under --root.
pub(crate) fn directory(root: &Path, id: &str) -> Result<PathBuf> {
    validate_id(id)?;
    Ok(root.join(id))
}

/// The cgroup that was recorded for the container in a directory. `None` if no cgroup was recorded,
/// or it is not below /sys/fs/cgroup.
pub(crate) fn linked_cgroup(directory: &Path) -> Option<PathBuf> {
    let link = rustix::fs::readlink(directory.join(CGROUP_LINK), Vec::new()).ok()?;
    let path = PathBuf::from(link.into_string().ok()?);
    let plain = path
        .components()
        .all(|part| !matches!(part, std::path::Component::ParentDir));
    (plain && path.parent()?.starts_with(crate::cgroup::MOUNT_POINT)).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_held_by_one_and_its_cgroup_is_known() {
        let root =
            std::env::temp_dir().join(format!("rrun-container-dir-test-{}", std::process::id()));
        let dir = ContainerDir::create(&root, "a").unwrap();
        assert!(ContainerDir::create(&root, "a").is_err());
        assert_eq!(linked_cgroup(dir.path()), None);
        dir.link_cgroup(Path::new("/sys/fs/cgroup/x/y")).unwrap();
        assert_eq!(
            linked_cgroup(dir.path()).as_deref(),
            Some(Path::new("/sys/fs/cgroup/x/y"))
        );
        // One who lost its directory leaves alone what stands there now.
        std::fs::rename(root.join("a"), root.join("b")).unwrap();
        std::fs::remove_file(root.join("b/cgroup")).unwrap();
        std::fs::remove_dir(root.join("b")).unwrap();
        let next = ContainerDir::create(&root, "a").unwrap();
        dir.remove().unwrap();
        assert!(next.is_linked().unwrap());
        next.remove().unwrap();
        assert!(matches!(
            ContainerDir::lock(&root.join("a"), || {}).unwrap(),
            Lock::Missing
        ));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_cgroup_outside_of_the_hierarchy_is_not_believed() {
        let root = std::env::temp_dir().join(format!("rrun-cgroup-test-{}", std::process::id()));
        for path in ["/sys/fs/cgroup", "/sys/fs/cgroup/a/../..", "/tmp/x", "x"] {
            let dir = ContainerDir::create(&root, "a").unwrap();
            dir.link_cgroup(Path::new(path)).unwrap();
            assert_eq!(linked_cgroup(dir.path()), None, "{path}");
            dir.remove().unwrap();
        }
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn ids_stay_below_the_root_directory() {
        for id in ["a", "0af-_.+Z", "..a"] {
            assert!(validate_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "a b", "ä", "a\n"] {
            assert!(validate_id(id).is_err(), "{id}");
        }
    }
}
