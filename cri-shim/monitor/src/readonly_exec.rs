//! Programs on a file system of the monitor's own, which nobody can write to.
//!
//! Before it meets a container rrun sees to it that it was executed from such a file system, and
//! if it was not, makes one and executes itself once more ([`rrun_kernel::readonly_exec`] tells
//! why, and why a read-only mount is not enough). This saves it the second execve(2), which is
//! much of what a short call takes: the overlay is made once, and rrun executed from it each time.

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

/// The only runtime that is known to look for it.
const RUNTIME_NAME: &str = "rrun";

/// The beginning of the only programs taken: a script's interpreter would be given a path that
/// leads nowhere by then.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

struct ReadonlyProgram {
    program: CString,
    /// Device and inode of the file below. As long as the overlay is there, no other gets them.
    identity: (u64, u64),
    file: OwnedFd,
}

static LAST: Mutex<Option<ReadonlyProgram>> = Mutex::new(None);

/// The path by which a child of ours that has our descriptors executes `program` from a read-only
/// file system. `None` for what is not rrun, or where no such file system can be had.
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

/// Makes the file system for a program that [`executable_path`] will be asked for.
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

/// The file at `path` in an overlay of its directory that has no layer to write to and is
/// attached nowhere. As far as the kernel counts who writes to it and who executes it, it is
/// another file than the one below.
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
            eprintln!("skipped: mounting needs root");
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
