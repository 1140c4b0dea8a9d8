//! rrun's command line, which a process that rrun creates in a container must not show.
//!
//! The file /proc/PID/cmdline contains the part of the process's memory in which the kernel stored
//! the arguments of execve(2), and every other process in the container can read this file. Until
//! it executes its program, a process that rrun creates is a copy of rrun. So rrun's arguments, for
//! example the secrets in `exec --env`, would be visible in the container.

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// The memory of rrun's arguments, without the program's name and without the NUL at the end of
/// each argument.
static ARGUMENTS: OnceLock<Vec<&'static [AtomicU8]>> = OnceLock::new();

/// The arguments that [`hide`] has overwritten.
pub(crate) struct Hidden(Vec<u8>);

/// Records where the arguments are stored, so that [`hide`] can overwrite them.
///
/// # Safety
/// Each argument must be a string that ends with NUL, and must be valid and writable until the
/// program exits. The program must not read the arguments while they are hidden.
pub(crate) unsafe fn record(arguments: impl Iterator<Item = *const c_char>) {
    let memory = |argument: *const c_char| -> &'static [AtomicU8] {
        // SAFETY: the caller guarantees that the argument ends with NUL.
        let length = unsafe { CStr::from_ptr(argument) }.count_bytes();
        // SAFETY: the caller guarantees that the memory is valid and writable. An AtomicU8 has the
        // size and the alignment of a u8.
        unsafe { std::slice::from_raw_parts(argument.cast(), length) }
    };
    let _ = ARGUMENTS.set(arguments.map(memory).collect());
}

fn bytes() -> impl Iterator<Item = &'static AtomicU8> {
    ARGUMENTS.get().into_iter().flatten().copied().flatten()
}

/// Overwrites the arguments with NUL. rrun must call this function before it creates a process,
/// because the new process is visible in the container immediately.
pub(crate) fn hide() -> Hidden {
    let hide = |byte: &AtomicU8| {
        let shown = byte.load(Ordering::Relaxed);
        byte.store(0, Ordering::Relaxed);
        shown
    };
    Hidden(bytes().map(hide).collect())
}

impl Hidden {
    /// Writes the arguments again. After the creation of the process, only the creating process
    /// calls this function, so that the administrator sees the arguments of rrun itself.
    pub(crate) fn show(self) {
        for (byte, shown) in bytes().zip(self.0) {
            byte.store(shown, Ordering::Relaxed);
        }
    }
}
