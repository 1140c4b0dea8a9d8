//! The protection of rrun's own executable against containers.
//!
//! A process of a container begins as a child of rrun. Until that child calls execve(2), the
//! container can reach rrun's executable file on the host through the child's link /proc/PID/exe. A
//! container can also make the child execute `/proc/self/exe`, or a script whose interpreter is
//! `/proc/self/exe`. rrun itself then runs in the container. If a process of the container opens a
//! link to rrun's file, the process can write to the file as soon as no process executes the file
//! any more (CVE-2019-5736).
//!
//! So rrun executes itself again from a read-only overlay of the directory that contains rrun's
//! executable. The overlay is not attached to any path. If the overlay cannot be created, rrun
//! executes itself from a read-only copy of the mount that contains rrun's executable.
//! [`rrun_kernel::readonly_exec`] describes the overlay and the disadvantage of the copy.
//!
//! If rrun was already executed from a file system that is read-only as a whole, it does not
//! execute itself again. A program that starts many containers can execute rrun from such a file
//! system. rrun then does not need the second execve.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use crate::error::{Context, Error, Reason as _, Result};
use crate::sys::dumpable::set_dumpable;
use crate::sys::syscalls::{execveat, ignore_signal};

const OWN_EXECUTABLE: &str = "/proc/self/exe";

/// The types of file systems that are read-only as a whole: overlay, squashfs and EROFS. An overlay
/// counts only if access(2) also reports it as read-only. The magic numbers of these types are from
/// statfs(2) and linux/magic.h.
const ALWAYS_READ_ONLY: [rustix::fs::FsWord; 3] = [0x794c_7630, 0x7371_7368, 0xe0f5_e1e2];

/// Reserves the descriptors 0 to 2, and ignores SIGPIPE. rrun must call this function before it
/// opens any file.
///
/// A descriptor that rrun opens must never get one of the numbers 0 to 2. Otherwise it would become
/// a container's standard input, output or error. rrun ignores SIGPIPE, because a write to a pipe
/// without a reader must return an error instead of killing rrun.
pub(crate) fn reserve_standard_descriptors() -> Result<()> {
    loop {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .doing(|| "open /dev/null")?;
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            break;
        }
        // A standard descriptor must stay open across execve(2), so clear the close-on-exec flag of
        // this descriptor.
        rustix::io::fcntl_setfd(&null, rustix::io::FdFlags::empty())
            .doing(|| "keep /dev/null open")?;
        std::mem::forget(null);
    }
    ignore_signal(libc::SIGPIPE).doing(|| "ignore SIGPIPE")
}

/// Makes sure that rrun was executed from a read-only file system. If rrun was executed from a
/// writable file system, executes rrun again from a read-only file system. This function also makes
/// sure that no process of a container can access the memory or descriptors of this process
/// (CVE-2016-9962).
pub(crate) fn protect(words: &[&'static CStr]) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return protect_unprivileged(words);
    }
    let look = || format!("check {OWN_EXECUTABLE}");
    let read_only =
        match rustix::fs::accessat(CWD, OWN_EXECUTABLE, Access::WRITE_OK, AtFlags::EACCESS) {
            Err(Errno::ROFS) => true,
            // Only a read-only file system makes the file safe. Any other reason why the file is
            // not writable could disappear later.
            Ok(()) | Err(Errno::ACCESS | Errno::TXTBSY | Errno::PERM) => false,
            Err(errno) => return Err(errno).doing(look),
        };
    let kind = rustix::fs::statfs(OWN_EXECUTABLE).doing(look)?.f_type;
    if !(read_only && ALWAYS_READ_ONLY.contains(&kind)) {
        match open_in_overlay() {
            Ok(file) => return Err(execute_again(&file, words)),
            // The file is on a read-only file system, so it is safe without an overlay.
            Err(_) if read_only => {}
            Err(refused) => {
                let file = rrun_kernel::readonly_exec::open_on_readonly_mount(c"/proc/self/exe").doing(|| {
                    let refused = refused.reason();
                    format!("{EXECUTE_AGAIN}: cannot create an overlay of the directory that contains rrun's executable ({refused}), and cannot create a read-only copy of its mount either")
                })?;
                return Err(execute_again(&file, words));
            }
        }
    }
    // rrun sets its process name, because the kernel uses the descriptor's number as the process
    // name after execveat(2).
    rustix::thread::set_name(c"rrun").doing(|| "set the name of this process")?;
    set_dumpable(false)
}

/// Protects rrun's executable file if rrun's caller is not root and so cannot create mounts. The
/// container's root user is then the same user on the host as rrun's caller. So the container can
/// write only to this user's files. If rrun's executable file belongs to this user, rrun executes a
/// sealed copy of itself in memory.
fn protect_unprivileged(words: &[&'static CStr]) -> Result<()> {
    let doing = || "copy rrun to memory, to protect rrun's executable file against the container";
    let file = rustix::fs::open(
        OWN_EXECUTABLE,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(|| format!("open {OWN_EXECUTABLE}"))?;
    let sealed = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    let is_sealed = rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(sealed));
    let stat = rustix::fs::fstat(&file).doing(|| format!("check {OWN_EXECUTABLE}"))?;
    let own = stat.st_uid == rustix::process::geteuid().as_raw() || is_writable()?;
    if is_sealed || !own {
        return set_dumpable(false);
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let copy = rustix::fs::memfd_create("rrun", flags).doing(doing)?;
    std::io::copy(
        &mut std::fs::File::from(file),
        &mut std::fs::File::from(copy.try_clone().doing(doing)?),
    )
    .doing(doing)?;
    rustix::fs::fcntl_add_seals(&copy, sealed).doing(doing)?;
    let errno = execveat(copy.as_fd(), words);
    Err::<(), Errno>(errno).doing(doing)
}

/// Returns whether this process has permission to write to rrun's executable file.
fn is_writable() -> Result<bool> {
    match rustix::fs::accessat(CWD, OWN_EXECUTABLE, Access::WRITE_OK, AtFlags::EACCESS) {
        Ok(()) | Err(Errno::TXTBSY) => Ok(true),
        Err(Errno::ROFS | Errno::ACCESS | Errno::PERM) => Ok(false),
        Err(errno) => Err(errno).doing(|| format!("check {OWN_EXECUTABLE}")),
    }
}

const EXECUTE_AGAIN: &str = "execute rrun from a read-only file system, to protect rrun's executable file against the container";

/// Executes rrun again from `file`. Returns only if the execution fails, and then returns the
/// error.
fn execute_again(file: &OwnedFd, words: &[&'static CStr]) -> Error {
    let errno = execveat(file.as_fd(), words);
    Error::new(errno.reason()).while_doing(EXECUTE_AGAIN)
}

/// Opens rrun's executable file in an overlay of the directory that contains the file.
fn open_in_overlay() -> std::result::Result<OwnedFd, Errno> {
    let path = rustix::fs::readlink(OWN_EXECUTABLE, Vec::new())?;
    let path = Path::new(std::ffi::OsStr::from_bytes(path.as_bytes()));
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::NOENT);
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    // The link /proc/self/exe contains the path of rrun's file at the time of execve(2). This path
    // can lead to another file now.
    let found = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let own = rustix::fs::stat(OWN_EXECUTABLE)?;
    if (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino) {
        return Err(Errno::NOENT);
    }
    rrun_kernel::readonly_exec::open_in_overlay(&directory, name)
}
