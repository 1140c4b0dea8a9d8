//! A table of system calls with the errors that they are likely to return. The tests inject these
//! errors. The errors are from section 2 of the manual pages. The table omits errors that only a
//! wrong program can cause, such as EBADF and EFAULT.

use nix::errno::Errno::{
    self, EACCES, EADDRINUSE, EADDRNOTAVAIL, EAGAIN, EBUSY, ECONNABORTED, ECONNREFUSED, ECONNRESET,
    EDQUOT, EEXIST, EINTR, EINVAL, EIO, ELOOP, EMFILE, EMLINK, ENETUNREACH, ENFILE, ENOBUFS,
    ENODEV, ENOENT, ENOEXEC, ENOLCK, ENOMEM, ENOSPC, ENOSYS, ENOTCONN, ENOTEMPTY, EOPNOTSUPP,
    EPERM, EPIPE, EROFS, ESRCH, ESTALE, ETIMEDOUT, EUSERS, EXDEV,
};
use nix::libc;

/// The possible faults of a system call.
pub(crate) struct Row {
    /// The numbers of the system calls to which this row applies, with their names.
    calls: &'static [(libc::c_long, &'static str)],
    pub(crate) errors: &'static [Errno],
    /// The index of the argument that contains the length, if the system call can transfer fewer
    /// bytes than its caller requests.
    pub(crate) length: Option<usize>,
}

/// A system call without a likely error, and the reason for the omission.
type Omitted = (&'static [(libc::c_long, &'static str)], &'static str);

macro_rules! numbers {
    ($($(#[$attribute:meta])* $number:ident)*) => {
        &[$($(#[$attribute])* (libc::$number, stringify!($number))),*]
    };
}

macro_rules! row {
    ([$($(#[$attribute:meta])* $number:ident)*] $($error:ident)*) => {
        Row { calls: numbers!($($(#[$attribute])* $number)*), errors: &[$($error),*], length: None }
    };
    ([$($(#[$attribute:meta])* $number:ident)*] $($error:ident)*; length $length:literal) => {
        Row {
            calls: numbers!($($(#[$attribute])* $number)*),
            errors: &[$($error),*],
            length: Some($length),
        }
    };
}

const ROWS: &[Row] = &[
    // Files.
    row!([#[cfg(target_arch = "x86_64")] SYS_open SYS_openat] ENOENT EACCES EMFILE ENFILE EIO ENOMEM ENOSPC EROFS),
    row!([SYS_openat2] ENOENT EACCES EMFILE ENFILE EIO ENOMEM ELOOP EAGAIN ENOSYS),
    row!([SYS_read SYS_pread64] EIO EINTR ESTALE; length 2),
    row!([SYS_readv SYS_preadv SYS_preadv2] EIO EINTR),
    row!([SYS_write SYS_pwrite64] ENOSPC EIO EINTR EDQUOT; length 2),
    row!([SYS_writev SYS_pwritev SYS_pwritev2] ENOSPC EIO EINTR EDQUOT),
    row!([SYS_sendfile] EIO ENOSPC EINTR; length 3),
    row!([SYS_copy_file_range SYS_splice] EIO ENOSPC EXDEV EINTR; length 4),
    row!([SYS_fsync SYS_fdatasync SYS_sync_file_range SYS_syncfs] EIO ENOSPC EDQUOT),
    row!([SYS_ftruncate SYS_truncate SYS_fallocate] ENOSPC EIO EDQUOT EINTR),
    row!([SYS_lseek] EIO),
    row!([SYS_getdents64] EIO ENOENT ENOMEM),
    row!([
        #[cfg(target_arch = "x86_64")] SYS_stat
        #[cfg(target_arch = "x86_64")] SYS_lstat
        SYS_newfstatat SYS_statx SYS_statfs
    ] ENOENT EACCES EIO ENOMEM ESTALE),
    row!([SYS_fstat SYS_fstatfs] EIO ENOMEM ESTALE),
    row!([
        #[cfg(target_arch = "x86_64")] SYS_access
        SYS_faccessat SYS_faccessat2
    ] ENOENT EACCES EIO EROFS ENOSYS),
    row!([#[cfg(target_arch = "x86_64")] SYS_readlink SYS_readlinkat] ENOENT EACCES EIO EINVAL ENOMEM),
    row!([#[cfg(target_arch = "x86_64")] SYS_mkdir SYS_mkdirat] ENOSPC EEXIST EMLINK EACCES EROFS EDQUOT EIO),
    row!([SYS_mknodat] ENOSPC EEXIST EPERM EROFS EDQUOT),
    row!([#[cfg(target_arch = "x86_64")] SYS_symlink SYS_symlinkat] ENOSPC EEXIST EROFS EDQUOT EIO),
    row!([#[cfg(target_arch = "x86_64")] SYS_link SYS_linkat] ENOSPC EEXIST EMLINK EXDEV EPERM EIO),
    row!([
        #[cfg(target_arch = "x86_64")] SYS_rename
        #[cfg(target_arch = "x86_64")] SYS_renameat
        #[cfg(target_arch = "aarch64")] SYS_renameat
        SYS_renameat2
    ] ENOSPC ENOENT EBUSY EIO EROFS EDQUOT),
    row!([
        #[cfg(target_arch = "x86_64")] SYS_unlink
        #[cfg(target_arch = "x86_64")] SYS_rmdir
        SYS_unlinkat
    ] ENOENT EBUSY EIO EROFS EACCES ENOTEMPTY),
    row!([
        #[cfg(target_arch = "x86_64")] SYS_chmod
        SYS_fchmod SYS_fchmodat
    ] EPERM EROFS EIO ENOENT),
    row!([
        #[cfg(target_arch = "x86_64")] SYS_chown
        #[cfg(target_arch = "x86_64")] SYS_lchown
        SYS_fchown SYS_fchownat
    ] EPERM EROFS EIO EDQUOT ENOENT),
    row!([SYS_setxattr SYS_lsetxattr SYS_fsetxattr] EOPNOTSUPP ENOSPC EPERM EDQUOT),
    row!([
        SYS_getxattr SYS_lgetxattr SYS_fgetxattr SYS_listxattr SYS_llistxattr SYS_flistxattr
    ] EOPNOTSUPP EIO ENOMEM),
    row!([SYS_utimensat] EPERM EROFS EIO),
    row!([SYS_flock] EAGAIN EINTR ENOLCK),
    row!([SYS_chdir SYS_fchdir SYS_chroot] EACCES EIO ENOENT ENOMEM),
    row!([SYS_getcwd] ENOENT ENOMEM),
    row!([SYS_dup #[cfg(target_arch = "x86_64")] SYS_dup2 SYS_dup3] EMFILE EBUSY EINTR),
    row!([SYS_fcntl] EMFILE ENOMEM EAGAIN EPERM),
    row!([SYS_close_range] ENOSYS EMFILE ENOMEM),
    row!([SYS_ioctl] EIO EPERM ENOMEM ENODEV EINTR),
    row!([SYS_inotify_init1 SYS_inotify_add_watch SYS_fanotify_init] EMFILE ENOSPC ENOMEM),
    row!([SYS_memfd_create] EMFILE ENFILE ENOMEM),
    row!([SYS_quotactl SYS_quotactl_fd] ENOSYS ESRCH EPERM),
    // Mounts.
    row!([SYS_mount] EPERM EBUSY ENOMEM EINVAL ENOSPC ENOENT),
    row!([SYS_umount2] EPERM EBUSY EINVAL ENOMEM),
    row!([SYS_pivot_root] EPERM EBUSY EINVAL),
    row!([SYS_fsopen] EPERM ENODEV EMFILE ENOMEM ENOSYS),
    row!([SYS_fsconfig] EPERM EBUSY EINVAL ENOMEM ENOSPC ENOSYS),
    row!([SYS_fsmount SYS_open_tree SYS_fspick] EPERM EMFILE ENOMEM EINVAL ENOSPC ENOSYS),
    row!([SYS_move_mount] EPERM EBUSY EINVAL ENOMEM ENOSPC ENOENT ENOSYS),
    row!([SYS_mount_setattr] EPERM EBUSY EINVAL ENOMEM ENOSYS),
    // Processes.
    row!([
        #[cfg(target_arch = "x86_64")] SYS_fork
        #[cfg(target_arch = "x86_64")] SYS_vfork
        SYS_clone
    ] EAGAIN ENOMEM EPERM),
    row!([SYS_clone3] EAGAIN ENOMEM EPERM ENOSPC EUSERS EBUSY ENOSYS),
    row!([SYS_execve SYS_execveat] EACCES ENOENT ENOEXEC ENOMEM EIO EAGAIN),
    row!([SYS_unshare SYS_setns] EPERM ENOMEM EINVAL ENOSPC EUSERS),
    row!([SYS_wait4 SYS_waitid] EINTR),
    row!([SYS_kill SYS_tkill SYS_tgkill SYS_pidfd_send_signal] EPERM ESRCH),
    row!([SYS_pidfd_open] EMFILE ENFILE ENOMEM ESRCH ENOSYS),
    row!([SYS_pidfd_getfd] EMFILE EPERM ESRCH ENOSYS),
    row!([SYS_setsid] EPERM),
    row!([SYS_setpgid SYS_getpgid] EPERM ESRCH),
    row!([SYS_prctl] EPERM EINVAL ENOMEM),
    row!([SYS_seccomp] EPERM EINVAL ENOMEM EBUSY ESRCH),
    row!([SYS_capset SYS_capget] EPERM EINVAL),
    row!([SYS_setgroups] EPERM ENOMEM),
    row!([SYS_setuid SYS_setgid SYS_setresuid SYS_setresgid] EPERM EAGAIN ENOMEM EINVAL),
    row!([SYS_prlimit64 SYS_setrlimit] EPERM EINVAL ESRCH),
    row!([SYS_setpriority] EACCES EPERM ESRCH),
    row!([SYS_ioprio_set] EPERM ESRCH),
    row!([
        SYS_sched_setattr SYS_sched_setscheduler SYS_sched_setaffinity SYS_sched_getaffinity
    ] EPERM EINVAL ESRCH),
    row!([SYS_set_mempolicy SYS_personality] EINVAL ENOMEM EPERM),
    row!([SYS_sethostname SYS_setdomainname] EPERM),
    row!([SYS_keyctl SYS_add_key SYS_request_key] EDQUOT EACCES ENOMEM ENOSYS),
    row!([SYS_bpf] EPERM ENOMEM EINVAL EAGAIN ENOSPC ENOSYS),
    row!([SYS_process_vm_readv SYS_process_vm_writev] EPERM ESRCH ENOMEM),
    // Memory.
    row!([SYS_mmap SYS_mremap] ENOMEM EAGAIN),
    row!([SYS_mprotect] ENOMEM),
    // Sockets.
    row!([SYS_socket SYS_socketpair] EMFILE ENFILE ENOBUFS ENOMEM EACCES),
    row!([SYS_bind] EADDRINUSE EADDRNOTAVAIL EACCES ENOMEM ENOSPC EROFS),
    row!([SYS_listen] EADDRINUSE),
    row!([
        #[cfg(target_arch = "x86_64")] SYS_accept
        #[cfg(target_arch = "aarch64")] SYS_accept
        SYS_accept4
    ] EMFILE ENFILE ECONNABORTED EINTR ENOBUFS ENOMEM),
    row!([SYS_connect] ECONNREFUSED EAGAIN EINTR ENETUNREACH ETIMEDOUT ENOENT EACCES),
    row!([SYS_sendto] ENOBUFS EINTR EPIPE ECONNRESET EAGAIN; length 2),
    row!([SYS_sendmsg SYS_sendmmsg] ENOBUFS EINTR EPIPE ECONNRESET EAGAIN ENOMEM),
    row!([SYS_recvfrom] ENOMEM EINTR ECONNRESET EAGAIN ENOBUFS; length 2),
    row!([SYS_recvmsg SYS_recvmmsg] ENOMEM EINTR ECONNRESET EAGAIN ENOBUFS),
    row!([SYS_shutdown] ENOTCONN),
    row!([SYS_setsockopt SYS_getsockopt] ENOMEM EPERM ENOBUFS),
    row!([SYS_getsockname SYS_getpeername] ENOBUFS ENOTCONN),
    row!([SYS_pipe2] EMFILE ENFILE),
    // Waiting.
    row!([
        #[cfg(target_arch = "x86_64")] SYS_poll
        SYS_ppoll
        #[cfg(target_arch = "x86_64")] SYS_select
        SYS_pselect6
    ] EINTR ENOMEM),
    row!([
        #[cfg(target_arch = "x86_64")] SYS_epoll_wait
        SYS_epoll_pwait SYS_epoll_pwait2
    ] EINTR),
    row!([SYS_epoll_create1 SYS_eventfd2 SYS_timerfd_create SYS_signalfd4] EMFILE ENFILE ENOMEM),
    row!([SYS_epoll_ctl] ENOMEM ENOSPC),
    row!([SYS_nanosleep SYS_clock_nanosleep] EINTR),
    row!([SYS_name_to_handle_at SYS_open_by_handle_at] EOPNOTSUPP ESTALE),
];

/// The system calls in which the tests inject no error.
const OMITTED: &[Omitted] = &[
    (
        numbers!(
            SYS_getpid SYS_gettid SYS_getppid SYS_getuid SYS_geteuid SYS_getgid SYS_getegid
            SYS_getsid SYS_umask SYS_sched_yield SYS_set_tid_address SYS_exit SYS_exit_group
        ),
        "the system call always succeeds",
    ),
    (
        numbers!(
            SYS_close SYS_munmap SYS_madvise SYS_msync SYS_futex SYS_set_robust_list SYS_rseq
            SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sigaltstack SYS_uname
            SYS_restart_syscall SYS_sysinfo SYS_getgroups SYS_getresuid SYS_getresgid
            SYS_clock_gettime SYS_clock_getres SYS_gettimeofday SYS_times SYS_getrusage
            SYS_membarrier SYS_getpriority SYS_get_mempolicy SYS_timerfd_settime SYS_setitimer
            #[cfg(target_arch = "x86_64")] SYS_arch_prctl
        ),
        "the system call fails only with wrong arguments",
    ),
    (
        numbers!(SYS_brk),
        "the system call has no error: it returns the old end of the heap, and the allocator then calls mmap",
    ),
    (
        numbers!(SYS_getrandom),
        "the system call fails only before the kernel has initialised its random number generator",
    ),
];

/// Returns the row for the system call `number`, or `None` if the tests inject no error in this
/// system call.
pub(crate) fn likely(number: i64) -> Option<&'static Row> {
    ROWS.iter()
        .find(|row| row.calls.iter().any(|call| call.0 == number))
}

/// Returns the reason why the tests inject no error in the system call `number`, or `None` if the
/// table does not omit it.
pub(crate) fn reason_to_omit(number: i64) -> Option<&'static str> {
    OMITTED
        .iter()
        .find(|(calls, _)| calls.iter().any(|call| call.0 == number))
        .map(|(_, reason)| *reason)
}

/// Returns the name of the system call `number`, or the number if the table does not contain the
/// system call.
pub(crate) fn name(number: i64) -> String {
    let rows = ROWS.iter().map(|row| row.calls);
    let mut calls = rows.chain(OMITTED.iter().map(|row| row.0)).flatten();
    calls
        .find(|call| call.0 == number)
        .map_or(format!("system call {number}"), |call| {
            call.1.trim_start_matches("SYS_").to_owned()
        })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_contains_each_system_call_only_once() {
        let rows = ROWS.iter().map(|row| row.calls);
        let all = rows.chain(OMITTED.iter().map(|row| row.0)).flatten();
        let mut seen = BTreeSet::new();
        for (number, name) in all {
            assert!(seen.insert(number), "{name} occurs twice");
        }
    }

    #[test]
    fn names_have_no_prefix() {
        assert_eq!(name(libc::SYS_openat2), "openat2");
        assert_eq!(name(-1), "system call -1");
        assert!(likely(libc::SYS_write).is_some_and(|row| row.length == Some(2)));
        assert!(reason_to_omit(libc::SYS_close).is_some());
    }
}
