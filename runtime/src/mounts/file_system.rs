//! New mounts of a file system, created with fsopen(2) and fsconfig(2). If the kernel does not
//! allow such a mount in a user namespace, rrun binds a directory of the host instead.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags, mount, unmount,
};

use super::entry::{Isolation, Mount};
use super::tree::{clone_descriptor, clone_tree};
use crate::error::{Context, Error, Reason as _, Result};
use crate::mounts::options::{self, Parameter, joined, needs_mount_call};
use crate::namespaces::in_initial_user_namespace;
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};
use rrun_kernel::namespace_limits::as_other_user;

/// The temporary mount point for a mount that only mount(2) can create. The directory /proc always
/// exists. The host does not see a mount on /proc, because this process is in the container's mount
/// namespace.
const SCRATCH_MOUNT_POINT: &str = "/proc";

/// The errno with which the kernel refused a mount, and the error that rrun reports.
struct MountRefusal {
    errno: Errno,
    error: Error,
}

impl Mount {
    /// Creates a detached mount of the file system. If the kernel refuses this mount, returns a
    /// bind mount of the host's own directory instead, for example of /sys for a sysfs.
    pub(super) fn new_file_system(&self, isolation: Option<&Isolation<'_>>) -> Result<OwnedFd> {
        let made = if needs_mount_call(&self.options.data) {
            self.with_mount_call()
        } else {
            match self.with_fsopen() {
                Err(refused) if refused.errno == Errno::NOSPC => {
                    as_other_user(|| self.with_fsopen()).unwrap_or(Err(refused))
                }
                made => made,
            }
        };
        let refused = match made {
            Ok(mount) => return Ok(mount),
            Err(refused) => refused,
        };
        match self.host_substitute(refused.errno, isolation) {
            Some((path, recursive)) => self.bind_instead(path, recursive).map_err(|error| {
                let refused = refused.error;
                Error::new(format!("{refused}, and rrun also failed to {error}"))
            }),
            None => Err(self.explained(refused)),
        }
    }

    /// Returns the host's directory that rrun bind-mounts in place of the file system, and whether
    /// the bind mount is recursive. In a user namespace, the kernel refuses to mount sysfs, mqueue
    /// or cgroup2 if the user namespace does not own the corresponding namespace (network, IPC or
    /// cgroup). In this case, runc bind-mounts the host's directory of a cgroup2, and crun
    /// bind-mounts the host's directory of a sysfs or mqueue.
    ///
    /// The host's directories show the container more than a new mount. So this function returns
    /// them only for these reasons. Outside a user namespace, and for the mqueue of a new IPC
    /// namespace, the kernel refused the mount for another reason.
    fn host_substitute<'a>(
        &self,
        errno: Errno,
        isolation: Option<&Isolation<'a>>,
    ) -> Option<(&'a Path, bool)> {
        let isolation = isolation?;
        let host = match (&*self.typ, errno) {
            ("sysfs", Errno::PERM) => (Path::new("/sys"), true),
            ("mqueue", Errno::PERM) if !isolation.has_new_ipc_namespace => {
                (Path::new("/dev/mqueue"), false)
            }
            ("cgroup2", Errno::PERM | Errno::BUSY) => (isolation.cgroup, false),
            _ => return None,
        };
        (!in_initial_user_namespace()).then_some(host)
    }

    pub(super) fn bind_instead(&self, path: &Path, recursive: bool) -> Result<OwnedFd> {
        let doing = || format!("bind {} instead", path.display());
        let mount = clone_tree(path, recursive).doing(doing)?;
        // rrun sets only the requested options that restrict the use of the mount. rrun does not
        // set the options for access times, because the kernel refuses to change them if they are
        // locked. A recursive bind mount also contains the host's mounts below the directory. rrun
        // restricts these mounts too, because a new sysfs would not contain them.
        let attr = MountAttr {
            attr_set: self.options.attr.attr_set & options::RESTRICTIONS,
            ..MountAttr::default()
        };
        mount_setattr(mount.as_fd(), recursive, &attr).doing(doing)?;
        Ok(mount)
    }

    fn explained(&self, refused: MountRefusal) -> Error {
        if self.typ == "proc" && refused.errno == Errno::PERM {
            return Error::new(format!(
                "{}: the kernel allows a mount of proc in a user namespace only if the container has its own PID namespace and rrun's /proc has no masked paths",
                refused.error
            ));
        }
        refused.error
    }

    fn with_fsopen(&self) -> std::result::Result<OwnedFd, MountRefusal> {
        let fs =
            rustix::mount::fsopen(&*self.typ, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| {
                MountRefusal {
                    errno,
                    error: self.file_system_error(errno),
                }
            })?;
        let explained = |errno: Errno| MountRefusal {
            errno,
            error: Error::new(format!("{}{}", errno.reason(), kernel_log(&fs))),
        };
        let option = |name: &str, errno: Errno| MountRefusal {
            errno,
            error: explained(errno).error.while_doing(format!("option {name}")),
        };
        let label = |errno: Errno| MountRefusal {
            errno,
            error: explained(errno)
                .error
                .while_doing("set the SELinux label of the file system (linux.mountLabel)"),
        };
        if !self.source.as_os_str().is_empty() {
            rustix::mount::fsconfig_set_string(&fs, "source", &self.source).map_err(explained)?;
        }
        for name in &self.options.superblock {
            rustix::mount::fsconfig_set_flag(&fs, *name).map_err(|errno| option(name, errno))?;
        }
        set_parameters(&fs, &self.options.data).map_err(|(name, errno)| option(name, errno))?;
        if let Some(context) = self.context() {
            rustix::mount::fsconfig_set_string(&fs, "context", context).map_err(label)?;
        }
        rustix::mount::fsconfig_create(&fs).map_err(explained)?;
        let attributes = MountAttrFlags::from_bits_retain(self.first_attributes() as u32);
        let mount = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(explained)?;
        if let Some(text) = self.label.as_ref().filter(|_| self.typ == "mqueue") {
            set_label(&mount, text).map_err(label)?;
        }
        Ok(mount)
    }

    /// Creates the mount with mount(2), which accepts longer values than fsconfig(2). mount(2)
    /// attaches the new mount to a directory, so this function returns a detached copy of the
    /// mount.
    fn with_mount_call(&self) -> std::result::Result<OwnedFd, MountRefusal> {
        let refused = |errno: Errno| MountRefusal {
            errno,
            error: self.file_system_error(errno),
        };
        let mut data = joined(&self.options.data);
        if let Some(context) = self.context() {
            data.push_str(&format!(",context=\"{context}\""));
        }
        let data = std::ffi::CString::new(data).map_err(|_| refused(Errno::INVAL))?;
        let mut flags = MountFlags::empty();
        for name in &self.options.superblock {
            flags |= options::mount_flag(name);
        }
        mount(&self.source, SCRATCH_MOUNT_POINT, &*self.typ, flags, &*data).map_err(refused)?;
        let copy = rustix::fs::open(
            SCRATCH_MOUNT_POINT,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|attached| clone_descriptor(attached, false));
        unmount(SCRATCH_MOUNT_POINT, UnmountFlags::DETACH).map_err(refused)?;
        let copy = copy.map_err(refused)?;
        let attr = MountAttr {
            attr_set: self.first_attributes(),
            ..self.options.attr
        };
        mount_setattr(copy.as_fd(), false, &attr).map_err(refused)?;
        Ok(copy)
    }

    /// Returns the SELinux label that applies to all files of the file system. Returns `None` for a
    /// file system that does not accept a label for all its files. Without a common label, each
    /// file gets its own label from the SELinux policy, or from rrun afterwards.
    fn context(&self) -> Option<&str> {
        let whole = !matches!(&*self.typ, "proc" | "sysfs" | "cgroup2" | "mqueue");
        self.label.as_deref().filter(|_| whole)
    }

    /// Returns the attributes with which the mount is created. If rrun still has to create files in
    /// the mount, the returned attributes lack the read-only attribute.
    fn first_attributes(&self) -> u64 {
        let wanted = self.options.attr.attr_set;
        if self.is_written_first() {
            wanted & !MountAttr::READ_ONLY.attr_set
        } else {
            wanted
        }
    }

    fn file_system_error(&self, errno: Errno) -> Error {
        Error::new(match errno {
            Errno::NODEV => format!("the kernel does not support the file system {}", self.typ),
            errno => errno.reason(),
        })
    }
}

/// Passes parameters to a file system that is being configured.
///
/// # Errors
/// Fails if the file system refuses a parameter. The error contains the name of this parameter, and
/// the errno.
pub(super) fn set_parameters<'a>(
    fs: &OwnedFd,
    data: &'a [Parameter],
) -> std::result::Result<(), (&'a str, Errno)> {
    for (key, value) in data {
        match value {
            Some(value) => rustix::mount::fsconfig_set_string(fs, &**key, &**value),
            None => rustix::mount::fsconfig_set_flag(fs, &**key),
        }
        .map_err(|errno| (&**key, errno))?;
    }
    Ok(())
}

/// Returns the kernel's message about the last failed call on `fs`, or an empty string if there is
/// no message.
pub(super) fn kernel_log(fs: &OwnedFd) -> String {
    let mut buffer = [0u8; 512];
    match rustix::io::read(fs, &mut buffer) {
        Ok(length) if length > 2 => {
            let text = String::from_utf8_lossy(buffer.get(2..length).unwrap_or_default());
            format!(" ({})", text.trim())
        }
        _ => String::new(),
    }
}

/// Sets the SELinux label of a mount's root directory.
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
