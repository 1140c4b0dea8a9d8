//! Image volumes: read-only mounts of an image, or of a directory in an image. A lease protects the
//! image's layers from deletion as long as the container exists. An image is mounted only once for all
//! its volumes in a container, because a mount of an image with many layers is slow, and because the
//! kernel limits the number of mounts on the node.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use futures_util::future::try_join_all;
use rrun_proto::v1::Mount;

use super::in_root::InRoot;
use super::unmount::IMAGES;
use super::{ContainerRecord, idmap};
use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::sandbox::files::private_dir;
use crate::selinux::label::Label;
use rrun_calls::error::{Code, During, Error, Result};
use rrun_calls::wait::slow;
use rrun_kernel::empty_tmpfs;
use rrun_kernel::errno::describe;
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};
use rrun_kernel::namespace_limits::beyond_limit;

/// Returns the name that owns the lease on an image volume's layers. `number` is the index of the
/// image's first volume in the list of the container's mounts.
fn owner(container: &str, number: usize) -> String {
    format!("{container}:{number}")
}

/// Returns the owners of the leases for all image volumes of a container. Only the first volume of
/// each image has a lease, so some of the owners have none.
pub(crate) fn owners(container: &str, mounts: &[Mount]) -> Vec<String> {
    let images = mounts
        .iter()
        .enumerate()
        .filter(|(_, mount)| is_image(mount));
    images.map(|(number, _)| owner(container, number)).collect()
}

/// An image of which a container has image volumes.
pub(crate) struct ResolvedImage {
    /// The index of the image's first volume in the container's list of mounts.
    first: usize,
    /// The indexes of all volumes of the image.
    volumes: Vec<usize>,
    /// The image's layers, uppermost first.
    lower: Vec<PathBuf>,
}

/// Returns whether the source of a mount is an image.
pub(crate) fn is_image(mount: &Mount) -> bool {
    mount
        .image
        .as_ref()
        .is_some_and(|image| !image.image.is_empty())
}

/// Refuses a mount if its fields `image` and `image_sub_path` are invalid or contradict its other
/// fields.
pub(crate) fn check(mount: &Mount) -> Result<()> {
    let path = &mount.container_path;
    let refuse = |why: &str| Err(Error::invalid(format!("the mount at {path:?}: {why}")));
    if !is_image(mount) {
        return if mount.image_sub_path.is_empty() {
            Ok(())
        } else {
            refuse("image_sub_path is set without an image")
        };
    }
    if !mount.host_path.is_empty() {
        return refuse("image and host_path are both set");
    }
    if mount.propagation != 0 {
        return refuse("a mount of an image must have private propagation");
    }
    let inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    if !Path::new(&mount.image_sub_path).components().all(inside) {
        return refuse("image_sub_path must be a relative path without ..");
    }
    Ok(())
}

/// Finds the images that the container's mounts request, acquires leases on their layers, and sets the
/// mounts' `image_ref`. The leases are acquired in parallel, because the store then writes many leases to
/// the disk at once.
pub(crate) async fn lease(
    node: &Node,
    sandbox: &Sandbox,
    record: &mut ContainerRecord,
) -> Result<Vec<ResolvedImage>> {
    let images = find(node, &mut record.config.mounts)?;
    let container = record.id.as_str();
    check_count(node, sandbox, images.len())?;
    let leases = images.into_iter().map(async |(id, mut image)| {
        let owner = owner(container, image.first);
        let what = format!("acquire a lease on the image {id} for a mount");
        image.lower = slow(what, node.images.lease(&owner, &id)).await?;
        Ok::<_, Error>(image)
    });
    try_join_all(leases).await
}

/// Refuses a container with image volumes of `count` different images if these are too many for one
/// container, or together with the pod's other containers. The kernel needs memory for each layer of each
/// mounted image.
fn check_count(node: &Node, sandbox: &Sandbox, count: usize) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let limit = node.config.container_image_volumes.get();
    if count > limit {
        return Err(Error::invalid(format!(
            "the container mounts {count} different images, and the limit is {limit} images (container_image_volumes)"
        )));
    }
    let others = node.containers_of(&sandbox.id);
    let of_others: usize = others
        .iter()
        .map(|other| images_of(&other.config.mounts))
        .sum();
    let limit = node.config.pod_image_volumes.get();
    if of_others + count > limit {
        return Err(Error::new(
            Code::ResourceExhausted,
            format!(
                "the container mounts {count} images, but the other containers of {} mount {of_others} images already, and the limit is {limit} images (pod_image_volumes)",
                sandbox.name()
            ),
        ));
    }
    Ok(())
}

/// Returns the number of different images that [`lease`] found for the mounts of a container.
fn images_of(mounts: &[Mount]) -> usize {
    let images = mounts.iter().filter(|mount| is_image(mount));
    let images = images.filter_map(|mount| mount.image.as_ref());
    let images: BTreeSet<&str> = images.map(|image| image.image_ref.as_str()).collect();
    images.len()
}

/// Returns the images that the mounts request, by their ids and without their layers. Sets the
/// mounts' `image_ref`.
fn find(node: &Node, mounts: &mut [Mount]) -> Result<BTreeMap<String, ResolvedImage>> {
    let mut images = BTreeMap::new();
    for (number, mount) in mounts.iter_mut().enumerate() {
        if !is_image(mount) {
            continue;
        }
        let path = &mount.container_path;
        let Some(requested) = mount.image.as_mut() else {
            continue;
        };
        let name = &requested.image;
        let image = node.images.find(name).ok_or_else(|| {
            Error::not_found(format!(
                "the image {name:?} of the mount at {path:?} is not on this node"
            ))
        })?;
        requested.image_ref = image.repo_digests.first().unwrap_or(&image.id).clone();
        let found = images
            .entry(image.id.clone())
            .or_insert_with(|| ResolvedImage {
                first: number,
                volumes: Vec::new(),
                lower: Vec::new(),
            });
        found.volumes.push(number);
    }
    Ok(images)
}

/// Mounts each image once in the bundle. Changes each requested image volume into a bind mount of
/// its mounted image, or of a directory in this image. `users` is the pod's user namespace, and
/// `label` is the SELinux label of the images' files. Calls `go_on` before each volume; an error
/// from `go_on` ends the work. This call blocks.
pub(crate) fn mount(
    node: &Node,
    bundle: &Path,
    found: &[ResolvedImage],
    users: Option<&idmap::Users>,
    label: Option<&Label>,
    mounts: &mut [Mount],
    go_on: impl Fn() -> Result<()>,
) -> Result<()> {
    for image in found {
        let target = bundle.join(IMAGES).join(image.first.to_string());
        private_dir(&target)?;
        for number in &image.volumes {
            go_on()?;
            let Some(mount) = mounts.get_mut(*number) else {
                continue;
            };
            let what = || format!("mount the image volume at {:?}", mount.container_path);
            if *number == image.first {
                mount_image(node, &image.lower, users, label, &target).during(what)?;
            }
            mount.host_path = resolve(&target, &mount.image_sub_path).during(what)?;
            mount.readonly = true;
            mount.recursive_read_only = false;
            mount.selinux_relabel = false;
            mount.uid_mappings.clear();
            mount.gid_mappings.clear();
        }
    }
    Ok(())
}

/// Mounts the image with the layers `lower` at `target`.
fn mount_image(
    node: &Node,
    lower: &[PathBuf],
    users: Option<&idmap::Users>,
    label: Option<&Label>,
    target: &Path,
) -> Result<()> {
    let empty = rrun_images::empty_layer(&node.config.root);
    let tree = if lower == [empty.clone()] {
        // The image has no layers. The directory of the empty layer must not be mounted: a container
        // could lock it, and the volumes of other pods use it, too.
        let context = label.map(ToString::to_string);
        beyond_limit(|| empty_tmpfs::create(context.as_deref()))
            .during(|| "mount an empty directory".to_owned())?
    } else {
        let mut lower = lower.to_vec();
        // A read-only overlay needs at least two layers.
        if lower.len() < 2 {
            lower.push(empty);
        }
        idmap::overlay(&lower, None, users, label, target)?
    };
    protect(&tree)?;
    idmap::attach(tree.as_fd(), target)
}

/// Returns the path of the directory `sub_path` of the image that is mounted at `mounted`. Symbolic
/// links in `sub_path` can't lead outside the image. The returned path contains no symbolic links,
/// and the image's files never change.
fn resolve(mounted: &Path, sub_path: &str) -> Result<String> {
    let whole = |part: Component<'_>| part == Component::CurDir;
    if Path::new(sub_path).components().all(whole) {
        return Ok(mounted.to_string_lossy().into_owned());
    }
    let found = InRoot::open(mounted).and_then(|root| root.find(sub_path));
    let inside = found.map_err(|errno| {
        Error::of_file(
            Some(errno.raw_os_error()),
            format!(
                "resolve the image_sub_path {sub_path:?} in the image: {}",
                describe(&errno.into())
            ),
        )
    })?;
    let stat = rustix::fs::fstat(&inside)
        .during(|| "read the attributes of the directory in the image".to_owned())?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Directory {
        return Err(Error::invalid(format!(
            "the image_sub_path {sub_path:?} is not a directory in the image"
        )));
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", inside.as_raw_fd()))
        .during(|| format!("read the path of the image_sub_path {sub_path:?}"))?;
    path.into_os_string().into_string().map_err(|path| {
        Error::invalid(format!(
            "the image_sub_path {sub_path:?} leads to {}, which is not valid UTF-8",
            path.display()
        ))
    })
}

/// Makes the mount read-only, and disables devices, set-user-ID and execution on it. Kubernetes
/// defines that image volumes contain only data.
fn protect(tree: &OwnedFd) -> Result<()> {
    let attr_set = libc::MOUNT_ATTR_RDONLY
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOEXEC;
    let attr = MountAttr {
        attr_set,
        ..MountAttr::default()
    };
    mount_setattr(tree.as_fd(), false, &attr)
        .during(|| "make the image volume read-only".to_owned())
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::ImageSpec;

    use super::*;

    #[test]
    fn an_image_mount_has_no_host_path_and_no_sub_path_outside_the_image() {
        let mount = |sub_path: &str, host_path: &str| Mount {
            container_path: "/data".into(),
            host_path: host_path.into(),
            image: Some(ImageSpec {
                image: "a".into(),
                ..Default::default()
            }),
            image_sub_path: sub_path.into(),
            ..Default::default()
        };
        assert!(check(&mount("", "")).is_ok());
        assert!(check(&mount("a/./b", "")).is_ok());
        for (sub_path, host_path) in [("../a", ""), ("/a", ""), ("a/../b", ""), ("", "/etc")] {
            let refused = check(&mount(sub_path, host_path));
            assert!(
                refused.is_err_and(|e| e.sentence().contains("/data")),
                "a mount with image_sub_path {sub_path:?} and host_path {host_path:?} was accepted"
            );
        }
        let mut no_image = mount("a", "/etc");
        no_image.image = None;
        assert!(check(&no_image).is_err());
    }
}
