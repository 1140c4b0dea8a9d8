//! Functions that read files up to a size limit, and that replace files atomically.

use std::io::Read as _;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Result, refuse};

/// The size limit for JSON files. In practice, the largest config.json files have a size of about
/// 100 kB.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Reads a file of at most [`FILE_BYTES_MAX`] bytes.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let file = std::fs::File::open(path).doing(|| format!("read {}", path.display()))?;
    read_file(file, path)
}

/// Reads at most [`FILE_BYTES_MAX`] bytes of the file that was opened at `path`.
pub(crate) fn read_file(file: std::fs::File, path: &Path) -> Result<Vec<u8>> {
    let doing = || format!("read {}", path.display());
    let mut bytes = Vec::with_capacity(16 << 10);
    let read = file
        .take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .doing(doing)?;
    if read as u64 > FILE_BYTES_MAX {
        refuse!(
            "read {}: the file is larger than {} MB",
            path.display(),
            FILE_BYTES_MAX >> 20
        );
    }
    Ok(bytes)
}

/// Writes `content` to the file `new`, and renames that file to `path`. Both paths are relative to
/// `directory`.
pub(crate) fn write_replacing(
    directory: impl AsFd,
    new: &Path,
    path: &Path,
    content: &[u8],
    mode: u32,
) -> Result<()> {
    let doing = || format!("write {}", path.display());
    let file = rustix::fs::openat(
        &directory,
        new,
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::from_raw_mode(mode),
    )
    .doing(doing)?;
    let mut rest = content;
    while !rest.is_empty() {
        let written = rustix::io::write(&file, rest).doing(doing)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    rustix::fs::renameat(&directory, new, &directory, path).doing(doing)
}

/// Writes a process id to the file that rrun's caller requested (`--pid-file`), without a newline,
/// as runc does.
pub(crate) fn write_pid_file(path: &Path, pid: i32) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}"));
    write_replacing(
        rustix::fs::CWD,
        &new,
        path,
        pid.to_string().as_bytes(),
        0o666,
    )
}
