//! Volumes that are images: the layers of an image, or a directory in it, read-only. The image's
//! layers are kept for as long as the container is there.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use pathrs::Root;
use rrun_proto::v1::Mount;
use rustix::mount::OpenTreeFlags;

use super::idmap;
use crate::node::Node;
use crate::sandbox::files::private_dir;
use crate::selinux::label::Label;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::slow;
use rrun_kernel::mount_setattr;

/// Where they are mounted, in the bundle.
const DIR: &str = "images";

/// Whose lease on the image's layers that of a container's mount is.
fn owner(container: &str, number: usize) -> String {
    format!("{container}:{number}")
}

/// All of a container's.
pub(crate) fn owners(container: &str, mounts: &[Mount]) -> Vec<String> {
    let images = mounts
        .iter()
        .enumerate()
        .filter(|(_, mount)| is_image(mount));
    images.map(|(number, _)| owner(container, number)).collect()
}

/// An image that a mount asks for, and that is here.
pub(crate) struct ResolvedImage {
    /// Which of the container's mounts.
    number: usize,
    /// Its layers, uppermost first.
    lower: Vec<PathBuf>,
    sub_path: PathBuf,
}

/// Whether a mount is of an image.
pub(crate) fn is_image(mount: &Mount) -> bool {
    mount
        .image
        .as_ref()
        .is_some_and(|image| !image.image.is_empty())
}

/// Refuses mounts of images that contradict themselves.
pub(crate) fn check(mount: &Mount) -> Result<()> {
    let path = &mount.container_path;
    let refuse = |why: &str| Err(Error::invalid(format!("the mount at {path:?} {why}")));
    if !is_image(mount) {
        return if mount.image_sub_path.is_empty() {
            Ok(())
        } else {
            refuse("has an image_sub_path and no image")
        };
    }
    if !mount.host_path.is_empty() {
        return refuse("has both an image and a host_path");
    }
    if mount.propagation != 0 {
        return refuse("is of an image and has a propagation that is not private");
    }
    let inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    if !Path::new(&mount.image_sub_path).components().all(inside) {
        return refuse("has an image_sub_path that is not a relative path without ..");
    }
    Ok(())
}

/// Finds the images of the mounts and keeps their layers; the mounts' `image_ref` is filled.
pub(crate) async fn lease(
    node: &Node,
    container: &str,
    mounts: &mut [Mount],
) -> Result<Vec<ResolvedImage>> {
    let mut found = Vec::new();
    for (number, mount) in mounts.iter_mut().enumerate() {
        if !is_image(mount) {
            continue;
        }
        let path = &mount.container_path;
        let Some(requested) = mount.image.as_mut() else {
            continue;
        };
        let name = requested.image.clone();
        let image = node.images.find(&name).ok_or_else(|| {
            Error::not_found(format!(
                "the image {name:?} of the mount at {path:?} is not on this node"
            ))
        })?;
        requested.image_ref = image.repo_digests.first().unwrap_or(&image.id).clone();
        let owner = owner(container, number);
        let leased = node.images.lease(&owner, &image.id);
        let lower = slow(format!("keep the image {name} for a mount"), leased).await?;
        found.push(ResolvedImage {
            number,
            lower,
            sub_path: PathBuf::from(&mount.image_sub_path),
        });
    }
    Ok(found)
}

/// Mounts them in the bundle and makes the mounts binds of that. `users` is the pod's user
/// namespace, `label` the SELinux label of the images' files. Blocks.
pub(crate) fn mount(
    node: &Node,
    bundle: &Path,
    found: &[ResolvedImage],
    users: Option<&idmap::Users>,
    label: Option<&Label>,
    mounts: &mut [Mount],
) -> Result<()> {
    for image in found {
        let Some(mount) = mounts.get_mut(image.number) else {
            continue;
        };
        let target = bundle.join(DIR).join(image.number.to_string());
        private_dir(&target)?;
        let what = || format!("mount an image for {:?}", mount.container_path);
        mount_one(node, image, users, label, &target).during(what)?;
        mount.host_path = target.to_string_lossy().into_owned();
        mount.readonly = true;
        mount.recursive_read_only = false;
        mount.selinux_relabel = false;
        mount.uid_mappings.clear();
        mount.gid_mappings.clear();
    }
    Ok(())
}

fn mount_one(
    node: &Node,
    image: &ResolvedImage,
    users: Option<&idmap::Users>,
    label: Option<&Label>,
    target: &Path,
) -> Result<()> {
    // Read-only, an overlay wants two layers.
    let mut lower = image.lower.clone();
    let empty = rrun_images::empty_layer(&node.config.root);
    if lower.len() < 2 && !lower.contains(&empty) {
        lower.push(empty.clone());
    }
    let tree = if lower.len() < 2 {
        // The image has no layers.
        // Ours: the server made this directory.
        clone(&std::fs::File::open(&empty).during(|| format!("open {}", empty.display()))?)?
    } else {
        idmap::overlay(&lower, None, users, label, target)?
    };
    protect(&tree)?;
    if image
        .sub_path
        .components()
        .all(|part| part == Component::CurDir)
    {
        return idmap::attach(tree.as_fd(), target);
    }
    // Only what is attached can be cloned from, before Linux 6.15.
    idmap::attach(tree.as_fd(), target)?;
    let part = resolve(target, &image.sub_path);
    let unmounted = crate::sandbox::files::unmount(target);
    let part = part?;
    unmounted?;
    idmap::attach(part.as_fd(), target)
}

/// A directory of an image, whatever links are in it.
fn resolve(mounted: &Path, sub_path: &Path) -> Result<OwnedFd> {
    let failed = |error: pathrs::error::Error| {
        Error::invalid(format!(
            "the image_sub_path {:?} in the image: {error}",
            sub_path.display()
        ))
    };
    let root = Root::open(mounted).map_err(failed)?;
    let inside = root.resolve(sub_path).map_err(failed)?;
    let stat = rustix::fs::fstat(&inside).during(|| "look at it".to_owned())?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Directory {
        return Err(Error::invalid(format!(
            "the image_sub_path {:?} is not a directory in the image",
            sub_path.display()
        )));
    }
    let tree = clone(&inside)?;
    protect(&tree)?;
    Ok(tree)
}

fn clone(dir: &impl AsFd) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(dir, "", flags).during(|| "clone its mount".to_owned())
}

/// Data, says Kubernetes, and nothing to run.
fn protect(tree: &OwnedFd) -> Result<()> {
    let attributes = libc::MOUNT_ATTR_RDONLY
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOEXEC;
    mount_setattr::set(tree, false, attributes, None).during(|| "make it read-only".to_owned())
}

/// Unmounts what [`mount`] mounted. Right also when nothing is. Blocks.
pub(crate) fn unmount(bundle: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(bundle.join(DIR)) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        crate::sandbox::files::unmount(&entry.path())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::ImageSpec;

    use super::*;

    #[test]
    fn a_mount_of_an_image_has_no_other_source_and_no_way_out() {
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
                "{sub_path} {host_path}"
            );
        }
        let mut no_image = mount("a", "/etc");
        no_image.image = None;
        assert!(check(&no_image).is_err());
    }
}
