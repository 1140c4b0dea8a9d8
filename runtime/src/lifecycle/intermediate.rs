//! An intermediate process, which enters existing namespaces and then creates a process of a
//! container.
//!
//! rrun itself must not enter these namespaces, for four reasons. First, the other processes of an
//! existing PID namespace could see the hooks, which are children of rrun, and could kill or trace
//! them. Second, the times in /proc depend on the time namespace of the reader. Third, rrun cannot
//! always return to its own namespaces, because it needs rights in the user namespace that owns
//! them. Fourth, rrun still needs the host's files.
//!
//! The new process must not enter them itself, either. A process in the PID namespace of a container
//! is visible to the container. The container can stop the process before it has entered the other
//! namespaces, and can use it to reach the host's network and files, for example through
//! `/proc/PID/net`. The intermediate process is not visible, because only the later children of a
//! process are in the PID namespace that the process enters.

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::channel::{self, ChildMessage};
use crate::sys::child::{NeverReturn, exit_now, reap};
use crate::sys::clone::{Cloned, clone3};
use rrun_kernel::session_keyring;

/// Creates an intermediate process, which calls `enter_and_clone`. This function must enter the
/// namespaces, and then call clone3 with the flag `CLONE_PARENT`, so that the new process is a child
/// of the calling process. Returns the result of clone3 in the calling process and in the new
/// process.
///
/// # Errors
/// Fails if the intermediate process could not be created or could not enter the namespaces.
pub(crate) fn clone_from_intermediate(
    enter_and_clone: impl FnOnce() -> Result<std::result::Result<Cloned, Errno>>,
) -> Result<std::result::Result<Cloned, Errno>> {
    // Use a separate channel for the intermediate process. On a shared channel, a message from the
    // new process could arrive before the message from the intermediate process.
    let (from_intermediate, to_parent) = channel::pair()?;
    let pidfd = match clone3(0, None)
        .doing(|| "create an intermediate process to enter namespaces (clone3)")?
    {
        Cloned::Parent { pidfd, .. } => pidfd,
        Cloned::Child => {
            let guard = NeverReturn;
            session_keyring::end_protection();
            let sent = match enter_and_clone() {
                Ok(Ok(Cloned::Child)) => {
                    std::mem::forget(guard);
                    return Ok(Ok(Cloned::Child));
                }
                // If the parent does not receive the process id, it closes its end of the channel
                // to the new process, which then exits.
                Ok(Ok(Cloned::Parent { pid, .. })) => to_parent.cloned(pid),
                // A negative number is the errno of clone3.
                Ok(Err(errno)) => to_parent.cloned(-errno.raw_os_error()),
                Err(error) => Err(error),
            };
            if let Err(error) = sent {
                to_parent.send_error(&error);
            }
            exit_now()
        }
    };
    // Close `to_parent` in the parent. Otherwise, receive() would not return end of file after the
    // death of the intermediate process.
    drop(to_parent);
    let answer = from_intermediate.receive(&pidfd);
    reap(&pidfd);
    match answer? {
        ChildMessage::Cloned(pid) if pid > 0 => {
            let doing = || format!("open process {pid}");
            let process = Pid::from_raw(pid).ok_or_else(|| Error::new(doing()))?;
            // The new process is a child of this process and is not reaped yet, so the kernel cannot
            // have reused its process id.
            let pidfd = pidfd_open(process, PidfdFlags::empty()).doing(doing)?;
            Ok(Ok(Cloned::Parent { pid, pidfd }))
        }
        ChildMessage::Cloned(number) => Ok(Err(Errno::from_raw_os_error(-number))),
        ChildMessage::Failed(error) => Err(error),
        _ => refuse!("the intermediate process died before it created a process of the container"),
    }
}
