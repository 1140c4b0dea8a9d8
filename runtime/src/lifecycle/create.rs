//! `create` in rrun itself, the parent of the container's first process.
//!
//! Four steps: [`Creation::reserve`] takes the id and makes the cgroup with its limits,
//! [`Creation::spawn`] makes the first process in that cgroup and in its namespaces by one
//! clone3(2), [`Creation::serve`] does for that process what only the host's side can do (while it
//! builds its surroundings, see [`crate::lifecycle::init`]), and [`Creation::publish`] lets callers
//! find the result. If a step fails, [`Rollback`] undoes everything so far.

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
use crate::lifecycle::serve_child::{Task, serve_child};
use crate::lifecycle::start_socket;
use crate::lifecycle::state::{State, Status};
use crate::log;
use crate::mounts::HostMounts;
use crate::namespaces::resctrl::ResctrlGroups;
use crate::namespaces::{OpenNamespace, flag, unshare_time};
use crate::process::descriptors::Descriptors;
use crate::seccomp::Agent;
use crate::sys::child::{NeverReturn, exit_now, kill_and_reap};
use crate::sys::clone::{Cloned, clone3};
use crate::sys::files::write_pid_file;
use crate::sys::procfs::process_stat;
use crate::sys::time::rfc3339_nanos;

/// How to create a container, besides its configuration.
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
    /// The service manager that is notified when the container is ready.
    pub(crate) notify: Option<ServiceManager>,
}

/// A container that was made.
pub(crate) struct Created {
    pub(crate) state: State,
    pub(crate) pidfd: OwnedFd,
    /// The master side of its terminal, if that was not sent to a console socket.
    pub(crate) terminal: Option<OwnedFd>,
    /// Receives its notification that it is ready, unless it waits for `start`.
    pub(crate) notify: Option<NotifySocket>,
}

/// Creates a container. When this returns, its program is executed, or waits for `start`.
pub(crate) fn create(request: CreateRequest<'_>) -> Result<Created> {
    let (mut creation, channel) = Creation::reserve(request)?.spawn()?;
    let terminal = creation.serve(&channel)?;
    creation.publish(terminal)
}

/// A container that is being created.
struct Creation<'a> {
    request: CreateRequest<'a>,
    state: State,
    /// `None` for an unprivileged caller who may make none.
    cgroup: Option<Cgroup>,
    agent: Option<Agent<'a>>,
    notify: Option<NotifySocket>,
    /// Whether rrun's caller is not root.
    unprivileged: bool,
    rollback: Rollback<'a>,
}

/// Undoes a creation that failed, when it is dropped.
struct Rollback<'a> {
    id: &'a str,
    dir: ContainerDir,
    location: CgroupLocation,
    has_cgroup: bool,
    child: Option<OwnedFd>,
    resctrl: ResctrlGroups,
    /// The hooks, and the state that poststop hooks get.
    hooks: Option<(&'a Hooks, String)>,
    disarmed: bool,
}

impl Rollback<'_> {
    /// The pidfd of the first process.
    fn child(&self) -> Result<&OwnedFd> {
        self.child.as_ref().ok_or_else(lost)
    }

    /// Keeps what was made, and returns the pidfd of the first process.
    fn disarm(mut self) -> Result<OwnedFd> {
        self.disarmed = true;
        self.child.take().ok_or_else(lost)
    }
}

fn lost() -> Error {
    Error::new("the container's first process is lost")
}

impl Drop for Rollback<'_> {
    fn drop(&mut self) {
        if self.disarmed {
            return;
        }
        let log_failure = |result: Result<()>| {
            if let Err(error) = result {
                log::warning(&format!("undo the creation of {}: {error}", self.id));
            }
        };
        if let Some(child) = &self.child {
            kill_and_reap(child);
        }
        if self.has_cgroup {
            log_failure(cgroup::remove(&self.location.path, self.location.unit()));
        }
        log_failure(self.resctrl.remove());
        log_failure(self.dir.remove());
        if let Some((hooks, state)) = &self.hooks {
            // Hooks may take long, and the id is free already.
            self.dir.unlock();
            hooks::run_and_log_failures("poststop", hooks.poststop().as_ref(), state);
        }
    }
}

impl<'a> Creation<'a> {
    /// Takes the container's id, and makes its cgroup with all limits.
    fn reserve(request: CreateRequest<'a>) -> Result<Creation<'a>> {
        let config = request.config;
        let location = CgroupLocation::new(
            &config.cgroups_path,
            &config.annotations,
            request.id,
            request.systemd_cgroup,
        )?;
        // Before anything is made: a missing agent is found at once.
        let agent = connect_agent(config, request.waits)?;
        let dir = ContainerDir::create(request.root, request.id)?;
        let state = new_state(&request, &location);
        let mut creation = Creation {
            state,
            cgroup: None,
            agent,
            notify: None,
            unprivileged: !rustix::process::geteuid().is_root(),
            rollback: Rollback {
                id: request.id,
                dir,
                location,
                has_cgroup: false,
                child: None,
                resctrl: ResctrlGroups::default(),
                hooks: None,
                disarmed: false,
            },
            request,
        };
        let dir = &creation.rollback.dir;
        // Before the cgroup is made: whatever happens, `delete` will know where it is.
        dir.link_cgroup(&creation.state.cgroup)?;
        creation.state.save(dir)?;
        if let Some(manager) = &creation.request.notify {
            notify_socket::make_directory(dir.path())?;
            if !creation.request.waits {
                creation.notify = NotifySocket::bind(dir.path(), manager)?;
            }
        }
        creation.make_cgroup()?;
        Ok(creation)
    }

    fn make_cgroup(&mut self) -> Result<()> {
        let (config, rollback) = (self.request.config, &mut self.rollback);
        let mut cgroup = match rollback.location.create(rollback.id, &config.resources) {
            Err(error) if self.unprivileged && config.can_do_without_cgroup() => {
                log::debug(|| format!("the container gets no cgroup of its own: {error}"));
                return Ok(());
            }
            cgroup => cgroup?,
        };
        rollback.has_cgroup = true;
        // Loading the device program takes long, and the first process has other things to do
        // meanwhile; a container that waits for `start` runs nothing before this one is done.
        let defer_devices = self.request.waits && config.opens_no_devices();
        cgroup.apply(&config.resources, defer_devices)?;
        self.cgroup = Some(cgroup);
        Ok(())
    }

    /// Makes the first process. Only the parent returns, with its end of the channel between the
    /// two.
    fn spawn(mut self) -> Result<(Creation<'a>, Channel)> {
        let config = self.request.config;
        let mut flags = config.namespaces.new & !flag(Type::Cgroup);
        if !config.time_offsets.is_empty() {
            unshare_time(&config.time_offsets)?;
            flags &= !flag(Type::Time);
        }
        let user = config.namespaces.own(Type::User);
        let host_mounts = HostMounts::before_clone(&config.mount_sources())?;
        let (after_clone, before_clone): (Vec<OpenNamespace>, Vec<OpenNamespace>) = config
            .namespaces
            .open_joins()?
            .into_iter()
            .partition(|join| {
                !join.is_entered_by_children() && (!user || join.is_entered_after_clone())
            });
        let start_socket = if self.request.waits {
            Some(start_socket::listen(self.rollback.dir.path())?)
        } else {
            None
        };
        let (channel, childs_end) = channel::pair()?;
        let cloned = if user && !before_clone.is_empty() {
            clone_from_intermediate(flags, self.cgroup.as_ref(), before_clone)?
        } else {
            for join in &before_clone {
                join.enter()?;
            }
            clone3(flags, self.cgroup.as_ref().map(Cgroup::as_fd)).doing(|| {
                format!(
                    "make the container's first process in cgroup {} (clone3)",
                    self.state.cgroup.display()
                )
            })?
        };
        match cloned {
            Cloned::Child => {
                drop(channel);
                self.become_init(childs_end, after_clone, host_mounts, start_socket)
            }
            Cloned::Parent { pid, pidfd } => {
                drop(host_mounts);
                drop(childs_end);
                drop(start_socket);
                log::debug(|| format!("made the container's first process {pid}"));
                self.rollback.child = Some(pidfd);
                if let Some(cgroup) = &mut self.cgroup {
                    cgroup.complete(&config.resources)?;
                }
                self.state.pid = pid;
                self.state.start_time = process_stat(pid)?.map_or(0, |(start_time, _)| start_time);
                self.state.save(&self.rollback.dir)?;
                Ok((self, channel))
            }
        }
    }

    /// In the first process: what the parent made is not its own to undo, and it must not hold the
    /// lock on the container's directory for as long as it lives.
    fn become_init(
        mut self,
        channel: Channel,
        joins: Vec<OpenNamespace>,
        host_mounts: HostMounts,
        start_socket: Option<OwnedFd>,
    ) -> ! {
        self.rollback.disarmed = true;
        drop(self.rollback);
        drop(self.agent);
        if let Some(cgroup) = self.cgroup {
            cgroup.leave_to_parent();
        }
        // It unlinks the socket when it is dropped.
        std::mem::forget(self.notify);
        Init {
            config: self.request.config,
            state: &self.state,
            channel,
            joins,
            host_mounts,
            console_socket: self.request.console_socket,
            start_socket,
            no_pivot: self.request.no_pivot,
            new_keyring: self.request.new_keyring,
            descriptors: self.request.descriptors,
            unprivileged: self.unprivileged,
            host_pid: None,
        }
        .run()
    }

    /// Serves the first process until it waits for `start` or has executed its program. Returns the
    /// terminal, if it hands one over.
    fn serve(&mut self, channel: &Channel) -> Result<Option<OwnedFd>> {
        let (config, waits) = (self.request.config, self.request.waits);
        self.rollback.hooks = Some((&config.hooks, self.state.json_for_hooks(Status::Stopped)));
        let pidfd = self.rollback.child()?;
        let task = Task::Create {
            config,
            waits,
            state: &mut self.state,
            dir: &self.rollback.dir,
        };
        let served = serve_child(channel, pidfd, self.agent.take(), task);
        self.rollback.resctrl.clone_from(&self.state.resctrl);
        let terminal = served?;
        log::debug(|| {
            if waits {
                format!("container {} is made, and waits for start", self.request.id)
            } else {
                format!("container {} executes its program", self.request.id)
            }
        });
        Ok(terminal)
    }

    /// Lets the caller, and `start`, find the container.
    fn publish(self, terminal: Option<OwnedFd>) -> Result<Created> {
        let (request, rollback) = (&self.request, &self.rollback);
        if let Some(path) = request.pid_file {
            write_pid_file(path, self.state.pid)?;
        }
        if let Some(socket) = &request.pidfd_socket {
            channel::send_pidfd(socket, rollback.child()?, "standard")?;
        }
        if request.waits {
            start_socket::publish(&rollback.dir)?;
        }
        if !rollback.dir.is_linked()? {
            refuse!(
                "container {} was removed while it was being made",
                request.id
            );
        }
        Ok(Created {
            state: self.state,
            pidfd: self.rollback.disarm()?,
            terminal,
            notify: self.notify,
        })
    }
}

/// Connects to the agent of the seccomp filter, if it has one. The filter of a container that waits
/// is loaded only by `start`, which connects then; its agent's socket must exist all the same.
fn connect_agent(config: &Config, waits: bool) -> Result<Option<Agent<'_>>> {
    match config.seccomp.as_ref().and_then(|it| it.listener.as_ref()) {
        Some(listener) if waits => {
            listener.check()?;
            Ok(None)
        }
        Some(listener) => Some(listener.connect()).transpose(),
        None => Ok(None),
    }
}

/// Makes the first process from an intermediate process, which enters the namespaces
/// `before_clone`.
///
/// This is only needed with a user namespace. New namespaces belong to the user namespace of the
/// process that makes them, and to enter an existing one takes rights over the user namespace that
/// it belongs to. So the order must be: the other namespaces, the user namespace, clone3. This
/// process cannot do that itself, because it would lose its rights on the host, which it needs.
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
            let cloned = before_clone
                .iter()
                .try_for_each(OpenNamespace::enter)
                .and_then(|()| {
                    clone3(flags | libc::CLONE_PARENT as u64, cgroup.map(Cgroup::as_fd))
                        .doing(|| "make the container's first process beside this one (clone3)")
                });
            match cloned {
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
    // Close our copy, or receive() would not see end-of-file when the intermediate process dies.
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

fn new_state(request: &CreateRequest<'_>, location: &CgroupLocation) -> State {
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
        cgroup: location.path.clone(),
        unit: location.unit().map(str::to_owned),
        memory_swap: cgroup::memory_swap(&config.resources).unwrap_or(0),
        namespaces: config.namespaces.own_flags(),
        new_pid_namespace: config.namespaces.is_new(Type::Pid),
        process: config.process_spec.clone(),
        personality: config.personality.clone(),
        memory_policy: config.memory_policy.clone(),
        keeps_keyring: !request.new_keyring,
        resctrl: ResctrlGroups::default(),
        hooks: config.hooks.clone(),
        seccomp: config.seccomp.clone(),
    }
}

/// The name of rrun's caller in the host's /etc/passwd, or its user id.
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
