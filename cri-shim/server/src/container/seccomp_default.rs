//! The seccomp profile of containers that ask for RuntimeDefault.
//!
//! What a program needs that minds its own files, memory, processes and connections is
//! allowed; so is what the kernel itself guards by a capability that the container has. The
//! rest fails with EPERM: it is of no use in a container, reaches what no namespace divides,
//! or was the way into the kernel too often. In substance this is what Docker's and
//! containerd's users know; where it differs, the reason stands beside it.
//!
//! Left out on purpose, whatever the capabilities: io_uring_* (went around other checks, and
//! had more holes than any other interface), userfaultfd (holds the kernel still while it is
//! deceived), keyctl, add_key, request_key (keyrings have no namespace), kexec_*, swapon,
//! swapoff, pivot_root, nfsservctl, uselib, ustat, sysfs, _sysctl, vm86 (nobody's business in
//! a container, or long gone), lookup_dcookie (profiling the host).

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompOperator,
    LinuxSyscall,
};
use rrun_calls::error::{Error, Result};
use rrun_kernel::capability::{Capability, Capability::*};

use super::capabilities::{CapabilitySets, mask};

/// Calls that are allowed together, for one reason.
struct Group {
    names: &'static [&'static str],
    /// The kernel refuses the calls without one of these, or they let a program do what is meant
    /// for these. An empty list means: allowed for everyone.
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
    // Files: opened, read, written, and what directories say of them. The kernel checks each
    // against owner, mode and mount.
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
    // Extended attributes: the kernel asks for CAP_SYS_ADMIN and its like where they bestow
    // something.
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
    // What is mounted in the own namespace, and handles of files (opening by one is another
    // matter, below).
    everyone(&["listmount", "name_to_handle_at", "statmount"]),
    // Waiting for descriptors, and being told of changes.
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
    // The old asynchronous I/O, which databases use.
    everyone(&[
        "io_cancel",
        "io_destroy",
        "io_getevents",
        "io_pgetevents",
        "io_pgetevents_time64",
        "io_setup",
        "io_submit",
    ]),
    // Memory of one's own.
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
    // Processes: making them (clone has a rule of its own), executing, waiting, ending.
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
    // Looking into processes with the same rights. Safe to allow since Linux 4.8 filters a
    // call again after a tracer has changed it; debuggers in containers count on it.
    everyone(&["process_vm_readv", "process_vm_writev", "ptrace"]),
    // Threads and their locks.
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
    // Scheduling and limits; raising them wants CAP_SYS_NICE or CAP_SYS_RESOURCE.
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
    // Who one is. Becoming someone else wants CAP_SETUID and CAP_SETGID.
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
    // Clocks and timers. adjtimex and its like also read; setting wants CAP_SYS_TIME.
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
    // Sockets once they are made (socket has rules of its own). socketcall carries all of
    // them for 32-bit x86; what it makes no filter can see.
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
        "socketcall",
        "socketpair",
    ]),
    // System V and POSIX IPC, which have a namespace.
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
    // The process's own settings, the system's name and load, randomness.
    everyone(&["getrandom", "prctl", "sysinfo", "uname"]),
    // Confining oneself further.
    everyone(&[
        "landlock_add_rule",
        "landlock_create_ruleset",
        "landlock_restrict_self",
        "seccomp",
    ]),
    // Made by the kernel's own trampolines where the host traces a program with probes;
    // without them, tracing a container would kill it.
    everyone(&["uprobe", "uretprobe"]),
    with(&[CAP_DAC_READ_SEARCH], &["open_by_handle_at"]),
    // Mounts, namespaces, host and domain name, quotas.
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
    // The kernel takes CAP_SYS_ADMIN for all of these, as it did before they had their own.
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
    // Processes whatever their rights.
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
    // Where memory is: on a node with several, a container's placement is its neighbours'.
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

/// Of the architecture itself: thread pointers, descriptor tables, caches.
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

/// Whose programs the kernel runs.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];
#[cfg(target_arch = "aarch64")]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchAarch64, Arch::ScmpArchArm];

/// `CLONE_NEW*` but for CLONE_NEWTIME, which is no flag of clone(2)'s: new namespaces, above
/// all a new user namespace, open much of the kernel to a program without any rights.
const CLONE_NAMESPACES: u32 = 0x7e02_0000;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// AF_ALG lets a program feed the kernel's cryptography, for which it has libraries; it was
/// a way to root as late as 2026. AF_VSOCK reaches the hypervisor and other virtual machines
/// past the network namespace. They are numbers 38 and 40.
const SOCKET_FAMILIES: [(LinuxSeccompOperator, u32); 3] = [
    (LinuxSeccompOperator::ScmpCmpLt, 38),
    (LinuxSeccompOperator::ScmpCmpEq, 39),
    (LinuxSeccompOperator::ScmpCmpGt, 40),
];

/// Linux's personality; 32-bit's; each with the kernel calling itself 2.6; asking which it is.
/// Others switch address space randomisation off, or read for execute on.
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

/// Allows a call if its first argument compares so.
fn allow_if(name: &str, operator: LinuxSeccompOperator, value: u32) -> Result<LinuxSyscall> {
    let argument = LinuxSeccompArgBuilder::default()
        .index(0_usize)
        .op(operator)
        .value(value)
        .value_two(0_u64)
        .build()
        .map_err(|error| Error::internal(error.to_string()))?;
    let mut rule = allow(&[name]);
    rule.set_args(Some(vec![argument]));
    Ok(rule)
}

/// `linux.seccomp` for a container with these capabilities.
pub(super) fn profile(capabilities: CapabilitySets) -> Result<LinuxSeccomp> {
    let has_any = |of: &[Capability]| capabilities.held & mask(of) != 0;
    let mut rules: Vec<LinuxSyscall> = GROUPS
        .iter()
        .filter(|group| group.capabilities.is_empty() || has_any(group.capabilities))
        .map(|group| allow(group.names))
        .collect();
    rules.push(allow(OF_ARCHITECTURE));
    for (operator, family) in SOCKET_FAMILIES {
        rules.push(allow_if("socket", operator, family)?);
    }
    for personality in PERSONALITIES {
        let equal = LinuxSeccompOperator::ScmpCmpEq;
        rules.push(allow_if("personality", equal, personality)?);
    }
    if !has_any(&[CAP_SYS_ADMIN]) {
        let masked = LinuxSeccompOperator::ScmpCmpMaskedEq;
        rules.push(allow_if("clone", masked, CLONE_NAMESPACES)?);
        // Its flags are behind a pointer, where no filter sees them. C libraries take clone
        // if the kernel answers that it has no clone3.
        let mut clone3 = rule(&["clone3"], LinuxSeccompAction::ScmpActErrno);
        clone3.set_errno_ret(Some(ENOSYS));
        rules.push(clone3);
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
        let sets = CapabilitySets {
            held: mask(held),
            ambient: 0,
        };
        json!(profile(sets).expect("the profile can't be built"))
    }

    /// The calls that are allowed whatever their arguments.
    fn allowed(profile: &Value) -> Vec<&str> {
        let rules = profile["syscalls"].as_array().into_iter().flatten();
        rules
            .filter(|rule| rule["action"] == "SCMP_ACT_ALLOW" && rule.get("args").is_none())
            .flat_map(|rule| rule["names"].as_array().into_iter().flatten())
            .filter_map(Value::as_str)
            .collect()
    }

    #[test]
    fn no_call_is_named_twice_and_none_is_misspelt() {
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
            assert!(known.contains(name), "{name} is no system call");
            assert!(seen.insert(name), "{name} is named twice");
        }
    }

    /// What tests and benchmarks of rrun take for it.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_profile_beside_the_tests_is_this_one() -> Result<(), Box<dyn std::error::Error>> {
        // Of the default capabilities, only this one brings calls.
        let default = with_capabilities(&[CAP_SYS_CHROOT]);
        let beside: Value =
            serde_json::from_str(include_str!("../../../../tests/seccomp/default.json"))?;
        assert!(
            default == beside,
            "tests/seccomp/default.json should be:\n{default}"
        );
        Ok(())
    }

    #[test]
    fn capabilities_bring_their_calls() {
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
            assert!(allowed(&profile).contains(&name), "{capability} {name}");
        }
        let admin = with_capabilities(&[CAP_SYS_ADMIN]).to_string();
        assert!(!admin.contains("MASKED_EQ") && !admin.contains("errnoRet"));
    }
}
