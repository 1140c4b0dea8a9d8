//! The kernel's limits on namespaces (`/proc/sys/user/max_*_namespaces`, namespaces(7)).
//!
//! The kernel limits the namespaces of each type for each user. A new namespace counts for the
//! effective user id of its creator. It also counts for the owner of the creator's user namespace,
//! for the owner of that namespace's parent, and so on up to the initial user namespace. A container
//! of root without any capability can create user namespaces, and in these it can create thousands
//! of other namespaces. All of them count for root on the node. When root's limit is used up, the
//! kernel refuses to create namespaces for root (ENOSPC). A detached mount (fsmount(2),
//! open_tree(2)) also counts as a mount namespace.
//!
//! If this happens, this module repeats the system call as another user. A user namespace always
//! belongs to another user, because later namespaces in it count for its owner. The id of the user
//! is random. A container that may change its user id could use up the limit of one user, but not
//! the limits of all users.

use nix::sched::CloneFlags;
use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Signal, dumpable_behavior, geteuid, parent_process_death_signal,
    set_dumpable_behavior, set_parent_process_death_signal,
};
use rustix::thread::{CapabilitySet, Uid, capabilities, set_capabilities, set_thread_res_uid};

/// The capabilities up to CAP_AUDIT_READ. Each later capability is a part of CAP_SYS_ADMIN.
const ALL_CAPABILITIES: CapabilitySet = CapabilitySet::from_bits_retain((1 << 38) - 1);

/// Moves the calling thread into new namespaces, which are not user namespaces. See unshare(2).
///
/// # Errors
/// Returns the errno of unshare(2).
pub fn unshare(flags: CloneFlags) -> Result<(), Errno> {
    beyond_limit(|| {
        nix::sched::unshare(flags).map_err(|errno| Errno::from_raw_os_error(errno as i32))
    })
}

/// Calls `create`, which creates a namespace or a detached mount, but no process. If root's limit is
/// used up, calls `create` again as another user. After fsmount(2) has failed, its file system
/// context is useless, so `create` must then call fsopen(2) again.
///
/// # Errors
/// Returns the error of `create`.
pub fn beyond_limit<T>(mut create: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    match create() {
        Err(Errno::NOSPC) => as_other_user(create).unwrap_or(Err(Errno::NOSPC)),
        created => created,
    }
}

/// Calls `create` as another user. Returns `None`, without calling `create`, if the calling thread
/// cannot become another user.
pub fn as_other_user<T>(create: impl FnOnce() -> T) -> Option<T> {
    let user = OtherUser::begin(CapabilitySet::SYS_ADMIN)?;
    let created = create();
    user.end();
    Some(created)
}

/// Calls `fork`, which creates a process in new namespaces, with the flags of clone3(2). Returns
/// the result of `fork`, which is 0 in the new process.
pub(crate) fn fork_beyond_limit(
    flags: u64,
    mut fork: impl FnMut() -> Result<i32, Errno>,
) -> Result<i32, Errno> {
    let has_new_user_namespace = flags & libc::CLONE_NEWUSER as u64 != 0;
    let user = if has_new_user_namespace {
        // A thread without some capabilities has rights in a new user namespace only because its
        // user owns this namespace, see user_namespaces(7).
        OtherUser::begin(ALL_CAPABILITIES)
    } else {
        match fork() {
            Err(Errno::NOSPC) => {
                Some(OtherUser::begin(CapabilitySet::SYS_ADMIN).ok_or(Errno::NOSPC)?)
            }
            forked => return forked,
        }
    };
    let forked = fork();
    match (user, forked) {
        // A process in a new user namespace cannot become root before its parent has written the
        // id maps.
        (Some(_), Ok(0)) if has_new_user_namespace => {}
        (Some(user), Ok(0)) => user.end_in_child(),
        (Some(user), _) => user.end(),
        (None, _) => {}
    }
    forked
}

/// The calling thread, while its effective user id is a random id instead of root's. The thread
/// keeps its capabilities, and its new files still belong to root.
#[must_use = "the thread must become root again"]
struct OtherUser {
    /// The thread's parent-death signal. The kernel clears it when the effective user id changes,
    /// see prctl(2).
    death_signal: Option<Signal>,
    /// The process's dumpable attribute, which the kernel also changes, see prctl(2).
    dumpable: DumpableBehavior,
}

impl OtherUser {
    /// Changes the effective user id of the calling thread. Returns `None` if the thread is not
    /// root, if it does not have the capabilities `needed`, or if the kernel refuses the change.
    /// The thread then still has its user id.
    fn begin(needed: CapabilitySet) -> Option<OtherUser> {
        if !geteuid().is_root() {
            return None;
        }
        let sets = capabilities(None).ok()?;
        // When the thread becomes root again, the kernel makes all permitted capabilities
        // effective.
        if sets.effective != sets.permitted || !sets.effective.contains(needed) {
            return None;
        }
        let user = OtherUser {
            death_signal: parent_process_death_signal().ok()?,
            dumpable: dumpable_behavior().ok()?,
        };
        // Most user namespaces do not have the random id. The kernel then refuses this call.
        set_thread_res_uid(None, random_user()?, None).ok()?;
        // The kernel has also changed the file system user id, which owns new files. The queues of
        // a new IPC namespace, for example, are in a directory of this user (mq_overview(7)).
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(0));
        // The kernel has cleared the effective capabilities, but not the permitted capabilities,
        // because the real user id is still 0. See capabilities(7).
        if set_capabilities(None, sets).is_ok() {
            return Some(user);
        }
        user.end();
        None
    }

    /// Makes the calling thread root again.
    fn end(self) {
        self.end_in_child();
        if self.death_signal.is_some() {
            or_abort(|| set_parent_process_death_signal(self.death_signal));
        }
    }

    /// Makes a new process root again, which is a copy of the calling thread in the same user
    /// namespace. A new process has no parent-death signal.
    fn end_in_child(&self) {
        or_abort(|| set_thread_res_uid(None, Uid::ROOT, None));
        // The kernel does not accept the third value as an argument.
        if self.dumpable != DumpableBehavior::DumpableReadableOnlyByRoot {
            or_abort(|| set_dumpable_behavior(self.dumpable));
        }
    }
}

/// Makes a system call, and makes it again if it fails, for example for lack of memory. If it fails
/// twice, aborts this process, which would otherwise continue as another user.
fn or_abort(call: impl Fn() -> Result<(), Errno>) {
    if call().or_else(|_| call()).is_err() {
        std::process::abort();
    }
}

/// Returns a random user id between 2^31 and 2^32 - 2. Hardly any process has one of these ids.
fn random_user() -> Option<Uid> {
    let mut bytes = [0; 4];
    // SAFETY: `bytes` is writable for its whole length.
    let length = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    // The id u32::MAX is not valid.
    let id = (u32::from_ne_bytes(bytes) | 0x8000_0000) & !1;
    (length == 4).then(|| Uid::from_raw(id))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{PipeReader, Read as _};

    use std::os::fd::OwnedFd;

    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen,
    };
    use rustix::process::{WaitIdOptions, WaitIdStatus, waitid};

    use super::*;
    use crate::clone3::{Cloned, clone3};

    const NEW_USER: u64 = libc::CLONE_NEWUSER as u64;
    const NEW_UTS: u64 = libc::CLONE_NEWUTS as u64;

    /// The process's ids of users (real, effective, saved, file system), its capabilities, its
    /// parent-death signal and its dumpable attribute.
    type Attributes = (
        [u32; 4],
        rustix::thread::CapabilitySets,
        Option<Signal>,
        DumpableBehavior,
    );

    fn attributes() -> Attributes {
        let ids = nix::unistd::getresuid().unwrap();
        // The id u32::MAX is not valid, so this call changes nothing and returns the current id.
        let files = nix::unistd::setfsuid(nix::unistd::Uid::from_raw(u32::MAX));
        (
            [ids.real, ids.effective, ids.saved, files].map(nix::unistd::Uid::as_raw),
            capabilities(None).unwrap(),
            parent_process_death_signal().unwrap(),
            dumpable_behavior().unwrap(),
        )
    }

    /// Creates a process with `flags`, which calls `work`. Returns after `prepare`, which gets the
    /// process's id, and after the exit of the process. Panics if `work` panics.
    fn run_in_child(flags: u64, work: impl FnOnce(), prepare: impl FnOnce(i32)) {
        // SAFETY: the C library of Linux allows memory allocation after the fork of a process with
        // several threads. The process needs no other lock.
        match unsafe { clone3(flags, None) }.unwrap() {
            Cloned::Child => {
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
                // SAFETY: _exit(2) has no pointer arguments.
                unsafe { libc::_exit(i32::from(done.is_err())) }
            }
            Cloned::Parent { pid, pidfd } => {
                prepare(pid);
                let id = rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd));
                let status = waitid(id, WaitIdOptions::EXITED).unwrap();
                assert_eq!(
                    status.and_then(|it: WaitIdStatus| it.exit_status()),
                    Some(0)
                );
            }
        }
    }

    fn detached_tmpfs() -> Result<OwnedFd, Errno> {
        beyond_limit(|| {
            let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_create(&context)?;
            let flags = FsMountFlags::FSMOUNT_CLOEXEC;
            fsmount(&context, flags, MountAttrFlags::empty())
        })
    }

    /// Uses up the limit of root in a new user namespace, and creates namespaces there.
    fn create_beyond_the_limit(mut mapped: PipeReader) {
        mapped.read_exact(&mut [0]).unwrap();
        for typ in ["uts", "mnt"] {
            fs::write(format!("/proc/sys/user/max_{typ}_namespaces"), "1").unwrap();
        }
        let both = CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWNS;
        nix::sched::unshare(both).unwrap();
        let _held = File::open("/proc/self/ns/uts").unwrap();
        let refused = nix::sched::unshare(CloneFlags::CLONE_NEWUTS);
        assert_eq!(refused, Err(nix::Error::ENOSPC));
        set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
        set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
        let before = attributes();
        assert_eq!(before.0, [0; 4]);

        unshare(CloneFlags::CLONE_NEWUTS).unwrap();
        assert_eq!(attributes(), before);
        detached_tmpfs().unwrap();
        assert_eq!(attributes(), before);
        let expected = (before.0, before.1, None, before.3);
        run_in_child(NEW_UTS, || assert_eq!(attributes(), expected), |_| ());
        assert_eq!(attributes(), before);
        let is_privileged = || {
            let effective = capabilities(None).unwrap().effective;
            assert!(effective.contains(CapabilitySet::SYS_ADMIN));
        };
        run_in_child(NEW_USER | NEW_UTS, is_privileged, |_| ());
        assert_eq!(attributes(), before);
    }

    #[test]
    fn namespaces_are_created_although_the_limit_of_root_is_used_up() {
        let (reader, writer) = std::io::pipe().unwrap();
        let map = |pid: i32| {
            for file in ["uid_map", "gid_map"] {
                fs::write(format!("/proc/{pid}/{file}"), "0 0 4294967295").unwrap();
            }
            std::io::Write::write_all(&mut &writer, b"!").unwrap();
        };
        run_in_child(NEW_USER, || create_beyond_the_limit(reader), map);
    }
}
