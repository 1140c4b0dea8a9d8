//! Device nodes and symbolic links in a container's /dev.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, StatxFlags, Uid};
use rustix::io::Errno;

use crate::error::{Context, Error, Result, refuse};
use crate::mounts::rootfs::{MountTarget, Rootfs};
use crate::mounts::tree::{clone_tree, move_mount};
use crate::sys::device_number::device_number;
use crate::sys::path::cleaned;
use rrun_kernel::id;

/// A device node that rrun creates in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    path: PathBuf,
    kind: FileType,
    major: u32,
    minor: u32,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// The devices that config-linux.md requires in every container, each with its path, major number
/// and minor number.
const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The symbolic links in /dev, each with its name and target.
const LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Returns the devices of a container: the defaults, and the entries of `linux.devices`, which can
/// replace defaults. If several entries have the same path, the first one is kept, as with runc and
/// crun.
pub(crate) fn from_spec(spec: &[LinuxDevice]) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for (index, device) in spec.iter().enumerate() {
        let kind = match device.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => {
                refuse!("linux.devices[{index}].type: \"a\" is not a type of device node")
            }
        };
        let field = || format!("linux.devices[{index}]");
        let (major, minor) = match kind {
            FileType::Fifo => (0, 0),
            _ => device_number(field, device.major(), device.minor())?,
        };
        let (uid, gid) = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
        for id in [uid, gid] {
            if !id::is_valid(id) {
                refuse!("{}: {id} is not a valid user or group id", field());
            }
        }
        devices.push(Device {
            path: cleaned(device.path()),
            kind,
            major,
            minor,
            mode: device.file_mode().unwrap_or(0o666) & 0o777,
            uid,
            gid,
        });
    }
    devices.extend(DEFAULTS.map(|(path, major, minor)| Device {
        path: PathBuf::from(path),
        kind: FileType::CharacterDevice,
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    }));
    let mut paths = BTreeSet::new();
    devices.retain(|device| paths.insert(device.path.clone()));
    Ok(devices)
}

/// Records the directory /dev of the root file system, if rrun will create device files there.
pub(crate) fn record_dev(rootfs: &mut Rootfs) -> Result<()> {
    let dev = rootfs.make_dev()?;
    let stat = rustix::fs::fstat(&dev).doing(|| "stat /dev in the container")?;
    rootfs.record_dev(&stat);
    Ok(())
}

/// Creates the device nodes and links. Device nodes cannot be created in a user namespace, so if
/// `bind` is true, rrun bind-mounts the host's device nodes instead of creating new nodes. The file
/// mode creation mask (umask) must be 0.
pub(crate) fn make(rootfs: &Rootfs, devices: &[Device], bind: bool) -> Result<()> {
    let dev = rootfs.open_dev()?;
    let mut place = None;
    for device in devices {
        device
            .make(rootfs, &dev, bind, &mut place)
            .map_err(|error| error.while_doing(format!("create {}", device.path.display())))?;
    }
    for (name, to) in LINKS {
        link(&dev, name, to)?;
    }
    // /dev/ptmx must be a link to the ptmx in the container's own devpts. So rrun removes a ptmx of
    // the image.
    match rustix::fs::unlinkat(&dev, "ptmx", AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        result => result.doing(|| "remove /dev/ptmx")?,
    }
    link(&dev, "ptmx", "pts/ptmx")
}

fn link(dev: &OwnedFd, name: &str, to: &str) -> Result<()> {
    match rustix::fs::symlinkat(to, dev, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        result => result.doing(|| format!("create the link /dev/{name}")),
    }
}

/// A directory for device nodes, other than /dev.
struct Place {
    path: PathBuf,
    directory: OwnedFd,
    /// False if the directory is in another mount than the root directory and /dev.
    is_own: bool,
}

impl Place {
    /// Opens the directory at `path`, and creates it if it does not exist. A link of the image can
    /// lead into a volume, which is a directory of the host. In a volume, this function creates
    /// nothing.
    fn open(rootfs: &Rootfs, dev: &OwnedFd, path: &Path) -> Result<Place> {
        let own = [mount_id(rootfs)?, mount_id(dev)?];
        let found = rootfs.open(path, OFlags::PATH | OFlags::DIRECTORY);
        let directory = match found {
            Err(Errno::NOENT) => {
                if !own.contains(&mount_id(&rootfs.nearest_directory(path)?)?) {
                    return Err(in_another_mount());
                }
                rootfs.make_directory(path)?
            }
            found => found.doing(|| format!("open {} in the container", path.display()))?,
        };
        let is_own = own.contains(&mount_id(&directory)?);
        Ok(Place {
            path: path.to_owned(),
            directory,
            is_own,
        })
    }
}

fn in_another_mount() -> Error {
    Error::new(
        "its path leads to another mount than the root directory and /dev, and rrun creates no device file there",
    )
}

fn mount_id(directory: impl AsFd) -> Result<u64> {
    let statx = rustix::fs::statx(directory, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID);
    Ok(statx
        .doing(|| "read the mount of a directory (statx)")?
        .stx_mnt_id)
}

impl Device {
    fn make(
        &self,
        rootfs: &Rootfs,
        dev: &OwnedFd,
        bind: bool,
        last: &mut Option<Place>,
    ) -> Result<()> {
        if bind {
            let node = clone_tree(&self.path, false).doing(|| "clone the host's device node")?;
            let stat = rustix::fs::fstat(&node).doing(|| "stat the host's device node")?;
            if !self.is_at(&stat) {
                refuse!("the host's file at this path has a different type or device number");
            }
            let target = rootfs.mount_target(&self.path, MountTarget::File)?;
            return move_mount(&node, &target).doing(|| "attach the device node");
        }
        let below_dev = self.path.strip_prefix("/dev").ok();
        if let Some(name) = below_dev.and_then(single_component) {
            return self.make_in(dev, name);
        }
        let (Some(parent), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            refuse!("it is not the path of a file in the container");
        };
        let place = match last.take().filter(|last| last.path == parent) {
            Some(place) => place,
            None => Place::open(rootfs, dev, parent)?,
        };
        let place = last.insert(place);
        if place.is_own {
            return self.make_in(&place.directory, name);
        }
        // A volume can already contain the node, for example if the volume is the host's /dev/dri.
        match rustix::fs::statat(&place.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if self.is_at(&stat) => Ok(()),
            Ok(_) | Err(Errno::NOENT) => Err(in_another_mount()),
            Err(errno) => Err(errno).doing(|| "stat the existing file"),
        }
    }

    fn is_at(&self, stat: &Stat) -> bool {
        let number = rustix::fs::makedev(self.major, self.minor);
        FileType::from_raw_mode(stat.st_mode) == self.kind
            && (self.kind == FileType::Fifo || stat.st_rdev == number)
    }

    fn make_in(&self, directory: &OwnedFd, name: &OsStr) -> Result<()> {
        let number = rustix::fs::makedev(self.major, self.minor);
        let mode = Mode::from_raw_mode(self.mode);
        match rustix::fs::mknodat(directory.as_fd(), name, self.kind, mode, number) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
                    .doing(|| "stat the existing file")?;
                if !self.is_at(&stat) {
                    refuse!("a different file already exists at this path");
                }
                return Ok(());
            }
            Err(errno) => return Err(errno).doing(|| "create the node"),
        }
        if (self.uid, self.gid) != (0, 0) {
            rustix::fs::chownat(
                directory,
                name,
                Some(Uid::from_raw(self.uid)),
                Some(Gid::from_raw(self.gid)),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .doing(|| "set its owner")?;
        }
        Ok(())
    }
}

fn single_component(path: &Path) -> Option<&OsStr> {
    let mut components = path.components();
    match (components.next(), components.next()) {
        (Some(std::path::Component::Normal(name)), None) => Some(name),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_the_configuration_replaces_a_default() {
        let spec: Vec<LinuxDevice> = serde_json::from_str(
            r#"[{"path":"/dev/../dev/null","type":"c","major":1,"minor":3,"fileMode":384},
                {"path":"/dev/net/tun","type":"c","major":10,"minor":200}]"#,
        )
        .unwrap();
        let devices = from_spec(&spec).unwrap();
        assert_eq!(devices.len(), DEFAULTS.len() + 1);
        let null: Vec<_> = devices
            .iter()
            .filter(|d| d.path == Path::new("/dev/null"))
            .collect();
        assert_eq!(null.len(), 1);
        assert_eq!(null.first().map(|d| d.mode), Some(0o600));
    }

    #[test]
    fn the_first_device_of_a_path_is_kept_without_special_mode_bits() {
        let spec: Vec<LinuxDevice> = serde_json::from_str(
            r#"[{"path":"/dev/x","type":"c","major":1,"minor":3,"fileMode":11181},
                {"path":"/dev/x","type":"p"}]"#,
        )
        .unwrap();
        let devices = from_spec(&spec).unwrap();
        assert_eq!(devices.len(), DEFAULTS.len() + 1);
        let first = devices.first().map(|d| (d.kind, d.minor, d.mode));
        assert_eq!(first, Some((FileType::CharacterDevice, 3, 0o655)));
    }

    #[test]
    fn a_number_that_the_kernel_would_truncate_is_refused() {
        for (json, words) in [
            (r#""major":4097,"minor":3"#, "linux.devices[0]: 4097:3"),
            (
                r#""major":4294967297,"minor":3"#,
                "linux.devices[0]: 4294967297:3",
            ),
            (
                r#""major":1,"minor":1048579"#,
                "linux.devices[0]: 1:1048579",
            ),
            (r#""major":-1,"minor":3"#, "linux.devices[0]: -1:3"),
            (
                r#""major":1,"minor":3,"uid":4294967295"#,
                "linux.devices[0]: 4294967295",
            ),
            (
                r#""major":1,"minor":3,"gid":4294967295"#,
                "linux.devices[0]: 4294967295",
            ),
        ] {
            let json = format!(r#"[{{"path":"/dev/x","type":"c",{json}}}]"#);
            let spec: Vec<LinuxDevice> = serde_json::from_str(&json).unwrap();
            let error = from_spec(&spec).unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
        }
    }
}
