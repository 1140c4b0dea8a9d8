//! The birth of a container, from the side of rrun, its parent.
//!
//! One clone3(2) makes the first process: in its cgroup, whose limits are in place, and in
//! all its new namespaces. While that process builds its own surroundings (see
//! [`crate::lifecycle::init`]), this one writes down that it exists, and does for it what only the
//! host's side can do. If anything fails, everything made so far is rollback.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::SystemTime;

use oci_spec::runtime::{Hooks, LinuxNamespaceType as Type};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};

use crate::cgroup::{self, Cgroup, CgroupLocation};
use crate::config::{Config, hooks};
use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::channel::{self, Channel, ChildMessage};
use crate::lifecycle::container_dir::ContainerDir;
use crate::lifecycle::init::Init;
use crate::lifecycle::notify_socket::{self, NotifySocket, ServiceManager};
use crate::lifecycle::start_socket;
use crate::lifecycle::state::{State, Status};
use crate::log;
use crate::mounts::HostMounts;
use crate::namespaces::{OpenNamespace, flag, net_devices, resctrl, unshare_time};
use crate::process::descriptors::Descriptors;
use crate::seccomp::{Agent, Report};
use crate::sys::child::{NeverReturn, await_death, exit_now, explain_death, kill_and_reap};
use crate::sys::clone::{Cloned, clone3};
use crate::sys::files::write_pid_file;
use crate::sys::procfs::process_stat;
use crate::sys::time::rfc3339_nanos;

/// How a container is to be made, beside its configuration.
pub(crate) struct CreateRequest<'a> {
    pub(crate) root: &'a Path,
    pub(crate) id: &'a str,
    pub(crate) config: &'a Config,
    /// Whether its program waits for `start`.
    pub(crate) waits: bool,
    pub(crate) console_socket: Option<OwnedFd>,
    pub(crate) pidfd_socket: Option<OwnedFd>,
    pub(crate) pid_file: Option<&'a Path>,
    pub(crate) no_pivot: bool,
    pub(crate) new_keyring: bool,
    /// Whether systemd makes the cgroup.
    pub(crate) systemd_cgroup: bool,
    pub(crate) descriptors: Descriptors,
    /// The service manager's socket, if the container is to have one to it.
    pub(crate) notify: Option<ServiceManager>,
}

/// A container that was made.
pub(crate) struct Created {
    pub(crate) state: State,
    pub(crate) pidfd: OwnedFd,
    /// The master side of its terminal, if that was not sent to a console socket.
    pub(crate) terminal: Option<OwnedFd>,
    /// Where it says that it is ready, unless it waits for `start`.
    pub(crate) notify: Option<NotifySocket>,
}

/// What has to be rollback if a later step fails.
struct Rollback<'a> {
    id: &'a str,
    dir: Option<ContainerDir>,
    cgroup: Option<&'a CgroupLocation>,
    child: Option<OwnedFd>,
    hooks: Option<(&'a Hooks, String)>,
    resctrl: resctrl::ResctrlGroups,
    disarmed: bool,
}

impl Drop for Rollback<'_> {
    fn drop(&mut self) {
        if self.disarmed {
            return;
        }
        if let Some(child) = &self.child {
            kill_and_reap(child);
        }
        if let Some(place) = &self.cgroup
            && let Err(error) = cgroup::remove(&place.path, place.unit())
        {
            log::warning(&format!("undo the creation of {}: {error}", self.id));
        }
        if let Err(error) = self.resctrl.remove() {
            log::warning(&format!("undo the creation of {}: {error}", self.id));
        }
        if let Some(Err(error)) = self.dir.take().map(ContainerDir::remove) {
            log::warning(&format!("undo the creation of {}: {error}", self.id));
        }
        if let Some((hooks, state)) = &self.hooks {
            hooks::run_and_log_failures("poststop", hooks.poststop().as_ref(), state);
        }
    }
}

/// Makes a container. When this returns, its program is executed, or waits for `start`.
pub(crate) fn create(request: CreateRequest<'_>) -> Result<Created> {
    let config = request.config;
    let place = CgroupLocation::new(
        &config.cgroups_path,
        &config.annotations,
        request.id,
        request.systemd_cgroup,
    )?;
    // An agent that is not there is found out before_clone anything is made.
    let agent = match config.seccomp.as_ref().and_then(|it| it.listener.as_ref()) {
        Some(listener) if request.waits => {
            // Only `start` loads the filter, and it connects to the agent then.
            listener.check()?;
            None
        }
        Some(listener) => Some(listener.connect()?),
        None => None,
    };
    let mut rollback = Rollback {
        id: request.id,
        dir: None,
        cgroup: None,
        child: None,
        hooks: None,
        resctrl: resctrl::ResctrlGroups::default(),
        disarmed: false,
    };
    let dir = &*rollback
        .dir
        .insert(ContainerDir::create(request.root, request.id)?);
    let mut state = new_state(&request, &place);
    // Before the cgroup is made: whatever happens, `delete` will know where it is.
    dir.link_cgroup(&state.cgroup)?;
    state.save(dir)?;
    let mut notify = None;
    if let Some(manager) = &request.notify {
        notify_socket::make_directory(dir.path())?;
        if !request.waits {
            notify = NotifySocket::bind(dir.path(), manager)?;
        }
    }
    let unprivileged = !rustix::process::geteuid().is_root();
    let mut cgroup = match place.create(request.id, &config.resources) {
        Err(error) if unprivileged && config.can_do_without_cgroup() => {
            log::debug(|| format!("the container gets no cgroup of its own: {error}"));
            None
        }
        cgroup => Some(cgroup?),
    };
    if let Some(cgroup) = &cgroup {
        rollback.cgroup = Some(&place);
        cgroup.apply(&config.resources)?;
        log::debug(|| format!("made cgroup {} with its limits", state.cgroup.display()));
    }
    // Loading them takes long, and the first process has other things to do; a container that
    // waits for `start` runs nothing before_clone this one is done.
    let devices_later = request.waits && config.opens_no_devices();
    if let Some(cgroup) = cgroup.as_ref().filter(|_| !devices_later) {
        cgroup.apply_devices(&config.resources)?;
    }

    let mut flags = config.namespaces.new & !flag(Type::Cgroup);
    if !config.time_offsets.is_empty() {
        unshare_time(&config.time_offsets)?;
        flags &= !flag(Type::Time);
    }
    let user = config.namespaces.own(Type::User);
    let host_mounts = HostMounts::before_clone(&config.mount_sources())?;
    let joins = config.namespaces.open_joins()?;
    let (after_clone, before_clone): (Vec<OpenNamespace>, Vec<OpenNamespace>) =
        joins.into_iter().partition(|join| {
            !join.is_entered_by_children() && (!user || join.is_entered_after_clone())
        });
    let gate = if request.waits {
        Some(start_socket::listen(dir.path())?)
    } else {
        None
    };
    let (channel, childs_end) = channel::pair()?;

    let in_cgroup = || format!("in cgroup {}", state.cgroup.display());
    let born = if user && !before_clone.is_empty() {
        clone_from_intermediate(flags, cgroup.as_ref(), before_clone)?
    } else {
        for join in &before_clone {
            join.enter()?;
        }
        clone3(flags, cgroup.as_ref().map(Cgroup::as_fd)).doing(|| {
            format!(
                "make the container's first process {} (clone3)",
                in_cgroup()
            )
        })?
    };
    let (pid, pidfd) = match born {
        Cloned::Child => {
            // The parent's things to unmake are not the child's; nor is the lock, which
            // would otherwise be held for as long as it lives.
            rollback.disarmed = true;
            drop(rollback);
            drop(channel);
            drop(agent);
            if let Some(cgroup) = cgroup {
                cgroup.leave_to_parent();
            }
            Init {
                config,
                state: &state,
                channel: childs_end,
                joins: after_clone,
                host_mounts,
                console_socket: request.console_socket,
                gate,
                no_pivot: request.no_pivot,
                new_keyring: request.new_keyring,
                descriptors: request.descriptors,
                unprivileged,
                host_pid: None,
            }
            .run()
        }
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
    };
    drop(host_mounts);
    drop(childs_end);
    drop(gate);
    log::debug(|| format!("made the container's first process {pid}"));
    let pidfd = &*rollback.child.insert(pidfd);
    if let Some(cgroup) = &mut cgroup {
        cgroup.release_placeholder(&config.resources)?;
    }
    if let Some(cgroup) = cgroup.as_ref().filter(|_| devices_later) {
        cgroup.apply_devices(&config.resources)?;
    }

    state.pid = pid;
    state.start_time = process_stat(pid)?.map_or(0, |(start_time, _)| start_time);
    state.save(dir)?;

    rollback.hooks = Some((&config.hooks, state.json_for_hooks(Status::Stopped)));
    let terminal = serve_child(
        &channel,
        &mut state,
        &request,
        dir,
        pidfd,
        &mut rollback.resctrl,
        agent,
    )
    .map_err(|error| explain_death(error, pidfd))?;
    log::debug(|| match request.waits {
        true => format!("container {} is made, and waits for start", request.id),
        false => format!("container {} executes its program", request.id),
    });
    if let Some(path) = request.pid_file {
        write_pid_file(path, pid)?;
    }
    if let Some(socket) = &request.pidfd_socket {
        channel::send_pidfd(socket, pidfd, "standard")?;
    }
    if request.waits {
        start_socket::publish(dir)?;
    }
    if !dir.is_linked()? {
        refuse!(
            "container {} was removed while it was being made",
            request.id
        );
    }
    rollback.disarmed = true;
    let Some(pidfd) = rollback.child.take() else {
        refuse!("the container's first process is lost");
    };
    Ok(Created {
        state,
        pidfd,
        terminal,
        notify,
    })
}

/// Has the first process made by another, which enters the namespaces `before_clone` first.
///
/// Only needed beside a user namespace. New namespaces belong to the user namespace of the
/// process that makes them, and existing ones can be entered only by who has rights over
/// theirs: nothing but the order host, others, user, birth will do. This process can not
/// go that way itself, for it would not come back to the host's rights, which it needs.
fn clone_from_intermediate(
    flags: u64,
    cgroup: Option<&Cgroup>,
    mut before_clone: Vec<OpenNamespace>,
) -> Result<Cloned> {
    // Not the container's channel: on that one, the process made may be the first to speak.
    let (from_intermediate, to_parent) = channel::pair()?;
    let pidfd = match clone3(0, None).doing(|| "make a process to enter namespaces (clone3)")? {
        Cloned::Parent { pidfd, .. } => pidfd,
        Cloned::Child => {
            let guard = NeverReturn;
            before_clone.sort_by_key(OpenNamespace::is_user);
            let born = before_clone
                .iter()
                .try_for_each(OpenNamespace::enter)
                .and_then(|()| {
                    clone3(flags | libc::CLONE_PARENT as u64, cgroup.map(Cgroup::as_fd))
                        .doing(|| "make the container's first process beside this one (clone3)")
                });
            match born {
                Ok(Cloned::Child) => {
                    std::mem::forget(guard);
                    return Ok(Cloned::Child);
                }
                // If the parent is gone, the process made will find that out itself.
                Ok(Cloned::Parent { pid, .. }) => drop(to_parent.cloned(pid)),
                Err(error) => to_parent.send_error(&error),
            }
            exit_now()
        }
    };
    // Or it would not be told when the others die.
    drop(to_parent);
    let answer = from_intermediate.receive();
    let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
    match answer? {
        ChildMessage::Cloned(pid) => {
            let doing = || format!("open process {pid}");
            let process = Pid::from_raw(pid).ok_or_else(|| Error::new(doing()))?;
            // It is a child of this process, which has not waited for it: no other can
            // have its id yet.
            let pidfd = pidfd_open(process, PidfdFlags::empty()).doing(doing)?;
            Ok(Cloned::Parent { pid, pidfd })
        }
        ChildMessage::Failed(error) => Err(error),
        _ => refuse!("the process that was to enter the namespaces died"),
    }
}

fn new_state(request: &CreateRequest<'_>, place: &CgroupLocation) -> State {
    let config = request.config;
    State {
        oci_version: config.oci_version.clone(),
        id: request.id.to_owned(),
        pid: 0,
        start_time: 0,
        bundle: config.bundle.clone(),
        rootfs: config.rootfs.clone(),
        created: rfc3339_nanos(SystemTime::now()),
        owner: owner(),
        annotations: config.annotations.clone().into_iter().collect(),
        cgroup: place.path.clone(),
        unit: place.unit().map(str::to_owned),
        memory_swap: cgroup::memory_swap(&config.resources).unwrap_or(0),
        namespaces: config.namespaces.own_flags(),
        new_pid_namespace: config.namespaces.is_new(Type::Pid),
        process: config.process_spec.clone(),
        personality: config.personality.clone(),
        memory_policy: config.memory_policy.clone(),
        keeps_keyring: !request.new_keyring,
        resctrl: resctrl::ResctrlGroups::default(),
        hooks: config.hooks.clone(),
        seccomp: config.seccomp.clone(),
    }
}

/// The name of rrun's caller, as far as the host's /etc/passwd has it.
fn owner() -> String {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return "root".to_owned();
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid.as_raw())).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| uid.as_raw().to_string())
}

/// Does for the child what it asks for, until it is ready (if it then waits) or has become
/// its program. Returns the terminal, if it hands one over.
fn serve_child(
    channel: &Channel,
    state: &mut State,
    request: &CreateRequest<'_>,
    dir: &ContainerDir,
    pidfd: &OwnedFd,
    made: &mut resctrl::ResctrlGroups,
    mut agent: Option<Agent<'_>>,
) -> Result<Option<OwnedFd>> {
    let (config, waits) = (request.config, request.waits);
    let hooks = &config.hooks;
    let mut terminal = None;
    let mut ready = false;
    let mut report = None;
    loop {
        match channel.receive()? {
            ChildMessage::NeedsParent => {
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
                    // First it is known what `delete` has to remove, or the undoing.
                    state.save(dir)?;
                    *made = state.resctrl.clone();
                    applied?;
                }
                channel.answer()?;
            }
            ChildMessage::RunHooks => {
                let shown = state.json_for_hooks(Status::Creating);
                #[allow(deprecated)] // prestart is: callers use it all the same
                let host = hooks::HookPlace::OnHost(Some(pidfd));
                log::debug(|| "run hooks prestart and createRuntime".to_owned());
                hooks::run("prestart", hooks.prestart().as_ref(), &shown, host)?;
                hooks::run(
                    "createRuntime",
                    hooks.create_runtime().as_ref(),
                    &shown,
                    host,
                )?;
                channel.answer()?;
            }
            ChildMessage::Cloned(_) => refuse!("the container's first process told of another"),
            ChildMessage::Terminal(master) => terminal = Some(master),
            ChildMessage::Filtered(page) => {
                ready = true;
                let page = report.insert(page);
                if let Some(agent) = agent.take() {
                    let shown = state.oci_state_for_others(Status::Creating);
                    agent.serve(page, pidfd, state.pid, shown)?;
                }
            }
            ChildMessage::Ready if waits => return Ok(terminal),
            ChildMessage::Ready => ready = true,
            ChildMessage::Closed if ready => {
                report.as_ref().map_or(Ok(()), Report::verdict)?;
                return Ok(terminal);
            }
            ChildMessage::Closed => {
                await_death(pidfd);
                refuse!("the container's first process died while it was being made")
            }
            ChildMessage::Failed(error) => return Err(error),
        }
    }
}
