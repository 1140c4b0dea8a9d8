//! Path lookups inside a container's root file system, whose content can come from an attacker.
//!
//! This module never resolves a path of the container from the host's root. rrun resolves every path
//! with the container's root as `/` ([`rrun_kernel::in_root`]). Even an absolute symbolic link or a
//! link with `..` ends inside the container. After the lookup, rrun uses the returned descriptor
//! instead of the path, because the path can lead to another file after a rename. rrun creates
//! directories with the crate `pathrs`, which follows the same rules for each directory.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, StatxFlags, statx};
use rustix::io::Errno;

use crate::error::{Context, Error, Reason as _, Result, refuse};
use crate::process::null_device::is_null_device;
use rrun_kernel::in_root;
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

const DEV: &str = "/dev";

/// The maximum number of symbolic links that rrun follows in a path. The kernel has the same limit.
const MAX_LINKS: usize = 40;

/// The maximum number of path components that rrun looks up to follow the links in a path. A path
/// without `..` never needs so many lookups, because `MAX_LINKS` and `PATH_MAX` limit it.
const MAX_LOOKUPS: usize = 1 << 17;

/// The maximum length of a path that the kernel accepts, with the zero byte at its end.
const PATH_MAX: usize = 4096;

/// The root directory of a container's file system, as a descriptor.
pub(crate) struct Rootfs {
    fd: OwnedFd,
    /// The mounts of the kernel's own files, such as /proc and /sys, by path.
    kernel_mounts: BTreeMap<PathBuf, OwnedFd>,
    /// The root directory, if rrun attaches mounts in this file system.
    root: Option<FileId>,
    /// The directory in which rrun creates the files of /dev. `None` until this directory is known.
    dev: Option<FileId>,
    /// The mounts that become read-only after all mounts are attached, each with a description for
    /// error messages.
    read_only_later: Vec<(String, OwnedFd)>,
}

/// The device number of a file's file system, and the file's inode number.
#[derive(Clone, Copy, PartialEq, Eq)]
struct FileId(u64, u64);

impl FileId {
    fn of(stat: &Stat) -> FileId {
        FileId(stat.st_dev, stat.st_ino)
    }
}

/// A file or directory that rrun masks or makes read-only.
pub(crate) enum Protected {
    /// The root directory. A mount on the root directory would not affect the container's first
    /// process, and would hide all later mounts from the processes that `exec` creates.
    Root,
    Below(OwnedFd),
}

/// The kind of file that a mount requires at its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MountTarget {
    Directory,
    /// Any file that is not a directory. If the file is missing, rrun creates an empty file.
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
            kernel_mounts: BTreeMap::new(),
            root: None,
            dev: None,
            read_only_later: Vec::new(),
        }
    }

    /// Returns the root of a container to which rrun adds mounts. Mounts on the root directory are
    /// refused. Such a mount would not be the root of the container's first process, but it would
    /// be the root of processes that `exec` creates.
    pub(crate) fn of_new_container(fd: OwnedFd) -> Result<Rootfs> {
        let stat = rustix::fs::fstat(&fd).doing(|| "stat the container's root directory")?;
        let mut rootfs = Rootfs::new(fd);
        rootfs.root = Some(FileId::of(&stat));
        Ok(rootfs)
    }

    /// Records that `mount` is attached at `path`. `is_kernel_mount` is true if the mount contains
    /// the kernel's own files, such as /proc and /sys.
    pub(crate) fn record_attached(&mut self, path: &Path, mount: OwnedFd, is_kernel_mount: bool) {
        // The order of paths places everything below `path` directly after `path`.
        while let Some((hidden, _)) = self.kernel_mounts.range(path.to_owned()..).next()
            && hidden.starts_with(path)
        {
            let hidden = hidden.clone();
            self.kernel_mounts.remove(&hidden);
        }
        if is_kernel_mount {
            self.kernel_mounts.insert(path.to_owned(), mount);
        }
    }

    /// Records a mount that [`Rootfs::make_read_only`] makes read-only later.
    pub(crate) fn read_only_later(&mut self, sentence: String, mount: OwnedFd) {
        self.read_only_later.push((sentence, mount));
    }

    /// Makes each mount in `read_only_later` read-only. The caller must call this function after
    /// rrun has created all files in these mounts.
    pub(crate) fn make_read_only(&self) -> Result<()> {
        for (sentence, mount) in &self.read_only_later {
            mount_setattr(mount.as_fd(), false, &MountAttr::READ_ONLY)
                .doing(|| format!("{sentence}: make the mount read-only"))?;
        }
        Ok(())
    }

    /// Opens the file or directory at `path`, which rrun then masks or makes read-only. A rename in
    /// the container can replace the directory /proc or /sys (CVE-2019-19921). So rrun looks up a
    /// path in /proc or /sys directly in the mount that rrun attached.
    pub(crate) fn open_to_protect(&self, path: &Path) -> std::result::Result<Protected, Errno> {
        let within = path.ancestors().skip(1).find_map(|place| {
            let mount = self.kernel_mounts.get(place)?;
            Some((mount, path.strip_prefix(place).ok()?))
        });
        match within {
            Some((mount, rest)) => {
                open_in(mount, rest, OFlags::PATH, ResolveFlags::empty()).map(Protected::Below)
            }
            None => {
                let found = self.open(path, OFlags::PATH)?;
                Ok(if self.is_root(&found)? {
                    Protected::Root
                } else {
                    Protected::Below(found)
                })
            }
        }
    }

    /// Returns whether `found` is the root directory. A bind mount of the root directory at another
    /// path is not the root directory.
    fn is_root(&self, found: &OwnedFd) -> std::result::Result<bool, Errno> {
        if self.root != Some(FileId::of(&rustix::fs::fstat(found)?)) {
            return Ok(false);
        }
        let mount = |file: BorrowedFd<'_>| {
            let stat = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
            Ok(stat.stx_mnt_id)
        };
        Ok(mount(found.as_fd())? == mount(self.fd.as_fd())?)
    }

    /// Opens the file at `path`, and follows symbolic links. `flags` contains O_PATH or O_DIRECTORY.
    pub(crate) fn open(&self, path: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
        open_in(&self.fd, path, flags, ResolveFlags::empty())
    }

    /// Opens the file at `path`, and fails if a component of the path is a symbolic
    /// link or a magic link.
    fn open_without_links(
        &self,
        path: &Path,
        flags: OFlags,
    ) -> std::result::Result<OwnedFd, Errno> {
        open_in(&self.fd, path, flags, ResolveFlags::NO_SYMLINKS)
    }

    /// Opens the container's directory /dev, in which rrun creates device files and removes the
    /// file ptmx. A link at /dev could lead to a volume, which is a directory of the host. So rrun
    /// refuses a link.
    pub(crate) fn open_dev(&self) -> Result<OwnedFd> {
        self.find_dev()?.ok_or_else(|| {
            let reason = Errno::NOENT.reason();
            Error::new(format!("open /dev in the container: {reason}"))
        })
    }

    /// Opens the container's directory /dev like [`Rootfs::open_dev`]. A missing /dev is created.
    pub(crate) fn make_dev(&self) -> Result<OwnedFd> {
        match self.find_dev()? {
            Some(dev) => Ok(dev),
            None => self.make_directory(Path::new(DEV)),
        }
    }

    fn find_dev(&self) -> Result<Option<OwnedFd>> {
        match self.open_without_links(Path::new(DEV), OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::LOOP) => refuse!(
                "/dev in the container is a symbolic link, and rrun creates device files only in a directory of the container"
            ),
            found => found.map(Some).doing(|| "open /dev in the container"),
        }
    }

    /// Returns a descriptor (O_PATH) of /dev/null in the container. Returns `None` if it is missing, or
    /// if it is not the null device.
    pub(crate) fn null_device(&self) -> std::result::Result<Option<OwnedFd>, Errno> {
        match self.open_without_links(Path::new("/dev/null"), OFlags::PATH) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            found => {
                let found = found?;
                let is_null = is_null_device(&rustix::fs::fstat(&found)?);
                Ok(is_null.then_some(found))
            }
        }
    }

    /// Records the directory /dev in which rrun will create device files. After this call, mounts
    /// on this directory are refused, because they would replace the directory.
    pub(crate) fn record_dev(&mut self, stat: &Stat) {
        self.dev = Some(FileId::of(stat));
    }

    /// Returns a descriptor (O_PATH) of the mount point at `path`. If the mount point is missing,
    /// this function follows the symbolic links in `path` and creates the mount point at the
    /// resulting path.
    ///
    /// # Errors
    /// Fails if a link leads to the root directory, or to the directory /dev in which rrun creates
    /// device files. The mount could be a volume, and rrun would then create the device files on
    /// the host.
    pub(crate) fn mount_target(&self, path: &Path, target: MountTarget) -> Result<OwnedFd> {
        let found = match self.open(path, OFlags::PATH) {
            Err(Errno::NOENT) => self.make(path, target),
            result => result.doing(|| format!("open {} in the container", path.display())),
        }?;
        let stat = attributes(&found, path)?;
        let id = Some(FileId::of(&stat));
        if id == self.root {
            refuse!(
                "{} in the container leads to the root directory",
                path.display()
            );
        }
        if id == self.dev && path != Path::new(DEV) {
            refuse!("{} in the container leads to /dev", path.display());
        }
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
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

    /// Returns a descriptor of the directory at `path`, for a mount that programs rely on, such as
    /// /proc. The path must not contain a symbolic link. A missing directory is created.
    pub(crate) fn plain_directory(&self, path: &Path) -> Result<OwnedFd> {
        match self.open_without_links(path, OFlags::PATH) {
            Err(Errno::NOENT) => {
                self.make_directory(path)?;
                self.open_without_links(path, OFlags::PATH | OFlags::DIRECTORY)
                    .doing(|| format!("open {} in the container", path.display()))
            }
            Err(Errno::LOOP) => refuse!(
                "{} in the container leads through a symbolic link, which is not allowed for this mount",
                path.display()
            ),
            result => {
                let found = result.doing(|| format!("open {} in the container", path.display()))?;
                let stat = attributes(&found, path)?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                    refuse!("{} in the container is not a directory", path.display());
                }
                Ok(found)
            }
        }
    }

    /// Creates a directory and its missing parents. A directory that already exists is not an
    /// error.
    pub(crate) fn make_directory(&self, path: &Path) -> Result<OwnedFd> {
        use std::os::unix::fs::PermissionsExt as _;
        if let Some(made) = self.make_last(path)? {
            return Ok(made);
        }
        let path = self.follow(path)?;
        pathrs::RootRef::from_fd(self.fd.as_fd())
            .mkdir_all(&path, &std::fs::Permissions::from_mode(0o755))
            .map(OwnedFd::from)
            .doing(|| format!("make directory {} in the container", path.display()))
    }

    /// Creates a directory and its missing parents, one path component after the other. rrun opens
    /// each component relative to its parent's descriptor and follows no link, so the path cannot
    /// lead out of the root. Unlike [`Rootfs::make_directory`], this function does not need /proc.
    /// Returns the path of the created directory without links, or `path` itself if the directory
    /// already exists.
    ///
    /// # Errors
    /// Fails if the directory cannot be created, or if the path leads through a magic link in
    /// /proc, such as /proc/PID/cwd.
    pub(crate) fn make_working_directory(&self, path: &Path, mode: Mode) -> Result<PathBuf> {
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
                    match rustix::fs::mkdirat(directory, name, mode) {
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

    /// Creates the directory with three system calls if only the last component of `path` is
    /// missing. This case is the most common. Returns `None` in all other cases.
    fn make_last(&self, path: &Path) -> Result<Option<OwnedFd>> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(None);
        };
        let Ok(parent) = self.open(parent, OFlags::PATH | OFlags::DIRECTORY) else {
            return Ok(None);
        };
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            // The existing file can be a symbolic link to a missing target. So the caller must
            // follow the link.
            Err(Errno::EXIST) => return Ok(None),
            Err(errno) => {
                return Err(errno)
                    .doing(|| format!("make directory {} in the container", path.display()));
            }
        }
        // This call opens a single path component relative to the parent's descriptor, and follows
        // no link. So it cannot open a file outside of `parent`.
        rustix::fs::openat(
            &parent,
            name,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing(|| format!("open {} in the container", path.display()))
        .map(Some)
    }

    /// Opens the lowest directory that exists on the path to which `path` leads.
    pub(crate) fn nearest_directory(&self, path: &Path) -> Result<OwnedFd> {
        let walk = self.walk(path)?;
        let mut place = walk.reached;
        for _ in 0..walk.missing {
            place.pop();
        }
        loop {
            match self.open(&place, OFlags::PATH | OFlags::DIRECTORY) {
                Err(Errno::NOENT) if place.pop() => {}
                found => {
                    return found.doing(|| format!("open {} in the container", place.display()));
                }
            }
        }
    }

    /// Returns the parent directory of `path` and the last component of `path`. A missing parent
    /// directory is created.
    fn parent(&self, path: &Path) -> Result<(OwnedFd, OsString)> {
        let Some(name) = path.file_name() else {
            refuse!(
                "{} is not the path of a file in the container",
                path.display()
            );
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
        // O_NOFOLLOW and O_EXCL make this call fail if a symbolic link has appeared at the path
        // since the lookup.
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

    /// Returns the path to which `path` leads after all its links are followed. A link can point to
    /// a file that does not exist yet, as /etc/resolv.conf in an image often does.
    ///
    /// A rename can make the returned path outdated. An outdated path is harmless. rrun uses the
    /// path only to create files and directories, and the lookups for these operations also stay
    /// inside the root.
    fn follow(&self, path: &Path) -> Result<PathBuf> {
        Ok(self.walk(path)?.reached)
    }

    fn walk(&self, path: &Path) -> Result<Walk<'_>> {
        let mut ahead: Vec<OsString> = components_backwards(path);
        let mut walk = Walk::new(self);
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            if walk.lookups > MAX_LOOKUPS {
                refuse!(
                    "{} in the container leads through more than {MAX_LOOKUPS} directories",
                    path.display()
                );
            }
            let next = if name.as_bytes() == b".." {
                walk.leave().map(|()| None)
            } else {
                walk.enter(&name)
            };
            let link =
                next.doing(|| format!("open {} in the container", walk.reached.display()))?;
            let Some(link) = link else { continue };
            links += 1;
            if links > MAX_LINKS {
                refuse!(
                    "{} in the container: too many symbolic links",
                    path.display()
                );
            }
            if link.is_absolute() {
                walk.return_to_root();
            }
            ahead.extend(components_backwards(&link));
        }
        Ok(walk)
    }
}

/// A path lookup that follows symbolic links itself. It opens each component relative to the
/// descriptor of its parent directory. A lookup of the whole path for each component would need
/// seconds for a long path.
struct Walk<'a> {
    rootfs: &'a Rootfs,
    /// The path so far. It contains no link.
    reached: PathBuf,
    /// The lowest existing file on the path `reached`, or `None` for the root directory.
    nearest: Option<OwnedFd>,
    /// The number of components at the end of `reached` that do not exist.
    missing: usize,
    /// The number of components that were looked up.
    lookups: usize,
}

impl Walk<'_> {
    fn new(rootfs: &Rootfs) -> Walk<'_> {
        Walk {
            rootfs,
            reached: PathBuf::from("/"),
            nearest: None,
            missing: 0,
            lookups: 0,
        }
    }

    fn return_to_root(&mut self) {
        self.reached = PathBuf::from("/");
        self.nearest = None;
        self.missing = 0;
    }

    /// Appends `name` to the path. If this component is a symbolic link, the path remains unchanged
    /// and the link's target is returned.
    fn enter(&mut self, name: &OsStr) -> std::result::Result<Option<PathBuf>, Errno> {
        self.lookups += 1;
        self.reached.push(name);
        if self.reached.as_os_str().len() >= PATH_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        if self.missing > 0 {
            self.missing += 1;
            return Ok(None);
        }
        // `name` is a single component, and O_NOFOLLOW opens a link itself. So this call cannot
        // open a file outside of the directory.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = self.nearest.as_ref().unwrap_or(&self.rootfs.fd);
        let found = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                self.missing = 1;
                return Ok(None);
            }
            found => found?,
        };
        match in_root::link_target(directory.as_fd(), name.as_bytes(), &found) {
            Ok(link) => {
                self.reached.pop();
                Ok(Some(OsString::from_vec(link).into()))
            }
            // The file is not a symbolic link.
            Err(Errno::INVAL | Errno::NOENT) => {
                self.nearest = Some(found);
                Ok(None)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Removes the last component of the path. This function opens the parent directory from the
    /// root, because a rename can have moved the last directory out of the root.
    fn leave(&mut self) -> std::result::Result<(), Errno> {
        self.reached.pop();
        if self.missing > 0 {
            self.missing -= 1;
            return Ok(());
        }
        self.lookups += self.reached.components().count();
        self.nearest = Some(self.rootfs.open(&self.reached, OFlags::PATH)?);
        Ok(())
    }
}

fn open_in(
    root: &OwnedFd,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> std::result::Result<OwnedFd, Errno> {
    in_root::open(root, path.as_os_str().as_bytes(), flags, resolve)
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

fn attributes(fd: &OwnedFd, path: &Path) -> Result<Stat> {
    rustix::fs::fstat(fd).doing(|| format!("stat {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_end_inside_the_root_even_if_their_targets_do_not_exist() {
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

    /// Creates an empty root directory, and passes the directory and its `Rootfs` to `test`.
    fn in_a_root(name: &str, test: impl FnOnce(&Path, &Rootfs)) {
        let root = std::env::temp_dir().join(format!("rrun-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&root).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let rootfs = Rootfs::new(rustix::fs::open(&root, flags, Mode::empty()).unwrap());
        test(&root, &rootfs);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_walk_looks_up_each_component_only_once() {
        in_a_root("walk", |root, rootfs| {
            let deep = "a/".repeat(1500);
            rootfs.make_directory(Path::new(&deep)).unwrap();
            std::os::unix::fs::symlink("b/../../c/d", root.join(&deep).join("link")).unwrap();
            std::os::unix::fs::symlink(format!("/{deep}link"), root.join("start")).unwrap();
            let walk = rootfs.walk(Path::new("/start/e")).unwrap();
            let parent = format!("/{}", "a/".repeat(1499));
            assert_eq!(walk.reached, Path::new(&parent).join("c/d/e"));
            assert_eq!(walk.missing, 3);
            assert!(walk.lookups < 2 * 1520, "{} lookups", walk.lookups);
            let nearest = rootfs.nearest_directory(Path::new("/start/e")).unwrap();
            let expected = rootfs.open(Path::new(&parent), OFlags::PATH).unwrap();
            let id = |fd| FileId::of(&rustix::fs::fstat(fd).unwrap());
            assert!(id(&nearest) == id(&expected));

            // The walk opens the parent of a deep directory from the root each time.
            let many = format!("{deep}{}", "../a/".repeat(200));
            let refused = rootfs.walk(Path::new(&many)).map(drop).unwrap_err();
            let sentence = refused.to_string();
            assert!(
                sentence.contains("more than 131072 directories"),
                "{sentence}"
            );
            let long = format!("/start/{}", "x".repeat(200)).repeat(20);
            assert!(rootfs.walk(Path::new(&(deep + &long))).is_err());
        });
    }

    #[test]
    fn a_walk_leaves_missing_directories_and_stays_in_the_root() {
        in_a_root("walk-missing", |root, rootfs| {
            std::fs::create_dir_all(root.join("a/b")).unwrap();
            std::fs::write(root.join("a/file"), "").unwrap();
            std::os::unix::fs::symlink("../../../../a", root.join("a/b/up")).unwrap();
            for (path, reached, missing) in [
                ("/a/b/up/new", "/a/new", 1),
                ("/new/x/../../a/b/../y", "/a/y", 1),
                ("/../..", "/", 0),
                ("/a/new/../../b/up/b/up/file", "/b/up/b/up/file", 5),
                ("/a/new/../b/up/b/up/file", "/a/file", 0),
            ] {
                let walk = rootfs.walk(Path::new(path)).unwrap();
                assert_eq!(
                    (walk.reached.as_path(), walk.missing),
                    (Path::new(reached), missing)
                );
            }
            assert!(rootfs.walk(Path::new("/a/file/x")).is_err());
        });
    }
}
