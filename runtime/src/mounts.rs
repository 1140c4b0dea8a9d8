//! The mounts of a container, made and moved by file descriptor.
//!
//! A mount is first made detached, complete with all its attributes (fsopen, open_tree,
//! mount_setattr), and only then moved to a place that openat2 found (move_mount). At no
//! moment is it visible with less protection than was asked for.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType as Type, Mount as SpecMount};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::config::Config;
use crate::error::{Context, Error, Reason as _, Result};
use crate::idmap::{self, IdMaps};
use crate::mount_options::{self, Bind, Options};
use crate::rootfs::{Rootfs, Target, cleaned};
use crate::syscalls::{MountAttr, mount_setattr};
use crate::{copy_up, refuse};

/// linux/magic.h
pub const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// Files in /proc that may be bound over, as lxcfs does to show a container its limits.
const PROC_FILES: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// One entry of `mounts`, checked.
#[derive(Clone, Debug)]
pub struct Mount {
    index: usize,
    pub destination: PathBuf,
    /// The file system's type; for a bind mount only a word.
    typ: String,
    source: PathBuf,
    pub options: Options,
    /// SELinux label of the files (linux.mountLabel).
    label: Option<String>,
    /// How ids are mapped; if they are to be (`options.idmap`) and this is empty, as in the
    /// container's user namespace.
    id_maps: IdMaps,
}

impl Mount {
    /// # Errors
    /// What is missing or not supported, by the name of its field.
    pub fn from_spec(index: usize, spec: &SpecMount, bundle: &Path) -> Result<Mount> {
        let field = format!("mounts[{index}]");
        let destination = cleaned(spec.destination());
        if destination == Path::new("/") {
            refuse!("{field}.destination: the root itself can not be mounted over");
        }
        let options = spec.options().iter().flatten().map(String::as_str);
        let mut options = mount_options::parse(options)
            .map_err(|error| error.while_doing(format!("{field}.options")))?;
        let mut typ = spec.typ().clone().unwrap_or_default();
        if typ == "bind" && options.bind == Bind::No {
            options.bind = Bind::Alone;
        }
        if options.bind == Bind::No && typ.is_empty() {
            refuse!("{field}.type: is missing, and there is no option bind");
        }
        if typ == "cgroup" {
            typ = "cgroup2".to_owned();
        }
        let id_maps = IdMaps::from_spec(
            &format!("{field}."),
            spec.uid_mappings().as_deref().unwrap_or_default(),
            spec.gid_mappings().as_deref().unwrap_or_default(),
        )?;
        if !id_maps.is_empty() {
            if !id_maps.is_complete() {
                refuse!("{field}.uidMappings, gidMappings: one can not be without the other");
            }
            // Not recursive unless it is said, as with runc.
            options.idmap.get_or_insert(false);
        }
        if options.copy_up && typ != "tmpfs" {
            refuse!("{field}.options: tmpcopyup is for a tmpfs");
        }
        if options.idmap.is_some() && options.bind == Bind::No {
            refuse!("{field}: ids can be mapped only in a bind mount");
        }
        let mut source = spec.source().clone().unwrap_or_default();
        if options.bind != Bind::No {
            if source.as_os_str().is_empty() {
                refuse!("{field}.source: is missing");
            }
            // Relative to the bundle, says config.md.
            source = bundle.join(source);
        }
        Ok(Mount {
            index,
            destination,
            typ,
            source,
            options,
            id_maps,
            label: None,
        })
    }

    /// # Errors
    /// If the mapping is to be the container's, which has none.
    pub fn check_idmap(&self, own_user_namespace: bool) -> Result<()> {
        if self.is_idmapped() && self.id_maps.is_empty() && !own_user_namespace {
            refuse!(
                "mounts[{}].options: idmap needs uidMappings and gidMappings, because the container has no user namespace whose mappings it could use",
                self.index
            );
        }
        Ok(())
    }

    pub fn is_idmapped(&self) -> bool {
        self.options.idmap.is_some()
    }

    pub fn with_label(mut self, label: Option<&String>) -> Mount {
        self.label = label.cloned();
        self
    }

    /// A bind mount of rrun's own, behind those of the configuration.
    pub fn read_only_bind(index: usize, source: &Path, destination: &Path) -> Result<Mount> {
        let options = ["bind", "nosuid", "noexec", "nodev", "ro"];
        Ok(Mount {
            index,
            destination: destination.to_owned(),
            typ: "bind".to_owned(),
            source: source.to_owned(),
            options: mount_options::parse(options.into_iter())?,
            id_maps: IdMaps::default(),
            label: None,
        })
    }

    fn sentence(&self) -> String {
        let what = if self.is_bind() {
            self.source.display().to_string()
        } else {
            self.typ.clone()
        };
        format!(
            "mount {what} on {} (mounts[{}])",
            self.destination.display(),
            self.index
        )
    }

    /// Whether it gets something of the directory that it covers: a tmpfs its contents with
    /// `tmpcopyup`, and its mode unless it has one of its own, as with runc.
    fn is_filled(&self) -> bool {
        let has_mode = || self.options.data.iter().any(|(key, _)| key == "mode");
        self.typ == "tmpfs" && !self.is_bind() && (self.options.copy_up || !has_mode())
    }

    pub fn is_bind(&self) -> bool {
        self.options.bind != Bind::No
    }

    /// Makes the mount, attached nowhere. `cgroup` is the container's own cgroup directory
    /// if it has no cgroup namespace, and is shown in place of the whole hierarchy. With
    /// `cut_off`, what is mounted below a bind mount later on does not reach the host. Ids
    /// are mapped as in the user namespace `ids`.
    pub fn detached(
        &self,
        cgroup: Option<&Path>,
        cut_off: bool,
        ids: Option<&OwnedFd>,
    ) -> Result<OwnedFd> {
        let mount = match (self.is_bind(), cgroup) {
            (true, _) => self.bound(&self.source),
            (false, Some(cgroup)) if self.typ == "cgroup2" => {
                clone_tree(cgroup, false).map_err(|errno| Error::new(errno.reason()))
            }
            (false, _) => self.of_file_system(),
        }
        .map_err(|error| error.while_doing(self.sentence()))?;
        if cut_off && self.is_bind() {
            make_slave(&mount).doing(|| self.sentence())?;
        }
        if let Some(namespace) = ids {
            self.map_ids(&mount, namespace)
                .map_err(|error| error.while_doing(self.sentence()))?;
        }
        self.set_attributes(&mount)
            .map_err(|error| error.while_doing(self.sentence()))?;
        Ok(mount)
    }

    fn bound(&self, source: &Path) -> Result<OwnedFd> {
        if let Some((name, _)) = self.options.data.first() {
            refuse!("option {name} is unknown for a bind mount");
        }
        clone_tree(source, self.options.bind == Bind::Recursive)
            .map_err(|errno| Error::new(errno.reason()))
    }

    fn of_file_system(&self) -> Result<OwnedFd> {
        let fs =
            rustix::mount::fsopen(&*self.typ, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| {
                match errno {
                    Errno::NODEV => {
                        Error::new(format!("the kernel has no file system {}", self.typ))
                    }
                    errno => Error::new(errno.reason()),
                }
            })?;
        let explained = |errno: Errno| Error::new(format!("{}{}", errno.reason(), said(&fs)));
        if !self.source.as_os_str().is_empty() {
            rustix::mount::fsconfig_set_string(&fs, "source", &self.source).map_err(explained)?;
        }
        for name in &self.options.superblock {
            rustix::mount::fsconfig_set_flag(&fs, *name)
                .map_err(|errno| explained(errno).while_doing(format!("option {name}")))?;
        }
        for (key, value) in &self.options.data {
            match value {
                Some(value) => rustix::mount::fsconfig_set_string(&fs, &**key, &**value),
                None => rustix::mount::fsconfig_set_flag(&fs, &**key),
            }
            .map_err(|errno| explained(errno).while_doing(format!("option {key}")))?;
        }
        // The others have labels of the policy's own, file by file, or one set afterwards.
        let whole = !matches!(&*self.typ, "proc" | "sysfs" | "cgroup2" | "mqueue");
        if let Some(label) = self.label.as_ref().filter(|_| whole) {
            rustix::mount::fsconfig_set_string(&fs, "context", label.as_str())
                .map_err(|errno| explained(errno).while_doing("label it (linux.mountLabel)"))?;
        }
        rustix::mount::fsconfig_create(&fs).map_err(explained)?;
        let mut attributes = MountAttrFlags::from_bits_retain(self.options.attr.attr_set as u32);
        if self.is_filled() {
            attributes.remove(MountAttrFlags::MOUNT_ATTR_RDONLY);
        }
        let mount = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(explained)?;
        if let Some(label) = self.label.as_ref().filter(|_| self.typ == "mqueue") {
            set_label(&mount, label).doing(|| "label it (linux.mountLabel)")?;
        }
        Ok(mount)
    }

    fn map_ids(&self, mount: &OwnedFd, namespace: &OwnedFd) -> Result<()> {
        let attr = MountAttr {
            attr_set: mount_options::ATTR_IDMAP,
            userns_fd: namespace.as_raw_fd() as u64,
            ..MountAttr::default()
        };
        mount_setattr(mount.as_fd(), self.options.idmap == Some(true), &attr).map_err(|errno| {
            let hint = match errno {
                Errno::INVAL => ": its file system may not support that",
                Errno::PERM => ": its ids may be mapped already",
                _ => "",
            };
            Error::new(format!("map its ids: {}{hint}", errno.reason()))
        })
    }

    fn set_attributes(&self, mount: &OwnedFd) -> Result<()> {
        let unchanged = MountAttr::default();
        if self.is_bind() && self.options.attr != unchanged {
            mount_setattr(mount.as_fd(), false, &self.options.attr).doing(|| "set its options")?;
        }
        let mut recursive = self.options.recursive_attr;
        if self.is_filled() {
            recursive.attr_set &= !mount_options::READ_ONLY.attr_set;
        }
        if recursive != unchanged {
            mount_setattr(mount.as_fd(), true, &recursive).doing(|| "set its recursive options")?;
        }
        for (propagation, recursive) in &self.options.propagation {
            let attr = MountAttr {
                propagation: *propagation,
                ..unchanged
            };
            mount_setattr(mount.as_fd(), *recursive, &attr).doing(|| "set its propagation")?;
        }
        Ok(())
    }

    /// Moves a mount that [`Mount::detached`] made to its place in the container.
    pub fn attach(&self, rootfs: &mut Rootfs, mount: OwnedFd) -> Result<()> {
        self.place(rootfs, mount)
            .map_err(|error| error.while_doing(self.sentence()))
    }

    fn place(&self, rootfs: &mut Rootfs, mount: OwnedFd) -> Result<()> {
        let is_new = !self.is_bind() && matches!(&*self.typ, "proc" | "sysfs");
        let is_kernels = is_new || matches!(self.destination.to_str(), Some("/proc" | "/sys"));
        let target = if is_new {
            // Others look for the kernel's own files here; a link would make them look
            // somewhere else (CVE-2019-19921).
            rootfs.plain_directory(&self.destination)?
        } else {
            let stat = rustix::fs::fstat(&mount).doing(|| "stat the source")?;
            let kind = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => Target::Directory,
                _ => Target::File,
            };
            let target = rootfs.mount_target(&self.destination, kind)?;
            self.refuse_inside_proc(&target, &mount)?;
            target
        };
        if self.is_filled() {
            if self.options.copy_up {
                copy_up::copy(&target, &mount)?;
            } else {
                copy_up::copy_mode(&target, &mount)?;
            }
            let asked = [&self.options.attr, &self.options.recursive_attr];
            if asked.into_iter().any(mount_options::is_read_only) {
                mount_setattr(mount.as_fd(), false, &mount_options::READ_ONLY)
                    .doing(|| "make it read-only")?;
            }
        }
        move_mount(&mount, &target).doing(|| "attach it")?;
        rootfs.attached(&self.destination, mount, is_kernels);
        Ok(())
    }

    /// Nothing of the container's may stand where the kernel's own files are looked for
    /// (CVE-2019-16884), however the way leads there.
    fn refuse_inside_proc(&self, target: &OwnedFd, mount: &OwnedFd) -> Result<()> {
        let is_proc = |fd: &OwnedFd| {
            rustix::fs::fstatfs(fd)
                .doing(|| "ask for the file system")
                .map(|statfs| statfs.f_type as u64 == PROC_SUPER_MAGIC)
        };
        let inside = self.destination.starts_with("/proc") || is_proc(target)?;
        if !inside
            || PROC_FILES
                .iter()
                .any(|file| self.destination == Path::new(file))
        {
            return Ok(());
        }
        // The host's own /proc, or another's, may be bound there.
        if self.destination == Path::new("/proc") && self.is_bind() && is_proc(mount)? {
            return Ok(());
        }
        refuse!("nothing may be mounted inside /proc")
    }
}

/// What the file system had to say about a refusal, if anything.
fn said(fs: &OwnedFd) -> String {
    let mut buffer = [0u8; 512];
    match rustix::io::read(fs, &mut buffer) {
        Ok(length) if length > 2 => {
            let text = String::from_utf8_lossy(buffer.get(2..length).unwrap_or_default());
            format!(" ({})", text.trim())
        }
        _ => String::new(),
    }
}

/// A detached copy of the mount at a path of the host, with those below it if `recursive`.
pub fn clone_tree(path: &Path, recursive: bool) -> std::result::Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(CWD, path, flags)
}

/// A detached copy of the mount that a descriptor refers to.
pub fn clone_descriptor(fd: impl AsFd, recursive: bool) -> std::result::Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(fd, "", flags)
}

/// Moves a mount onto what `target` refers to.
pub fn move_mount(mount: impl AsFd, target: impl AsFd) -> std::result::Result<(), Errno> {
    rustix::mount::move_mount(
        mount,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// Gives the root of a mount an SELinux label.
fn set_label(mount: &OwnedFd, label: &str) -> std::result::Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(mount, ".", flags, Mode::empty())?;
    rustix::fs::fsetxattr(
        &root,
        "security.selinux",
        label.as_bytes(),
        XattrFlags::empty(),
    )
}

/// A new, empty, read-only tmpfs, attached nowhere.
fn empty_tmpfs(label: Option<&str>) -> std::result::Result<OwnedFd, Errno> {
    let fs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    if let Some(label) = label {
        rustix::mount::fsconfig_set_string(&fs, "context", label)?;
    }
    rustix::mount::fsconfig_set_string(&fs, "nr_blocks", "1")?;
    rustix::mount::fsconfig_create(&fs)?;
    rustix::mount::fsmount(
        &fs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

/// Parts of the host's file system that were taken, as detached mounts, before the
/// container's first process lost sight of them or the right to reach them.
#[derive(Default)]
pub struct Taken {
    pub root: Option<OwnedFd>,
    /// For each of the container's mounts.
    pub mounts: Vec<Option<OwnedFd>>,
}

impl Taken {
    /// Takes what the container's first process could not: in another user namespace, it
    /// could not reach the host's files; and ids are mapped only by who has all rights over
    /// the file system.
    ///
    /// An unprivileged caller can take nothing: his files are within reach of the first
    /// process as well, which has all rights over its own mounts.
    pub fn before_birth(config: &Config) -> Result<Taken> {
        let mut taken = Taken::default();
        if !rustix::process::geteuid().is_root() {
            return Ok(taken);
        }
        if config.namespaces.own(Type::User) {
            taken.take(config, Mount::is_bind)?;
            taken.root = Some(take_root(&config.rootfs)?);
        } else if config.mounts.iter().any(Mount::is_idmapped) {
            taken.take(config, Mount::is_idmapped)?;
        }
        Ok(taken)
    }

    /// Takes the sources of the bind mounts that are `wanted` and not taken yet.
    pub fn take(&mut self, config: &Config, wanted: fn(&Mount) -> bool) -> Result<()> {
        // What the configuration shares with the host stays as it is.
        let cut_off = !config.root_is_shared();
        let mut namespaces = idmap::Namespaces::default();
        self.mounts.resize_with(config.mounts.len(), || None);
        for (mount, taken) in config.mounts.iter().zip(&mut self.mounts) {
            if taken.is_some() || !wanted(mount) {
                continue;
            }
            let ids = mount
                .is_idmapped()
                .then(|| {
                    if mount.id_maps.is_empty() {
                        namespaces.of_container(&config.namespaces, &config.id_maps)
                    } else {
                        namespaces.with(&mount.id_maps)
                    }
                })
                .transpose()
                .map_err(|error| error.while_doing(mount.sentence()))?;
            *taken = Some(mount.detached(None, cut_off, ids)?);
        }
        Ok(())
    }
}

/// A copy of the mount that the root lies in, from the root on, and of those below it;
/// what is mounted on it does not reach the host.
pub fn take_root(path: &Path) -> Result<OwnedFd> {
    let sentence = || format!("make root.path {} a mount of its own", path.display());
    let root = clone_tree(path, true).doing(sentence)?;
    make_slave(&root).doing(sentence)?;
    Ok(root)
}

fn make_slave(mount: &OwnedFd) -> std::result::Result<(), Errno> {
    let attr = MountAttr {
        propagation: mount_options::SLAVE,
        ..MountAttr::default()
    };
    mount_setattr(mount.as_fd(), true, &attr)
}

/// Attaches the root, which pivot_root(2) wants to be a mount in this namespace: on top of
/// the old root, which every process can reach, and which it will take the place of.
pub fn attach_root(root: OwnedFd) -> Result<Rootfs> {
    rustix::mount::move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .doing(|| "mount the container's root")?;
    Ok(Rootfs::new(root))
}

/// Takes the old root's /proc and /sys off, wherever they are: a process in a user namespace
/// may mount either anew, unmasked, as long as it is unmasked anywhere in its mount namespace.
pub fn take_off_kernels() -> Result<()> {
    let file = "/proc/self/mountinfo";
    let text = std::fs::read_to_string(file).doing(|| format!("read {file}"))?;
    for line in text.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(point), Some("proc" | "sysfs")) =
            (before.split(' ').nth(4), after.split(' ').next())
        else {
            continue;
        };
        // Not the host's. What the container has mounted is listed too, but no path leads
        // there yet.
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        if rustix::mount::mount_change(point, slave).is_ok() {
            rustix::mount::unmount(point, UnmountFlags::DETACH)
                .doing(|| format!("take {point} off the old root (--no-pivot)"))?;
        }
    }
    Ok(())
}

/// Hides `linux.maskedPaths`: a directory under an empty one, anything else under
/// /dev/null. What does not exist needs no hiding.
pub fn mask(rootfs: &Rootfs, paths: &[String], label: Option<&str>) -> Result<()> {
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let doing = || format!("mask {path} (linux.maskedPaths)");
        let target = match rootfs.open_to_protect(&cleaned(Path::new(path))) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            result => result.doing(doing)?,
        };
        let stat = rustix::fs::fstat(&target).doing(doing)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            // One empty directory serves for all. It can be copied only once it is attached.
            let cover = match &empty {
                Some(attached) => clone_descriptor(attached, false),
                None => empty_tmpfs(label),
            }
            .doing(doing)?;
            move_mount(&cover, &target).doing(doing)?;
            empty.get_or_insert(cover);
        } else {
            // The host's, because the container's could be a link to a file of the host's
            // choosing (CVE-2025-31133).
            let null = clone_tree(Path::new("/dev/null"), false).doing(doing)?;
            let stat = rustix::fs::statat(&null, "", AtFlags::EMPTY_PATH).doing(doing)?;
            if stat.st_rdev != rustix::fs::makedev(1, 3) {
                refuse!("{}: the host's /dev/null is not the null device", doing());
            }
            move_mount(&null, &target).doing(doing)?;
        }
    }
    Ok(())
}

/// Makes `linux.readonlyPaths` read-only, with all that is mounted below them.
pub fn make_read_only(rootfs: &Rootfs, paths: &[String]) -> Result<()> {
    for path in paths {
        let doing = || format!("make {path} read-only (linux.readonlyPaths)");
        let target = match rootfs.open_to_protect(&cleaned(Path::new(path))) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            result => result.doing(doing)?,
        };
        let copy = clone_descriptor(&target, true).doing(doing)?;
        mount_setattr(copy.as_fd(), true, &mount_options::READ_ONLY).doing(doing)?;
        move_mount(&copy, &target).doing(doing)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Mount> {
        Mount::from_spec(
            3,
            &serde_json::from_str(json).unwrap(),
            Path::new("/bundle"),
        )
    }

    #[test]
    fn a_relative_source_is_in_the_bundle_and_the_destination_is_cleaned() {
        let mount = read(r#"{"destination":"/a/../b","source":"vol","options":["bind"]}"#).unwrap();
        assert_eq!(mount.source, Path::new("/bundle/vol"));
        assert_eq!(mount.destination, Path::new("/b"));
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (json, words) in [
            (
                r#"{"destination":"/../","type":"tmpfs"}"#,
                "mounts[3].destination",
            ),
            (r#"{"destination":"/a"}"#, "mounts[3].type"),
            (r#"{"destination":"/a","type":"bind"}"#, "mounts[3].source"),
            (
                r#"{"destination":"/a","type":"proc","options":["tmpcopyup"]}"#,
                "mounts[3].options",
            ),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
