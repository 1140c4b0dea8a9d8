//! Network namespaces. A bind mount pins each namespace. The namespace therefore continues to exist
//! while no process is in it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use sha2::{Digest, Sha256};

use crate::error::NetworkError;
use crate::link;
use crate::netlink::{Batch, Socket};
use rrun_kernel::namespace_limits::unshare;

/// The stack size of the threads that enter a network namespace. These threads make only a few
/// system calls and read a netlink reply. The kernel maps and unmaps this stack faster than the
/// default stack of 2 MiB.
const STACK_BYTES: usize = 128 << 10;

/// The index of the loopback interface. The loopback is the first interface of every network
/// namespace.
const LOOPBACK_INDEX: u32 = 1;

/// The file system type that statfs(2) reports for a file that represents a namespace.
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

/// The directory in which the pods' network namespaces are pinned. It contains one file for each
/// namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespaces {
    dir: PathBuf,
    /// The prefix of the file names of this server's namespaces.
    prefix: String,
}

impl Namespaces {
    /// Uses the directory `dir` for the namespaces of the server whose state directory is `state`.
    /// CNI plugins, and daemons that plugins run in pods, expect namespaces in `/run/netns`, see
    /// ip-netns(8). If `dir` is not inside `state`, other programs may also use `dir`. The file
    /// names of this server's namespaces then begin with a hash of `state`.
    pub fn new(dir: PathBuf, state: &Path) -> Self {
        let prefix = if dir.starts_with(state) {
            String::new()
        } else {
            let hash = Sha256::digest(state.as_os_str().as_encoded_bytes());
            let [a, b, c, d] = *hash.first_chunk().unwrap_or(&[0; 4]);
            format!("rrun-{a:02x}{b:02x}{c:02x}{d:02x}-")
        };
        Namespaces { dir, prefix }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the path of the pod's network namespace.
    pub fn of(&self, pod: &str) -> PathBuf {
        self.dir.join(format!("{}{pod}", self.prefix))
    }

    /// Returns the ids of all pods whose network namespaces are pinned in this directory.
    pub fn pods(&self) -> io::Result<Vec<String>> {
        let mut pods = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            if let Some(pod) = name
                .to_str()
                .and_then(|name| name.strip_prefix(&self.prefix))
            {
                pods.push(pod.to_owned());
            }
        }
        Ok(pods)
    }
}

/// Creates a network namespace, sets its loopback interface up, and pins the namespace at `path`.
/// The file `path` is created, but its directory must already exist.
///
/// When a thread creates a network namespace, the thread also moves into the namespace. A thread of
/// the async runtime must not move. For this reason, a separate thread creates the namespace and
/// then exits. This call blocks for much less than a millisecond. If a step fails, no file remains
/// at `path`. If a namespace is already pinned at `path`, this function returns an error and does
/// not change that namespace.
pub fn create(path: &Path) -> Result<(), NetworkError> {
    new_pin(path)?;
    let result = on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|errno| failed("create a network namespace for", path, errno.into()))?;
        bind(Path::new("/proc/thread-self/ns/net"), path)?;
        loopback_up()
    });
    if result.is_err() {
        // This function returns the first error and ignores an error of this clean-up.
        let _ = remove(path);
    }
    result
}

/// Creates the file at which a namespace is pinned.
fn new_pin(path: &Path) -> Result<(), NetworkError> {
    // O_EXCL ensures that a second pod never gets the namespace that is already pinned at `path`.
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(path)
        .map(drop)
        .map_err(|source| failed("create the pin of a network namespace", path, source))
}

fn bind(namespace: &Path, path: &Path) -> Result<(), NetworkError> {
    let (kind, data) = (None::<&str>, None::<&str>);
    mount(Some(namespace), path, kind, MsFlags::MS_BIND, data)
        .map_err(|errno| failed("pin a network namespace at", path, errno.into()))
}

/// Sets the loopback interface up in the network namespace of the calling thread.
fn loopback_up() -> Result<(), NetworkError> {
    let mut socket = Socket::route()?;
    let mut batch = Batch::default();
    link::set_loopback_up(&mut batch, LOOPBACK_INDEX);
    socket.execute(&batch).map(drop)
}

/// Pins a network namespace at `path`, and sets the loopback interface of that namespace up.
/// `namespace` is the file `/proc/PID/ns/net` of a process in the namespace. As in [`create`], the
/// file `path` must not exist yet, and no file remains at `path` if a step fails.
pub fn pin(namespace: &Path, path: &Path) -> Result<(), NetworkError> {
    new_pin(path)?;
    let result = bind(namespace, path).and_then(|()| {
        let namespace = open(path)?;
        on_own_thread(|| {
            enter(namespace.as_fd(), path)?;
            loopback_up()
        })
    });
    if result.is_err() {
        // This function returns the first error and ignores an error of this clean-up.
        let _ = remove(path);
    }
    result
}

/// Unmounts the namespace that is pinned at `path`, and removes the file. A file that does not
/// exist is not an error. If no process and no socket uses the namespace any more, a kernel thread
/// destroys the namespace. `remove` does not wait for the kernel thread.
pub fn remove(path: &Path) -> Result<(), NetworkError> {
    loop {
        // A crash can leave two mounts on the same file. The loop removes both mounts.
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // EINVAL means that no namespace is mounted on the file.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
            Err(errno) => {
                return Err(failed("unmount the network namespace", path, errno.into()));
            }
        }
    }
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed(
            "remove the pin of a network namespace",
            path,
            source,
        )),
        _ => Ok(()),
    }
}

/// Returns whether a network namespace is pinned at `path`. After a reboot or a crash, `path` can
/// be an ordinary file without a namespace.
pub fn is_pinned(path: &Path) -> bool {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .and_then(rustix::fs::fstatfs)
        .is_ok_and(|found| found.f_type == NSFS_MAGIC)
}

/// Opens a non-blocking, unconnected TCP socket in the namespace pinned at `path`. If `path` is
/// `None`, the socket is opened in the server's own namespace. The socket remains in its namespace,
/// even if a thread in another namespace uses the socket. This call blocks for much less than a
/// millisecond.
pub fn socket(path: Option<&Path>, family: AddressFamily) -> Result<OwnedFd, NetworkError> {
    let open_in = |path: &Path| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(family, SocketType::STREAM, flags, None)
            .map_err(|errno| failed("open a socket in the network namespace", path, errno.into()))
    };
    let Some(path) = path else {
        return open_in(Path::new("/proc/self/ns/net"));
    };
    let namespace = open(path)?;
    on_own_thread(|| {
        enter(namespace.as_fd(), path)?;
        open_in(path)
    })
}

/// Opens the network namespace that is pinned at `path`. A process in the namespace can hold a lease
/// on the file (F_SETLEASE in fcntl(2)). Without O_NONBLOCK, open(2) would then wait 45 s. With
/// O_NONBLOCK, open(2) fails with EAGAIN.
pub(crate) fn open(path: &Path) -> Result<OwnedFd, NetworkError> {
    let action = "open the network namespace";
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| failed(action, path, errno.into()))?;
    let found = rustix::fs::fstatfs(&file).map_err(|errno| failed(action, path, errno.into()))?;
    if found.f_type != NSFS_MAGIC {
        return Err(NetworkError::NotPinned {
            path: path.to_owned(),
        });
    }
    Ok(file)
}

/// Moves the calling thread permanently into `namespace`, which was opened at `path`.
pub(crate) fn enter(namespace: BorrowedFd, path: &Path) -> Result<(), NetworkError> {
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| failed("enter the network namespace", path, errno.into()))
}

/// Runs `work` on a new thread, which then exits. Changes that `work` makes to this thread, such as
/// a move into another network namespace, do not affect other threads.
pub(crate) fn on_own_thread<T: Send>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    std::thread::scope(|scope| {
        thread()
            .spawn_scoped(scope, work)
            .map_err(NetworkError::Thread)?
            .join()
            .unwrap_or_else(|_| Err(NetworkError::ThreadDied))
    })
}

fn thread() -> std::thread::Builder {
    std::thread::Builder::new()
        .name("netns".into())
        .stack_size(STACK_BYTES)
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> NetworkError {
    NetworkError::Namespace {
        action,
        path: PathBuf::from(path),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_shared_directory_each_server_has_different_file_names() {
        let names = |dir: &str, state: &str| Namespaces::new(dir.into(), Path::new(state));
        let own = names("/run/rrun/netns", "/run/rrun");
        assert_eq!(own.of("p"), Path::new("/run/rrun/netns/p"));
        let [one, other] = ["/run/rrun", "/run/other"].map(|state| names("/run/netns", state));
        assert!(one.of("p").starts_with("/run/netns"));
        assert_ne!(one.of("p"), other.of("p"));
    }
}
