//! The parent's part in the setup of a child. The child is a container's first process, or a
//! process that `exec` creates.

use std::os::fd::{AsFd as _, OwnedFd};

use oci_spec::runtime::LinuxNamespaceType as Type;

use crate::config::spec::OciState;
use crate::config::{Config, hooks};
use crate::error::{Error, Result};
use crate::lifecycle::channel::{Channel, ChildMessage};
use crate::lifecycle::container_dir::ContainerDir;
use crate::lifecycle::foreground::Foreground;
use crate::lifecycle::state::{State, Status};
use crate::log;
use crate::mounts::attach_for_first_process;
use crate::namespaces::net_devices;
use crate::process::Process;
use crate::process::terminal::send_to_console;
use crate::seccomp::{Agent, Report};
use crate::sys::child::{await_death, explain_death};

/// The purpose of the child, with the data that the parent needs to handle the child's messages.
pub(crate) enum Task<'a> {
    /// The child is a container's first process.
    Create {
        config: &'a Config,
        /// The container's root, if the parent attaches it.
        root: Option<OwnedFd>,
        /// True if the first process waits for `start` when it is ready.
        waits: bool,
        state: &'a mut State,
        dir: &'a ContainerDir,
        net_devices: &'a mut net_devices::Attached,
    },
    /// The child is a process that `exec` creates in a running container.
    Exec {
        state: &'a State,
        process: &'a Process,
        pid: i32,
    },
}

/// Handles the child's messages until the child has executed its program or waits for `start`. In
/// the foreground, a signal can end the setup. Sends the master side of the child's terminal over
/// the socket `console`. If `console` is `None`, returns the master side.
///
/// The child itself does not send the master side, because the kernel can refuse to send a
/// descriptor for the child (see [`crate::sys::unix_socket::hand_over`]).
pub(crate) fn serve_child(
    channel: &Channel,
    pidfd: &OwnedFd,
    console: Option<OwnedFd>,
    agent: Option<Agent<'_>>,
    foreground: Option<&mut Foreground>,
    mut task: Task<'_>,
) -> Result<Option<OwnedFd>> {
    serve(channel, pidfd, console, agent, foreground, &mut task).map_err(|error| {
        // If the child failed at the same time, its own error is the cause.
        explain_death(channel.pending_failure().unwrap_or(error), pidfd)
    })
}

fn serve(
    channel: &Channel,
    pidfd: &OwnedFd,
    mut console: Option<OwnedFd>,
    mut agent: Option<Agent<'_>>,
    mut foreground: Option<&mut Foreground>,
    task: &mut Task<'_>,
) -> Result<Option<OwnedFd>> {
    let mut terminal = None;
    let mut ready = false;
    let mut report = None;
    loop {
        if let Some(foreground) = &mut foreground {
            foreground.await_ready(channel.as_fd())?;
        }
        match channel.receive(pidfd)? {
            ChildMessage::NeedsParent => {
                task.do_parents_part()?;
                channel.answer()?;
            }
            ChildMessage::NeedsRoot => {
                task.attach_root(pidfd)?;
                channel.answer()?;
            }
            ChildMessage::RunHooks => {
                task.run_hooks(pidfd)?;
                channel.answer()?;
            }
            ChildMessage::Terminal(master) => match console.take() {
                Some(socket) => send_to_console(&socket, &master)?,
                None => terminal = Some(master),
            },
            ChildMessage::Filtered(page) => {
                ready = true;
                let page = report.insert(page);
                if let Some(agent) = agent.take() {
                    let (pid, state) = task.agent_data();
                    let check = || {
                        let foreground = foreground.as_deref_mut();
                        foreground.map_or(Ok(()), Foreground::check_setup_end)
                    };
                    agent.serve(page, pidfd, pid, state, check)?;
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

    /// Returns the child's process id and the container's state for the seccomp agent.
    fn agent_data(&self) -> (i32, OciState<'_>) {
        match self {
            Task::Create { state, .. } => (state.pid, state.oci_state_for_others(Status::Creating)),
            Task::Exec { state, pid, .. } => (*pid, state.oci_state_for_others(Status::Running)),
        }
    }

    /// Performs the steps that need rights on the host. In its namespaces, the child does not have
    /// these rights.
    fn do_parents_part(&mut self) -> Result<()> {
        match self {
            Task::Create {
                config,
                state,
                dir,
                net_devices,
                ..
            } => {
                let new_user = config.namespaces.is_new(Type::User);
                let root = rustix::process::geteuid().is_root();
                if new_user {
                    if root {
                        config.id_maps.write(state.pid, "linux.")?;
                    } else {
                        config.id_maps.write_unprivileged(state.pid, "linux.")?;
                    }
                }
                if config.namespaces.own(Type::User) {
                    // In an existing user namespace, the child's files in /proc belong to root. If
                    // rrun's caller is not root, the intermediate process has already set the
                    // value, and the child has inherited it.
                    if new_user || root {
                        config.process.apply_oom_score_adj(&state.pid.to_string())?;
                    }
                    config.process.apply_limits(state.pid)?;
                }
                let (devices, namespaces) = (&config.net_devices, &config.namespaces);
                net_devices::attach(devices, state.pid, namespaces, net_devices)?;
                if let Some(resctrl) = &config.resctrl {
                    let applied = resctrl.apply(&state.id, state.pid, &mut state.resctrl);
                    // Save the state even if a step failed. Then `delete` can remove the resctrl
                    // groups that rrun has created.
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

    /// Attaches the container's root in the child's mount namespace.
    fn attach_root(&self, pidfd: &OwnedFd) -> Result<()> {
        match self {
            Task::Create {
                config,
                state,
                root: Some(root),
                ..
            } => attach_for_first_process(root, pidfd, state.pid, &config.mount_sources()),
            _ => Err(unsupported_by_exec()),
        }
    }

    /// Runs the prestart and createRuntime hooks after the child has mounted all file systems. The
    /// specification requires these hooks to run on the host.
    fn run_hooks(&self, pidfd: &OwnedFd) -> Result<()> {
        let Task::Create { config, state, .. } = self else {
            return Err(unsupported_by_exec());
        };
        let hooks = &config.hooks;
        let shown = state.json_for_hooks(Status::Creating);
        #[allow(deprecated)] // prestart is deprecated, but callers still use it
        let prestart = hooks.prestart().as_ref();
        let host = hooks::HookPlace::OnHost(Some(pidfd));
        log::debug(|| "run the prestart and createRuntime hooks".to_owned());
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
            Task::Create { .. } => "the container's first process died while it was being set up",
            Task::Exec { .. } => "the new process died while it was being set up",
        })
    }

    /// Returns the error for a `Cloned` message on the child's channel. Only an intermediate
    /// process sends `Cloned`, and the intermediate process has its own channel.
    fn misplaced_clone(&self) -> Error {
        match self {
            Task::Create { .. } => {
                Error::new("the container's first process reported that it created another process")
            }
            Task::Exec { .. } => unsupported_by_exec(),
        }
    }
}

fn unsupported_by_exec() -> Error {
    Error::new("the new process sent a request that exec does not support")
}
