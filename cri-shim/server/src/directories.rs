//! The directories ROOT and STATE. Other users of the node must not read the secrets in them.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::config::Config;
use crate::sandbox::files::private_dir;
use rrun_calls::error::{During, Result};

/// The names of the entries that can exist in ROOT if only the server uses ROOT. An administrator
/// creates `preload`, mkfs(8) creates `lost+found`, and earlier versions of the server created `trash`.
const ROOT_ENTRIES: [&str; 9] = [
    "containers",
    "ingest",
    "layers",
    "lock",
    "lost+found",
    "meta.redb",
    "mountpoints",
    "preload",
    "trash",
];

/// Creates the missing directories. Removes the access of other users to directories that exist.
/// For example, `mkdir -p ROOT/preload` creates ROOT with the mode 0755.
pub(crate) fn make(config: &Config) -> Result<()> {
    let (root, state) = (&config.root, &config.state);
    for dir in [root, state] {
        private_dir(dir)?;
    }
    protect_root(root)?;
    for (dir, mode) in [
        (root.join("containers"), 0o700),
        (state.join("runtime"), 0o700),
        // The server lets other users traverse this directory if a pod has a user namespace.
        (state.join("pods"), 0o711),
    ] {
        private_dir(&dir)?;
        restrict(&dir, mode)?;
    }
    let namespaces = config.namespaces();
    std::fs::create_dir_all(namespaces.dir())
        .during(|| format!("create the directory {}", namespaces.dir().display()))
}

/// Removes the access of other users to ROOT. The mode of a directory that also contains other
/// files does not change, because other programs can need these files.
fn protect_root(root: &Path) -> Result<()> {
    let what = || format!("read the directory {}", root.display());
    for entry in std::fs::read_dir(root).during(what)? {
        let name = entry.during(what)?.file_name();
        if !ROOT_ENTRIES.iter().any(|known| OsStr::new(known) == name) {
            log::warn!(
                "the mode of the directory {} does not change, because the directory contains {name:?}, which is not part of rrun-cri's data",
                root.display()
            );
            return Ok(());
        }
    }
    restrict(root, 0o700)
}

/// Removes all permissions from the directory `dir` that are not in `mode`.
fn restrict(dir: &Path, mode: u32) -> Result<()> {
    let what = || format!("set the mode of the directory {}", dir.display());
    let before = std::fs::metadata(dir).during(what)?.permissions().mode() & 0o7777;
    let after = before & mode;
    if before == after {
        return Ok(());
    }
    log::info!(
        "the server changes the mode of the directory {} from {before:04o} to {after:04o}",
        dir.display()
    );
    std::fs::set_permissions(dir, Permissions::from_mode(after)).during(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_users_have_no_access_to_root_unless_root_contains_other_files()
    -> Result<(), Box<dyn std::error::Error>> {
        let root = std::env::temp_dir().join(format!("rrun-directories-{}", std::process::id()));
        std::fs::create_dir_all(root.join("preload"))?;
        let link = root.with_extension("link");
        std::os::unix::fs::symlink(&root, &link)?;
        let mode_after = |dir: &Path| -> Result<u32, Box<dyn std::error::Error>> {
            std::fs::set_permissions(&root, Permissions::from_mode(0o755))?;
            protect_root(dir)?;
            Ok(std::fs::metadata(dir)?.permissions().mode() & 0o7777)
        };
        assert_eq!(mode_after(&root)?, 0o700);
        assert_eq!(mode_after(&link)?, 0o700);
        std::fs::write(root.join("other"), "")?;
        assert_eq!(mode_after(&root)?, 0o755);
        std::fs::remove_file(link)?;
        std::fs::remove_dir_all(root)?;
        Ok(())
    }
}
