//! A process that keeps new namespaces in existence as long as rrun needs them.

use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, pipe_with};

use crate::error::{Context, Result};
use crate::sys::child::{NeverReturn, exit_now, kill_and_reap};
use crate::sys::clone::{Cloned, clone3};

/// A sleeping process in new namespaces. Dropping the value ends the process.
pub(crate) struct NamespaceHolder {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// The process also ends if rrun dies, because this end of a pipe is then closed.
    _alive: OwnedFd,
}

impl NamespaceHolder {
    /// Creates the namespaces of `flags` (`CLONE_NEW*`) together with the process.
    pub(crate) fn create(flags: i32) -> Result<NamespaceHolder> {
        let doing = || "create a process in new namespaces (clone3)";
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).doing(doing)?;
        match clone3(flags as u64, None).doing(doing)? {
            Cloned::Child => {
                let _guard = NeverReturn;
                drop(writer);
                // This read returns when the parent closes its end of the pipe, or dies.
                let _ = rustix::io::read(&reader, &mut [0u8; 1]);
                exit_now()
            }
            Cloned::Parent { pid, pidfd } => Ok(NamespaceHolder {
                pid,
                pidfd,
                _alive: writer,
            }),
        }
    }
}

impl Drop for NamespaceHolder {
    fn drop(&mut self) {
        kill_and_reap(&self.pidfd);
    }
}
