//! The namespaces of a container: new namespaces, and existing namespaces that the container
//! enters.

mod holder;
pub(crate) mod idmap;
pub(crate) mod net_devices;
pub(crate) mod resctrl;
pub(crate) mod sysctl;

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Type};
use rustix::fs::{Gid, OFlags, Stat, Uid};
use rustix::io::Errno;
use rustix::thread::LinkNameSpaceType;

pub(crate) use self::holder::NamespaceHolder;
use crate::error::{Context, Result, refuse};
use rrun_kernel::namespace_limits::unshare;
use rrun_kernel::procfs::Procfs;
use rrun_kernel::regular_file;

/// The open file of an existing namespace, with the type that the namespace must have.
#[derive(Debug)]
pub(crate) struct OpenNamespace {
    typ: Type,
    path: PathBuf,
    file: File,
    /// The inode number of the namespace.
    inode: u64,
    /// True if the namespace is a namespace of the host (see [`OpenNamespace::is_hosts`]).
    is_hosts: bool,
}

/// The namespaces of a container. The container shares a namespace with rrun's caller if neither
/// `new` nor `join` contains the namespace's type.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    /// The `CLONE_NEW*` flags of the namespaces that are created for the container.
    pub(crate) new: u64,
    /// The existing namespaces that the container enters.
    pub(crate) join: Vec<OpenNamespace>,
}

/// Returns the `CLONE_NEW*` flag of a type of namespace.
pub(crate) fn flag(typ: Type) -> u64 {
    typ as u64
}

/// All types of namespaces, with their names in the specification.
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

/// Returns the specification's name for a type of namespace.
fn name(typ: Type) -> &'static str {
    TYPES
        .iter()
        .find(|(known, _)| *known == typ)
        .map_or("namespace", |(_, name)| name)
}

impl Namespaces {
    /// Checks `linux.namespaces` of config.json, and opens the existing namespaces.
    ///
    /// # Errors
    /// Fails if a type is listed twice, if a path is not absolute, or if the container cannot enter
    /// a namespace because it is the host's.
    pub(crate) fn from_spec(spec: &[LinuxNamespace]) -> Result<Namespaces> {
        let mut namespaces = Namespaces::default();
        for (index, namespace) in spec.iter().enumerate() {
            let typ = namespace.typ();
            if namespaces.is_new(typ) || namespaces.is_joined(typ) {
                refuse!(
                    "linux.namespaces[{index}].type: {} is listed twice",
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
                    namespaces.join.push(OpenNamespace::open(index, typ, path)?)
                }
                Some(path) => refuse!(
                    "linux.namespaces[{index}].path: {} is not an absolute path",
                    path.display()
                ),
            }
        }
        Ok(namespaces)
    }

    /// Returns whether a new namespace of this type is created for the container.
    pub(crate) fn is_new(&self, typ: Type) -> bool {
        self.new & flag(typ) != 0
    }

    /// Returns whether the container enters an existing namespace of this type.
    pub(crate) fn is_joined(&self, typ: Type) -> bool {
        self.join.iter().any(|join| join.typ == typ)
    }

    /// Returns whether the container has a different namespace of this type than the host. A joined
    /// namespace can be the host's, because its path can be `/proc/1/ns/net`, for example.
    pub(crate) fn own(&self, typ: Type) -> bool {
        let mut joins = self.join.iter();
        self.is_new(typ) || joins.any(|join| join.typ == typ && !join.is_hosts)
    }

    /// Returns whether the host name `name` does not change the host's name. Podman sets the host's
    /// name if a container joins the UTS namespace of another container, which can be the host's.
    pub(crate) fn can_have_hostname(&self, name: &str) -> bool {
        let is_hosts_name = || rustix::system::uname().nodename().to_bytes() == name.as_bytes();
        self.own(Type::Uts) || self.is_joined(Type::Uts) && is_hosts_name()
    }

    /// Returns the `CLONE_NEW*` flags of all namespaces that are created for the container or that
    /// the container enters.
    pub(crate) fn own_flags(&self) -> u64 {
        self.join
            .iter()
            .fold(self.new, |flags, join| flags | flag(join.typ))
    }

    /// Returns the inode number of the user namespace in which the container's first process `pid`
    /// executes its program.
    pub(crate) fn user_inode(&self, pid: i32) -> Result<u64> {
        if let Some(join) = self.join.iter().find(|join| join.is_user()) {
            return Ok(join.inode);
        }
        let path = if self.is_new(Type::User) {
            format!("/proc/{pid}/ns/user")
        } else {
            "/proc/self/ns/user".to_owned()
        };
        let stat = rustix::fs::stat(&path).doing(|| format!("check user namespace {path}"))?;
        Ok(stat.st_ino)
    }

    /// Returns the path of the existing namespace of this type that the container enters, if there
    /// is one.
    fn joined_path(&self, typ: Type) -> Option<&Path> {
        self.join
            .iter()
            .find(|join| join.typ == typ)
            .map(|join| &*join.path)
    }
}

impl OpenNamespace {
    /// Opens the namespace of `linux.namespaces[index]`.
    fn open(index: usize, typ: Type, path: PathBuf) -> Result<OpenNamespace> {
        let doing = || format!("open {} namespace {}", name(typ), path.display());
        let file = regular_file::open(&path, OFlags::RDONLY).doing(doing)?;
        let stat = rustix::fs::fstat(&file).doing(doing)?;
        let is_hosts = Self::is_hosts(typ, &stat).doing(doing)?;
        match typ {
            Type::Mount if is_hosts => refuse!(
                "linux.namespaces[{index}].path: {} is the mount namespace of the host, and rrun would change the root directory of the host's processes",
                path.display()
            ),
            // The kernel also refuses the host's user namespace, but its error does not name the
            // reason.
            Type::User if is_hosts => refuse!(
                "linux.namespaces[{index}].path: {} is the user namespace of the host, which a container cannot enter",
                path.display()
            ),
            _ => Ok(OpenNamespace {
                typ,
                path,
                file,
                inode: stat.st_ino,
                is_hosts,
            }),
        }
    }

    /// Returns whether `stat` describes the namespace of rrun itself or of the process with the id 1.
    /// Usually both are the same namespace. But a service manager can start rrun's caller in a
    /// separate mount namespace, for example.
    fn is_hosts(typ: Type, stat: &Stat) -> std::result::Result<bool, Errno> {
        let file_name = match typ {
            Type::Mount => "mnt",
            Type::Network => "net",
            typ => name(typ),
        };
        let id = |stat: &Stat| (stat.st_dev, stat.st_ino);
        let opened = id(stat);
        if opened == id(&rustix::fs::stat(format!("/proc/self/ns/{file_name}"))?) {
            return Ok(true);
        }
        // An unprivileged caller may not read the namespaces of process 1, and may not enter them
        // either.
        let first = rustix::fs::stat(format!("/proc/1/ns/{file_name}"));
        Ok(first.is_ok_and(|first| opened == id(&first)))
    }

    /// Returns whether the creator of the new process must enter this namespace before it creates
    /// the process.
    /// After setns(2) with a PID namespace, the calling process remains in its old PID namespace.
    /// Only its later children are in the new PID namespace. A child inherits its parent's time
    /// namespace, so the child does not need to enter that namespace itself.
    pub(crate) fn is_entered_by_children(&self) -> bool {
        matches!(self.typ, Type::Pid | Type::Time)
    }

    /// Returns whether the new process must always enter this namespace itself, because its parent
    /// cannot enter it. A parent in the container's mount namespace could no longer reach the
    /// host's paths. A parent in the container's cgroup namespace could not create a process in a
    /// cgroup outside of the cgroup namespace.
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
        // The kernel checks that the file is a namespace of this type.
        rustix::thread::move_into_link_name_space(self.file.as_fd(), Some(link))
            .doing(|| format!("enter {} namespace {}", name(self.typ), self.path.display()))
    }
}

/// Returns whether this process is in the initial user namespace of the kernel. If /proc cannot be
/// read, returns true.
pub(crate) fn in_initial_user_namespace() -> bool {
    /// The inode number of the initial user namespace, `PROC_USER_INIT_INO` in linux/proc_ns.h.
    const INITIAL_INODE: u64 = 0xefff_fffd;
    rustix::fs::stat("/proc/self/ns/user").map_or(true, |stat| stat.st_ino == INITIAL_INODE)
}

/// Creates a cgroup namespace and enters it.
pub(crate) fn unshare_cgroup() -> std::result::Result<(), Errno> {
    unshare(CloneFlags::CLONE_NEWCGROUP)
}

/// Changes the ids of this process to user 0 and group 0. A process in a new user namespace does
/// not have these ids automatically.
pub(crate) fn become_root_of_user_namespace() -> Result<()> {
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .doing(|| "become group 0 of the user namespace")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .doing(|| "become user 0 of the user namespace")
}

/// Creates a time namespace for later children, and sets the offsets of its clocks. The kernel
/// accepts offsets only before the first process is in the namespace. See time_namespaces(7).
pub(crate) fn unshare_time(offsets: &str) -> Result<()> {
    // The nix crate does not have this flag.
    unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))
        .doing(|| "create a time namespace")?;
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
    fn new_and_existing_namespaces_are_distinguished() {
        let namespaces = read(
            r#"[{"type":"pid"},{"type":"network","path":"/proc/self/ns/uts"},{"type":"mount","path":""}]"#,
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
    fn a_type_that_is_listed_twice_is_refused() {
        let error = read(r#"[{"type":"pid"},{"type":"pid","path":"/x"}]"#).unwrap_err();
        assert!(error.to_string().contains("linux.namespaces[1]"), "{error}");
    }
}
