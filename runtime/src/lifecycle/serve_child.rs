//! What rrun does for a process on its way into a container, the first one or one of `exec`.

use std::os::fd::OwnedFd;

use oci_spec::runtime::LinuxNamespaceType as Type;

use crate::config::spec::OciState;
use crate::config::{Config, hooks};
use crate::error::{Error, Result};
use crate::lifecycle::channel::{Channel, ChildMessage};
use crate::lifecycle::container_dir::ContainerDir;
use crate::lifecycle::state::{State, Status};
use crate::log;
use crate::namespaces::net_devices;
use crate::process::Process;
use crate::seccomp::{Agent, Report};
use crate::sys::child::{await_death, explain_death};

/// What the child is made for, with what its requests need.
pub(crate) enum Task<'a> {
    /// A container's first process.
    Create {
        config: &'a Config,
        /// Whether it waits for `start` when it is ready.
        waits: bool,
        state: &'a mut State,
        dir: &'a ContainerDir,
    },
    /// A further process in a running container.
    Exec {
        state: &'a State,
        process: &'a Process,
        pid: i32,
    },
}

/// Serves the child until it has executed its program, or waits for `start`. Returns the terminal,
/// if it hands one over.
pub(crate) fn serve_child(
    channel: &Channel,
    pidfd: &OwnedFd,
    agent: Option<Agent<'_>>,
    mut task: Task<'_>,
) -> Result<Option<OwnedFd>> {
    serve(channel, pidfd, agent, &mut task).map_err(|error| explain_death(error, pidfd))
}

fn serve(
    channel: &Channel,
    pidfd: &OwnedFd,
    mut agent: Option<Agent<'_>>,
    task: &mut Task<'_>,
) -> Result<Option<OwnedFd>> {
    let mut terminal = None;
    let mut ready = false;
    let mut report = None;
    loop {
        match channel.receive()? {
            ChildMessage::NeedsParent => {
                task.do_parents_part()?;
                channel.answer()?;
            }
            ChildMessage::RunHooks => {
                task.run_hooks(pidfd)?;
                channel.answer()?;
            }
            ChildMessage::Terminal(master) => terminal = Some(master),
            ChildMessage::Filtered(page) => {
                ready = true;
                let page = report.insert(page);
                if let Some(agent) = agent.take() {
                    let (pid, state) = task.shown();
                    agent.serve(page, pidfd, pid, state)?;
                }
            }
            ChildMessage::Ready if task.waits() => return Ok(terminal),
            ChildMessage::Ready => ready = true,
            ChildMessage::Closed if ready => {
                report.as_ref().map_or(Ok(()), Report::verdict)?;
                return Ok(terminal);
            }
            ChildMessage::Closed => {
                await_death(pidfd);
                return Err(task.died());
            }
            ChildMessage::Failed(error) => return Err(error),
            ChildMessage::Cloned(_) => return Err(task.misplaced_clone()),
        }
    }
}

impl Task<'_> {
    fn waits(&self) -> bool {
        matches!(self, Task::Create { waits: true, .. })
    }

    /// The child's process id, and the container's state for the agent.
    fn shown(&self) -> (i32, OciState<'_>) {
        match self {
            Task::Create { state, .. } => (state.pid, state.oci_state_for_others(Status::Creating)),
            Task::Exec { state, pid, .. } => (*pid, state.oci_state_for_others(Status::Running)),
        }
    }

    /// Does what the child, in its namespaces, has no right to do itself.
    fn do_parents_part(&mut self) -> Result<()> {
        match self {
            Task::Create {
                config, state, dir, ..
            } => {
                if config.namespaces.is_new(Type::User) {
                    if rustix::process::geteuid().is_root() {
                        config.id_maps.write(state.pid, "linux.")?;
                    } else {
                        config.id_maps.write_unprivileged(state.pid, "linux.")?;
                    }
                }
                if config.namespaces.own(Type::User) {
                    config.process.apply_oom_score_adj(&state.pid.to_string())?;
                    config.process.apply_limits(state.pid)?;
                }
                net_devices::attach(&config.net_devices, state.pid)?;
                if let Some(resctrl) = &config.resctrl {
                    let applied = resctrl.apply(&state.id, state.pid, &mut state.resctrl);
                    // Before a failure is reported, because `delete` removes what was made.
                    state.save(dir)?;
                    applied?;
                }
                Ok(())
            }
            Task::Exec { process, pid, .. } => {
                process.apply_oom_score_adj(&pid.to_string())?;
                process.apply_limits(*pid)
            }
        }
    }

    /// Runs the hooks that the specification wants on the host, once everything is mounted.
    fn run_hooks(&self, pidfd: &OwnedFd) -> Result<()> {
        let Task::Create { config, state, .. } = self else {
            return Err(not_for_exec());
        };
        let hooks = &config.hooks;
        let shown = state.json_for_hooks(Status::Creating);
        #[allow(deprecated)] // prestart is: callers use it all the same
        let prestart = hooks.prestart().as_ref();
        let host = hooks::HookPlace::OnHost(Some(pidfd));
        log::debug(|| "run hooks prestart and createRuntime".to_owned());
        hooks::run("prestart", prestart, &shown, host)?;
        hooks::run(
            "createRuntime",
            hooks.create_runtime().as_ref(),
            &shown,
            host,
        )
    }

    fn died(&self) -> Error {
        Error::new(match self {
            Task::Create { .. } => "the container's first process died while it was being made",
            Task::Exec { .. } => "the process died while it was being made",
        })
    }

    /// Only an intermediate process reports a clone, on a channel of its own.
    fn misplaced_clone(&self) -> Error {
        match self {
            Task::Create { .. } => Error::new("the container's first process told of another"),
            Task::Exec { .. } => not_for_exec(),
        }
    }
}

fn not_for_exec() -> Error {
    Error::new("the process asked for what exec does not do")
}
