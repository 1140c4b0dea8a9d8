//! The system calls that the tests of the CRI server make fail, and the objects of these calls.
//!
//! The list contains the calls that use or change something outside the process: files, sockets,
//! mounts, namespaces and processes. It does not contain close(2), which releases its descriptor
//! even if it fails.

use nix::errno::Errno;
use nix::libc::{self, c_long};

use crate::support::errnos::likely;

/// The argument of a system call that names the call's object.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Object {
    /// The call has no object.
    None,
    /// The argument with this index is a descriptor.
    Descriptor(usize),
    /// The argument with this index is a path.
    Path(usize),
    /// The argument with the first index is the descriptor of a directory. The argument with the
    /// second index is a path, which can be relative to this directory.
    At(usize, usize),
    /// The argument with this index is a number, for example a command.
    Number(usize),
}

use Object::{At, Descriptor, None, Number, Path};

/// A system call that a test can make fail.
pub(crate) struct Call {
    pub(crate) number: c_long,
    /// The name of the constant with the call's number.
    constant: &'static str,
    pub(crate) object: Object,
}

/// The object of fcntl(2) that duplicates a descriptor.
const F_DUPFD_CLOEXEC: &str = "0x406";

/// The errnos that mean a lack of resources, a broken device or a lost peer. The tests do not cause
/// other errnos. For example, ENOENT would mean that a file does not exist, and a server may then
/// succeed with another result.
const CAUSED: &[Errno] = &[
    Errno::EADDRINUSE,
    Errno::EBUSY,
    Errno::ECONNABORTED,
    Errno::ECONNREFUSED,
    Errno::ECONNRESET,
    Errno::EDQUOT,
    Errno::EIO,
    Errno::EMFILE,
    Errno::ENFILE,
    Errno::ENOBUFS,
    Errno::ENOLCK,
    Errno::ENOMEM,
    Errno::ENOSPC,
    Errno::EPERM,
    Errno::EPIPE,
];

impl Call {
    pub(crate) fn name(&self) -> &'static str {
        self.constant.trim_start_matches("SYS_")
    }

    /// Returns the errnos with which the test lets the call fail. `object` describes the call's
    /// object: a path, or the target of the descriptor's link in /proc/PID/fd. `creates` is true if
    /// the call opens a file with O_CREAT, or adds a descriptor to an epoll set.
    pub(crate) fn errnos(&self, object: &str, creates: bool) -> Vec<Errno> {
        use Errno::{
            EAGAIN, EBUSY, ECONNRESET, EIO, EMFILE, ENOBUFS, ENOMEM, ENOSPC, EPERM, EPIPE,
        };
        let is = |prefix: &str| object.starts_with(prefix);
        let fixed: &[Errno] = match self.name() {
            "open" | "openat" if !creates => &[EMFILE, EIO, ENOMEM],
            "epoll_ctl" if !creates => &[],
            // Only the duplication of a descriptor can fail.
            "fcntl" if object == F_DUPFD_CLOEXEC => &[EMFILE],
            "fcntl" => &[],
            // The kernel lets root send every signal.
            "kill" | "pidfd_send_signal" => &[],
            // tokio wakes its threads with an eventfd. A failure is not likely.
            "read" | "write" if is("anon_inode:") => &[],
            "read" | "readv" if is("pipe:") => &[],
            "read" | "readv" if is("socket:") => &[ECONNRESET],
            "write" | "writev" if is("pipe:") => &[EPIPE],
            "write" | "writev" if is("socket:") => &[ECONNRESET, ENOBUFS],
            "write" | "writev" if is("/sys/fs/cgroup") => &[EBUSY, ENOMEM],
            "write" | "writev" if is("/proc/") => &[EPERM, ENOMEM],
            "mkdir" | "mkdirat" if is("/sys/fs/cgroup") => &[EAGAIN, ENOMEM],
            "clone" | "clone3" | "fork" | "vfork" => &[EAGAIN, ENOMEM],
            "umount2" | "rmdir" | "unlink" | "unlinkat" => &[EBUSY, EIO],
            "ftruncate" | "fallocate" => &[ENOSPC, EIO],
            _ => {
                let likely = likely(self.number).map_or(&[][..], |row| row.errors);
                return likely
                    .iter()
                    .copied()
                    .filter(|it| CAUSED.contains(it))
                    .collect();
            }
        };
        fixed.to_vec()
    }
}

macro_rules! calls {
    ($($(#[$condition:meta])? $number:ident $object:expr,)*) => {
        &[$($(#[$condition])? Call {
            number: libc::$number,
            constant: stringify!($number),
            object: $object,
        }),*]
    };
}

pub(crate) static CALLS: &[Call] = calls! {
    #[cfg(target_arch = "x86_64")]
    SYS_open Path(0),
    SYS_openat At(0, 1),
    SYS_openat2 At(0, 1),
    SYS_read Descriptor(0),
    SYS_readv Descriptor(0),
    SYS_pread64 Descriptor(0),
    SYS_write Descriptor(0),
    SYS_writev Descriptor(0),
    SYS_pwrite64 Descriptor(0),
    SYS_fsync Descriptor(0),
    SYS_fdatasync Descriptor(0),
    SYS_syncfs Descriptor(0),
    SYS_ftruncate Descriptor(0),
    SYS_fallocate Descriptor(0),
    SYS_fstat Descriptor(0),
    SYS_newfstatat At(0, 1),
    SYS_statx At(0, 1),
    SYS_statfs Path(0),
    SYS_fstatfs Descriptor(0),
    SYS_getdents64 Descriptor(0),
    SYS_readlinkat At(0, 1),
    #[cfg(target_arch = "x86_64")]
    SYS_readlink Path(0),
    SYS_faccessat At(0, 1),
    SYS_faccessat2 At(0, 1),
    #[cfg(target_arch = "x86_64")]
    SYS_access Path(0),
    SYS_mkdirat At(0, 1),
    #[cfg(target_arch = "x86_64")]
    SYS_mkdir Path(0),
    #[cfg(target_arch = "x86_64")]
    SYS_rmdir Path(0),
    SYS_unlinkat At(0, 1),
    #[cfg(target_arch = "x86_64")]
    SYS_unlink Path(0),
    SYS_renameat At(0, 1),
    SYS_renameat2 At(0, 1),
    #[cfg(target_arch = "x86_64")]
    SYS_rename Path(0),
    SYS_linkat At(0, 1),
    #[cfg(target_arch = "x86_64")]
    SYS_link Path(0),
    SYS_symlinkat At(1, 2),
    #[cfg(target_arch = "x86_64")]
    SYS_symlink Path(1),
    SYS_mknodat At(0, 1),
    #[cfg(target_arch = "x86_64")]
    SYS_mknod Path(0),
    SYS_fchmod Descriptor(0),
    SYS_fchmodat At(0, 1),
    #[cfg(target_arch = "x86_64")]
    SYS_chmod Path(0),
    SYS_fchown Descriptor(0),
    SYS_fchownat At(0, 1),
    #[cfg(target_arch = "x86_64")]
    SYS_chown Path(0),
    #[cfg(target_arch = "x86_64")]
    SYS_lchown Path(0),
    SYS_utimensat At(0, 1),
    SYS_setxattr Path(0),
    SYS_lsetxattr Path(0),
    SYS_fsetxattr Descriptor(0),
    SYS_getxattr Path(0),
    SYS_lgetxattr Path(0),
    SYS_fgetxattr Descriptor(0),
    SYS_flistxattr Descriptor(0),
    SYS_llistxattr Path(0),
    SYS_removexattr Path(0),
    SYS_lremovexattr Path(0),
    SYS_fremovexattr Descriptor(0),
    SYS_flock Descriptor(0),
    SYS_chdir Path(0),
    SYS_fchdir Descriptor(0),
    SYS_copy_file_range Descriptor(0),
    SYS_sendfile Descriptor(0),
    SYS_splice Descriptor(0),
    SYS_tee Descriptor(0),
    SYS_ioctl Number(1),
    SYS_fcntl Number(1),
    SYS_dup Descriptor(0),
    SYS_pipe2 None,
    SYS_eventfd2 None,
    SYS_epoll_create1 None,
    SYS_timerfd_create None,
    SYS_signalfd4 None,
    SYS_inotify_init1 None,
    SYS_memfd_create None,
    SYS_pidfd_open None,
    SYS_epoll_ctl Descriptor(2),
    SYS_socket Number(0),
    SYS_socketpair Number(0),
    SYS_bind Descriptor(0),
    SYS_listen Descriptor(0),
    SYS_connect Descriptor(0),
    SYS_accept4 Descriptor(0),
    SYS_setsockopt Descriptor(0),
    SYS_getsockname Descriptor(0),
    SYS_sendmsg Descriptor(0),
    SYS_sendto Descriptor(0),
    SYS_recvmsg Descriptor(0),
    SYS_recvfrom Descriptor(0),
    SYS_mount Path(1),
    SYS_umount2 Path(0),
    SYS_open_tree At(0, 1),
    SYS_move_mount At(2, 3),
    SYS_mount_setattr At(0, 1),
    SYS_fsopen Path(0),
    SYS_fsconfig Number(1),
    SYS_fsmount None,
    SYS_pivot_root Path(0),
    SYS_setns Descriptor(0),
    SYS_unshare Number(0),
    SYS_sethostname None,
    SYS_clone Number(0),
    SYS_clone3 None,
    #[cfg(target_arch = "x86_64")]
    SYS_fork None,
    #[cfg(target_arch = "x86_64")]
    SYS_vfork None,
    SYS_execve Path(0),
    SYS_execveat At(0, 1),
    SYS_kill Number(1),
    SYS_pidfd_send_signal Number(1),
    SYS_prctl Number(0),
    SYS_prlimit64 Number(1),
    SYS_setsid None,
    SYS_setgroups None,
    SYS_setresuid None,
    SYS_setresgid None,
    SYS_setuid None,
    SYS_setgid None,
    SYS_capset None,
    SYS_seccomp None,
    SYS_bpf Number(0),
    SYS_keyctl Number(0),
    SYS_quotactl None,
};
