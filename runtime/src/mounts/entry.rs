//! A checked entry of `mounts` in config.json.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount as SpecMount;

use super::options;
use crate::error::{Result, refuse};
use crate::mounts::options::{Bind, MountOptions};
use crate::namespaces::idmap::IdMaps;
use crate::sys::path::cleaned;

/// The properties of the container that determine which of the kernel's file systems it can mount.
pub(crate) struct Isolation<'a> {
    /// The path of the container's own cgroup.
    pub(crate) cgroup: &'a Path,
    /// True if the container has a cgroup namespace. Without a cgroup namespace, rrun mounts only
    /// the container's own cgroup instead of the whole hierarchy.
    pub(crate) has_cgroup_namespace: bool,
    /// True if the container has a new IPC namespace.
    pub(crate) has_new_ipc_namespace: bool,
}

/// A checked entry of `mounts`.
#[derive(Clone, Debug)]
pub(crate) struct Mount {
    index: usize,
    pub(crate) destination: PathBuf,
    /// The type of the file system. rrun ignores the type of a bind mount.
    pub(super) typ: String,
    pub(super) source: PathBuf,
    pub(crate) options: MountOptions,
    /// The SELinux label for the files in the mount (linux.mountLabel).
    pub(super) label: Option<String>,
    /// The id mappings of the mount. If `options.idmap` is set and this field is empty, ids are
    /// mapped as in the container's user namespace.
    pub(super) id_maps: IdMaps,
}

impl Mount {
    /// Parses and checks the entry `mounts[index]`.
    ///
    /// # Errors
    /// Fails if a field is missing or not supported. The error names the invalid field.
    pub(crate) fn from_spec(index: usize, spec: &SpecMount, bundle: &Path) -> Result<Mount> {
        let field = format!("mounts[{index}]");
        let destination = cleaned(spec.destination());
        if destination == Path::new("/") {
            refuse!("{field}.destination: a mount cannot cover the root directory itself");
        }
        let options = spec.options().iter().flatten().map(String::as_str);
        let mut options = options::parse(options)
            .map_err(|error| error.while_doing(format!("{field}.options")))?;
        let mut typ = spec.typ().clone().unwrap_or_default();
        if typ == "bind" && options.bind == Bind::No {
            options.bind = Bind::Alone;
        }
        if options.bind == Bind::No && typ.is_empty() && !options.remount {
            refuse!("{field}.type: is missing, and the option bind is not set");
        }
        if typ == "cgroup" {
            typ = "cgroup2".to_owned();
        }
        let id_maps = IdMaps::from_spec(
            &format!("{field}."),
            spec.uid_mappings().as_deref(),
            spec.gid_mappings().as_deref(),
        )?;
        if !id_maps.is_empty() {
            if !id_maps.is_complete() {
                refuse!(
                    "{field}.uidMappings, gidMappings: each of these fields requires the other"
                );
            }
            // Without the option ridmap, the mapping is not recursive, as with runc.
            options.idmap.get_or_insert(false);
        }
        check_options(&field, &typ, &options)?;
        let mut source = spec.source().clone().unwrap_or_default();
        if options.bind != Bind::No && !options.remount {
            if source.as_os_str().is_empty() {
                refuse!("{field}.source: is missing");
            }
            // config.md specifies that a relative source is relative to the bundle.
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

    /// Checks that ids can be mapped, if the mount has the option `idmap`.
    ///
    /// # Errors
    /// Fails if `idmap` is set without mappings, and the container does not have a user namespace.
    pub(crate) fn check_idmap(&self, own_user_namespace: bool) -> Result<()> {
        if self.is_idmapped() && self.id_maps.is_empty() && !own_user_namespace {
            refuse!(
                "mounts[{}].options: idmap needs uidMappings and gidMappings, because the container has no user namespace whose mappings rrun could use instead",
                self.index
            );
        }
        Ok(())
    }

    pub(crate) fn is_idmapped(&self) -> bool {
        self.options.idmap.is_some()
    }

    pub(crate) fn with_label(mut self, label: Option<&String>) -> Mount {
        self.label = label.cloned();
        self
    }

    /// Returns a read-only bind mount that rrun adds after the mounts of the configuration.
    pub(crate) fn read_only_bind(index: usize, source: &Path, destination: &Path) -> Result<Mount> {
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

    pub(super) fn sentence(&self) -> String {
        let place = format!("{} (mounts[{}])", self.destination.display(), self.index);
        if self.options.remount {
            format!("remount {place}")
        } else if self.is_bind() {
            format!("mount {} on {place}", self.source.display())
        } else {
            format!("mount {} on {place}", self.typ)
        }
    }

    /// Returns whether the mount inherits the contents or the file mode of the directory that the
    /// mount covers. As with runc, a tmpfs with the option `tmpcopyup` inherits the contents, and a
    /// tmpfs without the option `mode` inherits the mode.
    pub(super) fn inherits_from_target(&self) -> bool {
        self.typ == "tmpfs" && !self.is_bind() && (self.options.tmpcopyup || !self.has_data("mode"))
    }

    /// Returns whether the mount has an option `key` of its file system.
    pub(super) fn has_data(&self, key: &str) -> bool {
        self.options.data.iter().any(|(name, _)| name == key)
    }

    /// Returns whether rrun might need to create mount points inside this mount. Like runc, rrun
    /// attaches all mounts before it makes such a mount read-only.
    pub(super) fn is_written_first(&self) -> bool {
        (self.typ == "tmpfs" && !self.is_bind()) || self.is_new_dev()
    }

    /// Returns whether this mount is a new file system at /dev, in which rrun creates device files.
    pub(crate) fn is_new_dev(&self) -> bool {
        self.is_at_dev() && !self.is_bind()
    }

    /// Returns whether this mount is the host's /dev. rrun must not change the files of the host's
    /// /dev.
    pub(crate) fn is_hosts_dev(&self) -> bool {
        self.is_at_dev() && (self.is_bind() || self.typ == "devtmpfs")
    }

    fn is_at_dev(&self) -> bool {
        self.destination == Path::new("/dev") && !self.options.remount
    }

    /// Returns true if the creation of this mount certainly does not open a device.
    pub(crate) fn opens_no_device(&self) -> bool {
        const WITHOUT_DEVICE: [&str; 7] = [
            "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
        ];
        self.is_bind() || WITHOUT_DEVICE.contains(&&*self.typ)
    }

    pub(crate) fn is_bind(&self) -> bool {
        self.options.bind != Bind::No && !self.options.remount
    }
}

/// Checks that the options can be combined with each other and with the type of the mount.
///
/// # Errors
/// Fails if options contradict each other, or are not allowed for the type.
fn check_options(field: &str, typ: &str, options: &MountOptions) -> Result<()> {
    if options.tmpcopyup && typ != "tmpfs" {
        refuse!("{field}.options: tmpcopyup is allowed only for a tmpfs");
    }
    if options.idmap.is_some() && options.bind == Bind::No {
        refuse!("{field}: ids can be mapped only in a bind mount");
    }
    if options.remount && (options.idmap.is_some() || options.tmpcopyup) {
        refuse!(
            "{field}.options: remount changes an existing mount, and cannot be combined with idmap or tmpcopyup"
        );
    }
    if options.bind == Bind::No {
        options::check_parameters(&options.data)
            .map_err(|error| error.while_doing(format!("{field}.options")))?;
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
    fn errors_name_the_entry_and_the_field() {
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

    #[test]
    fn a_bind_mount_and_a_devtmpfs_at_dev_are_the_hosts_dev() {
        let dev = |json: &str| read(&format!(r#"{{"destination":"/dev/.",{json}}}"#)).unwrap();
        let tmpfs = dev(r#""type":"tmpfs""#);
        assert!(tmpfs.is_new_dev() && !tmpfs.is_hosts_dev());
        for json in [
            r#""type":"none","source":"/dev","options":["rbind"]"#,
            r#""type":"devtmpfs""#,
        ] {
            assert!(dev(json).is_hosts_dev(), "{json}");
        }
        let remount = dev(r#""type":"tmpfs","options":["remount","ro"]"#);
        assert!(!remount.is_new_dev() && !remount.is_hosts_dev());
    }
}
