//! The limit on open descriptors (RLIMIT_NOFILE) of a server and of what it starts.

use std::sync::OnceLock;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

/// The limit that this process was started with.
static INHERITED: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit to the hard one: a stream takes about five descriptors, and the usual
/// 1024 are not enough for the sessions that are allowed at once. If the limit stays too low, the
/// calls that run into it report so.
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

/// Gives the process `pid` the limit from before [`raise`]. Containers inherit it from their monitor.
pub fn restore_for(pid: i32) {
    if let (Some(inherited), Some(pid)) = (INHERITED.get(), Pid::from_raw(pid)) {
        let _ = prlimit(Some(pid), Resource::Nofile, *inherited);
    }
}
