//! System calls of 32-bit x86 programs. An x86-64 kernel accepts these system calls from 64-bit
//! programs, too, through the instruction `int 0x80`.

use super::{InsideError, say, words_of_call};

/// Makes a 32-bit system call with at most three arguments, and prints its result: a number, or the
/// name of an errno.
pub(super) fn call(numbers: &[&str]) -> Result<(), InsideError> {
    let [number, first, second, third, ..] = words_of_call(numbers)?;
    print(interrupt(number, first, second, third)?)
}

/// Performs the operation `numbers[0]` of socketcall(2), and prints its result like [`call`]. The
/// other numbers are the operation's arguments.
#[cfg(target_arch = "x86_64")]
pub(super) fn socketcall(numbers: &[&str]) -> Result<(), InsideError> {
    use std::num::NonZeroUsize;

    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

    const SOCKETCALL: i64 = 102;
    let [operation, arguments @ ..] = words_of_call(numbers)?;
    // A 32-bit system call can only use addresses below 4 GiB. The page is unmapped when this
    // process exits.
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_32BIT;
    let size = NonZeroUsize::new(4096).ok_or("the size of the page is 0")?;
    // SAFETY: the kernel chooses an unused address.
    let page = unsafe { mmap_anonymous(None, size, protection, flags) }?;
    let words = arguments.map(|argument| argument as u32);
    // SAFETY: the page is large enough for the words, suitably aligned, and writable. No other code
    // uses the page.
    unsafe { page.cast::<[u32; 6]>().write(words) };
    let address = page.as_ptr() as i64;
    print(interrupt(SOCKETCALL, operation, address, 0)?)
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn socketcall(_numbers: &[&str]) -> Result<(), InsideError> {
    Err("only x86-64 supports 32-bit system calls by `int 0x80`".into())
}

fn print(returned: i32) -> Result<(), InsideError> {
    say(&match returned {
        errno @ ..=-1 => format!("{:?}", nix::errno::Errno::from_raw(-errno)),
        number => number.to_string(),
    })
}

#[cfg(target_arch = "x86_64")]
fn interrupt(number: i64, first: i64, second: i64, third: i64) -> Result<i32, InsideError> {
    let returned: i64;
    // SAFETY: the tests pass no pointers, except to the page of `socketcall`. The code restores
    // rbx, which the compiler reserves.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {first}",
            "int 0x80",
            "xchg rbx, {first}",
            first = inout(reg) first => _,
            inout("rax") number => returned,
            in("rcx") second,
            in("rdx") third,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    Ok(returned as i32)
}

#[cfg(not(target_arch = "x86_64"))]
fn interrupt(_number: i64, _first: i64, _second: i64, _third: i64) -> Result<i32, InsideError> {
    Err("only x86-64 supports 32-bit system calls by `int 0x80`".into())
}
