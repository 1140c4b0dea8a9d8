//! The option strings of `mounts[].options`, and the meaning of each option for the kernel.
//!
//! The option names are defined in the runtime specification (config.md, "Linux mount options"),
//! which uses the names of mount(8). If an option is not in any table of this module, rrun passes
//! the option to the file system as a parameter. The file system refuses unknown parameters.

use rustix::mount::MountFlags;

use crate::error::{Result, refuse};
use rrun_kernel::mount_setattr::MountAttr;

// linux/mount.h
const ATTR_RDONLY: u64 = 0x0000_0001;
const ATTR_NOSUID: u64 = 0x0000_0002;
const ATTR_NODEV: u64 = 0x0000_0004;
const ATTR_NOEXEC: u64 = 0x0000_0008;
/// All bits that control how access times are updated.
const ATTR_ATIME: u64 = 0x0000_0070;
const ATTR_NOATIME: u64 = 0x0000_0010;
const ATTR_STRICTATIME: u64 = 0x0000_0020;
const ATTR_NODIRATIME: u64 = 0x0000_0080;
const ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;
/// The attributes that restrict the use of a mount.
pub(crate) const RESTRICTIONS: u64 =
    ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC | ATTR_NOSYMFOLLOW;
/// The attributes that determine when the kernel updates the access times of files.
pub(super) const ACCESS_TIMES: u64 = ATTR_ATIME | ATTR_NODIRATIME;
/// The attribute that maps the ids of a mount. The user namespace with the mappings is passed to
/// mount_setattr(2) together with the attribute.
pub(crate) const ATTR_IDMAP: u64 = 0x0010_0000;

const MS_UNBINDABLE: u64 = libc::MS_UNBINDABLE;
const MS_PRIVATE: u64 = libc::MS_PRIVATE;
const MS_SLAVE: u64 = libc::MS_SLAVE;
const MS_SHARED: u64 = libc::MS_SHARED;

/// The options that set attributes, each with its name, the bits to set, and the bits to clear
/// first.
const ATTRIBUTES: &[(&str, u64, u64)] = &[
    ("ro", ATTR_RDONLY, 0),
    ("rw", 0, ATTR_RDONLY),
    ("nosuid", ATTR_NOSUID, 0),
    ("suid", 0, ATTR_NOSUID),
    ("nodev", ATTR_NODEV, 0),
    ("dev", 0, ATTR_NODEV),
    ("noexec", ATTR_NOEXEC, 0),
    ("exec", 0, ATTR_NOEXEC),
    ("nodiratime", ATTR_NODIRATIME, 0),
    ("diratime", 0, ATTR_NODIRATIME),
    ("relatime", 0, ATTR_ATIME),
    ("norelatime", ATTR_STRICTATIME, ATTR_ATIME),
    ("noatime", ATTR_NOATIME, ATTR_ATIME),
    ("atime", 0, ATTR_ATIME),
    ("strictatime", ATTR_STRICTATIME, ATTR_ATIME),
    ("nostrictatime", 0, ATTR_ATIME),
    ("nosymfollow", ATTR_NOSYMFOLLOW, 0),
    ("symfollow", 0, ATTR_NOSYMFOLLOW),
];

/// The options that set the propagation, each with its name and propagation type. The third field
/// is true if the option also applies to all mounts below the mount.
const PROPAGATIONS: &[(&str, u64, bool)] = &[
    ("private", MS_PRIVATE, false),
    ("rprivate", MS_PRIVATE, true),
    ("slave", MS_SLAVE, false),
    ("rslave", MS_SLAVE, true),
    ("shared", MS_SHARED, false),
    ("rshared", MS_SHARED, true),
    ("unbindable", MS_UNBINDABLE, false),
    ("runbindable", MS_UNBINDABLE, true),
];

/// The options that apply to a whole file system (its superblock), and that every file system
/// accepts.
const SUPERBLOCK: &[&str] = &["sync", "async", "dirsync", "mand", "lazytime", "nolazytime"];

/// The options that rrun does not support yet. rrun refuses these options instead of ignoring them.
const UNSUPPORTED: &[&str] = &["move"];

/// The options that have no effect. `silent` and `loud` control only messages about a mount. The
/// other options control features that no longer depend on a mount option. fsconfig(2) does not
/// accept any option in this list.
const WITHOUT_EFFECT: &[&str] = &["silent", "loud", "iversion", "noiversion", "nomand"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bind {
    /// A new mount of a file system instead of a bind mount.
    No,
    /// A bind mount of the source, without the mounts below the source.
    Alone,
    /// A bind mount of the source and of all mounts below the source.
    Recursive,
}

/// The settings that a list of mount options requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountOptions {
    pub(crate) bind: Bind,
    /// True if the options only change an existing mount.
    pub(crate) remount: bool,
    /// The attributes of the mount itself.
    pub(crate) attr: MountAttr,
    /// The attributes of the mount and of all mounts below it.
    pub(crate) recursive_attr: MountAttr,
    /// `None` means that ids are not mapped, `Some(false)` that ids are mapped only in this mount,
    /// and `Some(true)` that ids are also mapped in all mounts below this mount.
    pub(crate) idmap: Option<bool>,
    /// The propagation types in the given order. The boolean is true if the propagation type also
    /// applies to all mounts below the mount.
    pub(crate) propagation: Vec<(u64, bool)>,
    /// True if a tmpfs is filled with a copy of the directory that it covers.
    pub(crate) tmpcopyup: bool,
    /// The options of the whole file system. A bind mount does not change these options.
    pub(crate) superblock: Vec<&'static str>,
    /// The parameters of the file system, each with or without a value.
    pub(crate) data: Vec<Parameter>,
}

/// A parameter of a file system: its name, and its value if it has one.
pub(crate) type Parameter = (String, Option<String>);

/// Parses a list of option strings.
///
/// # Errors
/// Fails if this version of rrun does not support an option. The error names the option.
pub(crate) fn parse<'a>(options: impl Iterator<Item = &'a str>) -> Result<MountOptions> {
    let mut parsed = MountOptions {
        bind: Bind::No,
        remount: false,
        attr: MountAttr::default(),
        recursive_attr: MountAttr::default(),
        idmap: None,
        propagation: Vec::new(),
        tmpcopyup: false,
        superblock: Vec::new(),
        data: Vec::new(),
    };
    for option in options {
        if let Some((_, set, clear)) = ATTRIBUTES.iter().find(|(name, ..)| *name == option) {
            merge(&mut parsed.attr, *set, *clear);
        } else if let Some((_, set, clear)) = option
            .strip_prefix('r')
            .and_then(|rest| ATTRIBUTES.iter().find(|(name, ..)| *name == rest))
        {
            merge(&mut parsed.recursive_attr, *set, *clear);
        } else if let Some((_, kind, recursive)) =
            PROPAGATIONS.iter().find(|(name, ..)| *name == option)
        {
            parsed.propagation.push((*kind, *recursive));
        } else if let Some(known) = SUPERBLOCK.iter().find(|known| **known == option) {
            parsed.superblock.push(known);
        } else if WITHOUT_EFFECT.contains(&option) {
        } else if UNSUPPORTED.contains(&option) {
            refuse!("option {option} is not supported by this version of rrun");
        } else {
            match option {
                "bind" => parsed.bind = Bind::Alone,
                "rbind" => parsed.bind = Bind::Recursive,
                "remount" => parsed.remount = true,
                "tmpcopyup" => parsed.tmpcopyup = true,
                "idmap" => parsed.idmap = Some(false),
                "ridmap" => parsed.idmap = Some(true),
                "" | "defaults" => {}
                _ => parsed.data.extend(parameters(option)),
            }
        }
    }
    Ok(parsed)
}

/// Splits an option string into parameters. One string can contain several parameters, as with
/// mount(2), and rrun's callers rely on this behaviour. A comma is part of a value in two cases:
/// after a backslash (as in an overlay's `lowerdir`), and between quotes (as in an SELinux label).
fn parameters(option: &str) -> Vec<Parameter> {
    let (mut quoted, mut escaped) = (false, false);
    option
        .split(|letter: char| {
            let separates = letter == ',' && !quoted && !escaped;
            quoted ^= letter == '"';
            escaped = letter == '\\' && !escaped;
            separates
        })
        .filter(|part| !part.is_empty())
        .map(|part| match part.split_once('=') {
            Some((key, value)) if is_label(key) => {
                (key.to_owned(), Some(value.trim_matches('"').to_owned()))
            }
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (part.to_owned(), None),
        })
        .collect()
}

/// Returns whether a parameter is an SELinux label. mount(2) requires quotes around the value of
/// such a parameter, but fsconfig(2) does not.
fn is_label(key: &str) -> bool {
    matches!(key, "context" | "fscontext" | "defcontext" | "rootcontext")
}

/// Returns the flag of mount(2) that corresponds to an option of the whole file system.
pub(crate) fn mount_flag(superblock: &str) -> MountFlags {
    match superblock {
        "sync" => MountFlags::SYNCHRONOUS,
        "dirsync" => MountFlags::DIRSYNC,
        "mand" => MountFlags::PERMIT_MANDATORY_FILE_LOCKING,
        "lazytime" => MountFlags::LAZYTIME,
        _ => MountFlags::empty(),
    }
}

fn merge(attr: &mut MountAttr, set: u64, clear: u64) {
    attr.attr_set = (attr.attr_set & !clear) | set;
    attr.attr_clr |= clear;
    // A later option overrides an earlier option, so `rw,ro` is read-only. The bits for access
    // times form one field. The kernel sets the field only if the whole field is also cleared. So
    // the field's bits remain in `attr_clr`.
    attr.attr_clr &= !(set & !ATTR_ATIME);
}

/// Returns the propagation type that `linux.rootfsPropagation` specifies, and whether the type is
/// recursive.
pub(crate) fn propagation(name: &str) -> Option<(u64, bool)> {
    PROPAGATIONS
        .iter()
        .find(|(known, ..)| *known == name)
        .map(|(_, kind, recursive)| (*kind, *recursive))
}

/// Returns the names of all supported options, for `rrun features`.
pub(crate) fn known() -> Vec<String> {
    let mut names: Vec<String> = [
        "bind",
        "rbind",
        "defaults",
        "idmap",
        "remount",
        "ridmap",
        "tmpcopyup",
    ]
    .map(str::to_owned)
    .to_vec();
    for (name, ..) in ATTRIBUTES {
        names.push((*name).to_owned());
        names.push(format!("r{name}"));
    }
    names.extend(PROPAGATIONS.iter().map(|(name, ..)| (*name).to_owned()));
    names.extend(WITHOUT_EFFECT.iter().map(|name| (*name).to_owned()));
    names.extend(SUPERBLOCK.iter().map(|name| (*name).to_owned()));
    names.sort_unstable();
    names.dedup();
    names
}

/// Returns whether the attributes make the mount itself read-only.
pub(crate) fn is_read_only(attr: &MountAttr) -> bool {
    attr.attr_set & ATTR_RDONLY != 0
}

/// The propagation type with which new mounts propagate only from the host to the container.
pub(crate) const SLAVE: u64 = MS_SLAVE;
pub(crate) const PRIVATE: u64 = MS_PRIVATE;
/// The propagation type with which new mounts propagate in both directions, between the host and
/// the container.
pub(crate) const SHARED: u64 = MS_SHARED;

/// The maximum length in bytes of a value that fsconfig(2) accepts. The value of an overlay's
/// `lowerdir` is often longer.
const FSCONFIG_VALUE_BYTES: usize = 255;

/// The maximum total length of the parameters that mount(2) accepts, which is one page minus the
/// final NUL byte.
const MOUNT_DATA_BYTES: usize = 4095;

/// Checks the total length of a file system's parameters.
///
/// # Errors
/// Fails if the parameters are longer than the kernel accepts.
pub(crate) fn check_parameters(data: &[Parameter]) -> Result<()> {
    if needs_mount_call(data) {
        let length = joined(data).len();
        if length > MOUNT_DATA_BYTES {
            refuse!(
                "the parameters are {length} bytes long, but the kernel accepts at most {MOUNT_DATA_BYTES}"
            );
        }
    }
    Ok(())
}

/// Returns whether a value is too long for fsconfig(2), so that only mount(2) accepts it.
pub(crate) fn needs_mount_call(data: &[Parameter]) -> bool {
    data.iter().any(|(_, value)| {
        value
            .as_ref()
            .is_some_and(|it| it.len() > FSCONFIG_VALUE_BYTES)
    })
}

/// Joins parameters into the string that mount(2) expects.
pub(crate) fn joined(data: &[Parameter]) -> String {
    data.iter()
        .map(|(key, value)| match value {
            Some(value) if is_label(key) => format!("{key}=\"{value}\""),
            Some(value) => format!("{key}={value}"),
            None => key.clone(),
        })
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &[&str]) -> MountOptions {
        parse(options.iter().copied()).unwrap()
    }

    #[test]
    fn the_usual_options_of_a_tmpfs_are_parsed() {
        let options = parsed(&["nosuid", "strictatime", "mode=755", "size=65536k"]);
        assert_eq!(options.bind, Bind::No);
        assert_eq!(options.attr.attr_set, ATTR_NOSUID | ATTR_STRICTATIME);
        assert_eq!(options.attr.attr_clr, ATTR_ATIME);
        assert_eq!(
            options.data,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("65536k".to_owned()))
            ]
        );
    }

    #[test]
    fn the_last_of_several_contradicting_options_applies() {
        assert_eq!(parsed(&["ro", "rw"]).attr.attr_set, 0);
        assert_eq!(parsed(&["ro", "rw"]).attr.attr_clr, ATTR_RDONLY);
        assert_eq!(parsed(&["rw", "ro"]).attr, MountAttr::READ_ONLY);
        assert_eq!(
            parsed(&["noatime", "relatime"]).attr,
            MountAttr {
                attr_clr: ATTR_ATIME,
                ..MountAttr::default()
            }
        );
    }

    #[test]
    fn recursive_options_are_distinguished_from_other_options_that_begin_with_r() {
        let options = parsed(&["rbind", "rro", "rslave", "relatime"]);
        assert_eq!(options.bind, Bind::Recursive);
        assert_eq!(options.recursive_attr, MountAttr::READ_ONLY);
        assert_eq!(options.propagation, [(MS_SLAVE, true)]);
        assert_eq!(options.attr.attr_clr, ATTR_ATIME);
        assert_eq!(parsed(&["rw"]).attr.attr_clr, ATTR_RDONLY);
    }

    #[test]
    fn the_error_for_an_unsupported_option_names_the_option() {
        let error = parse(["move"].into_iter()).unwrap_err().to_string();
        assert!(error.contains("move"), "{error}");
    }

    /// The option names in config.md of the runtime specification 1.3, "Linux mount options".
    const SPECIFICATION: &str = "
        async atime bind defaults dev diratime dirsync exec idmap iversion lazytime loud mand
        noatime nodev nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime
        nosuid nosymfollow private ratime rbind rdev rdiratime relatime remount rexec ridmap
        rnoatime rnodev rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro
        rprivate rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw
        shared silent slave strictatime suid symfollow sync tmpcopyup unbindable";

    #[test]
    fn every_option_name_of_the_specification_is_supported() {
        let known = known();
        for name in SPECIFICATION.split_whitespace() {
            assert!(
                known.iter().any(|it| it == name),
                "the mount option {name} is not in the list of supported options"
            );
            assert!(
                parsed(&[name]).data.is_empty(),
                "the mount option {name} was parsed as a parameter of the file system"
            );
        }
    }

    #[test]
    fn one_string_can_contain_several_parameters() {
        let options = parsed(&[
            r#"size=1m,mode=700,noswap,context="a:b:c0,c1""#,
            r"lowerdir=/a\,b:/c,index=off",
        ]);
        let data: Vec<(&str, Option<&str>)> = options
            .data
            .iter()
            .map(|(key, value)| (&**key, value.as_deref()))
            .collect();
        assert_eq!(
            data,
            [
                ("size", Some("1m")),
                ("mode", Some("700")),
                ("noswap", None),
                ("context", Some("a:b:c0,c1")),
                ("lowerdir", Some(r"/a\,b:/c")),
                ("index", Some("off")),
            ]
        );
    }
}
