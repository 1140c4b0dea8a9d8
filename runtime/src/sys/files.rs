//! Files read up to a limit, and files replaced as a whole.

use std::io::Read as _;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Result, refuse};

/// The most that is read of a JSON file; the largest config.json that occur have some 100 kB.
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
            "read {}: is larger than {} MB",
            path.display(),
            FILE_BYTES_MAX >> 20
        );
    }
    Ok(bytes)
}

/// Writes a file beside its place and renames it there. Both paths count from `directory`.
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

/// Writes a process id to where the caller asked for it, without a newline, as runc does.
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
