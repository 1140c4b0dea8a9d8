//! Determines which of the node's devices a container gets.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use rrun_proto::v1::Device;

use super::mounts::keep_last;
use rrun_calls::error::{During, Error, Result};
use rrun_kernel::errno::is_of_the_machine;

/// The maximum depth at which a directory of devices is searched.
const MAX_DEPTH: u32 = 8;

/// Entries of /dev that a container can't share with the node. Each entry belongs to one terminal,
/// one mount namespace or one process.
const NOT_SHARED: [&str; 7] = [
    "pts",
    "shm",
    "fd",
    "mqueue",
    ".lxc",
    ".lxd-mounts",
    "console",
];

/// The values of `linux.devices` and `linux.resources.devices` in the runtime specification.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Devices {
    pub nodes: Vec<LinuxDevice>,
    pub rules: Vec<LinuxDeviceCgroup>,
}

/// Returns the requested devices, with cgroup rules that deny all other devices. A privileged
/// container gets all devices of the node. This call blocks.
pub(crate) fn devices(requested: &[Device], privileged: bool) -> Result<Devices> {
    let mut devices = Devices::default();
    devices.rules.push(all(privileged));
    if privileged {
        devices.add_all(Path::new("/dev"), MAX_DEPTH)?;
    }
    for device in requested {
        if device.permissions.chars().any(|c| !"rwm".contains(c)) {
            return Err(Error::invalid(format!(
                "the permissions {:?} of the device {} contain other letters than r, w and m",
                device.permissions, device.host_path
            )));
        }
        let host = Path::new(&device.host_path);
        let container = if device.container_path.is_empty() {
            host
        } else {
            Path::new(&device.container_path)
        };
        let access = if device.permissions.is_empty() {
            "rwm"
        } else {
            &device.permissions
        };
        devices.add(host, container, access, !privileged, MAX_DEPTH)?;
    }
    keep_last(&mut devices.nodes, |node| node.path().clone());
    Ok(devices)
}

impl Devices {
    /// Adds the device `host`, or every device in the directory `host`.
    fn add(
        &mut self,
        host: &Path,
        container: &Path,
        access: &str,
        rule: bool,
        depth: u32,
    ) -> Result<()> {
        let what = || format!("read the attributes of the device {}", host.display());
        let metadata = std::fs::metadata(host).during(what)?;
        if metadata.is_dir() && depth > 0 {
            for entry in std::fs::read_dir(host).during(what)? {
                let name = entry.during(what)?.file_name();
                let (inner, shown): (PathBuf, PathBuf) = (host.join(&name), container.join(&name));
                let kind = std::fs::symlink_metadata(&inner).during(what)?.file_type();
                if kind.is_dir() || kind.is_block_device() || kind.is_char_device() {
                    self.add(&inner, &shown, access, rule, depth - 1)?;
                }
            }
            return Ok(());
        }
        let Some(kind) = kind(&metadata) else {
            return Err(Error::invalid(format!(
                "{} is not a device",
                host.display()
            )));
        };
        let node = node(container, kind, &metadata);
        if rule {
            self.rules.push(allow(&node, access));
        }
        self.nodes.push(node);
        Ok(())
    }

    /// Adds every device below `dir`, except the entries in [`NOT_SHARED`].
    fn add_all(&mut self, dir: &Path, depth: u32) -> Result<()> {
        let what = || format!("read the directory {}", dir.display());
        let Some(entries) = unless_odd(std::fs::read_dir(dir)).during(what)? else {
            return Ok(());
        };
        for entry in entries {
            let entry = entry.during(what)?;
            let path = entry.path();
            let name = entry.file_name();
            if NOT_SHARED.iter().any(|not| name == *not) {
                continue;
            }
            // Symbolic links are skipped, because the search finds their targets in /dev anyway.
            let metadata = unless_odd(std::fs::symlink_metadata(&path));
            let what = || format!("read the attributes of {}", path.display());
            let Some(metadata) = metadata.during(what)? else {
                continue;
            };
            if metadata.is_dir() && depth > 0 {
                self.add_all(&path, depth - 1)?;
            } else if let Some(kind) = kind(&metadata) {
                self.nodes.push(node(&path, kind, &metadata));
            }
        }
        Ok(())
    }
}

/// Returns `None` if the entry of /dev was removed or cannot be used. A lack of descriptors or of
/// memory remains an error, because the container would otherwise lack devices.
fn unless_odd<T>(found: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.raw_os_error().is_some_and(is_of_the_machine) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Returns the `linux.devices` entry that provides the node's device `host` at the path
/// `container`.
pub(crate) fn node_of(host: &Path, container: &Path) -> Result<LinuxDevice> {
    let metadata = std::fs::metadata(host)
        .during(|| format!("read the attributes of the device {}", host.display()))?;
    match kind(&metadata) {
        Some(kind) => Ok(node(container, kind, &metadata)),
        None => Err(Error::invalid(format!(
            "{} is not a device",
            host.display()
        ))),
    }
}

fn kind(metadata: &std::fs::Metadata) -> Option<LinuxDeviceType> {
    let kind = metadata.file_type();
    if kind.is_block_device() {
        Some(LinuxDeviceType::B)
    } else if kind.is_char_device() {
        Some(LinuxDeviceType::C)
    } else {
        None
    }
}

fn node(path: &Path, kind: LinuxDeviceType, metadata: &std::fs::Metadata) -> LinuxDevice {
    let number = metadata.rdev();
    let mut node = LinuxDevice::default();
    node.set_path(path.to_owned())
        .set_typ(kind)
        .set_major(rustix::fs::major(number).into())
        .set_minor(rustix::fs::minor(number).into())
        .set_file_mode(Some(metadata.mode() & 0o7777))
        .set_uid(Some(metadata.uid()))
        .set_gid(Some(metadata.gid()));
    node
}

/// Returns the cgroup rule that allows or denies access to all devices.
fn all(allow: bool) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_access(Some("rwm".to_owned()));
    rule
}

/// Returns the cgroup rule that allows access to a device.
pub(crate) fn allow(node: &LinuxDevice, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::from(node);
    rule.set_access(Some(access.to_owned()));
    rule
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn device(host: &str, container: &str, permissions: &str) -> Device {
        Device {
            container_path: container.into(),
            host_path: host.into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn a_device_gets_a_node_and_a_rule() -> Result<()> {
        let devices = devices(&[device("/dev/null", "/dev/nothing", "rw")], false)?;
        assert_eq!(devices.nodes.len(), 1);
        assert_eq!(devices.nodes[0].path(), Path::new("/dev/nothing"));
        assert_eq!(devices.nodes[0].major(), 1);
        assert_eq!(
            json!(devices.rules),
            json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw" },
            ])
        );
        Ok(())
    }

    #[test]
    fn a_privileged_container_gets_all_devices_except_terminals() -> Result<()> {
        let devices = devices(&[], true)?;
        let has = |path: &str| {
            let mut nodes = devices.nodes.iter();
            nodes.any(|node| node.path() == Path::new(path))
        };
        assert!(has("/dev/null") && !has("/dev/console") && !has("/dev/pts/ptmx"));
        Ok(())
    }

    #[test]
    fn a_regular_file_and_a_wrong_permission_are_refused() {
        assert!(devices(&[device("/etc/passwd", "/x", "r")], false).is_err());
        assert!(devices(&[device("/dev/null", "/x", "z")], false).is_err());
    }
}
