//! Reads all files of a directory tree with all their attributes, and compares such trees.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::libc;

use crate::support::images::build::digest;
use crate::support::machine::Result;

/// The attributes of a file, each with a name.
type Attributes = BTreeMap<&'static str, String>;

/// The files of a tree. The key is the path relative to the root, which is empty for the root.
pub(crate) type Tree = BTreeMap<Vec<u8>, Attributes>;

/// Reads a tree. The tree must not change meanwhile.
pub(crate) fn read(root: &Path) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut inodes: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
    add(root, root, &mut tree, &mut inodes)?;
    for names in inodes.values().filter(|names| names.len() > 1) {
        let text: Vec<String> = names
            .iter()
            .map(|name| name.escape_ascii().to_string())
            .collect();
        for name in names {
            if let Some(attributes) = tree.get_mut(name) {
                attributes.insert("links", text.join(" "));
            }
        }
    }
    Ok(tree)
}

fn add(
    root: &Path,
    path: &Path,
    tree: &mut Tree,
    inodes: &mut BTreeMap<u64, Vec<Vec<u8>>>,
) -> Result {
    let file =
        fs::symlink_metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let kind = file.file_type();
    let name = path.strip_prefix(root)?.as_os_str().as_bytes().to_vec();
    let mut all = Attributes::new();
    all.insert("mode", format!("{:o}", file.mode()));
    all.insert("owner", format!("{}:{}", file.uid(), file.gid()));
    all.insert("time", format!("{}.{:09}", file.mtime(), file.mtime_nsec()));
    if kind.is_symlink() {
        let target = fs::read_link(path)?;
        all.insert(
            "target",
            target.as_os_str().as_bytes().escape_ascii().to_string(),
        );
    } else if kind.is_file() {
        all.insert(
            "content",
            format!("{} bytes {}", file.len(), digest(&fs::read(path)?)),
        );
    } else if kind.is_char_device() || kind.is_block_device() {
        let (major, minor) = (libc::major(file.rdev()), libc::minor(file.rdev()));
        all.insert("device", format!("{major}:{minor}"));
    }
    all.insert("xattrs", xattrs(path)?);
    tree.insert(name.clone(), all);
    if kind.is_dir() {
        for entry in fs::read_dir(path)? {
            add(root, &entry?.path(), tree, inodes)?;
        }
    } else {
        inodes.entry(file.ino()).or_default().push(name);
        if let Some(names) = inodes.get_mut(&file.ino()) {
            names.sort();
        }
    }
    Ok(())
}

/// Returns the names of a file's extended attributes, without those of overlayfs.
fn names_of_xattrs(path: &CString) -> Result<Vec<CString>> {
    let mut names = vec![0u8; 65536];
    // SAFETY: `path` ends with a NUL, and `names` is writable for the given length.
    let length = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(length).unwrap_or(0));
    let names = names.split(|letter| *letter == 0);
    let is_overlays =
        |name: &&[u8]| name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
    let names = names.filter(|name| !name.is_empty() && !is_overlays(name));
    Ok(names
        .map(CString::new)
        .collect::<std::result::Result<_, _>>()?)
}

/// Removes the extended attributes of a file.
pub(crate) fn remove_xattrs(path: &Path) -> Result {
    let path = CString::new(path.as_os_str().as_bytes())?;
    for name in names_of_xattrs(&path)? {
        // SAFETY: both strings end with a NUL.
        unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) };
    }
    Ok(())
}

/// Returns the extended attributes of a file, without those of overlayfs.
fn xattrs(path: &Path) -> Result<String> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut all = Vec::new();
    for name in names_of_xattrs(&path)? {
        let mut value = vec![0u8; 65536];
        // SAFETY: both strings end with a NUL, and `value` is writable for the given length.
        let length = unsafe {
            libc::lgetxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        value.truncate(usize::try_from(length).unwrap_or(0));
        all.push(format!(
            "{}={}",
            name.to_string_lossy(),
            value.escape_ascii()
        ));
    }
    all.sort();
    Ok(all.join(" "))
}

/// Returns the differences between two trees, one per attribute. `ignored` returns true if an
/// attribute of a path may differ. Its arguments are the path, the attribute, and both values.
pub(crate) fn differences(
    one: &Tree,
    other: &Tree,
    ignored: impl Fn(&[u8], &str, &str, &str) -> bool,
) -> Vec<String> {
    let mut all = Vec::new();
    let paths: std::collections::BTreeSet<&Vec<u8>> = one.keys().chain(other.keys()).collect();
    for path in paths {
        let name = path.escape_ascii();
        match (one.get(path), other.get(path)) {
            (Some(_), None) => all.push(format!("{name} is missing in the second tree")),
            (None, Some(_)) => all.push(format!("{name} is missing in the first tree")),
            (Some(one), Some(other)) => {
                let keys: std::collections::BTreeSet<&&str> =
                    one.keys().chain(other.keys()).collect();
                for key in keys {
                    let value = |tree: &Attributes| tree.get(*key).cloned().unwrap_or_default();
                    let (left, right) = (value(one), value(other));
                    if left != right && !ignored(path, key, &left, &right) {
                        all.push(format!("{key} of {name}: {left:?} and {right:?}"));
                    }
                }
            }
            (None, None) => {}
        }
    }
    all
}
