//! Network namespaces, pinned by a bind mount so that they live without a process in them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use sha2::{Digest, Sha256};

use crate::error::NetworkError;
use crate::link;
use crate::netlink::{Batch, Socket};

/// Enough for a few system calls and a netlink reply; the default of 2 MiB is only address space,
/// but mapping and unmapping it costs.
const STACK_BYTES: usize = 128 << 10;

/// The loopback is the first interface of every namespace.
const LOOPBACK_INDEX: u32 = 1;

/// What statfs(2) says of a file that stands for a namespace.
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

/// Where the pods' namespaces are pinned, each under a name of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespaces {
    dir: PathBuf,
    /// What the names of ours begin with.
    prefix: String,
}

impl Namespaces {
    /// Plugins, and daemons of theirs in pods, look for namespaces in `/run/netns`, ip-netns(8).
    /// In a directory that is also others' the names tell that they are those of the server with
    /// this `state`.
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

    /// Where `pod`'s is.
    pub fn of(&self, pod: &str) -> PathBuf {
        self.dir.join(format!("{}{pod}", self.prefix))
    }

    /// Every pod that one is there of.
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

/// Makes a new network namespace with its loopback up and pins it at `path`, a new file in a
/// directory that must be there.
///
/// A namespace can only be made by the thread that moves into it, and a thread of the async
/// runtime must not move: a thread of its own makes it and ends. Blocks for well under a
/// millisecond. If a step fails nothing stays at `path`; a namespace pinned there already is left
/// alone and is an error.
pub fn create(path: &Path) -> Result<(), NetworkError> {
    new_pin(path)?;
    let result = on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|errno| failed("make a network namespace for", path, errno.into()))?;
        bind(Path::new("/proc/thread-self/ns/net"), path)?;
        loopback_up()
    });
    if result.is_err() {
        // The first error is what counts.
        let _ = remove(path);
    }
    result
}

/// The file that a namespace is pinned at.
fn new_pin(path: &Path) -> Result<(), NetworkError> {
    // O_EXCL: a second pod never lands in the first one's namespace.
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

/// Of the namespace that the calling thread is in.
fn loopback_up() -> Result<(), NetworkError> {
    let mut socket = Socket::route()?;
    let mut batch = Batch::default();
    link::set_loopback_up(&mut batch, LOOPBACK_INDEX);
    socket.execute(&batch).map(drop)
}

/// Pins the network namespace of a process, `/proc/PID/ns/net`, at `path`, as [`create`] does with
/// a new one.
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
        // The first error is what counts.
        let _ = remove(path);
    }
    result
}

/// Unpins the namespace at `path`: unmounts it and removes the file. Right also when nothing is
/// there. With the last process and socket gone the kernel takes the namespace apart on a thread
/// of its own, which nobody waits for.
pub fn remove(path: &Path) -> Result<(), NetworkError> {
    loop {
        // A namespace mounted twice over the same file, by a crash at the wrong moment, goes too.
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // EINVAL: a file, but no mount on it.
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

/// Whether a network namespace is pinned at `path`; after a reboot, or a crash at the wrong moment,
/// it is an ordinary file.
pub fn is_pinned(path: &Path) -> bool {
    open(path).is_ok()
}

/// A non-blocking TCP socket, not connected, in the namespace pinned at `path`, or in ours. It
/// stays there whoever uses it. Blocks for well under a millisecond.
pub fn socket(path: Option<&Path>, family: AddressFamily) -> Result<OwnedFd, NetworkError> {
    let make = |path: &Path| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(family, SocketType::STREAM, flags, None)
            .map_err(|errno| failed("make a socket in the network namespace", path, errno.into()))
    };
    let Some(path) = path else {
        return make(Path::new("/proc/self/ns/net"));
    };
    let namespace = open(path)?;
    on_own_thread(|| {
        enter(namespace.as_fd(), path)?;
        make(path)
    })
}

/// Opens the namespace pinned at `path`.
pub(crate) fn open(path: &Path) -> Result<OwnedFd, NetworkError> {
    let action = "open the network namespace";
    let file = File::open(path).map_err(|source| failed(action, path, source))?;
    let found = rustix::fs::fstatfs(&file).map_err(|errno| failed(action, path, errno.into()))?;
    if found.f_type != NSFS_MAGIC {
        return Err(NetworkError::NotPinned {
            path: path.to_owned(),
        });
    }
    Ok(file.into())
}

/// Moves the calling thread, for good, into `namespace`, which was opened at `path`.
pub(crate) fn enter(namespace: BorrowedFd, path: &Path) -> Result<(), NetworkError> {
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| failed("enter the network namespace", path, errno.into()))
}

/// Runs `work` on a new thread, so that what it changes of itself ends with it.
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
    fn names_in_a_shared_directory_are_the_servers_own() {
        let names = |dir: &str, state: &str| Namespaces::new(dir.into(), Path::new(state));
        let own = names("/run/rrun/netns", "/run/rrun");
        assert_eq!(own.of("p"), Path::new("/run/rrun/netns/p"));
        let [one, other] = ["/run/rrun", "/run/other"].map(|state| names("/run/netns", state));
        assert!(one.of("p").starts_with("/run/netns"));
        assert_ne!(one.of("p"), other.of("p"));
    }
}
