//! The mappings of user and group ids for a container's user namespace and for individual mounts.
//!
//! A mount with a mapping (an idmapped mount) shows a file of user 0 as a file of another user,
//! without changing the file. With such a mount, a container with a user namespace can use volumes
//! and images that root owns. See mount_setattr(2), "ID-mapped mounts", and config.md, "Mounts",
//! `uidMappings`.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType as Type};

use crate::error::{Context, Result, refuse};
use crate::namespaces::{self, NamespaceHolder};
use rrun_kernel::procfs::Procfs;
use rrun_kernel::{id, regular_file};
use rustix::fs::OFlags;

/// The maximum number of lines that the kernel accepts in one map (UID_GID_MAP_MAX_EXTENTS).
const MAP_LINES_MAX: usize = 340;

/// The content that rrun writes to uid_map and gid_map. See user_namespaces(7).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct IdMaps {
    uid: String,
    gid: String,
}

impl IdMaps {
    /// Checks the id mappings of config.json and converts them to the kernel's format. `field` is
    /// the path of the object that contains `uidMappings` and `gidMappings`, followed by a dot.
    ///
    /// # Errors
    /// Fails if the kernel would refuse a mapping. The error names the invalid field.
    pub(crate) fn from_spec(
        field: &str,
        uid: Option<&[LinuxIdMapping]>,
        gid: Option<&[LinuxIdMapping]>,
    ) -> Result<IdMaps> {
        Ok(IdMaps {
            uid: lines(&format!("{field}uidMappings"), uid.unwrap_or_default())?,
            gid: lines(&format!("{field}gidMappings"), gid.unwrap_or_default())?,
        })
    }

    /// Returns whether both users and groups are mapped.
    pub(crate) fn is_complete(&self) -> bool {
        !self.uid.is_empty() && !self.gid.is_empty()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.uid.is_empty() && self.gid.is_empty()
    }

    /// Writes the id maps of the user namespace that contains process `pid`.
    pub(crate) fn write(&self, pid: i32, field: &str) -> Result<()> {
        let procfs = Procfs::open()?;
        for (file, name, map) in [
            ("uid_map", "uidMappings", &self.uid),
            ("gid_map", "gidMappings", &self.gid),
        ] {
            // The kernel requires all lines of a map in a single write. See user_namespaces(7).
            procfs
                .write(&format!("{pid}/{file}"), map)
                .doing(|| format!("set {field}{name}"))?;
        }
        Ok(())
    }

    /// Writes the id maps if rrun's caller has no privileges over the mapped ids. Without
    /// privileges, a user can map only the user's own id. If a map contains other ids, rrun calls
    /// newuidmap(1) or newgidmap(1). These programs map only ids that /etc/subuid and /etc/subgid
    /// grant to the user.
    pub(crate) fn write_unprivileged(&self, pid: i32, field: &str) -> Result<()> {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        let procfs = Procfs::open()?;
        if maps_single_id(&self.gid, gid) {
            // The kernel accepts this gid map only after rrun has written "deny" to
            // /proc/PID/setgroups. A file can deny access to the members of a group. With
            // setgroups(2), a process could leave this group and then access the file.
            procfs
                .write(&format!("{pid}/setgroups"), "deny")
                .doing(|| format!("forbid setgroups before setting {field}gidMappings"))?;
        }
        for (file, tool, name, map, own) in [
            ("uid_map", "newuidmap", "uidMappings", &self.uid, uid),
            ("gid_map", "newgidmap", "gidMappings", &self.gid, gid),
        ] {
            if maps_single_id(map, own) {
                procfs
                    .write(&format!("{pid}/{file}"), map)
                    .doing(|| format!("set {field}{name}"))?;
                continue;
            }
            let doing = || format!("set {field}{name} with {tool}, as user {uid}");
            let output = std::process::Command::new(tool)
                .arg(pid.to_string())
                .args(map.split_whitespace())
                .output()
                .doing(doing)?;
            if !output.status.success() {
                let output_text = String::from_utf8_lossy(&output.stderr);
                refuse!("{}: {}", doing(), output_text.trim());
            }
        }
        Ok(())
    }
}

/// Returns whether `map` maps exactly one id, and maps this id to `id` on the host.
fn maps_single_id(map: &str, id: u32) -> bool {
    let fields: Vec<&str> = map.split_whitespace().collect();
    matches!(fields.as_slice(), [_, outside, "1"] if outside.parse() == Ok(id))
}

fn lines(field: &str, mappings: &[LinuxIdMapping]) -> Result<String> {
    if mappings.len() > MAP_LINES_MAX {
        refuse!(
            "{field}: has {} mappings, but the kernel accepts at most {MAP_LINES_MAX}",
            mappings.len()
        );
    }
    let mut text = String::new();
    for (index, map) in mappings.iter().enumerate() {
        let (inside, outside, size) = (map.container_id(), map.host_id(), map.size());
        if size == 0 {
            refuse!("{field}[{index}].size: must be more than 0");
        }
        // The kernel refuses a range that contains u32::MAX, because this number is not an id.
        for first in [inside, outside] {
            if first.checked_add(size).is_none() {
                refuse!(
                    "{field}[{index}].size: {size} ids from {first} are too many, because the largest id is {}",
                    id::LARGEST
                );
            }
        }
        let overlap = |a: u32, a_size: u32, b: u32, b_size: u32| {
            u64::from(a) < u64::from(b) + u64::from(b_size)
                && u64::from(b) < u64::from(a) + u64::from(a_size)
        };
        for (other, earlier) in mappings.iter().enumerate().take(index) {
            if overlap(inside, size, earlier.container_id(), earlier.size())
                || overlap(outside, size, earlier.host_id(), earlier.size())
            {
                refuse!("{field}[{index}]: has ids in common with {field}[{other}]");
            }
        }
        text.push_str(&format!("{inside} {outside} {size}\n"));
    }
    Ok(text)
}

/// The user namespaces whose id mappings rrun applies to mounts with mount_setattr(2).
#[derive(Default)]
pub(crate) struct IdMapNamespaces {
    created: BTreeMap<IdMaps, OwnedFd>,
    /// The existing user namespace that the container joins. This field is `None` until rrun has
    /// opened that namespace.
    joined: Option<OwnedFd>,
}

impl IdMapNamespaces {
    /// Returns the container's user namespace. If the container's namespace does not exist yet,
    /// returns another user namespace with the same mappings. For a mount, both namespaces have the
    /// same effect.
    pub(crate) fn for_container(
        &mut self,
        namespaces: &namespaces::Namespaces,
        maps: &IdMaps,
    ) -> Result<&OwnedFd> {
        let Some(path) = namespaces.joined_path(Type::User) else {
            return self.for_maps(maps);
        };
        let opened = match self.joined.take() {
            Some(opened) => opened,
            None => open(path)?,
        };
        Ok(self.joined.insert(opened))
    }

    /// Returns a user namespace with the mappings `maps`. Mounts with equal mappings share a user
    /// namespace.
    pub(crate) fn for_maps(&mut self, maps: &IdMaps) -> Result<&OwnedFd> {
        match self.created.entry(maps.clone()) {
            Entry::Occupied(namespace) => Ok(namespace.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(make(maps)?)),
        }
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    regular_file::open(path, OFlags::RDONLY)
        .map(OwnedFd::from)
        .doing(|| format!("open user namespace {}", path.display()))
}

/// Creates a user namespace with the mappings `maps`.
fn make(maps: &IdMaps) -> Result<OwnedFd> {
    let create = || {
        let holder = NamespaceHolder::create(libc::CLONE_NEWUSER)?;
        maps.write(holder.pid, "")?;
        open(Path::new(&format!("/proc/{}/ns/user", holder.pid)))
    };
    create()
        .map_err(|error| error.while_doing("create a user namespace for the mappings of a mount"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(json: &str) -> Result<IdMaps> {
        let list: Vec<LinuxIdMapping> = serde_json::from_str(json).unwrap();
        IdMaps::from_spec("mounts[1].", Some(&list), Some(&list))
    }

    #[test]
    fn the_error_for_a_mapping_that_the_kernel_would_refuse_names_the_field() {
        for (json, words) in [
            (
                r#"[{"containerID":0,"hostID":1,"size":0}]"#,
                "mounts[1].uidMappings[0].size",
            ),
            (
                r#"[{"containerID":0,"hostID":1,"size":10},{"containerID":9,"hostID":100,"size":1}]"#,
                "mounts[1].uidMappings[1]",
            ),
            (
                r#"[{"containerID":0,"hostID":1,"size":10},{"containerID":10,"hostID":10,"size":1}]"#,
                "mounts[1].uidMappings[1]",
            ),
            (
                r#"[{"containerID":4294967295,"hostID":1,"size":1}]"#,
                "mounts[1].uidMappings[0].size: 1 ids from 4294967295",
            ),
            (
                r#"[{"containerID":0,"hostID":1,"size":10},{"containerID":10,"hostID":100,"size":4294967286}]"#,
                "mounts[1].uidMappings[1].size: 4294967286 ids from 10",
            ),
        ] {
            let error = maps(json).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let two = r#"[{"containerID":0,"hostID":1,"size":10},{"containerID":10,"hostID":100,"size":4294967195}]"#;
        let text = maps(two).unwrap().uid;
        assert_eq!(text, "0 1 10\n10 100 4294967195\n");
    }
}
