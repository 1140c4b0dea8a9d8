//! How many descriptors this server may have, and those it starts.

use std::sync::OnceLock;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

/// What this process was started with.
static GIVEN: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit to the hard one: a stream takes about five descriptors, and the usual
/// 1024 are not enough for the sessions that are allowed at once. A shortage is told where it is
/// met.
pub fn many() {
    let given = getrlimit(Resource::Nofile);
    let _ = GIVEN.set(given);
    let current = given.maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current, ..given });
}

/// Gives a monitor, from which containers have their limit, what we were given.
pub fn as_given(pid: i32) {
    if let (Some(given), Some(pid)) = (GIVEN.get(), Pid::from_raw(pid)) {
        let _ = prlimit(Some(pid), Resource::Nofile, *given);
    }
}
