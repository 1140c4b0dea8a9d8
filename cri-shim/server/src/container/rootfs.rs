//! A container's root filesystem: an overlay of the image's layers and a writable one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use pathrs::Root;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::idmap;
use crate::sandbox::files::private_dir;
use crate::selinux::label::Label;
use crate::selinux::relabel;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::errno::describe;

/// What every container has mounted, and many an image lacks.
const DIRECTORIES: [&str; 4] = ["dev", "etc", "proc", "sys"];
const FILES: [&str; 3] = ["etc/hostname", "etc/hosts", "etc/resolv.conf"];

/// A layer with nothing in it but places to mount on.
fn mount_points(root: &Path) -> PathBuf {
    root.join("mountpoints")
}

/// Makes the layer of mount points under `root` (rrun-cri's `--root`), or what is missing of it.
pub(crate) fn make_mount_points(root: &Path) -> Result<()> {
    let layer = mount_points(root);
    let what = |path: &Path| format!("make the mount point {}", path.display());
    let mode = |path: &Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).during(|| what(path))
    };
    for name in std::iter::once("").chain(DIRECTORIES) {
        let path = layer.join(name);
        std::fs::create_dir_all(&path).during(|| what(&path))?;
        mode(&path, 0o755)?;
    }
    for path in FILES.map(|name| layer.join(name)) {
        // Ours: this layer is below those of every container, and none can write to it.
        let mut options = std::fs::OpenOptions::new();
        let opened = options.create(true).append(true).open(&path);
        opened.map(drop).during(|| what(&path))?;
        mode(&path, 0o644)?;
    }
    Ok(())
}

/// The layers of an image, uppermost first, over the layer of mount points: whatever the image
/// says of a path hides what is there, and what it lacks need not be made in each container's
/// writable layer, for which overlayfs would copy /etc up first.
pub(crate) fn over_mount_points(mut image: Vec<PathBuf>, root: &Path) -> Vec<PathBuf> {
    // An image of nothing is mounted without an overlay.
    if !image.is_empty() {
        image.push(mount_points(root));
    }
    image
}

/// The directories of one overlay.
pub(crate) struct Overlay<'a> {
    /// The image's layers, uppermost first.
    pub lower: &'a [PathBuf],
    /// `ROOT/containers/CID`: gets `upper` and `work`.
    pub writable: &'a Path,
    /// Where it is mounted; made if it is not there.
    pub target: &'a Path,
    /// A directory that all the others are in, for kernels where paths must be short.
    pub base: &'a Path,
    /// The user namespace of the pod, if it has one of its own.
    pub users: Option<&'a idmap::Users>,
    /// The SELinux label of its files.
    pub label: Option<&'a Label>,
}

impl Overlay<'_> {
    /// Mounts it. Blocks.
    pub(crate) fn mount(&self) -> Result<()> {
        let (upper, work) = (self.writable.join("upper"), self.writable.join("work"));
        private_dir(&upper)?;
        private_dir(&work)?;
        // Containers see the owner and mode of the upper directory as those of their root.
        let (owner, group, mode) = match self.lower.first() {
            Some(top) => {
                let looks = std::fs::metadata(top)
                    .during(|| format!("look at the layer {}", top.display()))?;
                (looks.uid(), looks.gid(), looks.permissions())
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

    /// By the mount API that takes one layer at a time, Linux 6.8. False: this kernel lacks it.
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
        // A container does not outlive the machine, its writable layer need not either: without
        // this the unmounting of each container syncs the whole file system.
        fsconfig_set_flag(context, "volatile")
            .map_err(|errno| overlay_error(context, errno, "volatile"))?;
        if let Some(label) = self.label {
            fsconfig_set_string(context, "context", label.to_string())
                .map_err(|errno| overlay_error(context, errno, &format!("context={label}")))?;
        }
        fsconfig_create(context).map_err(|errno| overlay_error(context, errno, "create it"))?;
        let mounted = fsmount(
            context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )
        .map_err(|errno| overlay_error(context, errno, "fsmount"))?;
        move_mount(
            mounted,
            "",
            CWD,
            self.target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .during(|| "attach it".to_owned())?;
        Ok(true)
    }

    /// By mount(2), whose options must fit into a page: from a thread whose working directory is
    /// `base`, by paths relative to that.
    fn by_relative_paths(&self, base: &Path) -> Result<()> {
        let relative = |path: &Path| {
            let short = path.strip_prefix(base).unwrap_or(path);
            // Separators inside a path are escaped, overlayfs.rst.
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
                        .during(|| format!("go to {}", base.display()))?;
                    mount(
                        Some("overlay"),
                        self.target,
                        Some("overlay"),
                        MsFlags::empty(),
                        Some(data.as_str()),
                    )
                    .map_err(io::Error::from)
                    .during(|| format!("overlay of {} layers", self.lower.len()))
                })
                .during(|| "start a thread".to_owned())?;
            thread
                .join()
                .unwrap_or_else(|_| Err(Error::internal("the mounting thread panicked")))
        })
    }
}

/// What overlayfs wrote into the context's log says more than its errno, fsopen(2).
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

/// Makes the working directory inside the root filesystem, where an image may lack it, for the
/// root of the container (ids of the node). Blocks.
pub(crate) fn make_working_dir(rootfs: &Path, dir: &str, owner: (u32, u32)) -> Result<()> {
    let inside = dir.trim_start_matches('/');
    if inside.is_empty() {
        return Ok(());
    }
    let failed = |error: pathrs::error::Error| {
        Error::invalid(format!(
            "the working directory {dir:?} in the image: {error}"
        ))
    };
    let root = Root::open(rootfs).map_err(failed)?;
    if root.resolve(inside).is_ok() {
        return Ok(());
    }
    let mode = std::fs::Permissions::from_mode(0o755);
    let make = || root.mkdir_all(inside, &mode).map(drop).map_err(failed);
    match owner {
        (0, 0) => make(),
        owner => idmap::as_owner(owner, make),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mounts two layers both ways and looks at what wins.
    #[test]
    fn the_uppermost_layer_wins_by_either_interface() -> Result<(), Box<dyn std::error::Error>> {
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
            // A volatile layer is not mounted again: that is what its mark is for.
            std::fs::remove_dir_all(&writable)?;
            for dir in ["upper", "work"] {
                std::fs::create_dir_all(writable.join(dir))?;
            }
            assert_eq!((file?.as_str(), other?.as_str()), ("top", "bottom"));
        }
        std::fs::remove_dir_all(&base)?;
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Where the image has something, that counts; where it has nothing, there is a place to
    /// mount on, and nothing of it in the writable layer.
    #[test]
    fn mount_points_are_below_everything_that_the_image_has()
    -> Result<(), Box<dyn std::error::Error>> {
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
        // Twice, as at every start of the server.
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
