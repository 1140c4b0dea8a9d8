//! Overlays for pods with a user namespace of their own: layers and writable layer are mounted
//! with that namespace's ids, so that the files of every image belong to the right users and
//! nothing is copied or chowned. Overlayfs takes such layers since Linux 5.19.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags};

use crate::selinux::label::Label;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::clone3::{Cloned, clone3};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

/// An overlay, attached nowhere. `lower` is uppermost first; `writable` has `upper` and `work`,
/// without it the overlay is read-only and wants two layers; `users` is the user namespace, if the
/// ids are to be mapped; `label` the SELinux label of its files.
/// `scratch` is any directory. Blocks.
///
/// It is put together in a mount namespace of a thread's own, which takes the layers' mounts along
/// when it ends: there is nothing to unmount, also after a kill.
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
    std::fs::create_dir("overlay").during(|| "make a directory in a tmpfs".to_owned())?;
    if let Some(users) = users {
        // What overlayfs makes, it makes as who mounted it.
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
    .during(|| format!("overlay of {} layers with mapped ids", lower.len()))?;
    if writable.is_some() {
        check_writable()?;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, "overlay", flags).during(|| "take the overlay along".to_owned())
}

/// Takes this thread into a mount namespace of its own, and there into a tmpfs on `scratch`.
fn enter_scratch(scratch: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(io::Error::from)
        .during(|| "make a mount namespace".to_owned())?;
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    rustix::mount::mount_change("/", private).during(|| "keep its mounts in it".to_owned())?;
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
    // O_PATH calls no driver.
    let here = rustix::fs::open(scratch, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .during(|| format!("open {}", scratch.display()))?;
    // This thread's working directory only: CLONE_NEWNS implies CLONE_FS, unshare(2).
    rustix::process::fchdir(&here).during(|| format!("go to {}", scratch.display()))
}

/// Fails if overlayfs fell back to read-only, which it does when it can't use the writable layer.
fn check_writable() -> Result<()> {
    let is_readonly = rustix::fs::statvfs("overlay")
        .during(|| "look at the overlay".to_owned())?
        .f_flag
        .contains(rustix::fs::StatVfsMountFlags::RDONLY);
    if is_readonly {
        return Err(Error::internal(
            "overlayfs does not take the writable layer with mapped ids, the kernel's log may say why",
        ));
    }
    Ok(())
}

/// Mounts a directory, its files' ids mapped, on a new one here.
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
    let tree = rustix::mount::open_tree(CWD, dir, flags).during(what)?;
    if let Some(users) = users {
        let mapped = MountAttr::default().with_ids_of(users.namespace.as_fd());
        mount_setattr(tree.as_fd(), false, &mapped).during(what)?;
    }
    attach(tree.as_fd(), Path::new(name)).during(what)
}

/// Puts a detached mount on a path.
pub(crate) fn attach(tree: BorrowedFd<'_>, target: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", CWD, target, flags)
        .during(|| format!("mount it on {}", target.display()))
}

/// A pod's user namespace.
pub(crate) struct Users {
    pub namespace: OwnedFd,
    /// The node's ids of its root.
    pub root: (u32, u32),
}

impl Users {
    /// Of a process in it.
    pub(crate) fn of(pid: i32, root: (u32, u32)) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/user");
        // The kernel's: a file of /proc.
        let namespace = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .during(|| format!("open the pod's user namespace {path}"))?;
        Ok(Users { namespace, root })
    }
}

/// Runs `work` with what it makes belonging to this user and group of the node: on a mount with
/// mapped ids the node's root is nobody, who can own nothing.
pub(crate) fn as_owner<T>(owner: (u32, u32), work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = become_owner(owner);
    let done = before.and_then(|before| {
        let done = work();
        become_owner(before)?;
        done
    });
    done.during(|| format!("as the owner {}:{}", owner.0, owner.1))
}

/// Changes whose the files are that the calling thread makes, setfsuid(2), and nothing else;
/// returns whose they were.
fn become_owner((uid, gid): (u32, u32)) -> Result<(u32, u32)> {
    let gid = nix::unistd::setfsgid(nix::unistd::Gid::from_raw(gid));
    let uid = nix::unistd::setfsuid(nix::unistd::Uid::from_raw(uid));
    // Whoever is not root loses the capabilities that are about files; not us.
    let mut sets = rustix::thread::capabilities(None).during(|| "read capabilities".to_owned())?;
    sets.effective = sets.permitted;
    rustix::thread::set_capabilities(None, sets).during(|| "keep capabilities".to_owned())?;
    Ok((uid.as_raw(), gid.as_raw()))
}

/// Whether this kernel and the file system under `root` can do that; tried, with a user namespace
/// of a process that does nothing else. `empty` is an empty layer. Blocks.
pub(crate) fn probe(root: &Path, empty: &Path) -> Result<()> {
    let dir = root.join("idmap-probe");
    let made = (|| {
        for part in ["upper", "work", "scratch"] {
            crate::sandbox::files::private_dir(&dir.join(part))?;
        }
        let users = Users {
            namespace: throw_away_users().during(|| "make a user namespace".to_owned())?,
            root: (65536, 65536),
        };
        let lower = [empty.to_owned()];
        let scratch = dir.join("scratch");
        overlay(&lower, Some(&dir), Some(&users), None, &scratch).map(drop)
    })();
    crate::sandbox::files::remove_tree(&dir)?;
    made
}

/// A user namespace that lives as long as its descriptor.
fn throw_away_users() -> io::Result<OwnedFd> {
    let flags = u64::try_from(libc::CLONE_NEWUSER).unwrap_or_default();
    // SAFETY: the child makes no calls but prctl(2), pause(2) and _exit(2), which are safe in the
    // copy of a process with several threads.
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
