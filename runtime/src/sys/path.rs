//! Functions that process paths as text, without access to the file system.

use std::path::{Component, Path, PathBuf};

/// Returns `path` as an absolute path without `.`, `..` and doubled slashes. A relative path is
/// resolved from the root directory.
pub(crate) fn cleaned(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cleaned_path_never_leaves_the_root() {
        for (path, clean) in [
            ("/a/../../../etc", "/etc"),
            ("//proc//./self/", "/proc/self"),
            ("..", "/"),
            ("dev/pts", "/dev/pts"),
        ] {
            assert_eq!(cleaned(Path::new(path)), Path::new(clean));
        }
    }
}
