//! The seccomp profile of containers that request RuntimeDefault.
//!
//! The profile allows the system calls that a program needs for its own files, memory, processes
//! and connections. If the container has a capability, the profile also allows the system calls
//! that require this capability. All other system calls fail with EPERM. They are useless in a
//! container, act outside the container's namespaces, or were often exploited to attack the kernel.
//! The default profile of Docker and containerd is nearly the same; a comment next to each
//! difference gives the reason.
//!
//! Some system calls are denied on purpose, even if the container has all capabilities. The profile
//! denies io_uring_*, because io_uring bypassed security checks, and had more vulnerabilities than
//! any other interface of the kernel. The profile denies userfaultfd, because userfaultfd lets an
//! attacker pause the kernel in the middle of an operation. The profile denies keyctl, add_key and
//! request_key, because keyrings have no namespace. The profile denies lookup_dcookie, because
//! profilers use this system call to observe the whole host. The profile denies kexec_*, swapon,
//! swapoff, pivot_root, nfsservctl, uselib, ustat, sysfs, _sysctl and vm86. These system calls have
//! no use in a container, or were removed from the kernel long ago.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompOperator,
    LinuxSyscall,
};
use rrun_calls::error::{Error, Result};
use rrun_kernel::capability::{Capability, Capability::*};

use super::capabilities::{CapabilitySets, mask};

/// A group of system calls that are allowed for the same reason.
struct Group {
    names: &'static [&'static str],
    /// The system calls are allowed if the container has one of these capabilities. Either the
    /// kernel itself requires such a capability for the system calls, or the system calls give a
    /// process the capability's privileges. If the list is empty, the system calls are allowed in
    /// every container.
    capabilities: &'static [Capability],
}

const fn everyone(names: &'static [&'static str]) -> Group {
    Group {
        names,
        capabilities: &[],
    }
}

const fn with(capabilities: &'static [Capability], names: &'static [&'static str]) -> Group {
    Group {
        names,
        capabilities,
    }
}

const GROUPS: &[Group] = &[
    // System calls that open, read, write and list files. The system calls are safe, because the
    // kernel checks the file's owner and mode, and the flags of its mount.
    everyone(&[
        "access",
        "chdir",
        "chmod",
        "chown",
        "chown32",
        "close",
        "close_range",
        "copy_file_range",
        "creat",
        "dup",
        "dup2",
        "dup3",
        "faccessat",
        "faccessat2",
        "fadvise64",
        "fadvise64_64",
        "fallocate",
        "fchdir",
        "fchmod",
        "fchmodat",
        "fchmodat2",
        "fchown",
        "fchown32",
        "fchownat",
        "fcntl",
        "fcntl64",
        "fdatasync",
        "file_getattr",
        "file_setattr",
        "flock",
        "fstat",
        "fstat64",
        "fstatat64",
        "fstatfs",
        "fstatfs64",
        "fsync",
        "ftruncate",
        "ftruncate64",
        "futimesat",
        "getcwd",
        "getdents",
        "getdents64",
        "ioctl",
        "lchown",
        "lchown32",
        "link",
        "linkat",
        "_llseek",
        "lseek",
        "lstat",
        "lstat64",
        "mkdir",
        "mkdirat",
        "mknod",
        "mknodat",
        "newfstatat",
        "open",
        "openat",
        "openat2",
        "pipe",
        "pipe2",
        "pread64",
        "preadv",
        "preadv2",
        "pwrite64",
        "pwritev",
        "pwritev2",
        "read",
        "readahead",
        "readlink",
        "readlinkat",
        "readv",
        "rename",
        "renameat",
        "renameat2",
        "rmdir",
        "sendfile",
        "sendfile64",
        "splice",
        "stat",
        "stat64",
        "statfs",
        "statfs64",
        "statx",
        "symlink",
        "symlinkat",
        "sync",
        "sync_file_range",
        "syncfs",
        "tee",
        "truncate",
        "truncate64",
        "umask",
        "unlink",
        "unlinkat",
        "utime",
        "utimensat",
        "utimensat_time64",
        "utimes",
        "vmsplice",
        "write",
        "writev",
    ]),
    // System calls that read and change extended attributes. The kernel requires CAP_SYS_ADMIN or a
    // similar capability to change attributes that grant privileges.
    everyone(&[
        "fgetxattr",
        "flistxattr",
        "fremovexattr",
        "fsetxattr",
        "getxattr",
        "getxattrat",
        "lgetxattr",
        "listxattr",
        "listxattrat",
        "llistxattr",
        "lremovexattr",
        "lsetxattr",
        "removexattr",
        "removexattrat",
        "setxattr",
        "setxattrat",
    ]),
    // System calls that query the mounts of the caller's mount namespace, or create file handles.
    // (The use of a file handle requires CAP_DAC_READ_SEARCH, see open_by_handle_at below.)
    everyone(&["listmount", "name_to_handle_at", "statmount"]),
    // System calls that wait for events on file descriptors, or report changes of files.
    everyone(&[
        "epoll_create",
        "epoll_create1",
        "epoll_ctl",
        "epoll_ctl_old",
        "epoll_pwait",
        "epoll_pwait2",
        "epoll_wait",
        "epoll_wait_old",
        "eventfd",
        "eventfd2",
        "fanotify_mark",
        "inotify_add_watch",
        "inotify_init",
        "inotify_init1",
        "inotify_rm_watch",
        "_newselect",
        "poll",
        "ppoll",
        "ppoll_time64",
        "pselect6",
        "pselect6_time64",
        "select",
    ]),
    // System calls of the older asynchronous I/O interface, which databases use.
    everyone(&[
        "io_cancel",
        "io_destroy",
        "io_getevents",
        "io_pgetevents",
        "io_pgetevents_time64",
        "io_setup",
        "io_submit",
    ]),
    // System calls that manage the process's own memory.
    everyone(&[
        "brk",
        "cachestat",
        "madvise",
        "map_shadow_stack",
        "membarrier",
        "memfd_create",
        "memfd_secret",
        "mincore",
        "mlock",
        "mlock2",
        "mlockall",
        "mmap",
        "mmap2",
        "mprotect",
        "mremap",
        "mseal",
        "msync",
        "munlock",
        "munlockall",
        "munmap",
        "pkey_alloc",
        "pkey_free",
        "pkey_mprotect",
        "remap_file_pages",
    ]),
    // System calls that create, execute and end processes, or wait for processes. A separate rule
    // covers the system call clone.
    everyone(&[
        "execve",
        "execveat",
        "exit",
        "exit_group",
        "fork",
        "getpgid",
        "getpgrp",
        "getpid",
        "getppid",
        "getsid",
        "gettid",
        "pidfd_open",
        "pidfd_send_signal",
        "process_mrelease",
        "restart_syscall",
        "set_tid_address",
        "setpgid",
        "setsid",
        "vfork",
        "wait4",
        "waitid",
        "waitpid",
    ]),
    // System calls that inspect other processes. The kernel refuses access to a process that has
    // more privileges than the caller. A tracer can change a system call of the traced process.
    // Since Linux 4.8, the kernel filters the changed system call again, so ptrace can't bypass the
    // filter. Debuggers in containers need these system calls.
    everyone(&["process_vm_readv", "process_vm_writev", "ptrace"]),
    // System calls that manage threads and their locks.
    everyone(&[
        "futex",
        "futex_requeue",
        "futex_time64",
        "futex_wait",
        "futex_waitv",
        "futex_wake",
        "get_robust_list",
        "get_thread_area",
        "rseq",
        "set_robust_list",
        "set_thread_area",
    ]),
    // System calls for scheduling and resource limits. The kernel requires CAP_SYS_NICE or
    // CAP_SYS_RESOURCE to raise a priority or a limit.
    everyone(&[
        "getcpu",
        "getpriority",
        "getrlimit",
        "getrusage",
        "ioprio_get",
        "ioprio_set",
        "prlimit64",
        "sched_get_priority_max",
        "sched_get_priority_min",
        "sched_getaffinity",
        "sched_getattr",
        "sched_getparam",
        "sched_getscheduler",
        "sched_rr_get_interval",
        "sched_rr_get_interval_time64",
        "sched_setaffinity",
        "sched_setattr",
        "sched_setparam",
        "sched_setscheduler",
        "sched_yield",
        "setpriority",
        "setrlimit",
        "ugetrlimit",
    ]),
    // Signals.
    everyone(&[
        "kill",
        "pause",
        "rt_sigaction",
        "rt_sigpending",
        "rt_sigprocmask",
        "rt_sigqueueinfo",
        "rt_sigreturn",
        "rt_sigsuspend",
        "rt_sigtimedwait",
        "rt_sigtimedwait_time64",
        "rt_tgsigqueueinfo",
        "sigaltstack",
        "signalfd",
        "signalfd4",
        "sigprocmask",
        "sigreturn",
        "tgkill",
        "tkill",
    ]),
    // System calls that read and change the process's user and group ids. The kernel requires
    // CAP_SETUID or CAP_SETGID for a change to an arbitrary id.
    everyone(&[
        "capget",
        "capset",
        "getegid",
        "getegid32",
        "geteuid",
        "geteuid32",
        "getgid",
        "getgid32",
        "getgroups",
        "getgroups32",
        "getresgid",
        "getresgid32",
        "getresuid",
        "getresuid32",
        "getuid",
        "getuid32",
        "setfsgid",
        "setfsgid32",
        "setfsuid",
        "setfsuid32",
        "setgid",
        "setgid32",
        "setgroups",
        "setgroups32",
        "setregid",
        "setregid32",
        "setresgid",
        "setresgid32",
        "setresuid",
        "setresuid32",
        "setreuid",
        "setreuid32",
        "setuid",
        "setuid32",
    ]),
    // System calls for clocks and timers. The system call adjtimex and similar system calls can
    // read the clock without changing it. The kernel requires CAP_SYS_TIME to set the clock.
    everyone(&[
        "adjtimex",
        "alarm",
        "clock_adjtime",
        "clock_adjtime64",
        "clock_getres",
        "clock_getres_time64",
        "clock_gettime",
        "clock_gettime64",
        "clock_nanosleep",
        "clock_nanosleep_time64",
        "getitimer",
        "gettimeofday",
        "nanosleep",
        "setitimer",
        "time",
        "timer_create",
        "timer_delete",
        "timer_getoverrun",
        "timer_gettime",
        "timer_gettime64",
        "timer_settime",
        "timer_settime64",
        "timerfd_create",
        "timerfd_gettime",
        "timerfd_gettime64",
        "timerfd_settime",
        "timerfd_settime64",
        "times",
    ]),
    // System calls on existing sockets. Separate rules cover socket, socketpair and socketcall.
    everyone(&[
        "accept",
        "accept4",
        "bind",
        "connect",
        "getpeername",
        "getsockname",
        "getsockopt",
        "listen",
        "recv",
        "recvfrom",
        "recvmmsg",
        "recvmmsg_time64",
        "recvmsg",
        "send",
        "sendmmsg",
        "sendmsg",
        "sendto",
        "setsockopt",
        "shutdown",
    ]),
    // System calls for System V and POSIX IPC, which are restricted to the container's IPC
    // namespace.
    everyone(&[
        "ipc",
        "mq_getsetattr",
        "mq_notify",
        "mq_open",
        "mq_timedreceive",
        "mq_timedreceive_time64",
        "mq_timedsend",
        "mq_timedsend_time64",
        "mq_unlink",
        "msgctl",
        "msgget",
        "msgrcv",
        "msgsnd",
        "semctl",
        "semget",
        "semop",
        "semtimedop",
        "semtimedop_time64",
        "shmat",
        "shmctl",
        "shmdt",
        "shmget",
    ]),
    // System calls for the process's own settings, the system's name and load, and random numbers.
    everyone(&["getrandom", "prctl", "sysinfo", "uname"]),
    // System calls with which a process restricts itself further.
    everyone(&[
        "landlock_add_rule",
        "landlock_create_ruleset",
        "landlock_restrict_self",
        "seccomp",
    ]),
    // If the host traces a program with uprobes, the kernel inserts code into the program. This
    // code makes the system calls uprobe and uretprobe. If the profile denied these system calls,
    // tracing a container would kill it.
    everyone(&["uprobe", "uretprobe"]),
    with(&[CAP_DAC_READ_SEARCH], &["open_by_handle_at"]),
    // System calls for mounts, namespaces, host name, domain name and quotas.
    with(
        &[CAP_SYS_ADMIN],
        &[
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lsm_get_self_attr",
            "lsm_list_modules",
            "lsm_set_self_attr",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "open_tree_attr",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    // The kernel also accepts CAP_SYS_ADMIN for bpf, perf_event_open and syslog, as it did before
    // CAP_BPF, CAP_PERFMON and CAP_SYSLOG existed.
    with(&[CAP_SYS_ADMIN, CAP_BPF], &["bpf"]),
    with(&[CAP_SYS_ADMIN, CAP_PERFMON], &["perf_event_open"]),
    with(&[CAP_SYS_ADMIN, CAP_SYSLOG], &["syslog"]),
    with(&[CAP_SYS_BOOT], &["reboot"]),
    with(&[CAP_SYS_CHROOT], &["chroot"]),
    with(
        &[CAP_SYS_MODULE],
        &["delete_module", "finit_module", "init_module"],
    ),
    with(&[CAP_SYS_PACCT], &["acct"]),
    // System calls that access other processes. With CAP_SYS_PTRACE, a process may access even
    // processes that have more privileges than itself.
    with(
        &[CAP_SYS_PTRACE],
        &["kcmp", "pidfd_getfd", "process_madvise"],
    ),
    with(&[CAP_SYS_RAWIO], &["ioperm", "iopl"]),
    with(
        &[CAP_SYS_TIME],
        &["clock_settime", "clock_settime64", "settimeofday", "stime"],
    ),
    with(&[CAP_SYS_TTY_CONFIG], &["vhangup"]),
    // System calls that place memory on NUMA nodes. On a machine with several NUMA nodes, one
    // container's memory placement affects other containers. The profile therefore requires a
    // capability.
    with(
        &[CAP_SYS_NICE],
        &[
            "get_mempolicy",
            "mbind",
            "set_mempolicy",
            "set_mempolicy_home_node",
        ],
    ),
];

/// The system calls that exist only on the architecture of this build.
#[cfg(target_arch = "x86_64")]
const OF_ARCHITECTURE: &[&str] = &["arch_prctl", "modify_ldt"];
#[cfg(target_arch = "aarch64")]
const OF_ARCHITECTURE: &[&str] = &[
    "arm_fadvise64_64",
    "arm_sync_file_range",
    "breakpoint",
    "cacheflush",
    "set_tls",
    "sync_file_range2",
];

/// The architectures of the programs that the node's kernel can execute: the native architecture
/// and its 32-bit variants.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];
#[cfg(target_arch = "aarch64")]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchAarch64, Arch::ScmpArchArm];

/// The `CLONE_NEW*` flags except CLONE_NEWTIME, which clone(2) does not support. New namespaces,
/// above all a new user namespace, expose much of the kernel to a program without privileges.
const CLONE_NAMESPACES: u32 = 0x7e02_0000;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The address families that are allowed for socket(2) and socketpair(2): all families of Linux
/// 6.18 except AF_ALG (38) and AF_VSOCK (40). AF_ALG gives access to the kernel's cryptography, for
/// which programs can use libraries instead. In 2026, programs could still use AF_ALG to become
/// root. AF_VSOCK reaches the hypervisor and other virtual machines, and the network namespace does
/// not restrict it.
///
/// Each entry consists of a mask and a value. A family is allowed if the family has the value
/// within the mask of at least one entry.
const SOCKET_FAMILIES: [(u32, u32); 7] = [
    (!31, 0), // 0 to 31
    (!3, 32), // 32 to 35
    (!1, 36), // 36 and 37
    (!0, 39), // AF_NFC
    (!0, 41), // AF_KCM
    (!1, 42), // 42 and 43
    (!1, 44), // 44 and 45, which is the last family
];

/// The allowed arguments of personality(2). The personalities PER_LINUX (0) and PER_LINUX32 (8) are
/// allowed, with and without the flag UNAME26 (0x20000). The argument 0xffffffff queries the
/// current value. Other values disable address space randomisation, or make readable memory
/// executable.
const PERSONALITIES: [u32; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

fn rule(names: &[&str], action: LinuxSeccompAction) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.iter().map(|name| (*name).to_owned()).collect())
        .set_action(action);
    rule
}

fn allow(names: &[&str]) -> LinuxSyscall {
    rule(names, LinuxSeccompAction::ScmpActAllow)
}

/// Returns a rule that makes a system call fail with ENOSYS, as on a kernel without the call.
fn absent(name: &str) -> LinuxSyscall {
    let mut rule = rule(&[name], LinuxSeccompAction::ScmpActErrno);
    rule.set_errno_ret(Some(ENOSYS));
    rule
}

/// Returns a rule that allows system calls under one condition: in the bits of `mask`, the first
/// argument is equal to `value`.
///
/// This function is the only source of conditions in the profile. A filter compares 64 bits, but
/// the kernel reads only the lower 32 bits of a parameter of type `int`. With another operator, for
/// example SCMP_CMP_GT, a program could set an upper bit to satisfy the condition, and the kernel
/// would ignore that bit. A mask of 32 bits excludes the upper half from the comparison. Each
/// system call with a condition must therefore ignore the upper half of its first argument.
fn allow_if(names: &[&str], mask: u32, value: u32) -> Result<LinuxSyscall> {
    let argument = LinuxSeccompArgBuilder::default()
        .index(0_usize)
        .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
        .value(mask)
        .value_two(value)
        .build()
        .map_err(|error| Error::internal(error.to_string()))?;
    let mut rule = allow(names);
    rule.set_args(Some(vec![argument]));
    Ok(rule)
}

/// Returns the value of `linux.seccomp` for a container with these capabilities. `socketcall` is
/// true if the profile allows the system call socketcall.
///
/// 32-bit x86 programs can perform every socket operation through socketcall. The arguments of the
/// operation are in memory, and a filter can't read memory. If the profile allows socketcall, a
/// program can therefore create sockets of all address families.
pub(super) fn profile(capabilities: CapabilitySets, socketcall: bool) -> Result<LinuxSeccomp> {
    let has_any = |of: &[Capability]| capabilities.held & mask(of) != 0;
    let mut rules: Vec<LinuxSyscall> = GROUPS
        .iter()
        .filter(|group| group.capabilities.is_empty() || has_any(group.capabilities))
        .map(|group| allow(group.names))
        .collect();
    rules.push(allow(OF_ARCHITECTURE));
    // In libseccomp, a rule that allows a socket operation with some arguments also allows the
    // operation through socketcall with all arguments. Only a rule for socketcall itself prevents
    // this, and runc ignores a rule whose action is the default action, EPERM. The rule therefore
    // returns ENOSYS.
    rules.push(if socketcall {
        allow(&["socketcall"])
    } else {
        absent("socketcall")
    });
    for (mask, value) in SOCKET_FAMILIES {
        rules.push(allow_if(&["socket", "socketpair"], mask, value)?);
    }
    for personality in PERSONALITIES {
        rules.push(allow_if(&["personality"], u32::MAX, personality)?);
    }
    if !has_any(&[CAP_SYS_ADMIN]) {
        rules.push(allow_if(&["clone"], CLONE_NAMESPACES, 0)?);
        // A program passes the flags of clone3 in memory, and a seccomp filter can't read memory.
        // The profile therefore makes clone3 fail with ENOSYS, and C libraries then use clone
        // instead.
        rules.push(absent("clone3"));
    }
    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(ARCHITECTURES.to_vec()))
        .set_syscalls(Some(rules));
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;

    fn with_capabilities(held: &[Capability]) -> Value {
        with(held, false)
    }

    fn with(held: &[Capability], socketcall: bool) -> Value {
        let sets = CapabilitySets {
            held: mask(held),
            ambient: 0,
        };
        json!(profile(sets, socketcall).expect("the profile can't be built"))
    }

    /// Returns the names of the system calls that are allowed with any arguments.
    fn allowed(profile: &Value) -> Vec<&str> {
        let rules = profile["syscalls"].as_array().into_iter().flatten();
        rules
            .filter(|rule| rule["action"] == "SCMP_ACT_ALLOW" && rule.get("args").is_none())
            .flat_map(|rule| rule["names"].as_array().into_iter().flatten())
            .filter_map(Value::as_str)
            .collect()
    }

    #[test]
    fn every_listed_call_exists_and_is_listed_once() {
        let table = include_str!("../../../../runtime/src/seccomp/syscalls.tbl");
        let known: BTreeSet<&str> = table
            .lines()
            .filter_map(|line| line.split(' ').next())
            .collect();
        let mut seen = BTreeSet::new();
        for name in GROUPS
            .iter()
            .flat_map(|group| group.names)
            .chain(OF_ARCHITECTURE)
        {
            assert!(
                known.contains(name),
                "the profile lists {name}, which is not a system call"
            );
            assert!(
                seen.insert(name),
                "the profile lists the system call {name} twice"
            );
        }
    }

    /// The end-to-end tests and the benchmarks of rrun use a copy of the default profile.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_copy_of_the_profile_in_the_tests_is_up_to_date() -> Result<(), Box<dyn std::error::Error>>
    {
        // CAP_SYS_CHROOT is the only default capability that makes the profile allow additional
        // system calls.
        let default = with_capabilities(&[CAP_SYS_CHROOT]);
        let copy: Value =
            serde_json::from_str(include_str!("../../../../tests/seccomp/default.json"))?;
        assert!(
            default == copy,
            "tests/seccomp/default.json must have this content:\n{default}"
        );
        Ok(())
    }

    #[test]
    fn a_capability_allows_its_calls() {
        let none = with_capabilities(&[]);
        let none = allowed(&none);
        for name in [
            "mount",
            "bpf",
            "perf_event_open",
            "unshare",
            "clone",
            "clone3",
            "chroot",
            "io_uring_setup",
            "userfaultfd",
            "keyctl",
            "socket",
            "socketpair",
            "socketcall",
            "personality",
            "syslog",
        ] {
            assert!(!none.contains(&name), "{name}");
        }
        for (capability, name) in [
            (CAP_SYS_ADMIN, "mount"),
            (CAP_SYS_ADMIN, "clone3"),
            (CAP_SYS_ADMIN, "bpf"),
            (CAP_BPF, "bpf"),
            (CAP_PERFMON, "perf_event_open"),
            (CAP_SYSLOG, "syslog"),
            (CAP_SYS_CHROOT, "chroot"),
            (CAP_SYS_TIME, "clock_settime"),
            (CAP_SYS_NICE, "mbind"),
        ] {
            let profile = with_capabilities(&[capability]);
            assert!(
                allowed(&profile).contains(&name),
                "{capability} does not allow the system call {name}"
            );
        }
        let admin = with_capabilities(&[CAP_SYS_ADMIN]);
        let names = |rule: &Value| rule["names"].to_string();
        let rules = admin["syscalls"].as_array().into_iter().flatten();
        for rule in rules.filter(|rule| rule["names"].to_string().contains("clone")) {
            assert_eq!(rule.get("args"), None, "{}", names(rule));
            assert_eq!(rule["action"], "SCMP_ACT_ALLOW", "{}", names(rule));
        }
    }

    /// A filter compares 64 bits of an argument, and the kernel reads only 32 of them.
    #[test]
    fn no_condition_depends_on_the_upper_half_of_an_argument() {
        let profile = with_capabilities(&[]);
        let rules = profile["syscalls"].as_array().into_iter().flatten();
        let conditions: Vec<&Value> = rules
            .flat_map(|rule| rule["args"].as_array().into_iter().flatten())
            .collect();
        assert!(conditions.len() > 10);
        for condition in conditions {
            assert_eq!(condition["op"], "SCMP_CMP_MASKED_EQ", "{condition}");
            for field in ["value", "valueTwo"] {
                assert!(
                    condition[field].as_u64() <= Some(u32::MAX.into()),
                    "{condition}"
                );
            }
        }
    }

    #[test]
    fn all_socket_families_are_allowed_except_af_alg_and_af_vsock() {
        let is_allowed = |family: u32| {
            let allows = |(mask, value): &(u32, u32)| family & mask == *value;
            SOCKET_FAMILIES.iter().any(allows)
        };
        let denied: Vec<u32> = (0..46).filter(|family| !is_allowed(*family)).collect();
        assert_eq!(denied, [38, 40]);
        for family in [46, 64, 0x100, 0x8000_0000 | 38, u32::MAX] {
            assert!(!is_allowed(family), "{family}");
        }
    }

    #[test]
    fn socketcall_is_allowed_or_absent() {
        assert!(allowed(&with(&[], true)).contains(&"socketcall"));
        let profile = with(&[], false);
        let rules = profile["syscalls"].as_array().into_iter().flatten();
        let rules: Vec<&Value> = rules
            .filter(|rule| rule["names"].to_string().contains("socketcall"))
            .collect();
        assert_eq!(
            rules,
            [&json!({
                "names": ["socketcall"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS,
            })]
        );
    }
}
