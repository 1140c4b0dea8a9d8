//! The attributes of a mount, set by mount_setattr(2).

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::entry::Mount;
use super::options::ACCESS_TIMES;
use crate::error::{Context, Result};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

impl Mount {
    pub(super) fn set_attributes(&self, mount: &OwnedFd) -> Result<()> {
        let unchanged = MountAttr::default();
        if self.is_bind() && self.options.attr != unchanged {
            set_unlocked(mount, false, &self.options.attr).doing(|| "set the mount's options")?;
        }
        self.set_wider_attributes(mount)
    }

    /// Sets the propagation, and the recursive attributes, which also apply to the mounts below
    /// this mount.
    pub(super) fn set_wider_attributes(&self, mount: &OwnedFd) -> Result<()> {
        let unchanged = MountAttr::default();
        let mut recursive = self.options.recursive_attr;
        if self.is_written_first() {
            recursive.attr_set &= !MountAttr::READ_ONLY.attr_set;
        }
        if recursive != unchanged {
            set_unlocked(mount, true, &recursive).doing(|| "set the mount's recursive options")?;
        }
        for (propagation, recursive) in &self.options.propagation {
            let attr = MountAttr {
                propagation: *propagation,
                ..unchanged
            };
            mount_setattr(mount.as_fd(), *recursive, &attr)
                .doing(|| "set the mount's propagation")?;
        }
        Ok(())
    }
}

/// Sets attributes of a mount like mount_setattr(2), but keeps the restrictions and the update of
/// access times that the kernel has locked (mount_namespaces(7)). For example, a volume remains
/// read-only if the host has mounted it read-only and the container has a user namespace, even if
/// config.json specifies `rw`.
pub(super) fn set_unlocked(
    mount: &OwnedFd,
    recursive: bool,
    attr: &MountAttr,
) -> std::result::Result<(), Errno> {
    let change = |attr_set, attr_clr| {
        let attr = MountAttr {
            attr_set,
            attr_clr,
            ..MountAttr::default()
        };
        mount_setattr(mount.as_fd(), recursive, &attr)
    };
    let (set, cleared) = (attr.attr_set, attr.attr_clr);
    match change(set, cleared) {
        Err(Errno::PERM) => {}
        changed => return changed,
    }
    change(set & !ACCESS_TIMES, 0)?;
    let flags = (0..u64::BITS).map(|bit| (0, cleared & !ACCESS_TIMES & (1 << bit)));
    let times = (set & ACCESS_TIMES, cleared & ACCESS_TIMES);
    for (set, cleared) in flags.chain([times]).filter(|flags| *flags != (0, 0)) {
        match change(set, cleared) {
            Ok(()) | Err(Errno::PERM) => {}
            failed => return failed,
        }
    }
    Ok(())
}
