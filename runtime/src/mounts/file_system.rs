//! New mounts of a file system, by fsopen(2) and fsconfig(2), and what there is in their
//! place where a user namespace has no right to one.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags, mount, unmount,
};

use super::entry::{Mount, OwnCgroup};
use super::tree::{clone_descriptor, clone_tree};
use crate::error::{Context, Error, Reason as _, Result};
use crate::mounts::options::{self, Parameter, joined, needs_mount_call};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

/// Where a mount that only mount(2) can make stands for a moment: a directory that is there
/// for certain, in a mount namespace that is the container's own.
const SCRATCH_MOUNT_POINT: &str = "/proc";

/// What went wrong, and what the kernel said.
struct MountRefusal {
    errno: Errno,
    error: Error,
}

impl Mount {
    /// A detached mount of the file system, or of what stands for it.
    pub(super) fn new_file_system(&self, cgroup: Option<&OwnCgroup<'_>>) -> Result<OwnedFd> {
        let made = if needs_mount_call(&self.options.data) {
            self.with_mount_call()
        } else {
            self.with_fsopen()
        };
        let refused = match made {
            Ok(mount) => return Ok(mount),
            Err(refused) => refused,
        };
        match self.host_substitute(refused.errno, cgroup) {
            Some((path, recursive)) => self.bind_instead(path, recursive),
            None => Err(self.explained(refused)),
        }
    }

    /// What of the host's is bound where a user namespace may have no mount of its own, because
    /// the network, IPC or cgroup namespace is not its own; runc does so for a cgroup, crun for
    /// the others.
    fn host_substitute<'a>(
        &self,
        errno: Errno,
        cgroup: Option<&OwnCgroup<'a>>,
    ) -> Option<(&'a Path, bool)> {
        match (&*self.typ, errno) {
            ("sysfs", Errno::PERM) => Some((Path::new("/sys"), true)),
            ("mqueue", Errno::PERM) => Some((Path::new("/dev/mqueue"), false)),
            ("cgroup2", Errno::PERM | Errno::BUSY) => Some((cgroup?.path, false)),
            _ => None,
        }
    }

    pub(super) fn bind_instead(&self, path: &Path, recursive: bool) -> Result<OwnedFd> {
        let doing = || format!("bind {} in its place", path.display());
        let mount = clone_tree(path, recursive).doing(doing)?;
        // Access times may be locked. The rest goes for what is mounted below, too: a sysfs
        // of its own would have nothing there.
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
                "{}: a user namespace needs a PID namespace of its own for that, and sight of a /proc that nothing hides parts of",
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
                    error: self.no_file_system(errno),
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
                .while_doing("label it (linux.mountLabel)"),
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

    /// By mount(2), which takes longer values. That attaches it somewhere; what it gives is a
    /// copy that is not.
    fn with_mount_call(&self) -> std::result::Result<OwnedFd, MountRefusal> {
        let refused = |errno: Errno| MountRefusal {
            errno,
            error: self.no_file_system(errno),
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

    /// The label that the file system puts on all of its files. Some have labels of the
    /// policy's own, file by file, or one set afterwards.
    fn context(&self) -> Option<&str> {
        let whole = !matches!(&*self.typ, "proc" | "sysfs" | "cgroup2" | "mqueue");
        self.label.as_deref().filter(|_| whole)
    }

    /// As long as something is to be written there, it is not read-only.
    fn first_attributes(&self) -> u64 {
        let wanted = self.options.attr.attr_set;
        if self.is_written_first() {
            wanted & !MountAttr::READ_ONLY.attr_set
        } else {
            wanted
        }
    }

    fn no_file_system(&self, errno: Errno) -> Error {
        Error::new(match errno {
            Errno::NODEV => format!("the kernel has no file system {}", self.typ),
            errno => errno.reason(),
        })
    }
}

/// Hands parameters to a file system that is being set up.
///
/// # Errors
/// The name of what is refused.
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

/// What the file system had to say about a refusal, if anything.
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
