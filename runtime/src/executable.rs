//! rrun's own executable, kept out of containers' hands.
//!
//! A process of rrun's that is about to become a container's is, until its execve(2),
//! visible in the container as one whose /proc/PID/exe is rrun on the host; and if the
//! container makes it execute `/proc/self/exe` (or a script that names it as its
//! interpreter), rrun itself runs in there. Whoever opens that link can, once nobody
//! executes the file any more, write to it (CVE-2019-5736).
//!
//! A link in /proc/PID/exe leads to a file *by a mount*: the one it was executed from. So
//! rrun executes itself once more, from a private copy of the mount that is read-only and
//! attached nowhere. Opening for writing through it gives EROFS, for every user and with
//! every capability; nobody can make it writable again, because mount_setattr(2) and
//! mount(2) refuse a mount that is not in the caller's own mount namespace, and it ends
//! with the last process that was executed from it. The file's contents are not copied.
//!
//! If rrun was executed from a read-only mount already, there is nothing to do; a caller
//! that starts many containers can save the second execve that way.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{Access, AtFlags, CWD, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::process::DumpableBehavior;

use crate::error::{Context, Error, Result};
use crate::mount_options::READ_ONLY;
use crate::syscalls::{execveat, ignore_signal, mount_setattr};

const LINK: &str = "/proc/self/exe";

/// What every program has to do at its start that opens files.
///
/// A descriptor of rrun's own must never get one of the numbers 0 to 2, or it would become
/// a container's standard input, output or error. And a reader that went away is to be an
/// error to the writer, not its end.
pub fn prepare() -> Result<()> {
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

/// Makes sure that this process was executed from a read-only mount, if need be by
/// executing it again, and that no process of a container may look into it: neither at
/// its memory nor at its descriptors (CVE-2016-9962).
pub fn protect(words: &[&'static CStr]) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return protect_unprivileged(words);
    }
    match rustix::fs::accessat(CWD, LINK, Access::WRITE_OK, AtFlags::EACCESS) {
        // It may have been executed by a descriptor's number: no name for ps(1).
        Err(Errno::ROFS) => {
            rustix::thread::set_name(c"rrun").doing(|| "give this process its name")?;
        }
        // Also if it is not writable for another reason: that could change.
        Ok(()) | Err(Errno::ACCESS | Errno::TXTBSY | Errno::PERM) => {
            return Err(execute_again(words));
        }
        result => result.doing(|| format!("look at {LINK}"))?,
    }
    hide()
}

fn hide() -> Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .doing(|| "forbid other processes to look into this one")
}

/// The same for who can not make mounts. A container's root is then the caller himself: what
/// he can not write to, it can not either. A file of his own is copied to memory, sealed.
fn protect_unprivileged(words: &[&'static CStr]) -> Result<()> {
    let doing = || "copy rrun to memory, to keep its file out of the container's hands";
    let file = rustix::fs::open(LINK, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .doing(|| format!("open {LINK}"))?;
    let sealed = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    let is_sealed = rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(sealed));
    let stat = rustix::fs::fstat(&file).doing(|| format!("look at {LINK}"))?;
    let own = stat.st_uid == rustix::process::geteuid().as_raw()
        || rustix::fs::accessat(CWD, LINK, Access::WRITE_OK, AtFlags::EACCESS).is_ok();
    if is_sealed || !own {
        return hide();
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

/// Returns only with the reason why it could not be done.
fn execute_again(words: &[&'static CStr]) -> Error {
    let doing =
        || "execute rrun from a read-only mount, to keep its file out of the container's hands";
    let copy = rustix::mount::open_tree(
        CWD,
        LINK,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    );
    let copy = match copy.doing(doing) {
        Ok(copy) => copy,
        Err(error) => return error,
    };
    if let Err(error) = mount_setattr(copy.as_fd(), false, &READ_ONLY).doing(doing) {
        return error;
    }
    let errno = execveat(copy.as_fd(), words);
    match Err::<(), Errno>(errno).doing(doing) {
        Ok(()) => Error::new(doing()),
        Err(error) => error,
    }
}
