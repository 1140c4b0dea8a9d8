//! Paths inside a container's root file system, which is hostile ground.
//!
//! Nothing here takes a path as a string from the host's root. Every look-up is done by
//! the kernel with openat2(2) and RESOLVE_IN_ROOT, so that a symbolic link, absolute or
//! full of `..`, ends inside the container; what is then mounted or changed is the
//! descriptor that the look-up returned, not the name, which may mean something else by
//! now. Directories are made by `pathrs`, which holds to the same rule at every step.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, RawMode, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::error::{Context, Error, Reason as _, Result, refuse};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

/// As many links are followed as the kernel itself would follow.
const MAX_LINKS: usize = 40;

/// How often a look-up is tried again that a rename disturbed.
const LOOKUP_RETRIES: usize = 128;

/// The root of a container's file system, as a descriptor.
pub(crate) struct Rootfs {
    fd: OwnedFd,
    /// What is mounted of the kernel's own, /proc and /sys, and where.
    kernel_mounts: Vec<(PathBuf, OwnedFd)>,
    /// Mounts that are to be read-only once everything is in place, and what they are.
    read_only_later: Vec<(String, OwnedFd)>,
}

/// What is to be found, or made, at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MountTarget {
    Directory,
    /// Anything that is no directory; a missing one is made as an empty file.
    File,
}

impl AsFd for Rootfs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Rootfs {
    pub(crate) fn new(fd: OwnedFd) -> Rootfs {
        Rootfs {
            fd,
            kernel_mounts: Vec::new(),
            read_only_later: Vec::new(),
        }
    }

    /// Takes note that `mount` is attached at `path`; it is the kernel's own or not.
    pub(crate) fn attached(&mut self, path: &Path, mount: OwnedFd, is_kernels: bool) {
        self.kernel_mounts
            .retain(|(place, _)| !place.starts_with(path));
        if is_kernels {
            self.kernel_mounts.push((path.to_owned(), mount));
        }
    }

    /// Takes note of a mount to be made read-only by [`Rootfs::make_read_only`].
    pub(crate) fn read_only_later(&mut self, sentence: String, mount: OwnedFd) {
        self.read_only_later.push((sentence, mount));
    }

    /// For when nothing is written any more into what was mounted.
    pub(crate) fn make_read_only(&self) -> Result<()> {
        for (sentence, mount) in &self.read_only_later {
            mount_setattr(mount.as_fd(), false, &MountAttr::READ_ONLY)
                .doing(|| format!("{sentence}: make it read-only"))?;
        }
        Ok(())
    }

    /// Opens what is to be protected at `path`. In /proc and /sys that is looked for in what
    /// was mounted there, not in what a rename in the container's files may have put in its
    /// place since (CVE-2019-19921).
    pub(crate) fn open_to_protect(&self, path: &Path) -> std::result::Result<OwnedFd, Errno> {
        let within = self.kernel_mounts.iter().rev().find_map(|(place, mount)| {
            let rest = path.strip_prefix(place).ok()?;
            (!rest.as_os_str().is_empty()).then_some((mount, rest))
        });
        match within {
            Some((mount, rest)) => open_in(mount, rest, OFlags::PATH, ResolveFlags::empty()),
            None => self.open(path, OFlags::PATH),
        }
    }

    /// Opens what is at `path`, links followed, with openat2(2).
    pub(crate) fn open(&self, path: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
        open_in(&self.fd, path, flags, ResolveFlags::empty())
    }

    /// The same, and no link of any kind is followed.
    fn open_without_links(
        &self,
        path: &Path,
        flags: OFlags,
    ) -> std::result::Result<OwnedFd, Errno> {
        open_in(&self.fd, path, flags, ResolveFlags::NO_SYMLINKS)
    }

    /// A descriptor (O_PATH) of what is to be mounted upon. What is missing is made, in the
    /// place where the links that do exist lead.
    pub(crate) fn mount_target(&self, path: &Path, target: MountTarget) -> Result<OwnedFd> {
        let found = match self.open(path, OFlags::PATH) {
            Err(Errno::NOENT) => self.make(path, target),
            result => result.doing(|| format!("open {} in the container", path.display())),
        }?;
        let is_directory = file_type(&found, path)? == FileType::Directory;
        match target {
            MountTarget::Directory if !is_directory => {
                refuse!("{} in the container is not a directory", path.display())
            }
            MountTarget::File if is_directory => {
                refuse!("{} in the container is a directory", path.display())
            }
            _ => Ok(found),
        }
    }

    /// The same for a mount that others rely on, as /proc: no link on the way to it.
    pub(crate) fn plain_directory(&self, path: &Path) -> Result<OwnedFd> {
        match self.open_without_links(path, OFlags::PATH) {
            Err(Errno::NOENT) => {
                self.make_directory(path)?;
                self.open_without_links(path, OFlags::PATH | OFlags::DIRECTORY)
                    .doing(|| format!("open {} in the container", path.display()))
            }
            Err(Errno::LOOP) => refuse!(
                "{} in the container is a symbolic link, and no place for this mount",
                path.display()
            ),
            result => {
                let found = result.doing(|| format!("open {} in the container", path.display()))?;
                if file_type(&found, path)? != FileType::Directory {
                    refuse!("{} in the container is not a directory", path.display());
                }
                Ok(found)
            }
        }
    }

    /// Makes a directory and those that lead to it; one that exists already is fine.
    fn make_directory(&self, path: &Path) -> Result<OwnedFd> {
        use std::os::unix::fs::PermissionsExt as _;
        if let Some(made) = self.make_last(path)? {
            return Ok(made);
        }
        let path = self.follow(path)?;
        pathrs::RootRef::from_fd(self.fd.as_fd())
            .mkdir_all(&path, &std::fs::Permissions::from_mode(0o755))
            .map(OwnedFd::from)
            .map_err(|error| {
                Error::new(format!(
                    "make directory {} in the container: {error}",
                    path.display()
                ))
            })
    }

    /// Makes a directory and its missing parents, name by name. Each name is opened below a
    /// descriptor and no link is followed, so that it can't lead elsewhere. Needs no /proc, unlike
    /// [`Rootfs::make_directory`]. Returns the path of the directory without links.
    ///
    /// # Errors
    /// Also if the path leads through a link in /proc into a process.
    pub(crate) fn make_working_directory(&self, path: &Path) -> Result<PathBuf> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => {}
            Ok(_) => return Ok(path.to_owned()),
            Err(errno) => return Err(Error::new(errno.reason())),
        }
        let path = self.follow(path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut reached: Option<OwnedFd> = None;
        for name in components_backwards(&path).iter().rev() {
            let directory = reached.as_ref().unwrap_or(&self.fd);
            let doing = || format!("make directory {}", Path::new(name).display());
            let next = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
                Err(Errno::NOENT) => {
                    match rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o777)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(errno).doing(doing),
                    }
                    rustix::fs::openat(directory, name, flags, Mode::empty())
                }
                next => next,
            };
            reached = Some(next.doing(doing)?);
        }
        Ok(path)
    }

    /// The most usual case, in three system calls: only the last directory is missing.
    fn make_last(&self, path: &Path) -> Result<Option<OwnedFd>> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(None);
        };
        let Ok(parent) = self.open(parent, OFlags::PATH | OFlags::DIRECTORY) else {
            return Ok(None);
        };
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            // A link that leads nowhere, perhaps.
            Err(Errno::EXIST) => return Ok(None),
            Err(errno) => {
                return Err(errno)
                    .doing(|| format!("make directory {} in the container", path.display()));
            }
        }
        // A single name below a descriptor, and no link: this can not lead elsewhere.
        rustix::fs::openat(
            &parent,
            name,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing(|| format!("open {} in the container", path.display()))
        .map(Some)
    }

    /// The directory that `path` lies in, made if need be, and its name in there.
    pub(crate) fn parent(&self, path: &Path) -> Result<(OwnedFd, OsString)> {
        let Some(name) = path.file_name() else {
            refuse!("{} names no file in the container", path.display());
        };
        let parent = path.parent().unwrap_or_else(|| Path::new("/"));
        let directory = match self.open(parent, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => self.make_directory(parent)?,
            result => result.doing(|| format!("open {} in the container", parent.display()))?,
        };
        Ok((directory, name.to_owned()))
    }

    fn make(&self, path: &Path, target: MountTarget) -> Result<OwnedFd> {
        if target == MountTarget::Directory {
            return self.make_directory(path);
        }
        let path = self.follow(path)?;
        let (directory, name) = self.parent(&path)?;
        // O_NOFOLLOW and O_EXCL: if a link has appeared there since, this fails.
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&directory, &name, flags, Mode::from_raw_mode(0o644)) {
            Ok(_) | Err(Errno::EXIST) => {}
            Err(errno) => {
                return Err(errno)
                    .doing(|| format!("make file {} in the container", path.display()));
            }
        }
        rustix::fs::openat(
            &directory,
            &name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing(|| format!("open {} in the container", path.display()))
    }

    /// Where `path` leads when every link on it is followed, of which some may point to
    /// what does not exist yet (an image's /etc/resolv.conf often does).
    ///
    /// What comes out is a path and may be overtaken by a rename. That is harmless: it is
    /// used to make things, by look-ups that stay in the root themselves.
    fn follow(&self, path: &Path) -> Result<PathBuf> {
        let mut ahead: Vec<OsString> = components_backwards(path);
        let mut reached = PathBuf::from("/");
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            if name.as_bytes() == b".." {
                reached.pop();
                continue;
            }
            let next = reached.join(&name);
            let link = self
                .open(&next, OFlags::PATH | OFlags::NOFOLLOW)
                .and_then(|fd| rustix::fs::readlinkat(fd, "", Vec::new()));
            match link {
                Ok(link) => {
                    links += 1;
                    if links > MAX_LINKS {
                        refuse!("{} in the container: too many links", path.display());
                    }
                    let link = Path::new(std::ffi::OsStr::from_bytes(link.as_bytes()));
                    if link.is_absolute() {
                        reached = PathBuf::from("/");
                    }
                    ahead.extend(components_backwards(link));
                }
                // No link, or nothing there yet.
                Err(Errno::INVAL | Errno::NOENT) => reached = next,
                Err(errno) => {
                    return Err(errno)
                        .doing(|| format!("open {} in the container", next.display()));
                }
            }
        }
        Ok(reached)
    }
}

fn open_in(
    root: &OwnedFd,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> std::result::Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC;
    let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let mut again = 0;
    loop {
        match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
            // The kernel could not rule out that a rename elsewhere was an attack on
            // this look-up; it asks to try again.
            Err(Errno::AGAIN) if again < LOOKUP_RETRIES => again += 1,
            result => return result,
        }
    }
}

fn components_backwards(path: &Path) -> Vec<OsString> {
    path.components()
        .rev()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            _ => None,
        })
        .collect()
}

fn file_type(fd: &OwnedFd, path: &Path) -> Result<FileType> {
    let stat: Stat = rustix::fs::fstat(fd).doing(|| format!("stat {}", path.display()))?;
    Ok(FileType::from_raw_mode(stat.st_mode as RawMode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_end_inside_the_root_even_where_nothing_is_yet() {
        let base = std::env::temp_dir().join(format!("rrun-rootfs-test-{}", std::process::id()));
        let root = base.join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        let link = |to: &str, at: &str| std::os::unix::fs::symlink(to, root.join(at)).unwrap();
        link("../../../run/resolv.conf", "etc/resolv.conf");
        link("/outside", "abs");
        link("loop", "loop");
        let rootfs = Rootfs::new(
            rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap(),
        );
        let make = |path: &str, target| rootfs.mount_target(Path::new(path), target);

        make("/etc/resolv.conf", MountTarget::File).unwrap();
        assert!(root.join("run/resolv.conf").is_file());
        make("/abs/deep", MountTarget::Directory).unwrap();
        assert!(root.join("outside/deep").is_dir());
        assert!(make("/loop/x", MountTarget::Directory).is_err());
        assert!(make("/etc", MountTarget::File).is_err());
        assert!(rootfs.plain_directory(Path::new("/abs")).is_err());
        assert!(rootfs.plain_directory(Path::new("/proc")).is_ok());
        assert!(!base.join("run").exists() && !Path::new("/outside").exists());
        std::fs::remove_dir_all(&base).unwrap();
    }
}
