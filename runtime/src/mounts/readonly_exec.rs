//! rrun's own executable, kept out of containers' hands.
//!
//! A process of rrun's that is about to become a container's is, until its execve(2),
//! visible in the container as one whose /proc/PID/exe is rrun on the host; and if the
//! container makes it execute `/proc/self/exe` (or a script that names it as its
//! interpreter), rrun itself runs in there. Whoever opens that link can, once nobody
//! executes the file any more, write to it (CVE-2019-5736).
//!
//! So rrun executes itself once more, from a read-only overlay of its directory that is attached
//! nowhere: see [`rrun_kernel::readonly_exec`], which also tells what a read-only copy of the mount
//! lacks. That copy is what is left where no overlay can be made.
//!
//! If rrun was executed from such a file system already, there is nothing to do; a caller
//! that starts many containers can save the second execve that way.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::process::DumpableBehavior;

use crate::error::{Context, Error, Reason as _, Result};
use crate::sys::syscalls::{execveat, ignore_signal};

const OWN_EXECUTABLE: &str = "/proc/self/exe";

/// Overlays, as far as they are found read-only; squashfs; EROFS (statfs(2), linux/magic.h).
const ALWAYS_READ_ONLY: [rustix::fs::FsWord; 3] = [0x794c_7630, 0x7371_7368, 0xe0f5_e1e2];

/// What every program has to do at its start that opens files.
///
/// A descriptor of rrun's own must never get one of the numbers 0 to 2, or it would become
/// a container's standard input, output or error. And a reader that went away is to be an
/// error to the writer, not its end.
pub(crate) fn reserve_standard_descriptors() -> Result<()> {
    loop {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .doing(|| "open /dev/null")?;
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            break;
        }
        // Stays open, and is no exception among those of the caller's.
        rustix::io::fcntl_setfd(&null, rustix::io::FdFlags::empty())
            .doing(|| "keep /dev/null open")?;
        std::mem::forget(null);
    }
    ignore_signal(libc::SIGPIPE).doing(|| "ignore SIGPIPE")
}

/// Makes sure that this process was executed from a read-only file system, if need be by
/// executing it again, and that no process of a container may look into it: neither at
/// its memory nor at its descriptors (CVE-2016-9962).
pub(crate) fn protect(words: &[&'static CStr]) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return protect_unprivileged(words);
    }
    let look = || format!("look at {OWN_EXECUTABLE}");
    let read_only =
        match rustix::fs::accessat(CWD, OWN_EXECUTABLE, Access::WRITE_OK, AtFlags::EACCESS) {
            Err(Errno::ROFS) => true,
            // Also if it is not writable for another reason: that could change.
            Ok(()) | Err(Errno::ACCESS | Errno::TXTBSY | Errno::PERM) => false,
            Err(errno) => return Err(errno).doing(look),
        };
    let kind = rustix::fs::statfs(OWN_EXECUTABLE).doing(look)?.f_type;
    if !(read_only && ALWAYS_READ_ONLY.contains(&kind)) {
        match open_in_overlay() {
            Ok(file) => return Err(execute_again(&file, words)),
            // The file is safe without it.
            Err(_) if read_only => {}
            Err(refused) => {
                let file = rrun_kernel::readonly_exec::open_on_readonly_mount(c"/proc/self/exe").doing(|| {
                    let refused = refused.reason();
                    format!("{EXECUTE_AGAIN}: no overlay of its directory ({refused}) nor a read-only mount of it")
                })?;
                return Err(execute_again(&file, words));
            }
        }
    }
    // It may have been executed by a descriptor's number: no name for ps(1).
    rustix::thread::set_name(c"rrun").doing(|| "give this process its name")?;
    make_undumpable()
}

fn make_undumpable() -> Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .doing(|| "forbid other processes to look into this one")
}

/// The same for who can not make mounts. A container's root is then the caller himself: what
/// he can not write to, it can not either. A file of his own is copied to memory, sealed.
fn protect_unprivileged(words: &[&'static CStr]) -> Result<()> {
    let doing = || "copy rrun to memory, to keep its file out of the container's hands";
    let file = rustix::fs::open(
        OWN_EXECUTABLE,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(|| format!("open {OWN_EXECUTABLE}"))?;
    let sealed = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    let is_sealed = rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(sealed));
    let stat = rustix::fs::fstat(&file).doing(|| format!("look at {OWN_EXECUTABLE}"))?;
    let own = stat.st_uid == rustix::process::geteuid().as_raw()
        || rustix::fs::accessat(CWD, OWN_EXECUTABLE, Access::WRITE_OK, AtFlags::EACCESS).is_ok();
    if is_sealed || !own {
        return make_undumpable();
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

const EXECUTE_AGAIN: &str =
    "execute rrun from where it is read-only, to keep its file out of the container's hands";

/// Returns only with the reason why it could not be done.
fn execute_again(file: &OwnedFd, words: &[&'static CStr]) -> Error {
    let errno = execveat(file.as_fd(), words);
    Error::new(errno.reason()).while_doing(EXECUTE_AGAIN)
}

/// This program's file in an overlay of the directory that it is in.
fn open_in_overlay() -> std::result::Result<OwnedFd, Errno> {
    let path = rustix::fs::readlink(OWN_EXECUTABLE, Vec::new())?;
    let path = Path::new(std::ffi::OsStr::from_bytes(path.as_bytes()));
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::NOENT);
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    // The path is as of some root and some moment: it may lead elsewhere by now.
    let found = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let own = rustix::fs::stat(OWN_EXECUTABLE)?;
    if (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino) {
        return Err(Errno::NOENT);
    }
    rrun_kernel::readonly_exec::open_in_overlay(&directory, name)
}
