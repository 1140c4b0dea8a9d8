//! Which namespaces a container gets: new ones, or existing ones by path.

pub(crate) mod idmap;
pub(crate) mod net_devices;
pub(crate) mod resctrl;
pub(crate) mod sysctl;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Type};
use rustix::fs::{Gid, OFlags, Uid};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::error::{Context, Result, refuse};
use rrun_kernel::procfs::Procfs;
use rrun_kernel::regular_file;

/// An existing namespace to enter.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NamespacePath {
    typ: Type,
    path: PathBuf,
}

/// A namespace's file, open, and what it is to be.
#[derive(Debug)]
pub(crate) struct OpenNamespace {
    typ: Type,
    path: PathBuf,
    fd: OwnedFd,
}

/// The namespaces of a container. What is in neither list it shares with rrun's caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Namespaces {
    /// `CLONE_NEW*` of those that are made for it.
    pub(crate) new: u64,
    /// Those that exist already.
    join: Vec<NamespacePath>,
}

/// The `CLONE_NEW*` flag of a type of namespace.
pub(crate) fn flag(typ: Type) -> u64 {
    typ as u64
}

/// Every type, with its name in the specification.
pub(crate) const TYPES: [(Type, &str); 8] = [
    (Type::Cgroup, "cgroup"),
    (Type::Ipc, "ipc"),
    (Type::Mount, "mount"),
    (Type::Network, "network"),
    (Type::Pid, "pid"),
    (Type::Time, "time"),
    (Type::User, "user"),
    (Type::Uts, "uts"),
];

/// A type's name in the specification.
fn name(typ: Type) -> &'static str {
    TYPES
        .iter()
        .find(|(known, _)| *known == typ)
        .map_or("namespace", |(_, name)| name)
}

impl Namespaces {
    /// # Errors
    /// A type that is there twice, or a path that is not absolute.
    pub(crate) fn from_spec(spec: &[LinuxNamespace]) -> Result<Namespaces> {
        let mut namespaces = Namespaces::default();
        for (index, namespace) in spec.iter().enumerate() {
            let typ = namespace.typ();
            if namespaces.own(typ) {
                refuse!(
                    "linux.namespaces[{index}].type: {} is there twice",
                    name(typ)
                );
            }
            match namespace
                .path()
                .clone()
                .filter(|path| !path.as_os_str().is_empty())
            {
                None => namespaces.new |= flag(typ),
                Some(path) if path.is_absolute() => {
                    namespaces.join.push(NamespacePath { typ, path })
                }
                Some(path) => refuse!(
                    "linux.namespaces[{index}].path: {} is not an absolute path",
                    path.display()
                ),
            }
        }
        Ok(namespaces)
    }

    /// Whether one of this type is made for the container.
    pub(crate) fn is_new(&self, typ: Type) -> bool {
        self.new & flag(typ) != 0
    }

    /// Whether an existing one of this type is entered.
    fn is_joined(&self, typ: Type) -> bool {
        self.join.iter().any(|join| join.typ == typ)
    }

    /// Whether the container is in another namespace of this type than rrun's caller.
    pub(crate) fn own(&self, typ: Type) -> bool {
        self.is_new(typ) || self.is_joined(typ)
    }

    /// The `CLONE_NEW*` flags of all that are not rrun's caller's.
    pub(crate) fn own_flags(&self) -> u64 {
        self.join
            .iter()
            .fold(self.new, |flags, join| flags | flag(join.typ))
    }

    /// The file of the one of this type to be entered.
    fn joined_path(&self, typ: Type) -> Option<&Path> {
        self.join
            .iter()
            .find(|join| join.typ == typ)
            .map(|join| &*join.path)
    }

    /// Opens the files of those to be entered, while the host's paths are still valid.
    pub(crate) fn open_joins(&self) -> Result<Vec<OpenNamespace>> {
        self.join
            .iter()
            .map(|join| {
                let file = regular_file::open(&join.path, OFlags::RDONLY).doing(|| {
                    let (name, path) = (name(join.typ), join.path.display());
                    format!("open {name} namespace {path}")
                })?;
                Ok(OpenNamespace {
                    typ: join.typ,
                    path: join.path.clone(),
                    fd: file.into(),
                })
            })
            .collect()
    }
}

impl OpenNamespace {
    /// Whether it holds only for children, so that the parent must enter it.
    pub(crate) fn is_entered_by_children(&self) -> bool {
        matches!(self.typ, Type::Pid | Type::Time)
    }

    /// Whether the new process enters it itself in any case. In its mount namespace the
    /// host's paths are gone, and in its cgroup namespace it could not be made in a
    /// cgroup outside of that.
    pub(crate) fn is_entered_after_clone(&self) -> bool {
        matches!(self.typ, Type::Mount | Type::Cgroup)
    }

    pub(crate) fn is_user(&self) -> bool {
        self.typ == Type::User
    }

    pub(crate) fn enter(&self) -> Result<()> {
        let link = match self.typ {
            Type::Cgroup => LinkNameSpaceType::ControlGroup,
            Type::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Type::Mount => LinkNameSpaceType::Mount,
            Type::Network => LinkNameSpaceType::Network,
            Type::Pid => LinkNameSpaceType::ProcessID,
            Type::Time => LinkNameSpaceType::Time,
            Type::User => LinkNameSpaceType::User,
            Type::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
        };
        // The kernel checks that the file is a namespace, and of that type.
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&self.fd), Some(link))
            .doing(|| format!("enter {} namespace {}", name(self.typ), self.path.display()))
    }
}

/// Makes a cgroup namespace and enters it.
pub(crate) fn unshare_cgroup() -> std::result::Result<(), Errno> {
    unshare(UnshareFlags::NEWCGROUP)
}

fn unshare(flags: UnshareFlags) -> std::result::Result<(), Errno> {
    // SAFETY: the two callers request NEWCGROUP and NEWTIME, which leave the descriptor table
    // shared as it is; the process is single-threaded.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// In a new user namespace, user 0 has to be become by a system call.
pub(crate) fn become_root_of_user_namespace() -> Result<()> {
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .doing(|| "become group 0 of the user namespace")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .doing(|| "become user 0 of the user namespace")
}

/// Makes a time namespace for children, with its clocks set off. See time_namespaces(7):
/// that can be done only before the first process is in it.
pub(crate) fn unshare_time(offsets: &str) -> Result<()> {
    unshare(UnshareFlags::NEWTIME).doing(|| "make a time namespace")?;
    Procfs::open()?
        .write("self/timens_offsets", offsets)
        .doing(|| "set linux.timeOffsets")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Namespaces> {
        Namespaces::from_spec(&serde_json::from_str::<Vec<LinuxNamespace>>(json).unwrap())
    }

    #[test]
    fn new_and_joined_ones_are_told_apart() {
        let namespaces = read(
            r#"[{"type":"pid"},{"type":"network","path":"/run/netns/a"},{"type":"mount","path":""}]"#,
        )
        .unwrap();
        assert_eq!(
            namespaces.new,
            (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64
        );
        assert!(namespaces.is_joined(Type::Network) && !namespaces.is_new(Type::Network));
        assert!(!namespaces.own(Type::Uts));
    }

    #[test]
    fn one_that_is_there_twice_is_refused() {
        let error = read(r#"[{"type":"pid"},{"type":"pid","path":"/x"}]"#).unwrap_err();
        assert!(error.to_string().contains("linux.namespaces[1]"), "{error}");
    }
}
