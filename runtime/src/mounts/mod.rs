//! The mounts of a container, made and moved by file descriptor.
//!
//! A mount is first made detached, complete with all its attributes (fsopen, open_tree,
//! mount_setattr), and only then moved to a place that openat2 found (move_mount). At no
//! moment is it visible with less protection than was asked for.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount as SpecMount;
use rustix::fs::{FileType, OFlags};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

use crate::error::{Context, Error, Reason as _, Result, refuse};
use crate::mounts::options::{Bind, Options};
use crate::mounts::rootfs::{Rootfs, Target};
use crate::namespaces::idmap::IdMaps;
use crate::sys::mount_setattr::{MountAttr, mount_setattr};
use crate::sys::path::cleaned;
use crate::sys::procfs::PROC_SUPER_MAGIC;

pub mod devices;
mod file_system;
pub mod options;
pub mod protection;
pub mod readonly_exec;
mod remount;
pub mod rootfs;
mod taken;
pub mod tmpcopyup;
pub mod tree;

pub use taken::Taken;
use tree::{clone_tree, make_slave, move_mount};

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

/// The cgroup that a container is in.
pub struct OwnCgroup<'a> {
    pub path: &'a Path,
    /// Whether it has a cgroup namespace; otherwise its own cgroup is shown to it in place of
    /// the whole hierarchy.
    pub has_namespace: bool,
}

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
        let mut options = options::parse(options)
            .map_err(|error| error.while_doing(format!("{field}.options")))?;
        let mut typ = spec.typ().clone().unwrap_or_default();
        if typ == "bind" && options.bind == Bind::No {
            options.bind = Bind::Alone;
        }
        if options.bind == Bind::No && typ.is_empty() && !options.remount {
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
        if options.remount && (options.idmap.is_some() || options.copy_up) {
            refuse!(
                "{field}.options: remount changes a mount that is there, and goes with neither idmap nor tmpcopyup"
            );
        }
        if options.bind == Bind::No {
            file_system::check_parameters(&options.data)
                .map_err(|error| error.while_doing(format!("{field}.options")))?;
        }
        let mut source = spec.source().clone().unwrap_or_default();
        if options.bind != Bind::No && !options.remount {
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
            options: options::parse(options.into_iter())?,
            id_maps: IdMaps::default(),
            label: None,
        })
    }

    fn sentence(&self) -> String {
        let place = format!("{} (mounts[{}])", self.destination.display(), self.index);
        if self.options.remount {
            format!("remount {place}")
        } else if self.is_bind() {
            format!("mount {} on {place}", self.source.display())
        } else {
            format!("mount {} on {place}", self.typ)
        }
    }

    /// Whether it gets something of the directory that it covers: a tmpfs its contents with
    /// `tmpcopyup`, and its mode unless it has one of its own, as with runc.
    fn is_filled(&self) -> bool {
        let has_mode = || self.options.data.iter().any(|(key, _)| key == "mode");
        self.typ == "tmpfs" && !self.is_bind() && (self.options.copy_up || !has_mode())
    }

    /// Whether others may have to be mounted in it, for which it has no place yet: then it is
    /// read-only only in the end, if it is to be, as with runc.
    fn is_written_first(&self) -> bool {
        let is_dev = self.destination == Path::new("/dev");
        (self.typ == "tmpfs" || is_dev) && !self.is_bind()
    }

    /// Whether it is certain that no device is opened for it.
    pub fn opens_no_device(&self) -> bool {
        const OF_NO_DEVICE: [&str; 7] = [
            "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
        ];
        self.is_bind() || OF_NO_DEVICE.contains(&&*self.typ)
    }

    pub fn is_bind(&self) -> bool {
        self.options.bind != Bind::No && !self.options.remount
    }

    /// Mounts it in the container. `taken` is the mount, if it was made already.
    pub fn put(
        &self,
        rootfs: &mut Rootfs,
        taken: Option<OwnedFd>,
        cgroup: &OwnCgroup<'_>,
    ) -> Result<()> {
        if self.options.remount {
            return remount::remount(self, rootfs)
                .map_err(|error| error.while_doing(self.sentence()));
        }
        let mount = match taken {
            Some(mount) => mount,
            None => self.detached(Some(cgroup), false, None)?,
        };
        self.attach(rootfs, mount)
    }

    /// Makes the mount, attached nowhere. With `cut_off`, what is mounted below a bind mount
    /// later on does not reach the host. Ids are mapped as in the user namespace `ids`.
    fn detached(
        &self,
        cgroup: Option<&OwnCgroup<'_>>,
        cut_off: bool,
        ids: Option<&OwnedFd>,
    ) -> Result<OwnedFd> {
        let mount = match (self.is_bind(), cgroup) {
            (true, _) => self.bound(&self.source),
            (false, Some(cgroup)) if self.typ == "cgroup2" && !cgroup.has_namespace => {
                self.in_its_place(cgroup.path, false)
            }
            (false, _) => self.of_file_system(cgroup),
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

    fn map_ids(&self, mount: &OwnedFd, namespace: &OwnedFd) -> Result<()> {
        let attr = MountAttr {
            attr_set: options::ATTR_IDMAP,
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
        self.set_wider_attributes(mount)
    }

    /// Sets what goes for the mounts below as well, and the propagation.
    fn set_wider_attributes(&self, mount: &OwnedFd) -> Result<()> {
        let unchanged = MountAttr::default();
        let mut recursive = self.options.recursive_attr;
        if self.is_written_first() {
            recursive.attr_set &= !options::READ_ONLY.attr_set;
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
    fn attach(&self, rootfs: &mut Rootfs, mount: OwnedFd) -> Result<()> {
        self.place(rootfs, mount)
            .map_err(|error| error.while_doing(self.sentence()))
    }

    fn place(&self, rootfs: &mut Rootfs, mount: OwnedFd) -> Result<()> {
        let is_new = !self.is_bind() && matches!(&*self.typ, "proc" | "sysfs");
        let mut filled = self.is_filled();
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
            // A directory that is only made for it has nothing to give it.
            let is_there = !filled || rootfs.open(&self.destination, OFlags::PATH).is_ok();
            filled &= is_there;
            let target = rootfs.mount_target(&self.destination, kind)?;
            self.refuse_inside_proc(&target, &mount)?;
            target
        };
        if filled && self.options.copy_up {
            tmpcopyup::copy(&target, &mount)?;
        } else if filled {
            tmpcopyup::copy_mode(&target, &mount)?;
        }
        move_mount(&mount, &target).doing(|| "attach it")?;
        let asked = [&self.options.attr, &self.options.recursive_attr];
        if self.is_written_first() && asked.into_iter().any(options::is_read_only) {
            let again = fcntl_dupfd_cloexec(&mount, 0).doing(|| "keep it in mind")?;
            rootfs.read_only_later(self.sentence(), again);
        }
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
