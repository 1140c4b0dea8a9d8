//! A process that keeps the pipes of its standard streams locked.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use nix::fcntl::{SpliceFFlags, splice};

use super::InsideError;

/// Runs `inside lock-pipes DESCRIPTOR…`, which locks the pipes of these standard streams until the
/// process is killed.
///
/// splice(2) from a socket into a pipe waits for data with the pipe locked. Nobody sends data to the
/// socket here.
pub(super) fn lock(descriptors: &[&str]) -> Result<(), InsideError> {
    for descriptor in descriptors {
        let pipe: i32 = descriptor.parse()?;
        thread::spawn(move || wait_with_locked_pipe(pipe));
    }
    super::wait()
}

fn wait_with_locked_pipe(pipe: i32) {
    // SAFETY: the standard streams of this process are never closed.
    let pipe: BorrowedFd<'static> = unsafe { BorrowedFd::borrow_raw(pipe) };
    let Ok((socket, _silent)) = UnixStream::pair() else {
        return;
    };
    // The data makes the other side read the pipe.
    let _ = nix::unistd::write(pipe, b"data");
    let failed = splice(
        socket.as_fd(),
        None,
        pipe,
        None,
        4096,
        SpliceFFlags::empty(),
    );
    eprintln!("splice: {failed:?}");
}
