//! The work of `exec`, which adds a process to a running container.
//!
//! An intermediate process enters the namespaces of the container's first process with one call of
//! setns(2) on the pidfd of the first process. It then creates the process in the container's cgroup
//! with clone3(2).

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::cgroup;
use crate::error::{Context, Result, refuse};
use crate::lifecycle::channel::{self, Channel};
use crate::lifecycle::foreground::Foreground;
use crate::lifecycle::intermediate::clone_from_intermediate;
use crate::lifecycle::program::{apply_process, execute, hand_over_terminal, join_keyring};
use crate::lifecycle::serve_child::{Task, serve_child};
use crate::lifecycle::state::State;
use crate::mounts::rootfs::Rootfs;
use crate::namespaces::{self, flag};
use crate::process::Process;
use crate::process::descriptors::Descriptors;
use crate::process::terminal::Terminal;
use crate::seccomp::SharedPage;
use crate::sys::child::{NeverReturn, exit_now, kill_and_reap};
use crate::sys::clone::{Cloned, clone3};
use crate::sys::files::{exists, remove_pid_file, write_pid_file};
use crate::sys::syscalls;

use oci_spec::runtime::LinuxNamespaceType as Type;
use rrun_kernel::procfs::Procfs;
use rrun_kernel::session_keyring;

/// The parameters of `exec`: a process, and the container in which it runs.
pub(crate) struct ExecRequest<'a> {
    pub(crate) state: &'a State,
    /// The pidfd of the container's first process or of one of its threads.
    pub(crate) init: OwnedFd,
    pub(crate) process: Process,
    /// The path of a cgroup for the process, relative to the container's cgroup.
    pub(crate) sub_cgroup: Option<&'a str>,
    /// The signals that can end the setup, if rrun waits for the exit of the process.
    pub(crate) foreground: Option<&'a mut Foreground>,
    pub(crate) console_socket: Option<OwnedFd>,
    pub(crate) pidfd_socket: Option<OwnedFd>,
    pub(crate) pid_file: Option<&'a Path>,
    pub(crate) descriptors: Descriptors,
}

/// A process that `exec` created, and that now runs its program.
pub(crate) struct ExecProcess {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// The master side of the process's terminal. This field is `None` if the process has no
    /// terminal, or if rrun has sent the master side to a console socket.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Creates a process in a running container. When this function returns, the process has executed
/// its program.
pub(crate) fn exec(mut request: ExecRequest<'_>) -> Result<ExecProcess> {
    let state = request.state;
    let agent = match state.seccomp.as_ref().and_then(|it| it.listener.as_ref()) {
        Some(listener) => Some(listener.connect()?),
        None => None,
    };
    let host = HostSide::prepare(&request)?;
    let foreground = request.foreground.take();
    if foreground.is_some() {
        session_keyring::protect()
            .doing(|| "protect the session keyring of rrun's caller from the container")?;
    }
    let cgroup_path = match request.sub_cgroup {
        Some(inner) => cgroup::existing_below(&state.cgroup, inner)?,
        None => state.cgroup.clone(),
    };
    let (channel, childs_end) = channel::pair()?;
    request.process.scheduling.apply_initial_affinity()?;
    let (pid, pidfd) = match clone_into_cgroup(&request, &cgroup_path, &host)? {
        Cloned::Child => {
            drop(channel);
            drop(agent);
            if foreground.is_some() {
                session_keyring::end_protection();
            }
            run_child(&mut request, childs_end, &host)
        }
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
    };
    drop(childs_end);
    let console = request.console_socket.take();
    let task = Task::Exec {
        state,
        process: &request.process,
        pid,
    };
    let terminal = serve_child(&channel, &pidfd, console, agent, foreground, task)
        .and_then(|terminal| publish(&request, pid, &pidfd).map(|()| terminal));
    match terminal {
        Ok(terminal) => Ok(ExecProcess {
            pid,
            pidfd,
            terminal,
        }),
        Err(error) => {
            kill_and_reap(&pidfd);
            Err(error)
        }
    }
}

/// The properties of rrun and the objects of the host that the creation of the process needs.
struct HostSide {
    /// True if rrun's caller is not root.
    unprivileged: bool,
    /// The result of [`joined_before_clone`].
    joined: u64,
    /// True if the new process itself enters a user namespace.
    enters_user: bool,
    /// The host's procfs, through which the new process sets its labels.
    procfs: Option<Procfs>,
    /// The directory /proc of the host, if the new process enters namespaces.
    proc: Option<OwnedFd>,
}

impl HostSide {
    fn prepare(request: &ExecRequest<'_>) -> Result<HostSide> {
        let unprivileged = !rustix::process::geteuid().is_root();
        if unprivileged {
            // The new process inherits this value. In the container's user namespace, it could not
            // set the value itself.
            request.process.apply_own_oom_score_adj()?;
        }
        let joined = joined_before_clone(request.state, unprivileged);
        Ok(HostSide {
            unprivileged,
            joined,
            enters_user: request.state.namespaces & !joined & flag(Type::User) != 0,
            procfs: request.process.labels.open_procfs()?,
            proc: open_proc(request.state)?,
        })
    }
}

/// Returns the `CLONE_NEW*` flags of the namespaces that an intermediate process enters before it
/// creates the new process. The result is 0 if the container has no PID namespace. The new process
/// then enters all namespaces itself, because the container sees all processes of the host anyway.
///
/// The new process itself enters a user namespace and a cgroup namespace, because the kernel would
/// otherwise not let it into the container's cgroup. But if rrun's caller is not root, rrun has
/// rights in the container's namespaces only in the user namespace.
fn joined_before_clone(state: &State, unprivileged: bool) -> u64 {
    let (pid, user) = (flag(Type::Pid), flag(Type::User));
    let joined = state.namespaces & !flag(Type::Cgroup);
    if unprivileged && joined & (pid | user) != 0 {
        joined
    } else if joined & pid != 0 {
        joined & !user
    } else {
        0
    }
}

/// Reports the process to rrun's caller through the PID file and the pidfd socket.
fn publish(request: &ExecRequest<'_>, pid: i32, pidfd: &OwnedFd) -> Result<()> {
    if let Some(path) = request.pid_file {
        write_pid_file(path, pid)?;
    }
    let sent = match &request.pidfd_socket {
        Some(socket) => channel::send_pidfd(socket, pidfd, "setns"),
        None => Ok(()),
    };
    if sent.is_err()
        && let Some(path) = request.pid_file
    {
        // The caller kills the process. If the removal also fails, the first error is the cause.
        let _ = remove_pid_file(path);
    }
    sent
}

/// Creates the process in the cgroup at `path`. If the container has enabled controllers for child
/// cgroups, the kernel refuses new processes in the container's cgroup itself. After such a
/// refusal, this function creates the process in the cgroup of the container's first process.
fn clone_into_cgroup(request: &ExecRequest<'_>, path: &Path, host: &HostSide) -> Result<Cloned> {
    let doing = |path: &Path| format!("create a process in cgroup {} (clone3)", path.display());
    if host.unprivileged && !exists(path)? {
        // If rrun's caller is unprivileged, rrun possibly created no cgroup for the container. The
        // new process then stays in rrun's cgroup.
        return enter_and_clone(request, None, host)?.doing(|| "create a process (clone3)");
    }
    let directory = cgroup::open(path)?;
    match enter_and_clone(request, Some(directory.as_fd()), host)? {
        Err(Errno::BUSY | Errno::OPNOTSUPP) if request.sub_cgroup.is_none() => {
            let path = cgroup::of_process(request.state.pid)?;
            let directory = cgroup::open(&path)?;
            enter_and_clone(request, Some(directory.as_fd()), host)?.doing(|| doing(&path))
        }
        result => result.doing(|| doing(path)),
    }
}

/// Creates the process in `cgroup`, and in the namespaces `host.joined`. Returns the result of
/// clone3.
fn enter_and_clone(
    request: &ExecRequest<'_>,
    cgroup: Option<BorrowedFd<'_>>,
    host: &HostSide,
) -> Result<std::result::Result<Cloned, Errno>> {
    if host.joined == 0 {
        return Ok(clone3(0, cgroup));
    }
    clone_from_intermediate(|| {
        if !host.unprivileged && !host.enters_user {
            // The new process inherits this value.
            request.process.apply_oom_score_adj("self")?;
        }
        join(&request.init, host.joined)?;
        Ok(clone3(libc::CLONE_PARENT as u64, cgroup))
    })
}

fn join(init: &OwnedFd, namespaces: u64) -> Result<()> {
    let types = ThreadNameSpaceType::from_bits_retain(namespaces as u32);
    move_into_thread_name_spaces(init.as_fd(), types)
        .doing(|| "enter the namespaces of the container's first process")
}

/// Opens the host's /proc for [`check_user_namespace`]. Returns `None` if the new process enters no
/// namespaces, or if an older version of rrun has created the container.
fn open_proc(state: &State) -> Result<Option<OwnedFd>> {
    if state.namespaces == 0 || state.user_namespace == 0 {
        return Ok(None);
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open("/proc", flags, Mode::empty());
    Ok(Some(opened.doing(|| "open /proc")?))
}

/// Checks that the container's first process has not left the container's user namespace.
///
/// Without any privileges, the first process can create a user namespace together with other
/// namespaces, for example with a mount namespace in which it chooses all programs. These programs
/// must not run with the rights that `exec` has in the container's user namespace. A process cannot
/// return to a user namespace that it has left. So this check suffices after the new process has
/// entered all namespaces of the first process.
fn check_user_namespace(state: &State, proc: &OwnedFd) -> Result<()> {
    // The new process always has the right to look at itself. If it has entered a user namespace, it
    // possibly has no right to look at the first process.
    let path = if state.namespaces & flag(Type::User) != 0 {
        "self/ns/user".to_owned()
    } else {
        format!("{}/ns/user", state.pid)
    };
    let stat = rustix::fs::statat(proc, &path, AtFlags::empty())
        .doing(|| format!("check user namespace /proc/{path}"))?;
    if stat.st_ino != state.user_namespace {
        refuse!(
            "cannot exec in container {}: its first process has entered another user namespace, in which it can have replaced the container's files",
            state.id
        );
    }
    Ok(())
}

/// Enters the namespaces that the intermediate process has not entered.
fn join_rest(request: &ExecRequest<'_>, host: &HostSide) -> Result<()> {
    let left = request.state.namespaces & !flag(Type::Pid) & !host.joined;
    if left != 0 {
        join(&request.init, left)?;
    }
    match &host.proc {
        Some(proc) => check_user_namespace(request.state, proc),
        None => Ok(()),
    }
}

fn run_child(request: &mut ExecRequest<'_>, channel: Channel, host: &HostSide) -> ! {
    let _guard = NeverReturn;
    let Err(error) = run_to_execve(request, &channel, host);
    channel.send_error(&error);
    exit_now()
}

fn run_to_execve(
    request: &mut ExecRequest<'_>,
    channel: &Channel,
    host: &HostSide,
) -> Result<Infallible> {
    let state = request.state;
    request.descriptors.close_leaked()?;
    let filter = match &state.seccomp {
        Some(filter) => Some((filter, SharedPage::new()?)),
        None => None,
    };
    syscalls::set_signal_mask(&syscalls::signal_set(&[])).doing(|| "unblock signals")?;
    rustix::process::setsid().doing(|| "become a session leader")?;
    syscalls::default_signals().doing(|| "reset ignored signals to their default action")?;
    if host.enters_user {
        // Setting the OOM score adjustment and the resource limits requires rights on the host.
        // This process loses these rights when it enters the user namespace, so the parent sets
        // both. If rrun's caller is not root, the parent does not have these rights either.
        channel.wait_for_parent()?;
    } else if !host.unprivileged && host.joined == 0 {
        request.process.apply_oom_score_adj("self")?;
    }
    request.process.scheduling.apply_final_affinity()?;
    // This process sets its labels through files in the host's /proc, because the /proc in the
    // container can be a fake.
    let labels = request.process.labels.open(host.procfs.as_ref())?;
    join_rest(request, host)?;
    if state.namespaces & flag(Type::User) != 0 {
        namespaces::become_root_of_user_namespace()?;
    }
    if !host.enters_user {
        request.process.apply_limits(0)?;
    }
    if let Some(name) = state.keyring() {
        join_keyring(&name, &state.id, &labels)?;
    }
    if request.process.terminal {
        take_terminal(request, channel)?;
    }
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

/// Opens a terminal in the container, and makes the terminal the controlling terminal of the
/// calling process.
fn take_terminal(request: &ExecRequest<'_>, channel: &Channel) -> Result<()> {
    let root = rustix::fs::open(
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(|| "open the container's root")?;
    let terminal = Terminal::open(&Rootfs::new(root), request.process.console_size)?;
    hand_over_terminal(&terminal, request.console_socket.is_some(), channel)?;
    terminal.make_controlling()
}
