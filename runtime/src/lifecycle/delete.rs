//! The deletion of a container, including its processes, its cgroup and its directory.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};

use crate::config::hooks;
use crate::error::{Context, Error, Kind, Result, refuse};
use crate::lifecycle::container_dir::{self, ContainerDir, Lock};
use crate::lifecycle::state::{State, Status};
use crate::lifecycle::state_root::StateRoot;
use crate::sys::syscalls::pidfd_send_signal;
use crate::{cgroup, log};

/// The maximum time that rrun waits for the exit of a container's first process after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// The time after which rrun checks whether a killed process has exited although its pidfd does not
/// report its exit.
const EXIT_CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// Deletes a container. If `force` is true, this function first kills a running container, and
/// reports success if the container does not exist.
pub(crate) fn delete(root: &StateRoot, id: &str, force: bool) -> Result<()> {
    let directory = container_dir::directory(root, id)?;
    if !force && let Ok(state) = State::load(root, id) {
        // If the container is running, fail immediately, without waiting for the lock.
        check_removable(&state, &directory)?;
    }
    let missing = || Error::new(format!("container does not exist: {id}"));
    let lock = ContainerDir::lock(root, &directory, || {
        if force {
            // If another rrun process is still creating the container, it holds the lock. Kill the
            // container's processes, so that the creation fails and the lock is released.
            kill_unlocked(&directory);
        }
    })?;
    let dir = match lock {
        Lock::Acquired(dir) => dir,
        Lock::Missing if force => return Ok(()),
        Lock::Missing => return Err(missing().with_kind(Kind::NoSuchContainer)),
        Lock::Busy if force => return delete_unlocked(&directory, id),
        Lock::Busy => {
            refuse!("cannot delete container {id}: another process is creating or removing it")
        }
    };
    let state = match State::load(root, id) {
        Ok(state) => state,
        // A `create` command was killed before it wrote the state file. Remove the container's
        // cgroup and the container's directory.
        Err(error) if error.kind() == Kind::NoSuchContainer => {
            delete_without_state(dir)?;
            return if force { Ok(()) } else { Err(error) };
        }
        Err(error) if force => {
            log::warning(&format!(
                "{error}; rrun removes container {id} although it cannot read the container's state"
            ));
            return delete_without_state(dir);
        }
        Err(error) => return Err(error),
    };
    if !force {
        check_removable(&state, &directory)?;
    }
    destroy(dir, &state)
}

fn check_removable(state: &State, directory: &Path) -> Result<()> {
    match state.status(directory)? {
        Status::Stopped | Status::Created => Ok(()),
        status => refuse!(
            "cannot delete container {} that is not stopped: {}",
            state.id,
            status.as_str()
        ),
    }
}

/// Deletes a container whose first process has exited, unless another process has already deleted
/// it.
pub(crate) fn delete_after_exit(root: &StateRoot, state: &State) -> Result<()> {
    let directory = container_dir::directory(root, &state.id)?;
    match ContainerDir::lock(root, &directory, || {})? {
        Lock::Acquired(dir) => destroy(dir, state),
        Lock::Missing => Ok(()),
        Lock::Busy => refuse!(
            "cannot delete container {}: another process is removing it",
            state.id
        ),
    }
}

/// Kills all processes of a container that another rrun process is creating.
fn kill_unlocked(directory: &Path) {
    if let Some(cgroup) = container_dir::linked_cgroup(directory)
        && let Err(error) = cgroup::kill_all(&cgroup)
    {
        log::warning(&error.to_string());
    }
}

/// Deletes a container without holding its lock. The rrun process that holds the lock hangs, for
/// example in a hook.
///
/// This function must remove the container's directory before it removes the container's cgroup.
/// The last step of a creation checks that the directory exists, and undoes the creation if the
/// directory is missing. All processes that rrun started for the container before this check are in
/// the cgroup. The removal of the cgroup kills these processes.
fn delete_unlocked(directory: &Path, id: &str) -> Result<()> {
    log::warning(&format!(
        "another process has been creating or removing container {id} for a long time; rrun removes the container anyway"
    ));
    let cgroup = container_dir::linked_cgroup(directory);
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).doing(|| format!("remove {}", directory.display()));
        }
        _ => {}
    }
    cgroup.map_or(Ok(()), |cgroup| {
        cgroup::remove(&cgroup, cgroup::unit_at(&cgroup).as_deref())
    })
}

/// Deletes a container whose state cannot be read. To kill the container's processes, this function
/// needs only the container's cgroup, because all of these processes are in the cgroup.
fn delete_without_state(dir: ContainerDir) -> Result<()> {
    if let Some(cgroup) = container_dir::linked_cgroup(dir.path()) {
        cgroup::remove(&cgroup, cgroup::unit_at(&cgroup).as_deref())?;
    }
    dir.remove()
}

/// Kills the processes of a container, and removes its cgroup, its resctrl groups and its
/// directory. Then runs the poststop hooks.
fn destroy(dir: ContainerDir, state: &State) -> Result<()> {
    if let Some(process) = state.open_process()? {
        let doing = || {
            format!(
                "kill the first process of container {} (process id {})",
                state.id, state.pid
            )
        };
        match pidfd_send_signal(process.as_fd(), libc::SIGKILL) {
            Err(Errno::SRCH) => {}
            result => result.doing(doing)?,
        }
        if !wait_for_exit(state, &process)? {
            return Err(Error::new(format!(
                "{}: the process is still alive after {} s",
                doing(),
                KILL_TIMEOUT.as_secs()
            )));
        }
    }
    cgroup::remove(&state.cgroup, state.unit.as_deref())?;
    state.resctrl.remove()?;
    dir.remove()?;
    // Release the lock before the hooks run. Hooks can run for a long time, and the container's id
    // is already free.
    drop(dir);
    hooks::run_and_log_failures(
        "poststop",
        state.hooks.poststop().as_ref(),
        &state.json_for_hooks(Status::Stopped),
    );
    Ok(())
}

/// Waits until the killed first process has exited. Returns false if the process is still alive
/// after [`KILL_TIMEOUT`].
///
/// A process of the container can keep the first process alive: a tracer can stop a killed process
/// before it exits (PTRACE_O_TRACEEXIT of ptrace(2)). So this function kills the other processes if
/// the first process does not exit immediately.
fn wait_for_exit(state: &State, process: &OwnedFd) -> Result<bool> {
    let deadline = Instant::now() + KILL_TIMEOUT;
    let timeout = Timespec::try_from(EXIT_CHECK_INTERVAL).unwrap_or_default();
    loop {
        let mut watched = [PollFd::new(process, PollFlags::IN)];
        let exited = retry_on_intr(|| poll(&mut watched, Some(&timeout)));
        if exited.doing(|| format!("watch the first process of container {}", state.id))? != 0 {
            return Ok(true);
        }
        // The pidfd is not readable if all threads have exited, but the tracer of one of them has
        // not reaped it.
        if state.open_process()?.is_none() {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        cgroup::kill_all(&state.cgroup)?;
    }
}
