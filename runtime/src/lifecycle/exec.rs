//! A further process for a container that runs, as `exec` makes it.
//!
//! Born by clone3(2) in the container's cgroup; the descriptor of the container's first
//! process then leads into all of its namespaces with one setns(2).

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::cgroup;
use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::channel::{self, Channel, ChildMessage};
use crate::lifecycle::program::{apply_process, execute, join_keyring};
use crate::lifecycle::state::{State, Status};
use crate::mounts::rootfs::Rootfs;
use crate::namespaces::{self, flag};
use crate::process::Process;
use crate::process::descriptors::Descriptors;
use crate::process::terminal::Terminal;
use crate::seccomp::{Agent, Report, SharedPage};
use crate::sys::child::{NeverReturn, await_death, exit_now, explain_death, kill_and_reap};
use crate::sys::clone::{Cloned, clone3};
use crate::sys::files::write_pid_file;
use crate::sys::syscalls;

use oci_spec::runtime::LinuxNamespaceType as Type;

/// What is to be run where.
pub(crate) struct ExecRequest<'a> {
    pub(crate) state: &'a State,
    /// The container's first process.
    pub(crate) init: OwnedFd,
    pub(crate) process: Process,
    /// A cgroup below the container's own, from its root.
    pub(crate) sub_cgroup: Option<&'a str>,
    pub(crate) console_socket: Option<OwnedFd>,
    pub(crate) pidfd_socket: Option<OwnedFd>,
    pub(crate) pid_file: Option<&'a Path>,
    pub(crate) descriptors: Descriptors,
}

/// A process that has become its program.
pub(crate) struct ExecProcess {
    pub(crate) pidfd: OwnedFd,
    /// The master side of its terminal, if that was not sent to a console socket.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Makes the process. When this returns, it has executed its program.
pub(crate) fn exec(mut request: ExecRequest<'_>) -> Result<ExecProcess> {
    let state = request.state;
    let agent = match state.seccomp.as_ref().and_then(|it| it.listener.as_ref()) {
        Some(listener) => Some(listener.connect()?),
        None => None,
    };
    let unprivileged = !rustix::process::geteuid().is_root();
    // Its children are to be in there. Who is not root on the host has the right to only as
    // the user namespace's owner, from inside of it.
    let before = if unprivileged {
        flag(Type::Pid) | flag(Type::User)
    } else {
        flag(Type::Pid)
    };
    let before = state.namespaces & before;
    if before != 0 {
        join(&request.init, before)?;
    }
    let cgroup_path = match request.sub_cgroup {
        Some(inner) => cgroup::existing_below(&state.cgroup, inner)?,
        None => state.cgroup.clone(),
    };
    let (channel, childs_end) = channel::pair()?;
    request.process.scheduling.apply_initial_affinity()?;
    let (pid, pidfd) = match clone_into_cgroup(
        &cgroup_path,
        state,
        request.sub_cgroup.is_none(),
        unprivileged,
    )? {
        Cloned::Child => {
            drop(channel);
            drop(agent);
            run(&mut request, childs_end, before)
        }
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
    };
    drop(childs_end);
    drop(request.console_socket.take());
    let finished = serve_child(&channel, &request, pid, agent, &pidfd)
        .map_err(|error| explain_death(error, &pidfd))
        .and_then(|terminal| {
            if let Some(path) = request.pid_file {
                write_pid_file(path, pid)?;
            }
            if let Some(socket) = &request.pidfd_socket {
                channel::send_pidfd(socket, &pidfd, "setns")?;
            }
            Ok(terminal)
        });
    match finished {
        Ok(terminal) => Ok(ExecProcess { pidfd, terminal }),
        Err(error) => {
            kill_and_reap(&pidfd);
            Err(error)
        }
    }
}

/// Forks into a cgroup. If the container has divided its own among cgroups below, it can
/// take no processes; then the one that the first process is in has to do.
fn clone_into_cgroup(
    path: &Path,
    state: &State,
    may_follow: bool,
    unprivileged: bool,
) -> Result<Cloned> {
    let doing = |path: &Path| format!("make a process in cgroup {} (clone3)", path.display());
    if unprivileged && !path.exists() {
        // The container of an unprivileged caller, without a cgroup of its own.
        return clone3(0, None).doing(|| "make a process (clone3)");
    }
    let directory = cgroup::open(path)?;
    match clone3(0, Some(directory.as_fd())) {
        Err(Errno::BUSY | Errno::OPNOTSUPP) if may_follow => {
            let path = cgroup::of_process(state.pid)?;
            let directory = cgroup::open(&path)?;
            clone3(0, Some(directory.as_fd())).doing(|| doing(&path))
        }
        result => result.doing(|| doing(path)),
    }
}

fn join(init: &OwnedFd, namespaces: u64) -> Result<()> {
    let types = ThreadNameSpaceType::from_bits_retain(namespaces as u32);
    move_into_thread_name_spaces(init.as_fd(), types)
        .doing(|| "enter the namespaces of the container's first process")
}

fn run(request: &mut ExecRequest<'_>, channel: Channel, joined: u64) -> ! {
    let _guard = NeverReturn;
    let Err(error) = run_to_execve(request, &channel, joined);
    channel.send_error(&error);
    exit_now()
}

fn run_to_execve(
    request: &mut ExecRequest<'_>,
    channel: &Channel,
    joined: u64,
) -> Result<Infallible> {
    let state = request.state;
    request.descriptors.close_leaked()?;
    let filter = match &state.seccomp {
        Some(filter) => Some((filter, SharedPage::new()?)),
        None => None,
    };
    syscalls::set_signal_mask(&syscalls::signal_set(&[])).doing(|| "unblock signals")?;
    rustix::process::setsid().doing(|| "become a session leader")?;
    // An unprivileged parent could do no more than this process itself.
    let new_user = state.namespaces & !joined & flag(Type::User) != 0;
    if new_user {
        // The host's rights are needed for these; the parent sets them.
        channel.wait_for_parent()?;
    } else {
        request.process.apply_oom_score_adj("self")?;
    }
    request.process.scheduling.apply_final_affinity()?;
    // While /proc is the host's.
    let labels = request.process.labels.open()?;
    join(&request.init, state.namespaces & !flag(Type::Pid) & !joined)?;
    if state.namespaces & flag(Type::User) != 0 {
        namespaces::become_root_of_user_namespace()?;
    }
    if !new_user {
        request.process.apply_limits(0)?;
    }
    if !state.keeps_keyring {
        join_keyring(&state.id, &labels)?;
    }
    if request.process.terminal {
        let root = rustix::fs::open(
            "/",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing(|| "open the container's root")?;
        let terminal = Terminal::open(&Rootfs::new(root), request.process.console_size)?;
        let socket = request.console_socket.as_ref().map(AsFd::as_fd);
        terminal.hand_over(socket, channel)?;
        terminal.make_controlling()?;
    }
    request.console_socket = None;
    request.pidfd_socket = None;
    let mut kept = vec![channel.as_fd()];
    kept.extend(filter.as_ref().map(|(_, page)| page.as_fd()));
    let program = apply_process(
        &mut request.process,
        labels,
        &request.descriptors,
        filter.is_some(),
        &kept,
    )?;
    if filter.is_none() {
        channel.send_ready()?;
    }
    let send = |page: BorrowedFd<'_>| channel.send_page(page);
    Err(execute(&program, &request.process, filter, send))
}

fn serve_child(
    channel: &Channel,
    request: &ExecRequest<'_>,
    pid: i32,
    mut agent: Option<Agent<'_>>,
    pidfd: &OwnedFd,
) -> Result<Option<OwnedFd>> {
    let mut terminal = None;
    let mut ready = false;
    let mut report = None;
    loop {
        match channel.receive()? {
            ChildMessage::NeedsParent => {
                request.process.apply_oom_score_adj(&pid.to_string())?;
                request.process.apply_limits(pid)?;
                channel.answer()?;
            }
            ChildMessage::Terminal(master) => terminal = Some(master),
            ChildMessage::Filtered(page) => {
                ready = true;
                let page = report.insert(page);
                if let Some(agent) = agent.take() {
                    let shown = request.state.oci_state_for_others(Status::Running);
                    agent.serve(page, pidfd, pid, shown)?;
                }
            }
            ChildMessage::Ready => ready = true,
            ChildMessage::Closed if ready => {
                report.as_ref().map_or(Ok(()), Report::verdict)?;
                return Ok(terminal);
            }
            ChildMessage::Closed => {
                await_death(pidfd);
                refuse!("the process died while it was being made")
            }
            ChildMessage::Failed(error) => return Err(error),
            ChildMessage::Cloned(_) | ChildMessage::RunHooks => {
                return Err(Error::new("the process asked for what exec does not do"));
            }
        }
    }
}
