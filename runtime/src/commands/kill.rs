use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Resource, getrlimit, pidfd_open};

use crate::arguments::{Arguments, switch};
use crate::cgroup;
use crate::commands::globals::{Command, Globals};
use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::state::State;
use crate::log;
use crate::sys::files::exists;
use crate::sys::syscalls::pidfd_send_signal;
use rrun_kernel::signal::{self, Notation};

/// The number of processes that rrun opens without raising the limit on open descriptors. The usual
/// limit is 1024.
const PIDFDS_MAX: usize = 512;

pub(crate) const COMMAND: Command = Command {
    name: "kill",
    usage: "[options] <container-id> [signal]",
    about: "send a signal (default: SIGTERM) to a container's first process",
    flags: &[switch(
        "all",
        Some('a'),
        "send the signal to all processes of the container",
    )],
    rest_is_foreign: false,
    call: kill,
};

fn kill(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let (id, signal) = match arguments.positional.as_slice() {
        [id, signal] if !signal.is_empty() => (id, signal.as_str()),
        [id] | [id, _] => (id, "SIGTERM"),
        all => refuse!(
            "kill needs a container id and optionally a signal, but {} arguments are given",
            all.len()
        ),
    };
    let signal = signal::parse(signal, Notation::CommandLine)
        .ok_or_else(|| Error::new(format!("unknown signal \"{signal}\"")))?;
    let state = State::load(&globals.root, id)?;
    let process = state.open_process()?;
    let is_kill = signal == libc::SIGKILL;
    let requested = arguments.is_set("all");
    // If the container did not get a new PID namespace, the kernel does not kill the other
    // processes when the first process dies. Therefore rrun sends SIGKILL to all processes of the
    // container.
    if !requested && (!is_kill || state.new_pid_namespace) {
        return send_to_first(&state, process.as_ref(), signal);
    }
    // The container of an unprivileged caller does not always have a cgroup.
    if process.is_some() && !exists(&state.cgroup)? {
        send_to_first(&state, process.as_ref(), signal)?;
        return all_reached_without_cgroup(&state, signal, requested);
    }
    if is_kill {
        let running =
            process.is_some() || requested || rrun_kernel::cgroup::is_populated(&state.cgroup);
        cgroup::kill_all_and_survivors(&state.cgroup)?;
        if running {
            return Ok(0);
        }
        return send_to_first(&state, None, signal);
    }
    send_to_all(&state, signal)?;
    Ok(0)
}

fn doing(state: &State, signal: i32) -> String {
    format!("send signal {signal} to container {}", state.id)
}

fn send_to_first(state: &State, process: Option<&OwnedFd>, signal: i32) -> Result<u8> {
    let not_running = || {
        let doing = doing(state, signal);
        Error::new(format!("{doing}: container not running"))
    };
    match pidfd_send_signal(process.ok_or_else(not_running)?.as_fd(), signal) {
        Err(Errno::SRCH) => Err(not_running()),
        result => result.doing(|| doing(state, signal)).map(|()| 0),
    }
}

/// Returns whether all processes of a container without a cgroup have received the signal that rrun
/// has sent to the first process.
///
/// # Errors
/// Fails if rrun's caller requested the signal for all processes (`requested`), and if other
/// processes did not receive it.
fn all_reached_without_cgroup(state: &State, signal: i32, requested: bool) -> Result<u8> {
    if signal == libc::SIGKILL && state.new_pid_namespace {
        return Ok(0);
    }
    let sentence = format!(
        "{}: only the first process received the signal, because the container has no cgroup in which rrun can find its other processes",
        doing(state, signal)
    );
    if requested {
        return Err(Error::new(sentence));
    }
    log::warning(&sentence);
    Ok(0)
}

/// Sends the signal to all processes in the container's cgroup.
fn send_to_all(state: &State, signal: i32) -> Result<()> {
    let pids = cgroup::all_pids(&state.cgroup)?;
    for pids in pids.chunks(pidfds_max(pids.len())) {
        let mut processes = Vec::with_capacity(pids.len());
        for number in pids {
            // The kernel shows the id 0 for a process outside rrun's PID namespace.
            let Some(pid) = Pid::from_raw(*number) else {
                refuse!(
                    "{}: a process of the container is not in the PID namespace of rrun",
                    doing(state, signal)
                );
            };
            match pidfd_open(pid, PidfdFlags::empty()) {
                Ok(pidfd) => processes.push((*number, pidfd)),
                // EINVAL, or ENOENT since Linux 6.16, means that the kernel has reused the process
                // id as a thread id.
                Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => {}
                Err(errno) => return Err(errno).doing(|| format!("open process {number}")),
            }
        }
        // A process can have exited before rrun opened it, and the kernel can have given its id to
        // a process on the host. So read the ids in the cgroup again. If an id is still in the
        // cgroup, then the opened process was either in the cgroup or has exited.
        let still: BTreeSet<i32> = cgroup::all_pids(&state.cgroup)?.into_iter().collect();
        processes.retain(|(number, _)| still.contains(number));
        for (_, process) in &processes {
            match pidfd_send_signal(process.as_fd(), signal) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(errno) => return Err(errno).doing(|| doing(state, signal)),
            }
        }
    }
    Ok(())
}

/// Returns the number of processes that rrun keeps open at the same time. rrun reads the list of all
/// processes once for each such group. So rrun raises the limit on open descriptors if the list is
/// long.
fn pidfds_max(processes: usize) -> usize {
    if processes <= PIDFDS_MAX {
        return PIDFDS_MAX;
    }
    rrun_kernel::descriptor_limit::raise();
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit / 2).unwrap_or(usize::MAX).max(1)
}
