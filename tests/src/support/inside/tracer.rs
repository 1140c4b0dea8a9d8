//! Control of other processes with ptrace(2).

use super::InsideError;

/// Makes a system call in another process, and prints its result like `inside call`. The process
/// must be waiting in pause(2), and waits there again after the call.
#[cfg(target_arch = "x86_64")]
pub(super) fn call_in(process: &str, numbers: &[&str]) -> Result<(), InsideError> {
    use nix::libc::{SYS_pause, c_ulonglong};
    use nix::sys::ptrace;
    use nix::sys::wait::{WaitPidFlag, waitpid};

    use super::{say, words_of_call};

    /// The length of the instruction `syscall`.
    const LENGTH: c_ulonglong = 2;
    let words = words_of_call(numbers)?.map(i64::cast_unsigned);
    let process = nix::unistd::Pid::from_raw(process.parse()?);
    let wait = || waitpid(process, Some(WaitPidFlag::__WALL));
    ptrace::attach(process)?;
    wait()?;
    let original = ptrace::getregs(process)?;
    let mut registers = original;
    // Execute the instruction `syscall` again, with other registers.
    registers.rip = original.rip - LENGTH;
    [
        registers.rax,
        registers.rdi,
        registers.rsi,
        registers.rdx,
        registers.r10,
        registers.r8,
        registers.r9,
    ] = words;
    registers.orig_rax = c_ulonglong::MAX;
    ptrace::setregs(process, registers)?;
    ptrace::step(process, None)?;
    wait()?;
    let returned = ptrace::getregs(process)?.rax.cast_signed();
    registers = original;
    registers.rip = original.rip - LENGTH;
    registers.rax = SYS_pause.cast_unsigned();
    ptrace::setregs(process, registers)?;
    ptrace::detach(process, None)?;
    say(&match returned {
        errno @ -4095..=-1 => format!("{:?}", nix::errno::Errno::from_raw(-errno as i32)),
        number => number.to_string(),
    })
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn call_in(_process: &str, _numbers: &[&str]) -> Result<(), InsideError> {
    Err("the program sets only the registers of x86-64".into())
}
