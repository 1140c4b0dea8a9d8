//! `remount`: other options for a mount that is there already.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, OFlags, StatxAttributes, StatxFlags};
use rustix::mount::FsPickFlags;

use super::entry::Mount;
use super::file_system::{kernel_log, set_parameters};
use crate::error::{Context, Error, Reason as _, Result, refuse};
use crate::mounts::options::{self, Bind};
use crate::mounts::rootfs::Rootfs;
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

/// Gives the mount at the destination the options of `mount`, as mount(2) does with
/// MS_REMOUNT: what is not among them is cleared, but for how access times are kept.
///
/// `ro` and the like become attributes of the mount, never of the file system, which the host
/// may have mounted as well (sysfs, cgroup2); that gets its own parameters only.
pub(super) fn remount(mount: &Mount, rootfs: &Rootfs) -> Result<()> {
    let path = &mount.destination;
    let there = rootfs
        .open(path, OFlags::PATH)
        .doing(|| "open it in the container")?;
    let stat = rustix::fs::statx(&there, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
        .doing(|| "look at it")?;
    if !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        refuse!("nothing is mounted there that could be remounted");
    }
    let options = &mount.options;
    if options.bind == Bind::No && !(options.data.is_empty() && options.superblock.is_empty()) {
        reconfigure(mount, &there)?;
    }
    let set = options.attr.attr_set;
    let attr = MountAttr {
        attr_set: set,
        attr_clr: options.attr.attr_clr | (options::RESTRICTIONS & !set),
        ..MountAttr::default()
    };
    mount_setattr(there.as_fd(), false, &attr).doing(|| "set its options")?;
    mount.set_wider_attributes(&there)
}

fn reconfigure(mount: &Mount, there: &OwnedFd) -> Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let fs = rustix::mount::fspick(there, "", flags).doing(|| "open its file system")?;
    let explained =
        |errno: rustix::io::Errno| Error::new(format!("{}{}", errno.reason(), kernel_log(&fs)));
    for name in &mount.options.superblock {
        rustix::mount::fsconfig_set_flag(&fs, *name)
            .map_err(|errno| explained(errno).while_doing(format!("option {name}")))?;
    }
    set_parameters(&fs, &mount.options.data)
        .map_err(|(name, errno)| explained(errno).while_doing(format!("option {name}")))?;
    rustix::mount::fsconfig_reconfigure(&fs)
        .map_err(|errno| explained(errno).while_doing("set its parameters"))
}
