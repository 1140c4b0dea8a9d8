//! The limit on open descriptors (RLIMIT_NOFILE) of the CRI server and of the monitors that it
//! starts.

use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

/// The limit on open descriptors that this process inherited.
static INHERITED: OnceLock<Rlimit> = OnceLock::new();

/// Raises this process's soft limit on open descriptors to its hard limit. The usual soft limit of
/// 1024 is too low for the allowed number of concurrent exec, attach and port-forward sessions.
/// Each session uses about five descriptors. A failure is ignored. If descriptors later run out,
/// the failing call returns its own error.
pub fn raise() {
    let inherited = getrlimit(Resource::Nofile);
    let _ = INHERITED.set(inherited);
    let current = inherited.maximum;
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current,
            ..inherited
        },
    );
}

/// Returns a sixteenth of this process's limit on open descriptors. This number is the limit on
/// objects of one kind that need a few descriptors each, so that other objects can have descriptors,
/// too.
pub fn share() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit / 16).unwrap_or(usize::MAX).max(1)
}

/// Gives the process `pid` the descriptor limit that the calling process had before it called
/// [`raise`]. The CRI server calls this function for each monitor, because containers inherit the
/// monitor's descriptor limit.
pub fn restore_for(pid: i32) -> Result<(), Errno> {
    if let (Some(inherited), Some(pid)) = (INHERITED.get(), Pid::from_raw(pid)) {
        prlimit(Some(pid), Resource::Nofile, *inherited)?;
    }
    Ok(())
}
