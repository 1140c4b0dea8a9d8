use std::os::fd::AsFd;

use rustix::io::Errno;

use crate::arguments::{Arguments, switch};
use crate::cgroup;
use crate::commands::globals::{Command, Globals};
use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::state::State;
use crate::sys::syscalls::{kill as send, pidfd_send_signal};
use rrun_kernel::signal::{self, Notation};

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
    let doing = || format!("send signal {signal} to container {id}");
    let process = state.open_process()?;
    // If the container did not get a new PID namespace, the kernel does not kill the other
    // processes when the first process dies. Therefore rrun sends SIGKILL to all processes of the
    // container.
    let all = arguments.is_set("all") || (signal == libc::SIGKILL && !state.new_pid_namespace);
    if all && signal == libc::SIGKILL {
        let left = || cgroup::all_pids(&state.cgroup).is_ok_and(|pids| !pids.is_empty());
        let running = process.is_some() || arguments.is_set("all") || left();
        cgroup::kill_all(&state.cgroup)?;
        if running {
            return Ok(0);
        }
    } else if arguments.is_set("all") {
        for pid in cgroup::all_pids(&state.cgroup)? {
            match send(pid, signal) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(errno) => return Err(errno).doing(doing),
            }
        }
        return Ok(0);
    }
    let not_running = || Error::new(format!("{}: container not running", doing()));
    let process = process.ok_or_else(not_running)?;
    match pidfd_send_signal(process.as_fd(), signal) {
        Err(Errno::SRCH) => Err(not_running()),
        result => result.doing(doing).map(|()| 0),
    }
}
