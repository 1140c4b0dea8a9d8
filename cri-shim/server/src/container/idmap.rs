//! Overlays for pods that have their own user namespace.
//!
//! The image's layers and the writable layer become id-mapped mounts, mount_setattr(2), with the id
//! mappings of the pod's user namespace. In the pod, the files of every image therefore belong to
//! the right users. No file is copied or changed. Overlayfs supports id-mapped mounts as layers
//! since Linux 5.19.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags};

use crate::selinux::label::Label;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::clone3::{Cloned, clone3};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};
use rrun_kernel::namespace_limits::{beyond_limit, unshare};

/// Returns a detached overlay mount. `lower` lists the layers, uppermost first. `writable` is the
/// directory of `upper` and `work`. If `writable` is `None`, the overlay is read-only and needs at
/// least two layers. `users` is the user namespace with the id mappings for the layers. `label` is
/// the SELinux label of the overlay's files. `scratch` can be any existing directory: it is only a
/// mount point in a private mount namespace. This call blocks.
///
/// A temporary thread assembles the overlay in its own mount namespace. When the thread exits, the
/// kernel removes this namespace together with the layers' mounts. So none of the layers' mounts
/// remains, even if the server is killed.
pub(crate) fn overlay(
    lower: &[PathBuf],
    writable: Option<&Path>,
    users: Option<&Users>,
    label: Option<&Label>,
    scratch: &Path,
) -> Result<OwnedFd> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("idmap".into())
            .spawn_scoped(scope, || assemble(lower, writable, users, label, scratch))
            .during(|| "start a thread".to_owned())?;
        thread
            .join()
            .unwrap_or_else(|_| Err(Error::internal("the mounting thread panicked")))
    })
}

fn assemble(
    lower: &[PathBuf],
    writable: Option<&Path>,
    users: Option<&Users>,
    label: Option<&Label>,
    scratch: &Path,
) -> Result<OwnedFd> {
    enter_scratch(scratch)?;
    let mut names = Vec::with_capacity(lower.len());
    for (number, layer) in lower.iter().enumerate() {
        let name = number.to_string();
        mapped(layer, &name, users)?;
        names.push(name);
    }
    let mut data = format!("lowerdir={}", names.join(":"));
    if let Some(writable) = writable {
        mapped(writable, "w", users)?;
        data += ",upperdir=w/upper,workdir=w/work,volatile";
    }
    if let Some(label) = label {
        data += &label.as_mount_option();
    }
    std::fs::create_dir("overlay").during(|| "create the overlay's mount point".to_owned())?;
    if let Some(users) = users {
        // Overlayfs creates its internal files with the file system ids of the thread that mounts
        // it. On an id-mapped mount, only ids with a mapping can own files. This thread therefore
        // needs the ids of the user namespace's root.
        become_owner(users.root)?;
    }
    mount(
        Some("overlay"),
        "overlay",
        Some("overlay"),
        MsFlags::empty(),
        Some(data.as_str()),
    )
    .map_err(io::Error::from)
    .during(|| format!("mount an overlay of {} layers with mapped ids", lower.len()))?;
    if writable.is_some() {
        check_writable()?;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    beyond_limit(|| rustix::mount::open_tree(CWD, "overlay", flags))
        .during(|| "clone the overlay's mount".to_owned())
}

/// Moves this thread into a new mount namespace, and mounts a tmpfs on `scratch` there. The tmpfs
/// becomes the working directory.
fn enter_scratch(scratch: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).during(|| "create a mount namespace".to_owned())?;
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    rustix::mount::mount_change("/", private)
        .during(|| "make all mounts of the new mount namespace private".to_owned())?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("layers"),
        scratch,
        Some("tmpfs"),
        flags,
        Some("mode=0700"),
    )
    .map_err(io::Error::from)
    .during(|| format!("mount a tmpfs on {}", scratch.display()))?;
    // O_PATH prevents the kernel from calling a driver, even if the path leads to a device.
    let here = rustix::fs::open(scratch, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .during(|| format!("open {}", scratch.display()))?;
    // fchdir changes only the working directory of this thread, because CLONE_NEWNS implies
    // CLONE_FS, unshare(2).
    rustix::process::fchdir(&here)
        .during(|| format!("change the working directory to {}", scratch.display()))
}

/// Returns an error if the overlay is mounted read-only. Overlayfs mounts itself read-only if it
/// can't use the writable layer.
fn check_writable() -> Result<()> {
    let is_readonly = rustix::fs::statvfs("overlay")
        .during(|| "query the overlay's mount flags".to_owned())?
        .f_flag
        .contains(rustix::fs::StatVfsMountFlags::RDONLY);
    if is_readonly {
        return Err(Error::internal(
            "overlayfs refused to use the id-mapped mount of the writable layer; see the kernel's log",
        ));
    }
    Ok(())
}

/// Creates the directory `name` in the working directory, and mounts `dir` on it. If `users` is
/// set, the mount is id-mapped with the mappings of that user namespace.
fn mapped(dir: &Path, name: &str, users: Option<&Users>) -> Result<()> {
    let what = || {
        format!(
            "mount the layer {} (with mapped ids: {})",
            dir.display(),
            users.is_some()
        )
    };
    std::fs::create_dir(name).during(what)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = beyond_limit(|| rustix::mount::open_tree(CWD, dir, flags)).during(what)?;
    if let Some(users) = users {
        let mapped = MountAttr::default().with_ids_of(users.namespace.as_fd());
        mount_setattr(tree.as_fd(), false, &mapped).during(what)?;
    }
    attach(tree.as_fd(), Path::new(name)).during(what)
}

/// Attaches a detached mount to a path.
pub(crate) fn attach(tree: BorrowedFd<'_>, target: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", CWD, target, flags)
        .during(|| format!("attach the mount to {}", target.display()))
}

/// A pod's user namespace.
pub(crate) struct Users {
    pub namespace: OwnedFd,
    /// The user id and the group id that the root of the user namespace has on the node.
    pub root: (u32, u32),
}

impl Users {
    /// Opens the user namespace of the process `pid`.
    pub(crate) fn of(pid: i32, root: (u32, u32)) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/user");
        // The kernel's procfs provides this file, so opening it by its path is safe.
        let namespace = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .during(|| format!("open the pod's user namespace {path}"))?;
        Ok(Users { namespace, root })
    }
}

/// Runs `work` with the file system ids `owner`, which are ids on the node. The files that `work`
/// creates then belong to `owner`. On an id-mapped mount, the node's root has no mapping, so `work`
/// can't create files as root.
pub(crate) fn as_owner<T>(owner: (u32, u32), work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = become_owner(owner);
    let done = before.and_then(|before| {
        let done = work();
        become_owner(before)?;
        done
    });
    done.during(|| {
        format!(
            "create files with the file system ids {}:{}",
            owner.0, owner.1
        )
    })
}

/// Sets the file system user and group id of the calling thread, setfsuid(2). The thread's new
/// files belong to these ids. Returns the thread's previous file system user and group id.
fn become_owner((uid, gid): (u32, u32)) -> Result<(u32, u32)> {
    let gid = nix::unistd::setfsgid(nix::unistd::Gid::from_raw(gid));
    let uid = nix::unistd::setfsuid(nix::unistd::Uid::from_raw(uid));
    // When the fsuid changes from 0 to another id, the kernel reduces the effective capabilities,
    // capabilities(7). For example, it removes CAP_DAC_OVERRIDE. This function restores the
    // effective capabilities.
    let mut sets = rustix::thread::capabilities(None).during(|| "read capabilities".to_owned())?;
    sets.effective = sets.permitted;
    rustix::thread::set_capabilities(None, sets).during(|| "keep capabilities".to_owned())?;
    Ok((uid.as_raw(), gid.as_raw()))
}

/// Checks that this kernel and the file system under `root` support overlays on id-mapped mounts.
/// The check mounts an overlay with a temporary user namespace. `empty` is the directory of an
/// empty layer. This call blocks.
pub(crate) fn probe(root: &Path, empty: &Path) -> Result<()> {
    let dir = root.join("idmap-probe");
    let made = (|| {
        for part in ["upper", "work", "scratch"] {
            crate::sandbox::files::private_dir(&dir.join(part))?;
        }
        let users = Users {
            namespace: throw_away_users().during(|| "create a user namespace".to_owned())?,
            root: (65536, 65536),
        };
        let lower = [empty.to_owned()];
        let scratch = dir.join("scratch");
        overlay(&lower, Some(&dir), Some(&users), None, &scratch).map(drop)
    })();
    crate::sandbox::files::remove_tree(&dir)?;
    made
}

/// Creates a user namespace that exists as long as its descriptor is open.
fn throw_away_users() -> io::Result<OwnedFd> {
    let flags = u64::try_from(libc::CLONE_NEWUSER).unwrap_or_default();
    // SAFETY: the child is a copy of a process with several threads. The child calls only
    // prctl(2), pause(2) and _exit(2), which are safe in such a copy.
    match unsafe { clone3(flags, None) }? {
        Cloned::Child => {
            // SAFETY: as above.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::pause();
                libc::_exit(0)
            }
        }
        Cloned::Parent { pid, .. } => {
            let opened = map_and_open(pid);
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
            nix::sys::wait::waitpid(pid, None)?;
            opened
        }
    }
}

fn map_and_open(pid: i32) -> io::Result<OwnedFd> {
    for name in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{pid}/{name}"), "0 65536 65536")?;
    }
    Ok(std::fs::File::open(format!("/proc/{pid}/ns/user"))?.into())
}
