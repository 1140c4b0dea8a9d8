//! An empty directory to which nobody can add files.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

/// Creates an empty, read-only tmpfs without attaching it. `context` is the SELinux context of its
/// root directory. The limits leave no room for files, because a container with CAP_SYS_ADMIN can make
/// the tmpfs writable.
pub fn create(context: Option<&str>) -> Result<OwnedFd, Errno> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    if let Some(context) = context {
        fsconfig_set_string(&fs, "context", context)?;
    }
    fsconfig_set_string(&fs, "nr_blocks", "1")?;
    fsconfig_set_string(&fs, "nr_inodes", "1")?;
    fsconfig_create(&fs)?;
    fsmount(
        &fs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}
