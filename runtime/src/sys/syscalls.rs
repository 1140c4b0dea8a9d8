//! System calls that neither rustix nor nix provides yet, each with a wrapper function.

use std::ffi::{CStr, CString};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rrun_kernel::errno::last;
use rrun_kernel::signal::NONE_IGNORED;
use rustix::io::Errno;

use crate::sys::number_list::NumberSet;

pub(super) fn check(returned: libc::c_long) -> Result<libc::c_long, Errno> {
    if returned < 0 {
        Err(last())
    } else {
        Ok(returned)
    }
}

/// Sets the close-on-exec flag of every open descriptor whose number is `first` or higher. See
/// close_range(2).
pub(crate) fn close_range_cloexec(first: u32) -> Result<(), Errno> {
    // SAFETY: the call has no pointer arguments, and setting a flag does not invalidate a
    // descriptor.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })?;
    Ok(())
}

/// Closes every descriptor from `first` to `last`. See close_range(2).
///
/// # Safety
/// The caller must not use or drop a value that owns one of these descriptors afterwards.
pub(crate) unsafe fn close_range(first: u32, last: u32) -> Result<(), Errno> {
    // SAFETY: the call has no pointer arguments, and the caller guarantees that it does not use the
    // descriptors any more.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    Ok(())
}

/// Joins the session keyring `name`, so that this process no longer has its parent's keys. The
/// kernel creates the keyring if it does not exist. See keyctl(2), `KEYCTL_JOIN_SESSION_KEYRING`.
/// The call returns the keyring's number, but 0 if this process is already in the keyring.
pub(crate) fn join_session_keyring(name: &str) -> Result<(), Errno> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    let name = CString::new(name).map_err(|_| Errno::INVAL)?;
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) })?;
    Ok(())
}

/// Returns random bytes from the kernel that no process can guess. See getrandom(2).
pub(crate) fn random_bytes<const LENGTH: usize>() -> Result<[u8; LENGTH], Errno> {
    const {
        assert!(
            LENGTH <= 256,
            "the kernel can return fewer bytes than requested"
        )
    };
    let mut bytes = [0; LENGTH];
    // SAFETY: `bytes` is writable for its whole length.
    check(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), LENGTH, 0) } as libc::c_long)?;
    Ok(bytes)
}

/// Sets the permissions of this process's session keyring. See keyctl(2), `KEYCTL_SETPERM`.
pub(crate) fn set_session_keyring_permissions(permissions: u32) -> Result<(), Errno> {
    const KEYCTL_SETPERM: libc::c_int = 5;
    const SESSION_KEYRING: libc::c_int = -3;
    // SAFETY: the call has no pointer arguments.
    check(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_SETPERM,
            SESSION_KEYRING,
            permissions,
        )
    })?;
    Ok(())
}

/// Sends the signal number `signal` to the process that `pidfd` refers to. With the signal number
/// 0, the kernel only checks whether the process exists.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    // SAFETY: a null siginfo is allowed, and the call then behaves like kill(2).
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })?;
    Ok(())
}

fn set_disposition(signal: i32, disposition: libc::sighandler_t) -> Result<(), Errno> {
    // SAFETY: the callers pass only SIG_DFL and SIG_IGN, so a signal does not run a function of
    // rrun.
    let previous = unsafe { libc::signal(signal, disposition) };
    if previous == libc::SIG_ERR {
        return Err(last());
    }
    Ok(())
}

/// Resets a signal to its default disposition.
pub(crate) fn default_signal(signal: i32) -> Result<(), Errno> {
    set_disposition(signal, libc::SIG_DFL)
}

/// Resets the standard signals that rrun's caller ignored to their default disposition. execve(2)
/// preserves ignored signals. rrun has already reset SIGCHLD, and ignores SIGPIPE itself.
///
/// The kernel has no cheaper call for all signals together, and reading the ignored signals from
/// /proc/self/status takes longer than these calls. So this function does nothing if the monitor is
/// the caller, because the monitor has reset all signals.
pub(crate) fn default_signals() -> Result<(), Errno> {
    if std::env::var_os(NONE_IGNORED).is_some() {
        return Ok(());
    }
    (1..32)
        .filter(|signal| {
            let other = [libc::SIGKILL, libc::SIGSTOP, libc::SIGPIPE, libc::SIGCHLD];
            !other.contains(signal)
        })
        .try_for_each(default_signal)
}

/// Returns whether this process ignores a signal.
pub(crate) fn is_ignored(signal: i32) -> bool {
    // SAFETY: an all-zero sigaction is a valid value of that plain type.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: `action` is valid for writes, and the null pointer means that nothing changes.
    let returned = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    returned == 0 && action.sa_sigaction == libc::SIG_IGN
}

pub(crate) fn ignore_signal(signal: i32) -> Result<(), Errno> {
    set_disposition(signal, libc::SIG_IGN)
}

/// Installs a handler that ends this process when `signal` arrives. The exit status is 128 plus the
/// signal number, as in shells. The handler is necessary, because the first process of a PID
/// namespace ignores a signal with the default disposition. execve(2) resets the handler.
pub(crate) fn end_at_signal(signal: i32) -> Result<(), Errno> {
    extern "C" fn end(signal: i32) {
        // SAFETY: _exit is async-signal-safe, and does not return.
        unsafe { libc::_exit(128 + signal) }
    }
    let handler: extern "C" fn(i32) = end;
    // SAFETY: the handler calls only _exit, which is allowed at every moment.
    let previous = unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    if previous == libc::SIG_ERR {
        return Err(last());
    }
    Ok(())
}

/// Blocks exactly the signals in `mask`. Returns the signals that were blocked before.
pub(crate) fn set_signal_mask(mask: &libc::sigset_t) -> Result<libc::sigset_t, Errno> {
    // SAFETY: an all-zero sigset_t is a valid value of that plain type.
    let mut previous: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers refer to valid sets for the duration of the call.
    let returned = unsafe { libc::sigprocmask(libc::SIG_SETMASK, mask, &raw mut previous) };
    check(libc::c_long::from(returned))?;
    Ok(previous)
}

/// Returns whether this process blocks a signal.
pub(crate) fn blocks_signal(signal: i32) -> bool {
    // SAFETY: an all-zero sigset_t is a valid value of that plain type.
    let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the null pointer means that the mask does not change, and `mask` is valid for writes.
    let returned = unsafe { libc::sigprocmask(libc::SIG_SETMASK, std::ptr::null(), &raw mut mask) };
    // SAFETY: `mask` is a valid set.
    returned == 0 && unsafe { libc::sigismember(&raw const mask, signal) } == 1
}

/// Returns a signal set that contains exactly `signals`.
pub(crate) fn signal_set(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: sigemptyset initialises the set, and sigaddset refuses invalid signal numbers.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        set
    }
}

/// Returns a descriptor from which the signals in `mask` can be read. See signalfd(2).
pub(crate) fn signalfd(mask: &libc::sigset_t) -> Result<OwnedFd, Errno> {
    // SAFETY: mask points to a valid set, and -1 requests a new descriptor.
    let fd = check(libc::c_long::from(unsafe {
        libc::signalfd(-1, mask, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    }))?;
    // SAFETY: the kernel returned a new descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Returns the number of the next signal that is pending in a [`signalfd`], if there is one.
pub(crate) fn read_signal(fd: BorrowedFd<'_>) -> Option<i32> {
    let mut info = [0u8; std::mem::size_of::<libc::signalfd_siginfo>()];
    match rustix::io::read(fd, &mut info) {
        // `ssi_signo`, the number of the signal, is the first field of signalfd_siginfo and has 32
        // bits.
        Ok(read) if read == info.len() => {
            let [a, b, c, d, ..] = info;
            Some(u32::from_ne_bytes([a, b, c, d]) as i32)
        }
        _ => None,
    }
}

/// A call of execve(2) with prepared arguments. The call itself does not allocate memory.
pub(crate) struct Execution<'a> {
    path: &'a CStr,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    strings: PhantomData<&'a [CString]>,
}

impl<'a> Execution<'a> {
    pub(crate) fn new(path: &'a CStr, args: &'a [CString], env: &'a [CString]) -> Execution<'a> {
        let pointers = |strings: &'a [CString]| {
            let pointers = strings.iter().map(|string| string.as_ptr());
            pointers.chain([std::ptr::null()]).collect()
        };
        Execution {
            path,
            argv: pointers(args),
            envp: pointers(env),
            strings: PhantomData,
        }
    }

    /// Replaces this process's program with execve(2), and makes no other system call. Returns only
    /// if execve(2) failed.
    pub(crate) fn execute(&self) -> Errno {
        // SAFETY: all strings are NUL-terminated and outlive `self`, and both arrays end with a
        // null pointer.
        unsafe { libc::execve(self.path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
        last()
    }
}

/// Replaces this process's program with the file that `file` refers to, and keeps the environment.
/// Returns only if execveat(2) failed.
pub(crate) fn execveat(file: BorrowedFd<'_>, args: &[&CStr]) -> Errno {
    unsafe extern "C" {
        static environ: *const *const libc::c_char;
    }
    let mut argv: Vec<*const libc::c_char> = args.iter().map(|arg| arg.as_ptr()).collect();
    argv.push(std::ptr::null());
    // SAFETY: the path and all arguments are NUL-terminated, and the array ends with a null
    // pointer. environ belongs to the C library, and rrun never changes it.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            environ,
            libc::AT_EMPTY_PATH,
        )
    };
    last()
}

/// Sets the hard and soft limits of one resource for process `pid`. `resource` is a `RLIMIT_*`
/// number.
pub(crate) fn setrlimit(pid: i32, resource: i64, soft: u64, hard: u64) -> Result<(), Errno> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `limit` is valid for reads, and prlimit64 accepts a null pointer in place of a buffer
    // for the old limit.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            &raw const limit,
            std::ptr::null_mut::<libc::rlimit64>(),
        )
    })?;
    Ok(())
}

/// `struct sched_attr` of sched_setattr(2), as of Linux 5.3.
#[repr(C)]
#[derive(Clone, Debug)]
pub(crate) struct SchedAttr {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    /// The CPU time in each period for SCHED_DEADLINE. This field, `deadline` and `period` are in
    /// nanoseconds.
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
    pub(crate) util_min: u32,
    pub(crate) util_max: u32,
}

impl Default for SchedAttr {
    fn default() -> SchedAttr {
        SchedAttr {
            size: std::mem::size_of::<SchedAttr>() as u32,
            policy: 0,
            flags: 0,
            nice: 0,
            priority: 0,
            runtime: 0,
            deadline: 0,
            period: 0,
            util_min: 0,
            util_max: 0,
        }
    }
}

/// Sets the scheduling policy and attributes of process `pid`, where 0 means this process.
pub(crate) fn sched_setattr(pid: i32, attr: &SchedAttr) -> Result<(), Errno> {
    // SAFETY: attr is a valid sched_attr whose first field is its length.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, std::ptr::from_ref(attr), 0) })?;
    Ok(())
}

/// Sets the I/O scheduling class and priority of process `pid`, where 0 means this process. See
/// ioprio_set(2).
pub(crate) fn ioprio_set(pid: i32, ioprio: i32) -> Result<(), Errno> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: the call has no pointer arguments.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, ioprio) })?;
    Ok(())
}

/// Restricts this process to the CPUs in the set. The kernel ignores CPUs that do not exist, if at
/// least one CPU in the set exists.
pub(crate) fn sched_setaffinity(cpus: &NumberSet) -> Result<(), Errno> {
    let words = cpus.words();
    // SAFETY: the mask is valid for reads of the given length in bytes.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            std::mem::size_of_val(words),
            words.as_ptr(),
        )
    })?;
    Ok(())
}

/// Sets the NUMA memory policy of this process. See set_mempolicy(2).
pub(crate) fn set_mempolicy(mode: u32, nodes: Option<&NumberSet>) -> Result<(), Errno> {
    let words = nodes.map(NumberSet::words).unwrap_or_default();
    let (mask, length) = match words {
        [] => (std::ptr::null(), 0),
        // The kernel reads one bit less than the given length, so the length is the number of bits
        // plus 1.
        words => (words.as_ptr(), words.len() * u64::BITS as usize + 1),
    };
    // SAFETY: the mask is null, or valid for reads of `length` - 1 bits. The kernel reads only
    // these bits.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, length) })?;
    Ok(())
}

/// Sets this process's execution domain. See personality(2).
pub(crate) fn personality(persona: u32) -> Result<(), Errno> {
    // SAFETY: the call has no pointer arguments.
    let previous = unsafe { libc::personality(libc::c_ulong::from(persona)) };
    check(libc::c_long::from(previous))?;
    Ok(())
}

/// Makes a terminal the controlling terminal of this session. See ioctl_tty(2).
pub(crate) fn set_controlling_terminal(terminal: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the argument of TIOCSCTTY is an integer, not a pointer.
    let returned = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY as _, 0) };
    check(libc::c_long::from(returned))?;
    Ok(())
}

/// Returns whether the kernel accepts a seccomp filter with these `SECCOMP_FILTER_FLAG_*` flags.
///
/// This function passes a null pointer in place of a filter to seccomp(2). The kernel checks the
/// flags first, so it returns EFAULT for the pointer only if the flags are valid.
pub(crate) fn has_seccomp_flags(flags: u32) -> Result<bool, Errno> {
    // SAFETY: the kernel does not read a filter from the null pointer, and returns EFAULT.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            std::ptr::null::<libc::sock_fprog>(),
        )
    };
    match last() {
        _ if returned >= 0 => Ok(false),
        Errno::FAULT => Ok(true),
        Errno::INVAL | Errno::NOSYS => Ok(false),
        errno => Err(errno),
    }
}

/// `struct sock_filter` of linux/filter.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SockFilter {
    pub(crate) code: u16,
    pub(crate) if_true: u8,
    pub(crate) if_false: u8,
    pub(crate) value: u32,
}

impl SockFilter {
    /// Returns the instruction as one number, which is stored in the container's state.
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.code) << 48
            | u64::from(self.if_true) << 40
            | u64::from(self.if_false) << 32
            | u64::from(self.value)
    }

    pub(crate) fn unpack(packed: u64) -> SockFilter {
        SockFilter {
            code: (packed >> 48) as u16,
            if_true: (packed >> 40) as u8,
            if_false: (packed >> 32) as u8,
            value: packed as u32,
        }
    }
}

/// Loads a filter for all further system calls of this process. Returns the listener's descriptor
/// if the flags request a listener. See seccomp(2), SECCOMP_SET_MODE_FILTER.
pub(crate) fn load_seccomp_filter(
    program: &[SockFilter],
    flags: u32,
) -> Result<Option<OwnedFd>, Errno> {
    /// `struct sock_fprog` of linux/filter.h.
    #[repr(C)]
    struct SockFprog {
        length: libc::c_ushort,
        instructions: *const SockFilter,
    }
    let program = SockFprog {
        length: program.len().try_into().map_err(|_| Errno::INVAL)?,
        instructions: program.as_ptr(),
    };
    // SAFETY: `program` contains the right number of instructions, which have the layout of the
    // kernel's struct sock_filter, and outlives the call.
    let returned = check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })?;
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32 == 0 {
        return Ok(None);
    }
    // SAFETY: with SECCOMP_FILTER_FLAG_NEW_LISTENER, the kernel returns a new descriptor, which has
    // no other owner.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(returned as i32) }))
}

/// Maps the start of a file into memory that is shared with all processes that map the file. The
/// mapping lasts until execve(2). See mmap(2).
pub(crate) fn map_shared(
    file: BorrowedFd<'_>,
    length: usize,
) -> Result<NonNull<libc::c_void>, Errno> {
    // SAFETY: the kernel chooses an address at which no other memory is mapped.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    match NonNull::new(address) {
        Some(mapped) if address != libc::MAP_FAILED => Ok(mapped),
        _ => Err(last()),
    }
}

/// Brings the loopback interface of the current network namespace up.
pub(crate) fn loopback_up() -> Result<(), Errno> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is a valid value of that plain type.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, and `request` is an ifreq.
    let returned = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw mut request,
        )
    };
    check(libc::c_long::from(returned))?;
    Ok(())
}
