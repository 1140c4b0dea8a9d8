//! The option strings of `mounts[].options` and what each means to the kernel.
//!
//! The names are those of the runtime specification (config.md, "Linux mount options"),
//! which takes them from mount(8). What is in none of the tables goes to the file system
//! itself as a parameter; the file system refuses what it does not know.

use rustix::mount::MountFlags;

use crate::error::{Result, refuse};
use rrun_kernel::mount_setattr::MountAttr;

// linux/mount.h
const ATTR_RDONLY: u64 = 0x0000_0001;
const ATTR_NOSUID: u64 = 0x0000_0002;
const ATTR_NODEV: u64 = 0x0000_0004;
const ATTR_NOEXEC: u64 = 0x0000_0008;
/// All of the bits that say how access times are kept.
const ATTR_ATIME: u64 = 0x0000_0070;
const ATTR_NOATIME: u64 = 0x0000_0010;
const ATTR_STRICTATIME: u64 = 0x0000_0020;
const ATTR_NODIRATIME: u64 = 0x0000_0080;
const ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;
/// Attributes that forbid something.
pub(crate) const RESTRICTIONS: u64 =
    ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC | ATTR_NOSYMFOLLOW;
/// The mount maps ids as the user namespace does that goes with it.
pub(crate) const ATTR_IDMAP: u64 = 0x0010_0000;

const MS_UNBINDABLE: u64 = libc::MS_UNBINDABLE;
const MS_PRIVATE: u64 = libc::MS_PRIVATE;
const MS_SLAVE: u64 = libc::MS_SLAVE;
const MS_SHARED: u64 = libc::MS_SHARED;

/// Name, bits to set, bits to clear first.
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

/// Name, propagation type, whether for all mounts below as well.
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

/// Options of the file system as a whole that every file system takes.
const SUPERBLOCK: &[&str] = &["sync", "async", "dirsync", "mand", "lazytime", "nolazytime"];

/// Those that are not there yet, and are refused rather than ignored.
const UNSUPPORTED: &[&str] = &["move"];

/// Say how a mount is told of, or ask for what every file system has today; fsconfig(2) does
/// not know them.
const WITHOUT_EFFECT: &[&str] = &["silent", "loud", "iversion", "noiversion", "nomand"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bind {
    /// A new mount of a file system.
    No,
    /// The one mount at the source.
    Alone,
    /// The mount at the source and all below it.
    Recursive,
}

/// What a list of options asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountOptions {
    pub(crate) bind: Bind,
    /// Whether the mount is there already and is only given these options.
    pub(crate) remount: bool,
    /// Attributes of the mount itself.
    pub(crate) attr: MountAttr,
    /// Attributes of the mount and of all below it.
    pub(crate) recursive_attr: MountAttr,
    /// Whether ids are to be mapped, and if so, whether in all mounts below as well.
    pub(crate) idmap: Option<bool>,
    /// Propagation types, in the order given, each with whether it is recursive.
    pub(crate) propagation: Vec<(u64, bool)>,
    /// Whether a tmpfs begins with what the directory has that it covers.
    pub(crate) tmpcopyup: bool,
    /// Options of the file system as a whole; a bind mount leaves them as they are.
    pub(crate) superblock: Vec<&'static str>,
    /// Parameters of the file system, with and without value.
    pub(crate) data: Vec<Parameter>,
}

/// A parameter of a file system: its name, and its value if it has one.
pub(crate) type Parameter = (String, Option<String>);

/// Reads a list of option strings.
///
/// # Errors
/// An option that this version does not support, by its name.
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

/// Several may stand in one string, as mount(2) takes them, and callers rely on that. A comma
/// belongs to a value behind a backslash (overlay) or between quotes (an SELinux label).
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

/// Whether a parameter is SELinux's, whose values stand in quotes for mount(2) alone.
fn is_label(key: &str) -> bool {
    matches!(key, "context" | "fscontext" | "defcontext" | "rootcontext")
}

/// What mount(2) has for an option of the file system as a whole.
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
    // A later option takes back what an earlier one cleared: `rw,ro` is read-only. Access
    // time is one field and must always be cleared as a whole before it is set.
    attr.attr_clr &= !(set & !ATTR_ATIME);
}

/// The propagation that `linux.rootfsPropagation` names, and whether it is recursive.
pub(crate) fn propagation(name: &str) -> Option<(u64, bool)> {
    PROPAGATIONS
        .iter()
        .find(|(known, ..)| *known == name)
        .map(|(_, kind, recursive)| (*kind, *recursive))
}

/// All the names above, for `rrun features`.
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

/// Whether the mount itself is to be read-only.
pub(crate) fn is_read_only(attr: &MountAttr) -> bool {
    attr.attr_set & ATTR_RDONLY != 0
}

/// Mounts made on the host still arrive, none leaves.
pub(crate) const SLAVE: u64 = MS_SLAVE;
/// Mounts arrive and leave.
pub(crate) const SHARED: u64 = MS_SHARED;

/// The longest value that fsconfig(2) takes; overlay's `lowerdir` often is longer.
const FSCONFIG_VALUE_BYTES: usize = 255;

/// What mount(2) takes of parameters in all: a page less the NUL.
const MOUNT_DATA_BYTES: usize = 4095;

/// # Errors
/// More than the kernel takes.
pub(crate) fn check_parameters(data: &[Parameter]) -> Result<()> {
    if needs_mount_call(data) {
        let length = joined(data).len();
        if length > MOUNT_DATA_BYTES {
            refuse!("are {length} bytes long, and the kernel takes {MOUNT_DATA_BYTES}");
        }
    }
    Ok(())
}

pub(crate) fn needs_mount_call(data: &[Parameter]) -> bool {
    data.iter().any(|(_, value)| {
        value
            .as_ref()
            .is_some_and(|it| it.len() > FSCONFIG_VALUE_BYTES)
    })
}

/// Parameters as mount(2) takes them.
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
    fn usual_options_of_a_tmpfs() {
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
    fn the_last_of_contradicting_options_counts() {
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
    fn recursive_forms_are_told_from_names_that_begin_with_r() {
        let options = parsed(&["rbind", "rro", "rslave", "relatime"]);
        assert_eq!(options.bind, Bind::Recursive);
        assert_eq!(options.recursive_attr, MountAttr::READ_ONLY);
        assert_eq!(options.propagation, [(MS_SLAVE, true)]);
        assert_eq!(options.attr.attr_clr, ATTR_ATIME);
        assert_eq!(parsed(&["rw"]).attr.attr_clr, ATTR_RDONLY);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let error = parse(["move"].into_iter()).unwrap_err().to_string();
        assert!(error.contains("move"), "{error}");
    }

    /// config.md of the runtime specification 1.3, "Linux mount options".
    const SPECIFICATION: &str = "
        async atime bind defaults dev diratime dirsync exec idmap iversion lazytime loud mand
        noatime nodev nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime
        nosuid nosymfollow private ratime rbind rdev rdiratime relatime remount rexec ridmap
        rnoatime rnodev rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro
        rprivate rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw
        shared silent slave strictatime suid symfollow sync tmpcopyup unbindable";

    #[test]
    fn every_name_of_the_specification_means_something() {
        let known = known();
        for name in SPECIFICATION.split_whitespace() {
            assert!(known.iter().any(|it| it == name), "{name} is not known");
            assert!(parsed(&[name]).data.is_empty(), "{name} is a parameter");
        }
    }

    #[test]
    fn several_parameters_may_stand_in_one_string() {
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
