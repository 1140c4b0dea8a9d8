//! One entry of `mounts` in config.json, checked.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount as SpecMount;

use super::options;
use crate::error::{Result, refuse};
use crate::mounts::options::{Bind, MountOptions};
use crate::namespaces::idmap::IdMaps;
use crate::sys::path::cleaned;

/// The cgroup that a container is in.
pub(crate) struct OwnCgroup<'a> {
    pub(crate) path: &'a Path,
    /// Whether it has a cgroup namespace; otherwise its own cgroup is shown to it in place of
    /// the whole hierarchy.
    pub(crate) has_namespace: bool,
}

/// One entry of `mounts`, checked.
#[derive(Clone, Debug)]
pub(crate) struct Mount {
    index: usize,
    pub(crate) destination: PathBuf,
    /// The file system's type; for a bind mount only a word.
    pub(super) typ: String,
    pub(super) source: PathBuf,
    pub(crate) options: MountOptions,
    /// SELinux label of the files (linux.mountLabel).
    pub(super) label: Option<String>,
    /// How ids are mapped; if they are to be (`options.idmap`) and this is empty, as in the
    /// container's user namespace.
    pub(super) id_maps: IdMaps,
}

impl Mount {
    /// # Errors
    /// What is missing or not supported, by the name of its field.
    pub(crate) fn from_spec(index: usize, spec: &SpecMount, bundle: &Path) -> Result<Mount> {
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
            spec.uid_mappings().as_deref(),
            spec.gid_mappings().as_deref(),
        )?;
        if !id_maps.is_empty() {
            if !id_maps.is_complete() {
                refuse!("{field}.uidMappings, gidMappings: one can not be without the other");
            }
            // Not recursive unless it is said, as with runc.
            options.idmap.get_or_insert(false);
        }
        check_options(&field, &typ, &options)?;
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
    /// `idmap` without mappings, when the container has no user namespace.
    pub(crate) fn check_idmap(&self, own_user_namespace: bool) -> Result<()> {
        if self.is_idmapped() && self.id_maps.is_empty() && !own_user_namespace {
            refuse!(
                "mounts[{}].options: idmap needs uidMappings and gidMappings, because the container has no user namespace whose mappings it could use",
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

    /// A bind mount of rrun's own, behind those of the configuration.
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

    /// Whether it gets something of the directory that it covers: a tmpfs its contents with
    /// `tmpcopyup`, and its mode unless it has one of its own, as with runc.
    pub(super) fn is_filled(&self) -> bool {
        let has_mode = || self.options.data.iter().any(|(key, _)| key == "mode");
        self.typ == "tmpfs" && !self.is_bind() && (self.options.tmpcopyup || !has_mode())
    }

    /// Whether others may have to be mounted in it, for which it has no place yet: then it is
    /// read-only only in the end, if it is to be, as with runc.
    pub(super) fn is_written_first(&self) -> bool {
        let is_dev = self.destination == Path::new("/dev");
        (self.typ == "tmpfs" || is_dev) && !self.is_bind()
    }

    /// Whether it is certain that no device is opened for it.
    pub(crate) fn opens_no_device(&self) -> bool {
        const OF_NO_DEVICE: [&str; 7] = [
            "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
        ];
        self.is_bind() || OF_NO_DEVICE.contains(&&*self.typ)
    }

    pub(crate) fn is_bind(&self) -> bool {
        self.options.bind != Bind::No && !self.options.remount
    }
}

/// # Errors
/// Options that do not go together, or not with the type.
fn check_options(field: &str, typ: &str, options: &MountOptions) -> Result<()> {
    if options.tmpcopyup && typ != "tmpfs" {
        refuse!("{field}.options: tmpcopyup is for a tmpfs");
    }
    if options.idmap.is_some() && options.bind == Bind::No {
        refuse!("{field}: ids can be mapped only in a bind mount");
    }
    if options.remount && (options.idmap.is_some() || options.tmpcopyup) {
        refuse!(
            "{field}.options: remount changes a mount that is there, and goes with neither idmap nor tmpcopyup"
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
