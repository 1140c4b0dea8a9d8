//! The execution of rrun from a read-only file system that the monitor creates.
//!
//! Before rrun starts a container's process, rrun checks the file system from which it was
//! executed. If this file system is writable, rrun creates a read-only overlay and executes itself
//! again from the overlay. [`rrun_kernel::readonly_exec`] describes why a read-only file system is
//! necessary, and why a read-only mount is not enough. The monitor creates the overlay once and
//! executes rrun from it every time. With the monitor's overlay, rrun does not need the second
//! execve(2). The second execve(2) would take a large part of the time of a short runtime call.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rrun_kernel::readonly_exec::open_in_overlay;
use rustix::fs::{Mode, OFlags, Stat};

/// The file name of the only runtime that the monitor executes from an overlay. Other runtimes are
/// not known to check the file system from which they were executed.
const RUNTIME_NAME: &str = "rrun";

/// The first bytes of an ELF program. The monitor executes only ELF programs from the overlay, and
/// no scripts. The interpreter of a script would receive the script's path under /proc/self/fd, but
/// cannot open the script through this path.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

struct ReadonlyProgram {
    program: CString,
    /// The device and inode numbers of the original file. While the overlay exists, no other file
    /// can get the same numbers. Different numbers therefore show that the program was replaced.
    identity: (u64, u64),
    file: OwnedFd,
}

static LAST: Mutex<Option<ReadonlyProgram>> = Mutex::new(None);

/// Returns a path under /proc/self/fd. Through this path, a child process executes `program` from a
/// read-only file system. The child must have inherited the monitor's descriptors. Returns `None`
/// if the program is not rrun, or if the monitor cannot create the read-only file system.
pub(crate) fn executable_path(program: &CStr) -> Option<CString> {
    let path = Path::new(OsStr::from_bytes(program.to_bytes()));
    if path.file_name() != Some(OsStr::new(RUNTIME_NAME)) {
        return None;
    }
    let found = identity(&rustix::fs::stat(path).ok()?);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if !last
        .as_ref()
        .is_some_and(|last| last.identity == found && last.program.as_c_str() == program)
    {
        *last = mount_readonly(program, path, found);
    }
    let program = last.as_ref()?;
    CString::new(format!("/proc/self/fd/{}", program.file.as_raw_fd())).ok()
}

/// Creates the read-only file system for a program in advance. The next call of [`executable_path`]
/// for this program is then faster.
pub(crate) fn prepare(program: &Path) {
    if let Ok(program) = CString::new(program.as_os_str().as_bytes()) {
        executable_path(&program);
    }
}

fn mount_readonly(program: &CStr, path: &Path, identity: (u64, u64)) -> Option<ReadonlyProgram> {
    let mut magic = [0; ELF_MAGIC.len()];
    File::open(path).ok()?.read_exact(&mut magic).ok()?;
    if magic != ELF_MAGIC {
        return None;
    }
    Some(ReadonlyProgram {
        program: program.to_owned(),
        identity,
        file: overlaid(path).ok()?,
    })
}

/// Opens the file at `path` in an overlay of its directory. The overlay has no writable layer and
/// is not attached to any mount point. The overlay's file has its own inode. For this reason, its
/// execution does not fail with ETXTBSY while a process has the original file open for writing.
pub(crate) fn overlaid(path: &Path) -> io::Result<OwnedFd> {
    let path = std::fs::canonicalize(path)?;
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::IsADirectory.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    Ok(open_in_overlay(&directory, name)?)
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn path_to(program: &Path) -> Option<CString> {
        executable_path(&CString::new(program.as_os_str().as_bytes()).unwrap())
    }

    #[test]
    fn rrun_is_executed_from_a_read_only_overlay_until_it_is_replaced() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: this test mounts file systems, so it needs root");
            return;
        }
        let dir = std::env::temp_dir().join(format!("rrun-readonly-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (program, new, other) = (dir.join(RUNTIME_NAME), dir.join("new"), dir.join("runc"));
        let own = std::env::current_exe().unwrap();
        for copy in [&program, &new, &other] {
            std::fs::copy(&own, copy).unwrap();
        }
        let inode = |path: &CString| std::fs::metadata(path.to_str().unwrap()).unwrap().ino();
        let first = path_to(&program).unwrap();
        assert_eq!(inode(&first), std::fs::metadata(&program).unwrap().ino());
        let written = std::fs::OpenOptions::new()
            .append(true)
            .open(first.to_str().unwrap());
        assert_eq!(
            written.map_err(|error| error.kind()).unwrap_err(),
            std::io::ErrorKind::ReadOnlyFilesystem
        );
        assert_eq!(path_to(&program).unwrap(), first);
        std::fs::rename(&new, &program).unwrap();
        let second = path_to(&program).unwrap();
        assert_eq!(inode(&second), std::fs::metadata(&program).unwrap().ino());
        assert!(path_to(&other).is_none());
        std::fs::remove_file(&program).unwrap();
        std::fs::write(&program, "#!/bin/sh\n").unwrap();
        assert!(path_to(&program).is_none());
        *LAST.lock().unwrap() = None;
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
