//! The --root directory, which contains a directory for each container.
//!
//! The state of a container names hooks, processes and cgroups, on which rrun acts with the rights
//! of its caller. So no other user may choose the directory to which the path of --root leads. The
//! owner of the directory is not a proof: in a user namespace, every user can mount file systems in
//! which directories seem to belong to root. This module therefore checks every component of the
//! path, like sshd (StrictModes) and sudo do. A link of /proc, for example /proc/PID/root, can lead
//! into the mounts of another user.

use std::cell::Cell;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

use crate::error::{Context, Result, refuse};
use crate::namespaces::in_initial_user_namespace;

/// The maximum number of symbolic links in a path, as in the kernel.
const LINKS_MAX: usize = 40;

/// The kernel's user id for owners that have no id in the user namespace of the calling process.
const OVERFLOW_UID: u32 = 65_534;

/// The file system type of FUSE, from linux/magic.h.
const FUSE_SUPER_MAGIC: rustix::fs::FsWord = 0x6573_5546;

pub(crate) struct StateRoot {
    pub(crate) path: PathBuf,
    /// True if rrun acts on containers of every user (--any-owner).
    pub(crate) any_owner: bool,
    /// The directory at `path`, if it exists and has been checked.
    checked: Cell<Option<PassedDirectory>>,
}

/// A checked directory, in which no other user can replace the entries of rrun's caller and of root.
#[derive(Clone, Copy)]
struct PassedDirectory {
    device: u64,
    /// True if all users can create entries in the directory. They cannot replace the entries of
    /// others, because the sticky bit is set.
    is_shared: bool,
}

/// The root directory of the calling process, which rrun trusts like its own executable.
const ROOT: PassedDirectory = PassedDirectory {
    device: 0,
    is_shared: false,
};

impl StateRoot {
    pub(crate) fn new(path: PathBuf, any_owner: bool) -> StateRoot {
        StateRoot {
            path,
            any_owner,
            checked: Cell::new(None),
        }
    }

    /// Checks that no other user can choose the directory to which the path leads. If the directory
    /// does not exist, this function succeeds, and [`StateRoot::is_checked`] returns false.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.any_owner && self.checked.get().is_none() {
            self.checked.set(PathCheck::new(&self.path).run()?);
        }
        Ok(())
    }

    /// Returns whether the directory exists and has been checked.
    pub(crate) fn is_checked(&self) -> bool {
        self.checked.get().is_some()
    }

    /// Returns whether an unprivileged user can have mounted a file system at `path`, which is an
    /// entry of this directory with the attributes `stat`.
    pub(crate) fn is_users_mount(&self, path: &Path, stat: &Stat) -> Result<bool> {
        let place = self.checked.get().unwrap_or(ROOT);
        is_users_mount(place, path, stat)
    }
}

/// The check of the path of --root, one component after the other. Other users cannot change the
/// components that have already been checked.
struct PathCheck<'a> {
    root: &'a Path,
    /// The part of the path that has been checked. It contains no symbolic link.
    at: PathBuf,
    /// The directories in `at`.
    places: Vec<PassedDirectory>,
    /// The remaining components, in reverse order.
    rest: Vec<OsString>,
    links: usize,
}

impl<'a> PathCheck<'a> {
    fn new(root: &'a Path) -> PathCheck<'a> {
        let mut check = PathCheck {
            root,
            at: PathBuf::from("/"),
            places: Vec::new(),
            rest: Vec::new(),
            links: 0,
        };
        check.prepend(root);
        check
    }

    fn prepend(&mut self, path: &Path) {
        let name = |component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        };
        self.rest.extend(path.components().rev().filter_map(name));
        if path.is_absolute() {
            self.at = PathBuf::from("/");
            self.places.clear();
        }
    }

    /// Returns the directory at the end of the path, or `None` if it does not exist.
    fn run(mut self) -> Result<Option<PassedDirectory>> {
        while let Some(name) = self.rest.pop() {
            if name == ".." {
                self.at.pop();
                self.places.pop();
                continue;
            }
            let path = self.at.join(name);
            let stat = match rustix::fs::lstat(&path) {
                Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
                stat => stat.doing(|| format!("check {}", path.display()))?,
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Symlink => self.follow(&path, &stat)?,
                _ => self.enter(path, &stat)?,
            }
        }
        Ok(Some(self.place()))
    }

    fn place(&self) -> PassedDirectory {
        self.places.last().copied().unwrap_or(ROOT)
    }

    fn enter(&mut self, path: PathBuf, stat: &Stat) -> Result<()> {
        let mode = Mode::from_raw_mode(stat.st_mode);
        let is_sticky = mode.contains(Mode::SVTX);
        let is_writable =
            mode.contains(Mode::WOTH) || mode.contains(Mode::WGRP) && !is_callers_group(stat);
        let is_safe = is_trusted(stat.st_uid)
            && (!is_writable || is_sticky)
            && !is_users_mount(self.place(), &path, stat)?;
        if !is_safe {
            return self.refuse(&path, "another user owns this directory or can write to it");
        }
        self.at = path;
        self.places.push(PassedDirectory {
            device: stat.st_dev,
            is_shared: is_writable,
        });
        Ok(())
    }

    fn follow(&mut self, path: &Path, stat: &Stat) -> Result<()> {
        if self.place().is_shared && !is_trusted(stat.st_uid) {
            return self.refuse(path, "another user owns this symbolic link");
        }
        self.links += 1;
        // The target of a link in /proc can be another directory than the text of the link names.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_MAGICLINKS;
        let opened = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve);
        if self.links > LINKS_MAX || opened.is_err_and(|errno| errno == Errno::LOOP) {
            return self.refuse(
                path,
                "this symbolic link leads to itself, or through /proc to a file of a process",
            );
        }
        let target = rustix::fs::readlink(path, Vec::new())
            .doing(|| format!("read symbolic link {}", path.display()))?;
        self.prepend(Path::new(&OsString::from_vec(target.into_bytes())));
        Ok(())
    }

    fn refuse(&self, path: &Path, why: &str) -> Result<()> {
        refuse!(
            "--root {}: {}: {why}, and so can choose the states of containers; use a directory that only you can change, or use --any-owner if you trust the other user",
            self.root.display(),
            path.display()
        )
    }
}

/// Returns whether rrun trusts the user `uid`. In a user namespace, the node's root has no user id.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw() || uid == OVERFLOW_UID && !in_initial_user_namespace()
}

/// Returns whether the file belongs to the group of rrun's caller. Many users are the only
/// members of their group, which can write to their directories. This does not apply to the node's root.
fn is_callers_group(stat: &Stat) -> bool {
    stat.st_gid == getegid().as_raw() && (!geteuid().is_root() || !in_initial_user_namespace())
}

/// Returns whether an unprivileged user can have mounted a file system at `path`, which is in the
/// directory `place` and has the attributes `stat`. fusermount(1) lets users mount a FUSE file
/// system on their own directories. Such a file system chooses the owners of its files, and hides the
/// owner of the directory on which it is mounted.
fn is_users_mount(place: PassedDirectory, path: &Path, stat: &Stat) -> Result<bool> {
    if stat.st_dev == place.device {
        return Ok(false);
    }
    let kind = rustix::fs::statfs(path).doing(|| format!("check {}", path.display()))?;
    Ok(kind.f_type == FUSE_SUPER_MAGIC)
}
