//! Taking a container away: its processes, its cgroup, its directory.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::error::{Context, Error, Kind, Result};
use crate::state::{self, State, Status};
use crate::syscalls::pidfd_send_signal;
use crate::{cgroup, hooks, log, refuse};

/// How long a killed first process may take to die.
const DEAD_WITHIN: Duration = Duration::from_secs(10);

/// Removes a container. One that runs is only removed by `force`; with that it is no error
/// if there is none.
pub fn delete(root: &Path, id: &str, force: bool) -> Result<()> {
    let directory = state::directory(root, id)?;
    let state = match State::load(root, id) {
        Ok(state) => state,
        Err(error) if error.kind() == Kind::NoSuchContainer => {
            // A directory without a state is what is left of a `create` that was killed
            // before it made anything else.
            if force || directory.exists() {
                state::release(&directory)?;
            }
            return if force { Ok(()) } else { Err(error) };
        }
        Err(error) if force => {
            log::warning(&format!(
                "{error}; removing what is known of {id} all the same"
            ));
            return remove_damaged(&directory);
        }
        Err(error) => return Err(error),
    };
    let status = state.status(&directory)?;
    match status {
        Status::Stopped | Status::Created => {}
        _ if force => {}
        _ => refuse!(
            "cannot delete container {id} that is not stopped: {}",
            status.as_str()
        ),
    }
    destroy(&directory, &state)
}

/// Removes a container whose state can not be read. What names its cgroup may still be in
/// there; everything else that lives is in that.
fn remove_damaged(directory: &Path) -> Result<()> {
    match State::cgroup_of_damaged(directory) {
        Some(cgroup) => cgroup::remove(&cgroup)?,
        None => log::warning("the state no longer names the cgroup, which may be left behind"),
    }
    state::release(directory)
}

/// Removes all that belongs to a container, killing it if need be.
pub fn destroy(directory: &Path, state: &State) -> Result<()> {
    if let Some(process) = state.open_process()? {
        let doing = || format!("kill the first process of {} ({})", state.id, state.pid);
        match pidfd_send_signal(process.as_fd(), libc::SIGKILL) {
            Err(Errno::SRCH) => {}
            result => result.doing(doing)?,
        }
        let timeout = Timespec {
            tv_sec: DEAD_WITHIN.as_secs() as _,
            tv_nsec: 0,
        };
        let dead = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout));
        if dead.doing(doing)? == 0 {
            return Err(Error::new(format!(
                "{}: it still lives after {} s",
                doing(),
                DEAD_WITHIN.as_secs()
            )));
        }
    }
    cgroup::remove(&state.cgroup)?;
    state::release(directory)?;
    hooks::run_all(
        "poststop",
        state.hooks.poststop().as_ref(),
        &state.for_hooks(Status::Stopped),
    );
    Ok(())
}
