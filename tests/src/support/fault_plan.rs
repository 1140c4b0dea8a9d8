//! The faults that a test injects into the system calls of a command.

use std::collections::BTreeSet;

use nix::libc;

use crate::ensure;
use crate::support::errnos;
use crate::support::inject::{Call, Fault};
use crate::support::machine::Result;

/// Returns each system call with each of its faults.
pub(crate) fn plan(calls: &[Call]) -> Result<Vec<(Call, Fault)>> {
    let mut plan = Vec::new();
    let mut unknown = BTreeSet::new();
    for call in calls {
        let number = call.place.number;
        if call.place.nth >= POLLS && is_poll(call) {
            continue;
        }
        let Some(row) = errnos::likely(number) else {
            if errnos::reason_to_omit(number).is_none() {
                unknown.insert(errnos::name(number));
            }
            continue;
        };
        let errors = row.errors.iter().map(|errno| Fault::Error(*errno));
        let long = row.length.and_then(|at| call.arguments.get(at)) > Some(&1);
        let short = (long && can_be_short(call)).then_some(Fault::Short);
        plan.extend(
            errors
                .chain(short)
                .filter(|fault| reason_to_skip(call, *fault).is_none())
                .map(|fault| (call.clone(), fault)),
        );
    }
    ensure!(
        unknown.is_empty(),
        "the table in tests/src/support/errnos.rs lacks these system calls: {unknown:?}"
    );
    Ok(plan)
}

/// The number of times that a test lets a system call fail which the runtime repeats until another
/// process has done its work.
const POLLS: usize = 3;

fn is_poll(call: &Call) -> bool {
    let name = errnos::name(call.place.number);
    name.contains("poll") || (name == "pread64" && call.object.starts_with("/memfd:"))
}

/// Returns whether the kernel can transfer only a part of the bytes. Files of /proc and /sys take
/// the bytes of a write as a whole, and the sockets of the runtime transfer whole messages.
fn can_be_short(call: &Call) -> bool {
    let is_socket = call.object.starts_with("socket:");
    let is_kernels = call.object.starts_with("/proc/") || call.object.starts_with("/sys/");
    let writes = matches!(call.place.number, libc::SYS_write | libc::SYS_pwrite64);
    !(is_socket || is_kernels && writes)
}

/// Returns the reason why the tests inject no such fault. Some errors are not failures: they are the
/// kernel's answer to a question. If the test injected such an error, the kernel would lie.
fn reason_to_skip(call: &Call, fault: Fault) -> Option<&'static str> {
    use nix::errno::Errno::{
        EACCES, EAGAIN, ECONNREFUSED, ECONNRESET, EEXIST, EINVAL, EIO, ELOOP, ENOENT, ENOSYS,
        EPIPE, EROFS, ESRCH,
    };
    let Fault::Error(errno) = fault else {
        return None;
    };
    let (first, second) = (call.arguments[0], call.arguments[1]);
    let name = errnos::name(call.place.number);
    let object = &*call.object;
    let masked = || {
        let rest = object.trim_start_matches("/proc/");
        PROTECTED.contains(&rest)
    };
    match (&*name, errno) {
        ("fcntl", _) if second == libc::F_GETFD as u64 => {
            Some("only a debug build makes this system call, before it closes a descriptor")
        }
        ("prctl", EINVAL) if first == libc::PR_CAPBSET_DROP as u64 && second > 40 => {
            Some("the kernel has no such capability")
        }
        ("seccomp", EINVAL) if call.arguments[2] == 0 => {
            Some("the kernel does not support the flags")
        }
        ("keyctl", ENOSYS) => Some("the kernel has no keyrings that the container could use"),
        ("openat2", ELOOP) if object == "/dev" || object == "/dev/null" => {
            Some("the path contains a symbolic link")
        }
        ("openat2", ENOENT) if masked() => Some("the path does not exist, so nothing protects it"),
        ("faccessat2", EACCES | EROFS) if object == "/proc/self/exe" => {
            Some("the runtime has no permission to write to its executable file")
        }
        ("access" | "faccessat2", ENOENT) => Some("the file does not exist"),
        ("open" | "openat", ENOENT) if object.starts_with("/sys/fs/cgroup/") => {
            Some("the cgroup or its controller does not exist")
        }
        ("statfs", ENOENT) if object == "/sys/fs/cgroup" => {
            Some("no cgroup file system is mounted at its usual place")
        }
        ("open" | "openat", ENOENT) if object.starts_with("/sys/module/") => {
            Some("the kernel does not have the module")
        }
        ("stat" | "statx", _) if object == "/sys/fs/cgroup/cgroup.controllers" => {
            Some("libcgroups only checks whether the file exists")
        }
        ("read", EIO) if object.ends_with("ptmx") => Some("all processes have closed the terminal"),
        ("getdents64", ENOENT) => Some("another process has removed the directory"),
        ("open" | "openat", ENOENT)
            if object.starts_with("/proc/") && object.ends_with("/stat") =>
        {
            Some("the process has exited")
        }
        ("pidfd_open" | "pidfd_send_signal", ESRCH) => Some("the process has exited"),
        ("ioctl", _) if second == FIONBIO => Some("an open descriptor accepts this request"),
        ("rmdir" | "unlink" | "unlinkat", ENOENT) => Some("another process has removed the file"),
        ("open" | "openat", ENOENT) if object == "/proc" => Some("the container has no /proc"),
        ("open" | "openat" | "openat2", ENOENT) if object == "/dev/null" => {
            Some("the container has no /dev/null")
        }
        ("open" | "openat" | "stat" | "newfstatat", ENOENT) if object.contains("/state/e2e-") => {
            Some("another process has removed the container")
        }
        ("openat", ENOENT) if object == "cgroup.procs" => {
            Some("another process has removed the cgroup")
        }
        ("mkdir" | "mkdirat" | "mknodat" | "symlinkat", EEXIST) => Some("the file exists"),
        ("connect", ENOENT | ECONNREFUSED | EAGAIN) => Some("no process waits at the socket"),
        ("sendto" | "sendmsg", EPIPE | ECONNRESET) | ("recvfrom" | "recvmsg", ECONNRESET) => {
            Some("the process at the other end has exited")
        }
        _ => None,
    }
}

/// The request of ioctl(2) that makes a descriptor non-blocking.
const FIONBIO: u64 = 0x5421;

/// The last components of the paths that the tests' containers mask or make read-only.
const PROTECTED: &[&str] = &[
    "acpi",
    "asound",
    "kcore",
    "keys",
    "latency_stats",
    "timer_list",
    "timer_stats",
    "sched_debug",
    "firmware",
    "scsi",
    "bus",
    "fs",
    "irq",
    "sys",
    "sysrq-trigger",
];
