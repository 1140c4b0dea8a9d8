//! The option `remount`, which changes the options of an existing mount.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, OFlags, StatxAttributes, StatxFlags};
use rustix::mount::FsPickFlags;

use super::attributes::set_unlocked;
use super::entry::Mount;
use super::file_system::{kernel_log, set_parameters};
use crate::error::{Context, Error, Reason as _, Result, refuse};
use crate::mounts::options::{self, Bind};
use crate::mounts::rootfs::Rootfs;
use rrun_kernel::mount_setattr::MountAttr;

/// Sets the options of `mount` on the existing mount at the destination. Like MS_REMOUNT of
/// mount(2), this function clears all options that `mount` does not list. It does not clear the
/// options for access times.
///
/// Options such as `ro` become attributes of the mount, never of the file system. The same file
/// system can also be mounted on the host (sysfs, cgroup2). Only the options of a file system, such
/// as `sync` or the `size` of a tmpfs, change the file system itself.
pub(super) fn remount(mount: &Mount, rootfs: &Rootfs) -> Result<()> {
    let path = &mount.destination;
    let mounted = rootfs
        .open(path, OFlags::PATH)
        .doing(|| "open the mount in the container")?;
    let stat = rustix::fs::statx(&mounted, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
        .doing(|| "stat the mount")?;
    if !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        refuse!("this path is not a mount point");
    }
    let options = &mount.options;
    if options.bind == Bind::No && !(options.data.is_empty() && options.superblock.is_empty()) {
        reconfigure(mount, &mounted)?;
    }
    let set = options.attr.attr_set;
    let attr = MountAttr {
        attr_set: set,
        attr_clr: options.attr.attr_clr | (options::RESTRICTIONS & !set),
        ..MountAttr::default()
    };
    set_unlocked(&mounted, false, &attr).doing(|| "set the mount's options")?;
    mount.set_wider_attributes(&mounted)
}

fn reconfigure(mount: &Mount, mounted: &OwnedFd) -> Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let fs = rustix::mount::fspick(mounted, "", flags).doing(|| "open the mount's file system")?;
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
