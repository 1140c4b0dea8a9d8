//! Directories that a layer uses without listing them.
//!
//! The archive says nothing of their owner and mode, but in the overlay they would cover the
//! directories of the same name below, and a `/tmp` would lose its sticky bit. So they take over
//! what the layers below them say.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::LayerError;
use super::tree::{Tree, modified};

/// Gives each of the directories `implied` in `layer` the looks that it has in the uppermost of
/// the layers `below`, which are named uppermost first.
pub fn adopt(layer: &Path, implied: &[Vec<u8>], below: &[PathBuf]) -> Result<(), LayerError> {
    let layer = open(layer)?;
    let below = below
        .iter()
        .map(|path| open(path))
        .collect::<Result<Vec<_>, _>>()?;
    for name in implied {
        let Some(stat) = below.iter().find_map(|tree| found(tree, name)) else {
            continue;
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            continue;
        }
        // An entry that came later may have put something else in its place.
        let ours = match layer.open(name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            other => other.map_err(|e| LayerError::system("open the directory", name, e))?,
        };
        let fail = |e| LayerError::system("set the owner and mode of", name, e);
        rustix::fs::fchown(
            &ours,
            Some(Uid::from_raw(stat.st_uid)),
            Some(Gid::from_raw(stat.st_gid)),
        )
        .map_err(fail)?;
        rustix::fs::fchmod(&ours, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(fail)?;
        rustix::fs::futimens(&ours, &modified(stat.st_mtime, stat.st_mtime_nsec as u32))
            .map_err(fail)?;
    }
    Ok(())
}

fn open(path: &Path) -> Result<Tree, LayerError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
        .map(Tree::new)
        .map_err(|e| LayerError::system("open the layer", path.as_os_str().as_encoded_bytes(), e))
}

/// What a layer has under that name: a directory, or a file or whiteout that hides those below.
fn found(tree: &Tree, name: &[u8]) -> Option<rustix::fs::Stat> {
    let opened = tree.open(name, OFlags::PATH | OFlags::NOFOLLOW).ok()?;
    rustix::fs::fstat(opened).ok()
}
