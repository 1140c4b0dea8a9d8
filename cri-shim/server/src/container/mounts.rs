//! What is mounted in a container: what every container has, what the pod shares, what the
//! request asks for.

use std::path::{Component, Path, PathBuf};

use rrun_proto::v1::{IdMapping, Mount, MountPropagation};
use serde_json::{Value, json};

use crate::handlers::Features;
use rrun_calls::error::{During, Error, Result};

/// What the mounts depend on beside the request's own.
pub(crate) struct Surroundings<'a> {
    /// `STATE/pods/POD`, with hostname, hosts, resolv.conf and shm.
    pub pod: &'a Path,
    pub privileged: bool,
    pub readonly_rootfs: bool,
    /// The pod has an IPC namespace, and so a /dev/shm, of its own.
    pub own_ipc: bool,
    /// Of the pod's runtime handler.
    pub features: Features,
}

/// The specification's `mounts`, in the order in which to mount them.
pub(crate) fn mounts(asked: &[Mount], around: &Surroundings<'_>) -> Result<Vec<Value>> {
    let mut all: Vec<(PathBuf, Value)> = Vec::new();
    let mut add = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        let mount = json!({
            "destination": destination, "type": kind, "source": source, "options": options,
        });
        all.push((destination.into(), mount));
    };
    let (sys, cgroup): (&[&str], &[&str]) = if around.privileged {
        (
            &["nosuid", "noexec", "nodev", "rw"],
            &["nosuid", "noexec", "nodev", "relatime", "rw"],
        )
    } else {
        (
            &["nosuid", "noexec", "nodev", "ro"],
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        )
    };
    add("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]);
    let dev = ["nosuid", "strictatime", "mode=755", "size=65536k"];
    add("/dev", "tmpfs", "tmpfs", &dev);
    let pts = [
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
        "gid=5",
    ];
    add("/dev/pts", "devpts", "devpts", &pts);
    add(
        "/dev/mqueue",
        "mqueue",
        "mqueue",
        &["nosuid", "noexec", "nodev"],
    );
    add("/sys", "sysfs", "sysfs", sys);
    add("/sys/fs/cgroup", "cgroup", "cgroup", cgroup);

    let mut bind = |destination: &str, source: &Path, writable: bool| {
        let access = if writable { "rw" } else { "ro" };
        let mount = json!({
            "destination": destination, "type": "bind", "source": source,
            "options": ["rbind", "rprivate", access],
        });
        all.push((destination.into(), mount));
    };
    let shm = if around.own_ipc {
        around.pod.join("shm")
    } else {
        "/dev/shm".into()
    };
    bind("/dev/shm", &shm, true);
    for name in ["hostname", "hosts", "resolv.conf"] {
        let writable = !around.readonly_rootfs;
        bind(&format!("/etc/{name}"), &around.pod.join(name), writable);
    }
    for mount in asked {
        let (destination, value) = one(mount, around)?;
        // The request's mount takes the place of ours.
        all.retain(|(there, _)| *there != destination);
        all.push((destination, value));
    }
    // A parent before what is mounted in it; else the order is kept.
    all.sort_by_key(|(destination, _)| destination.components().count());
    Ok(all.into_iter().map(|(_, mount)| mount).collect())
}

fn one(mount: &Mount, around: &Surroundings<'_>) -> Result<(PathBuf, Value)> {
    let path = &mount.container_path;
    let refuse = |why: &str| Err(Error::invalid(format!("the mount at {path:?} {why}")));
    let mapped = !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty();
    if mapped {
        if mount.uid_mappings.is_empty() || mount.gid_mappings.is_empty() {
            return refuse("has only one of uidMappings and gidMappings");
        }
        if !around.features.mapped_mounts {
            return refuse(
                "maps ids (uidMappings, gidMappings), which the pod's runtime handler does not do by what its features say",
            );
        }
    }
    if mount.recursive_read_only && !around.features.recursive_read_only {
        return refuse(
            "is recursive_read_only, which the pod's runtime handler does not do by what its features say",
        );
    }
    if !mount.host_path.starts_with('/') {
        return refuse("has no absolute host_path");
    }
    let propagation = mount.propagation();
    if mount.recursive_read_only {
        if !mount.readonly {
            return refuse("is recursive_read_only without readonly");
        }
        if propagation != MountPropagation::PropagationPrivate {
            return refuse("is recursive_read_only with a propagation that is not private");
        }
    }
    let access = match (mount.readonly, mount.recursive_read_only) {
        (true, true) => "rro",
        (true, false) => "ro",
        (false, _) => "rw",
    };
    let propagation = match propagation {
        MountPropagation::PropagationPrivate => "rprivate",
        MountPropagation::PropagationHostToContainer => "rslave",
        MountPropagation::PropagationBidirectional => "rshared",
    };
    let destination = cleaned(path);
    if destination == Path::new("/") {
        return refuse("would cover the whole root filesystem");
    }
    let mut value = json!({
        "destination": destination, "type": "bind", "source": mount.host_path,
        "options": ["rbind", propagation, access],
    });
    if mapped {
        value["uidMappings"] = id_mappings(&mount.uid_mappings);
        value["gidMappings"] = id_mappings(&mount.gid_mappings);
    }
    Ok((destination, value))
}

/// The specification's form of ranges of ids.
pub(crate) fn id_mappings(ranges: &[IdMapping]) -> Value {
    let one = |range: &IdMapping| {
        json!({
            "containerID": range.container_id, "hostID": range.host_id, "size": range.length,
        })
    };
    ranges.iter().map(one).collect()
}

/// An absolute path without `.`, `..` and doubled slashes, as text: the runtime resolves it in
/// the root filesystem.
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

/// The propagation that the root of the container's mounts needs for theirs to work; `None` is
/// private.
pub(crate) fn root_propagation(asked: &[Mount]) -> Option<&'static str> {
    let mut wanted = None;
    for mount in asked {
        match mount.propagation() {
            MountPropagation::PropagationBidirectional => return Some("rshared"),
            MountPropagation::PropagationHostToContainer => wanted = Some("rslave"),
            MountPropagation::PropagationPrivate => {}
        }
    }
    wanted
}

/// Makes missing sources, as directories, as containerd does. Blocks, on a hung volume for ever.
pub(crate) fn make_sources(asked: &[Mount]) -> Result<()> {
    for mount in asked {
        let path = Path::new(&mount.host_path);
        // Not followed: a dangling link is the runtime's to complain about.
        if mount.host_path.starts_with('/')
            && let Err(error) = std::fs::symlink_metadata(path)
            && error.kind() == std::io::ErrorKind::NotFound
        {
            std::fs::create_dir_all(path)
                .during(|| format!("make the missing mount source {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around() -> Surroundings<'static> {
        Surroundings {
            pod: Path::new("/run/rrun/pods/p"),
            privileged: false,
            readonly_rootfs: false,
            own_ipc: true,
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

    fn find<'a>(mounts: &'a [Value], destination: &str) -> Vec<&'a Value> {
        let of = mounts.iter();
        of.filter(|mount| mount["destination"] == destination)
            .collect()
    }

    #[test]
    fn a_requests_mount_takes_the_place_of_ours() -> Result<()> {
        let all = mounts(
            &[bind("//etc/./hosts", "/var/lib/kubelet/hosts")],
            &around(),
        )?;
        let hosts = find(&all, "/etc/hosts");
        assert_eq!(hosts.len(), 1);
        assert_eq!(hosts[0]["source"], "/var/lib/kubelet/hosts");
        assert_eq!(find(&all, "/dev/shm")[0]["source"], "/run/rrun/pods/p/shm");
        Ok(())
    }

    #[test]
    fn a_parent_is_mounted_before_its_child() -> Result<()> {
        let all = mounts(&[bind("/a/b/c", "/x"), bind("/a", "/y")], &around())?;
        let position = |path: &str| all.iter().position(|mount| mount["destination"] == path);
        assert!(position("/a") < position("/a/b/c"));
        assert!(position("/dev") < position("/dev/pts"));
        Ok(())
    }

    #[test]
    fn options_say_access_and_propagation() -> Result<()> {
        let mut mount = bind("/m", "/x");
        mount.readonly = true;
        mount.recursive_read_only = true;
        let all = mounts(std::slice::from_ref(&mount), &around())?;
        assert_eq!(
            find(&all, "/m")[0]["options"],
            json!(["rbind", "rprivate", "rro"])
        );
        mount.set_propagation(MountPropagation::PropagationBidirectional);
        assert!(mounts(std::slice::from_ref(&mount), &around()).is_err());
        mount.recursive_read_only = false;
        assert_eq!(root_propagation(&[mount]), Some("rshared"));
        Ok(())
    }

    #[test]
    fn only_the_privileged_write_to_sys() -> Result<()> {
        let all = mounts(&[], &around())?;
        assert!(
            find(&all, "/sys")[0]["options"]
                .to_string()
                .contains("\"ro\"")
        );
        let privileged = Surroundings {
            privileged: true,
            ..around()
        };
        let all = mounts(&[], &privileged)?;
        assert!(
            find(&all, "/sys")[0]["options"]
                .to_string()
                .contains("\"rw\"")
        );
        Ok(())
    }
}
