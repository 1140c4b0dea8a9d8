//! The seccomp filter of the pause process. See seccomp(2) and the kernel's
//! Documentation/userspace-api/seccomp_filter.rst.
//!
//! A container with CAP_SYS_PTRACE that shares the pause process's PID namespace can trace the pause
//! process, and make system calls in its name. The filter therefore allows only the system calls
//! with which the pause process waits, and with which it drops its capabilities. A tracer cannot
//! remove the filter, because the kernel filters a system call after the tracer has changed it. The
//! option PTRACE_O_SUSPEND_SECCOMP requires CAP_SYS_ADMIN in the node's user namespace.

use libc::{sock_filter, sock_fprog};
use rrun_kernel::errno::ENOTSUPP;
use rustix::io::Errno;

/// The value of `seccomp_data.arch` for system calls of this architecture (linux/audit.h). 32-bit
/// system calls have another value.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// The system call with which pause(3) waits.
#[cfg(target_arch = "x86_64")]
const PAUSE: libc::c_long = libc::SYS_pause;
#[cfg(target_arch = "aarch64")]
const PAUSE: libc::c_long = libc::SYS_ppoll;

/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;

const DENY: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Returns an instruction. `if_true` and `if_false` are the numbers of instructions that a
/// conditional jump skips.
const fn instruction(code: u32, if_true: u8, if_false: u8, value: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: if_true,
        jf: if_false,
        k: value,
    }
}

const PROGRAM: [sock_filter; 8] = [
    instruction(LOAD, 0, 0, ARCHITECTURE_OFFSET),
    instruction(IF_EQUAL, 0, 4, ARCHITECTURE),
    instruction(LOAD, 0, 0, NUMBER_OFFSET),
    instruction(IF_EQUAL, 3, 0, PAUSE as u32),
    instruction(IF_EQUAL, 2, 0, libc::SYS_close_range as u32),
    instruction(IF_EQUAL, 1, 0, libc::SYS_capset as u32),
    instruction(RETURN, 0, 0, DENY),
    instruction(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
];

/// Loads the filter. All system calls except pause(2), or ppoll(2) on arm64, close_range(2) and
/// capset(2) then fail with EPERM. The process must have set no_new_privs. Does nothing if the kernel
/// does not support filters. The containers then have no filters either. Also does nothing if the
/// node's memory for BPF programs is used up (net.core.bpf_jit_limit) and the process has no
/// CAP_SYS_ADMIN in the node's user namespace.
pub(crate) fn load() -> Result<(), Errno> {
    let mut program = PROGRAM;
    let program = sock_fprog {
        len: PROGRAM.len() as libc::c_ushort,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: `program` describes an array of the given length. The kernel copies the array.
    let loaded = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if loaded == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    match Errno::from_io_error(&error) {
        Some(Errno::INVAL) => Ok(()),
        Some(errno) if errno.raw_os_error() == ENOTSUPP => Ok(()),
        errno => Err(errno.unwrap_or(Errno::IO)),
    }
}
