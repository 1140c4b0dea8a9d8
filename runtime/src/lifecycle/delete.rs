//! Taking a container away: its processes, its cgroup, its directory.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::config::hooks;
use crate::error::{Context, Error, Kind, Result, refuse};
use crate::lifecycle::container_dir::{self, ContainerDir, Lock};
use crate::lifecycle::state::{State, Status};
use crate::sys::syscalls::pidfd_send_signal;
use crate::{cgroup, log};

/// How long a killed first process may take to die.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Removes a container. One that runs is only removed by `force`; with that it is no error
/// if there is none.
pub(crate) fn delete(root: &Path, id: &str, force: bool) -> Result<()> {
    let directory = container_dir::directory(root, id)?;
    if !force && let Ok(state) = State::load(root, id) {
        // Refuse now, before waiting for the lock.
        check_removable(&state, &directory)?;
    }
    let none = || Error::new(format!("container does not exist: {id}"));
    let held = ContainerDir::lock(&directory, || {
        if force {
            // Who makes it can not go on then, and gives it up.
            kill_unlocked(root, id);
        }
    })?;
    let dir = match held {
        Lock::Acquired(dir) => dir,
        Lock::Missing if force => return Ok(()),
        Lock::Missing => return Err(none().with_kind(Kind::NoSuchContainer)),
        Lock::Busy if force => return delete_unlocked(root, id),
        Lock::Busy => {
            refuse!("cannot delete container {id}: another process is making or removing it")
        }
    };
    let state = match State::load(root, id) {
        Ok(state) => state,
        // What is left of a `create` that was killed before it could say what it makes.
        Err(error) if error.kind() == Kind::NoSuchContainer => {
            delete_without_state(dir)?;
            return if force { Ok(()) } else { Err(error) };
        }
        Err(error) if force => {
            log::warning(&format!(
                "{error}; removing what is known of {id} all the same"
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

/// Removes a container whose first process has ended, unless somebody else did.
pub(crate) fn delete_after_exit(root: &Path, state: &State) -> Result<()> {
    match ContainerDir::lock(&container_dir::directory(root, &state.id)?, || {})? {
        Lock::Acquired(dir) => destroy(dir, state),
        Lock::Missing => Ok(()),
        Lock::Busy => refuse!(
            "cannot delete container {}: another process is removing it",
            state.id
        ),
    }
}

/// Kills what lives of a container that another process is making.
fn kill_unlocked(root: &Path, id: &str) {
    let directory = root.join(id);
    if let Some(cgroup) = container_dir::linked_cgroup(&directory)
        && let Err(error) = cgroup::kill_all(&cgroup)
    {
        log::warning(&error.to_string());
    }
}

/// Removes a container whose maker hangs, in a hook for example. Its directory goes before
/// its cgroup: the maker looks for the directory last of all, and unmakes everything if it
/// is gone; and what it had made before then is in the cgroup.
fn delete_unlocked(root: &Path, id: &str) -> Result<()> {
    log::warning(&format!(
        "another process has been making or removing container {id} for a while; removing it all the same"
    ));
    let directory = container_dir::directory(root, id)?;
    let cgroup = container_dir::linked_cgroup(&directory);
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).doing(|| format!("remove {}", directory.display()));
        }
        _ => {}
    }
    cgroup.map_or(Ok(()), |cgroup| {
        cgroup::remove(&cgroup, cgroup::unit_at(&cgroup).as_deref())
    })
}

/// Removes a container whose state can not be read. Everything of it that lives is in its
/// cgroup.
fn delete_without_state(dir: ContainerDir) -> Result<()> {
    if let Some(cgroup) = container_dir::linked_cgroup(dir.path()) {
        cgroup::remove(&cgroup, cgroup::unit_at(&cgroup).as_deref())?;
    }
    dir.remove()
}

/// Removes all that belongs to a container, killing it if need be.
fn destroy(dir: ContainerDir, state: &State) -> Result<()> {
    if let Some(process) = state.open_process()? {
        let doing = || format!("kill the first process of {} ({})", state.id, state.pid);
        match pidfd_send_signal(process.as_fd(), libc::SIGKILL) {
            Err(Errno::SRCH) => {}
            result => result.doing(doing)?,
        }
        let timeout = Timespec {
            tv_sec: KILL_TIMEOUT.as_secs() as _,
            tv_nsec: 0,
        };
        let dead = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout));
        if dead.doing(doing)? == 0 {
            return Err(Error::new(format!(
                "{}: it still lives after {} s",
                doing(),
                KILL_TIMEOUT.as_secs()
            )));
        }
    }
    cgroup::remove(&state.cgroup, state.unit.as_deref())?;
    state.resctrl.remove()?;
    dir.remove()?;
    // Hooks may take long, and the id is free already.
    drop(dir);
    hooks::run_and_log_failures(
        "poststop",
        state.hooks.poststop().as_ref(),
        &state.json_for_hooks(Status::Stopped),
    );
    Ok(())
}
