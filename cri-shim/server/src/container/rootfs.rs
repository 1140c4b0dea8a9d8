//! A container's root filesystem: an overlay of the image's layers and a writable layer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use pathrs::RootRef;
use pathrs::error::ErrorKind;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::idmap;
use super::in_root::InRoot;
use crate::sandbox::files::private_dir;
use crate::selinux::label::Label;
use crate::selinux::relabel;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::errno::{self, describe};

/// The mount points that every container needs and many images lack.
const DIRECTORIES: [&str; 4] = ["dev", "etc", "proc", "sys"];
const FILES: [&str; 3] = ["etc/hostname", "etc/hosts", "etc/resolv.conf"];

/// Returns the path of the layer that contains only mount points.
fn mount_points(root: &Path) -> PathBuf {
    root.join("mountpoints")
}

/// Creates the layer of mount points under `root` (rrun-cri's `--root`). Existing directories and
/// files of the layer are not changed.
pub(crate) fn make_mount_points(root: &Path) -> Result<()> {
    let layer = mount_points(root);
    let what = |path: &Path| format!("create the mount point {}", path.display());
    let mode = |path: &Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).during(|| what(path))
    };
    for name in std::iter::once("").chain(DIRECTORIES) {
        let path = layer.join(name);
        std::fs::create_dir_all(&path).during(|| what(&path))?;
        mode(&path, 0o755)?;
    }
    for path in FILES.map(|name| layer.join(name)) {
        // Ours: this layer is below every container's layers, so no container can write to it.
        let mut options = std::fs::OpenOptions::new();
        let opened = options.create(true).append(true).open(&path);
        opened.map(drop).during(|| what(&path))?;
        mode(&path, 0o644)?;
    }
    Ok(())
}

/// Returns the image's layers, uppermost first, and below them the layer that contains only mount
/// points. A path in the image hides the mount point with the same path. Without this layer, the
/// runtime would have to create missing mount points in each container's writable layer. To create
/// a mount point in /etc, overlayfs would first copy up /etc.
pub(crate) fn over_mount_points(mut image: Vec<PathBuf>, root: &Path) -> Vec<PathBuf> {
    // An image without layers is mounted without an overlay, so it gets no layer of mount points.
    if !image.is_empty() {
        image.push(mount_points(root));
    }
    image
}

/// The directories of one overlay.
pub(crate) struct Overlay<'a> {
    /// The directories of the image's layers, uppermost layer first.
    pub lower: &'a [PathBuf],
    /// The directory `ROOT/containers/CID`, in which `upper` and `work` are created.
    pub writable: &'a Path,
    /// The mount point of the overlay. A missing mount point is created.
    pub target: &'a Path,
    /// A directory that contains all the other directories in this struct. Before Linux 6.8, the
    /// paths in the mount options are relative to this directory. Absolute paths could be too long
    /// for mount(2).
    pub base: &'a Path,
    /// The pod's user namespace, if the pod has a separate one.
    pub users: Option<&'a idmap::Users>,
    /// The SELinux label of the overlay's files.
    pub label: Option<&'a Label>,
}

impl Overlay<'_> {
    /// Mounts the overlay. This call blocks.
    pub(crate) fn mount(&self) -> Result<()> {
        let (upper, work) = (self.writable.join("upper"), self.writable.join("work"));
        private_dir(&upper)?;
        private_dir(&work)?;
        // Overlayfs shows the owner and the mode of the upper directory as those of the container's
        // root directory. The server therefore copies the owner and the mode from the image's
        // uppermost layer.
        let (owner, group, mode) = match self.lower.first() {
            Some(top) => {
                let metadata = std::fs::metadata(top)
                    .during(|| format!("read the attributes of the layer {}", top.display()))?;
                (metadata.uid(), metadata.gid(), metadata.permissions())
            }
            None => (0, 0, std::fs::Permissions::from_mode(0o755)),
        };
        std::os::unix::fs::chown(&upper, Some(owner), Some(group))
            .during(|| format!("set the owner of {}", upper.display()))?;
        std::fs::set_permissions(&upper, mode)
            .during(|| format!("set the mode of {}", upper.display()))?;
        private_dir(self.target)?;
        let what = || format!("mount the root filesystem on {}", self.target.display());
        if self.lower.is_empty() {
            if let Some(label) = self.label {
                relabel::one(&upper, label)?;
            }
            return mount(
                Some(&upper),
                self.target,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .map_err(io::Error::from)
            .during(what);
        }
        if self.users.is_some() {
            let tree = idmap::overlay(
                self.lower,
                Some(self.writable),
                self.users,
                self.label,
                self.target,
            );
            return tree
                .and_then(|tree| idmap::attach(tree.as_fd(), self.target))
                .during(what);
        }
        match self.by_descriptor(&upper, &work) {
            Ok(true) => Ok(()),
            Ok(false) => self.by_relative_paths(self.base),
            Err(error) => Err(error),
        }
        .during(what)
    }

    /// Mounts the overlay with fsopen(2), and adds each layer with a separate option `lowerdir+`.
    /// Returns false if this kernel lacks fsopen(2) or the option, or if it creates no detached
    /// mount. Linux 6.8 introduced the option.
    fn by_descriptor(&self, upper: &Path, work: &Path) -> Result<bool> {
        let context = match fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(context) => context,
            Err(rustix::io::Errno::NOSYS) => return Ok(false),
            Err(errno) => return Err(errno).during(|| "fsopen overlay".to_owned()),
        };
        let context = context.as_fd();
        for (number, layer) in self.lower.iter().enumerate() {
            match fsconfig_set_string(context, "lowerdir+", layer) {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL) if number == 0 => return Ok(false),
                Err(errno) => {
                    return Err(overlay_error(
                        context,
                        errno,
                        &format!("the layer {}", layer.display()),
                    ));
                }
            }
        }
        let set = |key: &str, path: &Path| {
            fsconfig_set_string(context, key, path).map_err(|errno| {
                overlay_error(context, errno, &format!("{key}={}", path.display()))
            })
        };
        set("upperdir", upper)?;
        set("workdir", work)?;
        // With the option `volatile`, unmounting a container's overlay does not sync the whole file
        // system. The writable layer can then be lost in a crash of the node. The loss is
        // acceptable: a container never survives a reboot.
        fsconfig_set_flag(context, "volatile")
            .map_err(|errno| overlay_error(context, errno, "volatile"))?;
        if let Some(label) = self.label {
            fsconfig_set_string(context, "context", label.to_string())
                .map_err(|errno| overlay_error(context, errno, &format!("context={label}")))?;
        }
        fsconfig_create(context)
            .map_err(|errno| overlay_error(context, errno, "create the overlay"))?;
        let Some(mounted) = detached(context, work)? else {
            return Ok(false);
        };
        move_mount(
            mounted,
            "",
            CWD,
            self.target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .during(|| "attach the overlay to its mount point".to_owned())?;
        Ok(true)
    }

    /// Mounts the overlay with mount(2), whose options must fit into one page. To shorten the
    /// options, a thread changes its working directory to `base` and uses relative paths.
    fn by_relative_paths(&self, base: &Path) -> Result<()> {
        let relative = |path: &Path| {
            let short = path.strip_prefix(base).unwrap_or(path);
            // The kernel's overlayfs.rst requires that these characters are escaped inside a path.
            short
                .to_string_lossy()
                .replace('\\', "\\\\")
                .replace(':', "\\:")
                .replace(',', "\\,")
        };
        let lower: Vec<String> = self.lower.iter().map(|layer| relative(layer)).collect();
        let mut data = format!(
            "lowerdir={},upperdir={},workdir={},volatile",
            lower.join(":"),
            relative(&self.writable.join("upper")),
            relative(&self.writable.join("work")),
        );
        if let Some(label) = self.label {
            data += &label.as_mount_option();
        }
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("overlay".into())
                .spawn_scoped(scope, || {
                    unshare(CloneFlags::CLONE_FS)
                        .map_err(io::Error::from)
                        .during(|| "give a thread its own working directory".to_owned())?;
                    std::env::set_current_dir(base)
                        .during(|| format!("change the working directory to {}", base.display()))?;
                    mount(
                        Some("overlay"),
                        self.target,
                        Some("overlay"),
                        MsFlags::empty(),
                        Some(data.as_str()),
                    )
                    .map_err(io::Error::from)
                    .during(|| format!("mount an overlay of {} layers", self.lower.len()))
                })
                .during(|| "start a thread".to_owned())?;
            thread
                .join()
                .unwrap_or_else(|_| Err(Error::internal("the mounting thread panicked")))
        })
    }
}

/// Returns the detached mount of an overlay. A detached mount counts as a mount namespace. If root's
/// limit is used up ([`rrun_kernel::namespace_limits`]), returns `None`, and prepares `work` for
/// mount(2), which creates no detached mount.
fn detached(context: BorrowedFd<'_>, work: &Path) -> Result<Option<OwnedFd>> {
    let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    match fsmount(context, flags, attributes) {
        Ok(mount) => Ok(Some(mount)),
        Err(rustix::io::Errno::NOSPC) => {
            // Because of the option `volatile`, overlayfs has marked the directory as used, and
            // would not use it again.
            std::fs::remove_dir_all(work.join("work/incompat/volatile"))
                .during(|| "prepare the writable layer for another mount".to_owned())?;
            Ok(None)
        }
        Err(errno) => Err(overlay_error(context, errno, "fsmount")),
    }
}

/// Returns an error with the message that overlayfs wrote to the log of the file system context,
/// fsopen(2). This message is more precise than the errno.
fn overlay_error(context: BorrowedFd<'_>, errno: rustix::io::Errno, what: &str) -> Error {
    let mut log = [0_u8; 512];
    let line = match rustix::io::read(context, &mut log) {
        Ok(length) => String::from_utf8_lossy(log.get(..length).unwrap_or_default()).into_owned(),
        Err(_) => String::new(),
    };
    let line = line.trim_start_matches(['e', 'w', 'i', ' ']).trim();
    let errno = describe(&errno.into());
    if line.is_empty() {
        Error::internal(format!("{what}: {errno}"))
    } else {
        Error::internal(format!("{what}: {errno}: {line}"))
    }
}

/// Creates the container's working directory in the root filesystem if the image lacks it. The
/// directory belongs to `owner`: the user id and the group id of the container's root on the node.
/// This call blocks.
pub(crate) fn make_working_dir(rootfs: &Path, dir: &str, owner: (u32, u32)) -> Result<()> {
    let inside = dir.trim_start_matches('/');
    if inside.is_empty() {
        return Ok(());
    }
    let what = || format!("create the working directory {dir:?} in the image");
    let root = InRoot::open(rootfs).during(what)?;
    match root.find(inside) {
        Ok(_) => return Ok(()),
        Err(Errno::NOENT) => {}
        Err(errno) => {
            let errno_text = describe(&errno.into());
            let sentence = format!("{}: {errno_text}", what());
            return Err(Error::of_file(Some(errno.raw_os_error()), sentence));
        }
    }
    // The library looks for the last existing directory from the end of the path. Each lookup can need
    // much time, if the image leads the path through many links. So the library gets only the rest.
    let (existing, missing) = last_existing(&root, inside);
    // The library follows the same rules for each directory of the path.
    let root = existing.as_ref().map_or(root.as_fd(), AsFd::as_fd);
    let root = RootRef::from_fd(root);
    let failed = |error: pathrs::error::Error| {
        let (errno, reason) = match error.kind() {
            ErrorKind::OsError(Some(errno)) => (Some(errno), errno::text(errno)),
            _ => (None, error.to_string()),
        };
        Error::of_file(errno, format!("{}: {reason}", what()))
    };
    let mode = std::fs::Permissions::from_mode(0o755);
    let make = || root.mkdir_all(missing, &mode).map(drop).map_err(failed);
    match owner {
        (0, 0) => make(),
        owner => idmap::as_owner(owner, make),
    }
}

/// Returns the last existing directory of a path and the rest of the path. Returns `None` and the whole
/// path if the first directory does not exist. This function needs few lookups: it halves the number of
/// possible directories with each lookup.
fn last_existing<'a>(root: &InRoot, path: &'a str) -> (Option<OwnedFd>, &'a str) {
    let slashes: Vec<usize> = path.match_indices('/').map(|(at, _)| at).collect();
    let directory = |end: usize| root.find(path.get(..end).unwrap_or_default());
    let existing = slashes.partition_point(|end| directory(*end).is_ok());
    let end = existing.checked_sub(1).and_then(|last| slashes.get(last));
    match end.map(|end| (directory(*end), path.get(end + 1..))) {
        Some((Ok(directory), Some(rest))) => (Some(directory), rest),
        _ => (None, path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_existing_directory_of_a_path_is_found() -> Result<(), Box<dyn std::error::Error>> {
        let dir = std::env::temp_dir().join(format!("rrun-last-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("a/b"))?;
        std::os::unix::fs::symlink("/a/b", dir.join("link"))?;
        let root = InRoot::open(&dir)?;
        for (path, rest) in [
            ("a/b/c/d", "c/d"),
            ("link/c", "c"),
            ("x", "x"),
            ("x/y", "x/y"),
            ("a//b/./c/", "c/"),
            ("a/x/../b", "x/../b"),
        ] {
            let (existing, found) = last_existing(&root, path);
            assert_eq!(found, rest, "the missing part of {path}");
            assert_eq!(existing.is_some(), path != rest, "{path}");
        }
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }

    /// Mounts two layers, once with fsopen(2) and once with mount(2), and checks which layer's file
    /// is visible.
    #[test]
    fn the_uppermost_layers_file_is_visible_with_fsopen_and_with_mount()
    -> Result<(), Box<dyn std::error::Error>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return Ok(());
        }
        let base = std::env::temp_dir().join(format!("rrun-overlay-{}", std::process::id()));
        let (top, bottom) = (base.join("layers/2"), base.join("layers/1"));
        for dir in [&top, &bottom] {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write(top.join("file"), "top")?;
        std::fs::write(bottom.join("file"), "bottom")?;
        std::fs::write(bottom.join("other"), "bottom")?;
        let lower = [top, bottom];
        let (writable, target) = (base.join("c"), base.join("rootfs"));
        let overlay = Overlay {
            lower: &lower,
            writable: &writable,
            target: &target,
            base: &base,
            users: None,
            label: None,
        };
        let mut failed = None;
        for old in [false, true] {
            let mounted = if old {
                overlay.by_relative_paths(&base)
            } else {
                overlay.mount()
            };
            if let Err(error) = mounted {
                failed = Some(error);
                break;
            }
            let read = |name: &str| std::fs::read_to_string(target.join(name));
            let (file, other) = (read("file"), read("other"));
            crate::sandbox::files::unmount(&target)?;
            // Delete the writable layer, because overlayfs refuses to mount a volatile layer a
            // second time.
            std::fs::remove_dir_all(&writable)?;
            for dir in ["upper", "work"] {
                std::fs::create_dir_all(writable.join(dir))?;
            }
            assert_eq!((file?.as_str(), other?.as_str()), ("top", "bottom"));
        }
        std::fs::remove_dir_all(&base)?;
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// A path that exists in the image is not changed. If a path is missing in the image, the mount
    /// point is visible instead. The writable layer remains empty.
    #[test]
    fn mount_points_are_below_all_layers_of_the_image() -> Result<(), Box<dyn std::error::Error>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return Ok(());
        }
        let base = std::env::temp_dir().join(format!("rrun-points-{}", std::process::id()));
        let images = ["bare", "linked", "own"].map(|name| base.join("layers").join(name));
        let [bare, linked, own] = &images;
        for dir in [bare.clone(), linked.join("conf"), own.join("etc")] {
            std::fs::create_dir_all(dir)?;
        }
        std::os::unix::fs::symlink("conf", linked.join("etc"))?;
        std::fs::set_permissions(own.join("etc"), std::fs::Permissions::from_mode(0o750))?;
        std::fs::write(own.join("etc/hosts"), "own")?;
        std::os::unix::fs::symlink("../run/resolv.conf", own.join("etc/resolv.conf"))?;
        // The server calls this function at every start, so a second call must succeed.
        make_mount_points(&base)?;
        make_mount_points(&base)?;
        assert!(over_mount_points(Vec::new(), &base).is_empty());
        let target = base.join("rootfs");
        let mut failed = None;
        for image in &images {
            let writable = base.join("c").join(image.file_name().unwrap_or_default());
            std::fs::create_dir_all(&writable)?;
            let mounted = Overlay {
                lower: &over_mount_points(vec![image.clone()], &base),
                writable: &writable,
                target: &target,
                base: &base,
                users: None,
                label: None,
            }
            .mount();
            if let Err(error) = mounted {
                failed = Some(error);
                break;
            }
            let seen = |name: &str| {
                let data = std::fs::symlink_metadata(target.join(name)).ok()?;
                Some((data.permissions().mode(), data.len()))
            };
            let etc = seen("etc");
            let found = FILES.map(seen);
            let directories = ["dev", "proc", "sys"].map(seen);
            let changed = std::fs::read_dir(writable.join("upper"))?.count();
            crate::sandbox::files::unmount(&target)?;
            let empty = Some((0o100_644, 0));
            assert_eq!(changed, 0);
            for directory in directories {
                assert_eq!(directory.map(|it| it.0), Some(0o040_755));
            }
            if image == bare {
                assert_eq!(etc.map(|it| it.0), Some(0o040_755));
                assert_eq!(found, [empty; 3]);
            } else if image == linked {
                assert_eq!(etc, Some((0o120_777, 4)));
                assert_eq!(found, [None; 3]);
            } else {
                assert_eq!(etc.map(|it| it.0), Some(0o040_750));
                let (hosts, link) = (Some((0o100_644, 3)), Some((0o120_777, 18)));
                assert_eq!(found, [empty, hosts, link]);
            }
        }
        std::fs::remove_dir_all(&base)?;
        failed.map_or(Ok(()), |error| Err(error.into()))
    }
}
