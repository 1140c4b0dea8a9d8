//! The mounts of a container. There are three kinds: the default mounts of every container, the
//! shared files of the pod's containers, and the requested mounts.

use std::collections::HashSet;
use std::hash::Hash;
use std::num::NonZeroU32;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime as oci;
use rrun_proto::v1::{IdMapping, Mount, MountPropagation};

use crate::handlers::Features;
use crate::sandbox::files::{POD_FILES, SHM};
use rrun_calls::error::{During, Error, Result};

/// The inputs of [`mounts`] apart from the requested mounts.
pub(crate) struct MountInputs<'a> {
    /// The directory `STATE/pods/POD`, which contains shm.
    pub pod: &'a Path,
    /// The directory of the files hostname, hosts and resolv.conf.
    pub etc: &'a Path,
    pub privileged: bool,
    pub readonly_rootfs: bool,
    /// True if the pod has its own IPC namespace, and therefore its own /dev/shm.
    pub own_ipc: bool,
    /// The maximum number of terminals in the container's /dev/pts.
    pub terminals: NonZeroU32,
    /// The features of the pod's runtime handler.
    pub features: Features,
}

/// Returns the runtime specification's `mounts`, in the order in which they are mounted.
pub(crate) fn mounts(requested: &[Mount], inputs: &MountInputs<'_>) -> Result<Vec<oci::Mount>> {
    let mut all = kernel_file_systems(inputs);
    all.extend(pod_files(inputs));
    for mount in requested {
        all.push(bind_mount(mount, inputs)?);
    }
    arrange(&mut all);
    Ok(all)
}

/// Removes each mount that a later mount at the same path replaces. Sorts the mounts by the depth
/// of their paths. A mount then precedes the mounts inside it. Mounts at the same depth keep their
/// order.
pub(crate) fn arrange(mounts: &mut Vec<oci::Mount>) {
    keep_last(mounts, |mount| mount.destination().clone());
    mounts.sort_by_cached_key(|mount| mount.destination().components().count());
}

/// Removes each entry whose key a later entry has, too.
pub(crate) fn keep_last<T, K: Eq + Hash>(all: &mut Vec<T>, key: impl Fn(&T) -> K) {
    let mut seen = HashSet::with_capacity(all.len());
    all.reverse();
    all.retain(|one| seen.insert(key(one)));
    all.reverse();
}

/// Returns an entry of the runtime specification's `mounts`.
pub(crate) fn entry(
    destination: impl Into<PathBuf>,
    kind: &str,
    source: impl Into<PathBuf>,
    options: &[&str],
) -> oci::Mount {
    let options = options.iter().map(|option| (*option).to_owned());
    let mut mount = oci::Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options.collect()));
    mount
}

fn kernel_file_systems(inputs: &MountInputs<'_>) -> Vec<oci::Mount> {
    let access = if inputs.privileged { "rw" } else { "ro" };
    // Without a limit, one container could open all terminals of the node.
    let terminals = format!("max={}", inputs.terminals);
    let dev = ["nosuid", "strictatime", "mode=755", "size=65536k"];
    let pts = [
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
        "gid=5",
        &terminals,
    ];
    let plain = ["nosuid", "noexec", "nodev"];
    let sys = ["nosuid", "noexec", "nodev", access];
    let cgroup = ["nosuid", "noexec", "nodev", "relatime", access];
    vec![
        entry("/proc", "proc", "proc", &plain),
        entry("/dev", "tmpfs", "tmpfs", &dev),
        entry("/dev/pts", "devpts", "devpts", &pts),
        entry("/dev/mqueue", "mqueue", "mqueue", &plain),
        entry("/sys", "sysfs", "sysfs", &sys),
        entry("/sys/fs/cgroup", "cgroup", "cgroup", &cgroup),
    ]
}

/// Returns the mounts of the files that the pod's containers share, and of the pod's /dev/shm.
fn pod_files(inputs: &MountInputs<'_>) -> Vec<oci::Mount> {
    let bind = |destination: String, source: PathBuf, access: &str| {
        entry(destination, "bind", source, &["rbind", "rprivate", access])
    };
    let shm = if inputs.own_ipc {
        inputs.pod.join(SHM)
    } else {
        "/dev/shm".into()
    };
    let access = if inputs.readonly_rootfs { "ro" } else { "rw" };
    let mut all = vec![bind("/dev/shm".to_owned(), shm, "rw")];
    for name in POD_FILES {
        all.push(bind(format!("/etc/{name}"), inputs.etc.join(name), access));
    }
    all
}

/// Returns the bind mount for a requested mount.
fn bind_mount(mount: &Mount, inputs: &MountInputs<'_>) -> Result<oci::Mount> {
    check(mount, inputs.features)?;
    let destination = cleaned(&mount.container_path);
    if destination == Path::new("/") {
        return refuse(mount, "the mount would cover the whole root filesystem");
    }
    let access = match (mount.readonly, mount.recursive_read_only) {
        (true, true) => "rro",
        (true, false) => "ro",
        (false, _) => "rw",
    };
    let propagation = match mount.propagation() {
        MountPropagation::PropagationPrivate => "rprivate",
        MountPropagation::PropagationHostToContainer => "rslave",
        MountPropagation::PropagationBidirectional => "rshared",
    };
    let options = ["rbind", propagation, access];
    let mut entry = entry(destination, "bind", &mount.host_path, &options);
    if is_mapped(mount) {
        entry
            .set_uid_mappings(Some(id_mappings(&mount.uid_mappings)?))
            .set_gid_mappings(Some(id_mappings(&mount.gid_mappings)?));
    }
    Ok(entry)
}

fn is_mapped(mount: &Mount) -> bool {
    !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty()
}

fn refuse<T>(mount: &Mount, why: &str) -> Result<T> {
    Err(Error::invalid(format!(
        "the mount at {:?}: {why}",
        mount.container_path
    )))
}

/// Refuses a mount whose fields contradict each other, and a mount that the pod's runtime handler
/// does not support.
fn check(mount: &Mount, features: Features) -> Result<()> {
    if is_mapped(mount) {
        if mount.uid_mappings.is_empty() || mount.gid_mappings.is_empty() {
            return refuse(mount, "uidMappings and gidMappings must be set together");
        }
        if !features.mapped_mounts {
            return refuse(
                mount,
                "the pod's runtime handler does not support mapped ids (uidMappings, gidMappings)",
            );
        }
    }
    if mount.recursive_read_only && !features.recursive_read_only {
        return refuse(
            mount,
            "the pod's runtime handler does not support recursive_read_only",
        );
    }
    if !mount.host_path.starts_with('/') {
        return refuse(mount, "host_path is not an absolute path");
    }
    if mount.recursive_read_only {
        if !mount.readonly {
            return refuse(mount, "recursive_read_only requires readonly");
        }
        if mount.propagation() != MountPropagation::PropagationPrivate {
            return refuse(mount, "recursive_read_only requires private propagation");
        }
    }
    Ok(())
}

/// Converts the id ranges of a CRI request to the form of the runtime specification.
pub(crate) fn id_mappings(ranges: &[IdMapping]) -> Result<Vec<oci::LinuxIdMapping>> {
    let one = |range: &IdMapping| {
        oci::LinuxIdMappingBuilder::default()
            .container_id(range.container_id)
            .host_id(range.host_id)
            .size(range.length)
            .build()
            .map_err(|error| Error::internal(error.to_string()))
    };
    ranges.iter().map(one).collect()
}

/// Returns `path` as an absolute path without `.`, `..` and doubled slashes. The function does not
/// access the file system; the runtime later resolves the path in the container's root filesystem.
pub(crate) fn cleaned(path: &str) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Returns the mount propagation of the container's root mount. A requested mount can have its
/// propagation only if the root mount has a suitable propagation. The result `None` means private
/// propagation.
pub(crate) fn root_propagation(requested: &[Mount]) -> Option<&'static str> {
    let mut needed = None;
    for mount in requested {
        match mount.propagation() {
            MountPropagation::PropagationBidirectional => return Some("rshared"),
            MountPropagation::PropagationHostToContainer => needed = Some("rslave"),
            MountPropagation::PropagationPrivate => {}
        }
    }
    needed
}

/// Creates missing mount sources as directories, as containerd does. Blocks as long as the file
/// system of a mount source does not respond.
pub(crate) fn make_sources(requested: &[Mount]) -> Result<()> {
    for mount in requested {
        let path = Path::new(&mount.host_path);
        // The server does not create the target of a dangling symbolic link, so the runtime reports
        // the dangling link.
        if mount.host_path.starts_with('/')
            && let Err(error) = std::fs::symlink_metadata(path)
            && error.kind() == std::io::ErrorKind::NotFound
        {
            std::fs::create_dir_all(path)
                .during(|| format!("create the missing mount source {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> MountInputs<'static> {
        MountInputs {
            pod: Path::new("/run/rrun/pods/p"),
            etc: Path::new("/run/rrun/pods/p/etc"),
            privileged: false,
            readonly_rootfs: false,
            own_ipc: true,
            terminals: NonZeroU32::MIN,
            features: Features {
                recursive_read_only: true,
                ..Features::default()
            },
        }
    }

    fn bind(container: &str, host: &str) -> Mount {
        Mount {
            container_path: container.into(),
            host_path: host.into(),
            ..Default::default()
        }
    }

    fn find<'a>(mounts: &'a [oci::Mount], destination: &str) -> Vec<&'a oci::Mount> {
        let of = mounts.iter();
        of.filter(|mount| mount.destination() == Path::new(destination))
            .collect()
    }

    fn source(mount: &oci::Mount) -> Option<&Path> {
        mount.source().as_deref()
    }

    fn options(mount: &oci::Mount) -> String {
        mount.options().clone().unwrap_or_default().join(",")
    }

    #[test]
    fn a_requested_mount_replaces_a_default_mount() -> Result<()> {
        let all = mounts(
            &[bind("//etc/./hosts", "/var/lib/kubelet/hosts")],
            &inputs(),
        )?;
        let hosts = find(&all, "/etc/hosts");
        assert_eq!(hosts.len(), 1);
        assert_eq!(source(hosts[0]), Some(Path::new("/var/lib/kubelet/hosts")));
        let shm = source(find(&all, "/dev/shm")[0]);
        assert_eq!(shm, Some(Path::new("/run/rrun/pods/p/shm")));
        Ok(())
    }

    #[test]
    fn a_parent_is_mounted_before_its_child() -> Result<()> {
        let all = mounts(&[bind("/a/b/c", "/x"), bind("/a", "/y")], &inputs())?;
        let position = |path: &str| {
            let mut of = all.iter();
            of.position(|mount| mount.destination() == Path::new(path))
        };
        assert!(position("/a") < position("/a/b/c"));
        assert!(position("/dev") < position("/dev/pts"));
        Ok(())
    }

    #[test]
    fn the_number_of_terminals_is_limited() -> Result<()> {
        let all = mounts(&[], &inputs())?;
        assert!(options(find(&all, "/dev/pts")[0]).ends_with(",max=1"));
        Ok(())
    }

    #[test]
    fn options_contain_access_and_propagation() -> Result<()> {
        let mut mount = bind("/m", "/x");
        mount.readonly = true;
        mount.recursive_read_only = true;
        let all = mounts(std::slice::from_ref(&mount), &inputs())?;
        assert_eq!(options(find(&all, "/m")[0]), "rbind,rprivate,rro");
        mount.set_propagation(MountPropagation::PropagationBidirectional);
        assert!(mounts(std::slice::from_ref(&mount), &inputs()).is_err());
        mount.recursive_read_only = false;
        assert_eq!(root_propagation(&[mount]), Some("rshared"));
        Ok(())
    }

    #[test]
    fn only_a_privileged_container_can_write_to_sys() -> Result<()> {
        let all = mounts(&[], &inputs())?;
        assert!(options(find(&all, "/sys")[0]).ends_with(",ro"));
        let privileged = MountInputs {
            privileged: true,
            ..inputs()
        };
        let all = mounts(&[], &privileged)?;
        assert!(options(find(&all, "/sys")[0]).ends_with(",rw"));
        Ok(())
    }
}
