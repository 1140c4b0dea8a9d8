//! Functions that read files up to a size limit, and that replace files atomically.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Context, Result, refuse};
use rrun_kernel::regular_file::{self, Unfit};

/// The size limit for JSON files that rrun's caller writes. In practice, the largest config.json
/// files have a size of about 100 kB.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// The size limit for files that rrun writes. A container's state contains a large part of its
/// config.json. So the state can be a little larger than the largest config.json.
const OWN_FILE_BYTES_MAX: u64 = 2 * FILE_BYTES_MAX;

/// Returns whether a file exists at `path`. Unlike [`Path::exists`], this function fails if the
/// kernel reports another error than a missing file.
pub(crate) fn exists(path: &Path) -> Result<bool> {
    match rustix::fs::access(path, Access::EXISTS) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(errno) => Err(errno).doing(|| format!("check whether {} exists", path.display())),
    }
}

/// Returns whether a socket exists at `path`. A symbolic link to a socket does not count.
pub(crate) fn is_socket(path: &Path) -> Result<bool> {
    match rustix::fs::lstat(path) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Socket),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(errno) => Err(errno).doing(|| format!("check whether {} exists", path.display())),
    }
}

/// Opens a regular file that rrun wrote to its own directory `directory`. If `careful` is true,
/// another user can have replaced the file. This function then checks the type of the file before
/// it opens the file, which needs some more system calls. If `careful` is false, also
/// returns the attributes of the file.
pub(crate) fn open_own(
    directory: impl AsFd,
    name: &str,
    careful: bool,
) -> std::result::Result<(File, Option<Stat>), Unfit> {
    if careful {
        let file = regular_file::open_at(directory, name, OFlags::RDONLY, false)?;
        return Ok((file, None));
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let stat = regular_file::check_kind(&file)?;
    Ok((file.into(), Some(stat)))
}

/// Reads the file that [`open_own`] has opened at `path`.
pub(crate) fn read_own(file: File, path: &Path) -> Result<Vec<u8>> {
    read_at_most(OWN_FILE_BYTES_MAX, file, path)
}

/// Reads a regular file of at most [`FILE_BYTES_MAX`] bytes. The path is from rrun's command line,
/// so rrun's caller trusts the path. rrun nevertheless refuses a FIFO, because it would wait for
/// ever for a writer of the FIFO.
pub(crate) fn read_argument(path: &Path) -> Result<Vec<u8>> {
    let doing = || format!("read {}", path.display());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).doing(doing)?;
    regular_file::check_kind(&file).doing(doing)?;
    read_file(file.into(), path)
}

/// Reads the file that was opened at `path`.
///
/// # Errors
/// Fails if the file has more than [`FILE_BYTES_MAX`] bytes.
pub(crate) fn read_file(file: File, path: &Path) -> Result<Vec<u8>> {
    read_at_most(FILE_BYTES_MAX, file, path)
}

fn read_at_most(limit: u64, file: File, path: &Path) -> Result<Vec<u8>> {
    let doing = || format!("read {}", path.display());
    let mut bytes = Vec::with_capacity(16 << 10);
    let read = file.take(limit + 1).read_to_end(&mut bytes).doing(doing)?;
    if read as u64 > limit {
        refuse!(
            "read {}: the file is larger than {} MB",
            path.display(),
            limit >> 20
        );
    }
    Ok(bytes)
}

/// Writes `content` to the file `new`, and renames that file to `path`. Both paths are relative to
/// `directory`. A file that exists at the path `new` is removed. It can be the rest of an rrun
/// process that was killed, or a FIFO, which rrun must not open.
pub(crate) fn write_replacing(
    directory: impl AsFd,
    new: &Path,
    path: &Path,
    content: &[u8],
    mode: u32,
) -> Result<()> {
    let doing = || format!("write {}", path.display());
    let create = || {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(&directory, new, flags, Mode::from_raw_mode(mode))
    };
    let file = match create() {
        Err(Errno::EXIST) => {
            rustix::fs::unlinkat(&directory, new, AtFlags::empty()).doing(doing)?;
            create()
        }
        created => created,
    }
    .doing(doing)?;
    let written = write_all(&file, content)
        .and_then(|()| rustix::fs::renameat(&directory, new, &directory, path));
    if written.is_err() {
        let _ = rustix::fs::unlinkat(&directory, new, AtFlags::empty());
    }
    written.doing(doing)
}

fn write_all(file: &OwnedFd, mut rest: &[u8]) -> std::result::Result<(), Errno> {
    while !rest.is_empty() {
        let written = retry_on_intr(|| rustix::io::write(file, rest))?;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(())
}

/// Removes a file that [`write_pid_file`] has written, because the process no longer exists.
pub(crate) fn remove_pid_file(path: &Path) -> Result<()> {
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        removed => removed.doing(|| format!("remove {}", path.display())),
    }
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
