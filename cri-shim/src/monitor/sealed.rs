//! rrun's program on a read-only mount.
//!
//! Before it meets a container rrun sees to it that it was executed from a mount that nobody can
//! write to, and if it was not, makes one and executes itself once more (`executable.rs` in its
//! sources tells why). This saves it the second execve(2), which is much of what a short call
//! takes: the mount is made once, and rrun executed from it each time.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{CWD, Stat};
use rustix::mount::OpenTreeFlags;

use crate::mount_attributes;

/// The only runtime that is known to look for it.
const NAME: &str = "rrun";

/// A script's interpreter would be given a path that leads nowhere by then.
const ELF: [u8; 4] = *b"\x7fELF";

/// A copy of the mount of one file, attached nowhere.
struct Sealed {
    program: CString,
    /// Device and inode. As long as the mount is there, no other file gets them.
    file: (u64, u64),
    mount: OwnedFd,
}

static LAST: Mutex<Option<Sealed>> = Mutex::new(None);

/// The path by which a child of ours that has our descriptors executes `program` from a read-only
/// mount. `None` for what is not rrun, or where such a mount can't be had.
pub fn path(program: &CStr) -> Option<CString> {
    let path = Path::new(OsStr::from_bytes(program.to_bytes()));
    if path.file_name() != Some(OsStr::new(NAME)) {
        return None;
    }
    let file = identity(&rustix::fs::stat(path).ok()?);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if !last
        .as_ref()
        .is_some_and(|sealed| sealed.file == file && sealed.program.as_c_str() == program)
    {
        *last = seal(program, path);
    }
    let sealed = last.as_ref()?;
    CString::new(format!("/proc/self/fd/{}", sealed.mount.as_raw_fd())).ok()
}

fn seal(program: &CStr, path: &Path) -> Option<Sealed> {
    let mut magic = [0; ELF.len()];
    File::open(path).ok()?.read_exact(&mut magic).ok()?;
    if magic != ELF {
        return None;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = rustix::mount::open_tree(CWD, path, flags).ok()?;
    mount_attributes::set(mount.as_fd(), false, libc::MOUNT_ATTR_RDONLY, None).ok()?;
    Some(Sealed {
        program: program.to_owned(),
        file: identity(&rustix::fs::fstat(&mount).ok()?),
        mount,
    })
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn sealed(program: &Path) -> Option<CString> {
        path(&CString::new(program.as_os_str().as_bytes()).unwrap())
    }

    #[test]
    fn rrun_is_executed_from_a_read_only_mount_until_it_is_replaced() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let dir = std::env::temp_dir().join(format!("rrun-sealed-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (program, new, other) = (dir.join(NAME), dir.join("new"), dir.join("runc"));
        let own = std::env::current_exe().unwrap();
        for copy in [&program, &new, &other] {
            std::fs::copy(&own, copy).unwrap();
        }
        let inode = |path: &CString| std::fs::metadata(path.to_str().unwrap()).unwrap().ino();
        let first = sealed(&program).unwrap();
        assert_eq!(inode(&first), std::fs::metadata(&program).unwrap().ino());
        let written = std::fs::OpenOptions::new()
            .append(true)
            .open(first.to_str().unwrap());
        assert_eq!(
            written.map_err(|error| error.kind()).unwrap_err(),
            std::io::ErrorKind::ReadOnlyFilesystem
        );
        assert_eq!(sealed(&program).unwrap(), first);
        std::fs::rename(&new, &program).unwrap();
        let second = sealed(&program).unwrap();
        assert_eq!(inode(&second), std::fs::metadata(&program).unwrap().ino());
        assert!(sealed(&other).is_none());
        std::fs::remove_file(&program).unwrap();
        std::fs::write(&program, "#!/bin/sh\n").unwrap();
        assert!(sealed(&program).is_none());
        *LAST.lock().unwrap() = None;
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
