//! The attributes of a mount, set by mount_setattr(2).

use std::os::fd::{AsFd, OwnedFd};

use super::entry::Mount;
use crate::error::{Context, Result};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

impl Mount {
    pub(super) fn set_attributes(&self, mount: &OwnedFd) -> Result<()> {
        let unchanged = MountAttr::default();
        if self.is_bind() && self.options.attr != unchanged {
            mount_setattr(mount.as_fd(), false, &self.options.attr)
                .doing(|| "set the mount's options")?;
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
            mount_setattr(mount.as_fd(), true, &recursive)
                .doing(|| "set the mount's recursive options")?;
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
