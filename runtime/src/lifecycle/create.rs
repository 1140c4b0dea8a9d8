//! The parent's part of `create`. The parent is rrun itself, and its child is the container's first
//! process.
//!
//! The creation of a container has four steps. [`Creation::reserve`] reserves the id and creates
//! the cgroup with its limits. [`Creation::spawn`] creates the first process in that cgroup and in
//! the container's namespaces, with one call of clone3(2). The first process then sets up the
//! container (see [`crate::lifecycle::init`]). At the same time, [`Creation::serve`] does the steps
//! that the first process has no right to do. [`Creation::publish`] reports the container to rrun's
//! caller, and makes sure that `start` can find the container. If a step fails, [`Rollback`] undoes
//! all earlier steps.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::SystemTime;

use oci_spec::runtime::{Hooks, LinuxNamespaceType as Type};
use rustix::io::Errno;

use crate::cgroup::{self, Cgroup, CgroupLocation};
use crate::config::{Config, hooks};
use crate::error::{Context, Error, Kind, Result, refuse};
use crate::lifecycle::channel::{self, Channel};
use crate::lifecycle::container_dir::ContainerDir;
use crate::lifecycle::foreground::Foreground;
use crate::lifecycle::init::Init;
use crate::lifecycle::intermediate::clone_from_intermediate;
use crate::lifecycle::notify_socket::{self, NotifySocket, ServiceManager};
use crate::lifecycle::program::keyring_name;
use crate::lifecycle::serve_child::{Task, serve_child};
use crate::lifecycle::start_socket;
use crate::lifecycle::state::{State, Status};
use crate::lifecycle::state_root::StateRoot;
use crate::log;
use crate::mounts::HostMounts;
use crate::namespaces::resctrl::ResctrlGroups;
use crate::namespaces::{OpenNamespace, flag, net_devices, unshare_time};
use crate::process::descriptors::Descriptors;
use crate::seccomp::Agent;
use crate::sys::child::kill_and_reap;
use crate::sys::clone::{Cloned, clone3};
use crate::sys::files::{remove_pid_file, write_pid_file};
use crate::sys::procfs::process_stat;
use crate::sys::time::rfc3339_nanos;
use rrun_kernel::session_keyring;

/// The parameters of a container's creation: its configuration and the settings from the command
/// line.
pub(crate) struct CreateRequest<'a> {
    pub(crate) root: &'a StateRoot,
    pub(crate) id: &'a str,
    pub(crate) config: &'a Config,
    /// True if the container waits for `start` before it executes its program.
    pub(crate) waits: bool,
    pub(crate) console_socket: Option<OwnedFd>,
    pub(crate) pidfd_socket: Option<OwnedFd>,
    pub(crate) pid_file: Option<&'a Path>,
    pub(crate) no_pivot: bool,
    pub(crate) new_keyring: bool,
    /// True if systemd creates the cgroup.
    pub(crate) systemd_cgroup: bool,
    pub(crate) descriptors: Descriptors,
    /// The signals that can end the setup, if rrun stays in the foreground.
    pub(crate) foreground: Option<&'a mut Foreground>,
    /// The service manager to notify when the container is ready.
    pub(crate) notify: Option<ServiceManager>,
}

/// A created container, with the descriptors that the caller of [`create`] needs.
pub(crate) struct Created {
    pub(crate) state: State,
    pub(crate) pidfd: OwnedFd,
    /// The master side of the container's terminal. This field is `None` if the container has no
    /// terminal, or if rrun has sent the master side to a console socket.
    pub(crate) terminal: Option<OwnedFd>,
    /// The socket on which the container reports that it is ready. This field is `None` if rrun's
    /// caller specified no service manager in NOTIFY_SOCKET. It is also `None` if the container
    /// waits for `start`, because `start` then binds the socket.
    pub(crate) notify: Option<NotifySocket>,
}

/// Creates a container. When this function returns, the container executes its program or waits for
/// `start`.
pub(crate) fn create(request: CreateRequest<'_>) -> Result<Created> {
    let (mut creation, channel) = Creation::reserve(request)?.spawn()?;
    let terminal = creation.serve(&channel)?;
    creation.publish(terminal)
}

/// A container that is being created.
struct Creation<'a> {
    request: CreateRequest<'a>,
    state: State,
    /// The container's cgroup. This field is `None` until rrun has created the cgroup. It remains
    /// `None` if rrun's caller has no right to create cgroups.
    cgroup: Option<Cgroup>,
    agent: Option<Agent<'a>>,
    notify: Option<NotifySocket>,
    /// The container's root, if the first process cannot reach it.
    root: Option<OwnedFd>,
    /// True if rrun's caller is not root.
    unprivileged: bool,
    rollback: Rollback<'a>,
}

/// A guard that undoes the creation of the container if a step fails. Dropping the guard undoes the
/// creation, unless `disarmed` is true.
struct Rollback<'a> {
    id: &'a str,
    dir: ContainerDir,
    location: CgroupLocation,
    has_cgroup: bool,
    child: Option<OwnedFd>,
    resctrl: ResctrlGroups,
    net_devices: net_devices::Attached,
    /// The container's hooks, and the JSON state that the poststop hooks receive.
    hooks: Option<(&'a Hooks, String)>,
    /// The PID file, after rrun has written it.
    pid_file: Option<&'a Path>,
    disarmed: bool,
}

impl Rollback<'_> {
    /// Returns the pidfd of the first process.
    fn child(&self) -> Result<&OwnedFd> {
        self.child.as_ref().ok_or_else(no_first_process)
    }

    /// Disables the rollback, so that the container is kept. Returns the pidfd of the first
    /// process.
    fn disarm(mut self) -> Result<OwnedFd> {
        self.disarmed = true;
        self.child.take().ok_or_else(no_first_process)
    }
}

fn no_first_process() -> Error {
    Error::new("the container has no first process yet")
}

impl Drop for Rollback<'_> {
    fn drop(&mut self) {
        if self.disarmed {
            return;
        }
        let log_failure = |result: Result<()>| {
            if let Err(error) = result {
                log::warning(&format!(
                    "undo the failed creation of container {}: {error}",
                    self.id
                ));
            }
        };
        if let Some(child) = &self.child {
            kill_and_reap(child);
        }
        if let Some(path) = self.pid_file {
            log_failure(remove_pid_file(path));
        }
        let mut killed = Ok(());
        if self.has_cgroup {
            killed = cgroup::remove(&self.location.path, self.location.unit());
        }
        // A process of the container that is still alive could replace a device.
        log_failure(killed.and_then(|()| self.net_devices.give_back()));
        log_failure(self.resctrl.remove());
        log_failure(self.dir.remove());
        if let Some((hooks, state)) = &self.hooks {
            // Release the lock before the hooks run. Hooks can run for a long time, and the
            // container's id is already free.
            self.dir.unlock();
            hooks::run_and_log_failures("poststop", hooks.poststop().as_ref(), state);
        }
    }
}

impl<'a> Creation<'a> {
    /// Reserves the container's id, and creates the container's cgroup with all limits.
    fn reserve(request: CreateRequest<'a>) -> Result<Creation<'a>> {
        let config = request.config;
        let location = CgroupLocation::new(
            &config.cgroups_path,
            &config.annotations,
            request.id,
            request.systemd_cgroup,
        )?;
        // Connect to the seccomp agent first. If the agent is missing, rrun then fails before it
        // creates a cgroup or a process.
        let agent = connect_agent(config, request.waits)?;
        let dir = ContainerDir::create(request.root, request.id)?;
        let state = new_state(&request, &location)?;
        let mut creation = Creation {
            state,
            cgroup: None,
            agent,
            notify: None,
            root: None,
            unprivileged: !rustix::process::geteuid().is_root(),
            rollback: Rollback {
                id: request.id,
                dir,
                location,
                has_cgroup: false,
                child: None,
                resctrl: ResctrlGroups::default(),
                net_devices: net_devices::Attached::default(),
                hooks: None,
                pid_file: None,
                disarmed: false,
            },
            request,
        };
        let dir = &creation.rollback.dir;
        // Record the cgroup's path before the creation of the cgroup. Then `delete` can find the
        // cgroup even if rrun is killed.
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
            Err(error) if self.unprivileged && can_do_without_cgroup(config, rollback, &error) => {
                log::debug(|| {
                    format!("rrun creates the container without its own cgroup: {error}")
                });
                return Ok(());
            }
            cgroup => cgroup?,
        };
        rollback.has_cgroup = true;
        // Loading the cgroup's device program (BPF) takes long. If possible, rrun loads it later,
        // while the first process sets up the container. But the container's program must not start
        // before the device program is loaded. So rrun defers the loading only if the container
        // waits for `start`, and if the setup opens no devices.
        let defer_devices = self.request.waits && config.opens_no_devices();
        cgroup.apply(&config.resources, defer_devices)?;
        self.cgroup = Some(cgroup);
        Ok(())
    }

    /// Creates the first process. This function returns only in the parent. It returns the updated
    /// `Creation`, and the parent's end of the channel between the parent and the first process.
    fn spawn(mut self) -> Result<(Creation<'a>, Channel)> {
        let config = self.request.config;
        // In a user namespace, the first process cannot enter the other namespaces. In an existing PID
        // namespace, other processes can see it before it has entered them (intermediate.rs).
        let early = config.namespaces.own(Type::User) || config.namespaces.is_joined(Type::Pid);
        let host_mounts = HostMounts::before_clone(&config.mount_sources())?;
        let (after_clone, before_clone): (Vec<_>, Vec<_>) =
            config.namespaces.join.iter().partition(|join| {
                !join.is_entered_by_children() && (!early || join.is_entered_after_clone())
            });
        let start_socket = start_socket::listen(self.rollback.dir.path())?;
        let (channel, childs_end) = channel::pair()?;
        if !self.request.waits {
            session_keyring::protect()
                .doing(|| "protect the session keyring of rrun's caller from the container")?;
        }
        match self.clone_first_process(before_clone)? {
            Cloned::Child => {
                drop(channel);
                if !self.request.waits {
                    session_keyring::end_protection();
                }
                self.become_init(childs_end, after_clone, host_mounts, start_socket)
            }
            Cloned::Parent { pid, pidfd } => {
                self.root = host_mounts.root;
                drop(childs_end);
                drop(start_socket);
                log::debug(|| format!("created the container's first process, process id {pid}"));
                self.rollback.child = Some(pidfd);
                if let Some(cgroup) = &mut self.cgroup {
                    cgroup.complete(&config.resources)?;
                }
                self.state.pid = pid;
                self.state.start_time = start_time(pid)?;
                // Without root's rights, rrun cannot look at the namespaces of its undumpable child.
                // The kernel then also prevents `exec` from entering a further user namespace.
                if !(self.unprivileged && config.namespaces.is_new(Type::User)) {
                    self.state.user_namespace = config.namespaces.user_inode(pid)?;
                }
                self.state.save(&self.rollback.dir)?;
                Ok((self, channel))
            }
        }
    }

    fn clone_first_process(&self, before_clone: Vec<&OpenNamespace>) -> Result<Cloned> {
        let namespaces = &self.request.config.namespaces;
        let flags = namespaces.new & !flag(Type::Cgroup);
        if before_clone.is_empty() && self.request.config.time_offsets.is_empty() {
            return clone3(flags, self.cgroup.as_ref().map(Cgroup::as_fd)).doing(|| {
                format!(
                    "create the container's first process in cgroup {} (clone3)",
                    self.state.cgroup.display()
                )
            });
        }
        clone_from_intermediate(|| self.enter_and_clone(flags, before_clone))?
            .doing(|| "create the container's first process from an intermediate process (clone3)")
    }

    /// Performs the steps of the intermediate process: enters the existing namespaces in
    /// `before_clone`, creates the time namespace if its clocks have offsets, and creates the first
    /// process. Returns the result of clone3.
    ///
    /// When a process creates a namespace, the user namespace of this process owns the new
    /// namespace. To enter an existing namespace, a process needs rights in the user namespace that
    /// owns it. Therefore this function enters an existing user namespace last, and then creates the
    /// new namespaces.
    fn enter_and_clone(
        &self,
        mut flags: u64,
        mut before_clone: Vec<&OpenNamespace>,
    ) -> Result<std::result::Result<Cloned, Errno>> {
        let config = self.request.config;
        if self.unprivileged && config.namespaces.is_joined(Type::User) {
            // The first process inherits this value. In an existing user namespace, neither this
            // process nor the first process could set the value.
            config.process.apply_own_oom_score_adj()?;
        }
        if !config.time_offsets.is_empty() {
            unshare_time(&config.time_offsets)?;
            flags &= !flag(Type::Time);
        }
        before_clone.sort_by_key(|join| join.is_user());
        for join in &before_clone {
            join.enter()?;
        }
        let cgroup = self.cgroup.as_ref().map(Cgroup::as_fd);
        Ok(clone3(flags | libc::CLONE_PARENT as u64, cgroup))
    }

    /// Turns the new process into the container's first process. The new process first drops its
    /// copies of the values that only the parent needs. Only the parent is responsible for undoing
    /// a failed creation, so the new process must not undo it. The new process also must not keep
    /// the lock on the container's directory.
    fn become_init(
        mut self,
        channel: Channel,
        joins: Vec<&OpenNamespace>,
        host_mounts: HostMounts,
        start_socket: OwnedFd,
    ) -> ! {
        self.rollback.disarmed = true;
        drop(self.rollback);
        drop(self.agent);
        if let Some(cgroup) = self.cgroup {
            cgroup.leave_to_parent();
        }
        // Forget `self.notify` without dropping it. Dropping `self.notify` would remove the file of
        // the notification socket, but the parent still needs this file.
        std::mem::forget(self.notify);
        Init {
            config: self.request.config,
            state: &self.state,
            channel,
            joins,
            host_mounts,
            has_console_socket: self.request.console_socket.is_some(),
            start_socket: Some(start_socket),
            waits: self.request.waits,
            no_pivot: self.request.no_pivot,
            descriptors: self.request.descriptors,
            unprivileged: self.unprivileged,
            host_pid: None,
        }
        .run()
    }

    /// Handles the messages of the first process until the first process waits for `start` or has
    /// executed its program. Returns the master side of the terminal, if the first process sends it
    /// to the parent.
    fn serve(&mut self, channel: &Channel) -> Result<Option<OwnedFd>> {
        let (config, waits) = (self.request.config, self.request.waits);
        self.rollback.hooks = Some((&config.hooks, self.state.json_for_hooks(Status::Stopped)));
        let rollback = &mut self.rollback;
        let pidfd = rollback.child.as_ref().ok_or_else(no_first_process)?;
        let task = Task::Create {
            config,
            root: self.root.take(),
            waits,
            state: &mut self.state,
            dir: &rollback.dir,
            net_devices: &mut rollback.net_devices,
        };
        let console = self.request.console_socket.take();
        let foreground = self.request.foreground.take();
        let served = serve_child(channel, pidfd, console, self.agent.take(), foreground, task);
        self.rollback.resctrl.clone_from(&self.state.resctrl);
        let terminal = served?;
        log::debug(|| {
            if waits {
                format!(
                    "container {} is created and waits for start",
                    self.request.id
                )
            } else {
                format!("container {} executes its program", self.request.id)
            }
        });
        Ok(terminal)
    }

    /// Reports the container to rrun's caller through the PID file and the pidfd socket. If the
    /// container waits for `start`, this function also gives the start socket its final name, so
    /// that `start` can find the socket. Otherwise, this function removes the start socket.
    fn publish(mut self, terminal: Option<OwnedFd>) -> Result<Created> {
        if let Some(path) = self.request.pid_file {
            write_pid_file(path, self.state.pid)?;
            self.rollback.pid_file = Some(path);
        }
        let (request, rollback) = (&self.request, &self.rollback);
        if let Some(socket) = &request.pidfd_socket {
            channel::send_pidfd(socket, rollback.child()?, "standard")?;
        }
        if request.waits {
            start_socket::publish(&rollback.dir)?;
        } else {
            start_socket::remove(&rollback.dir)?;
        }
        if !rollback.dir.is_linked()? {
            refuse!(
                "container {} was removed while it was being created",
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

/// Returns whether rrun creates the container without its own cgroup, although rrun has failed to
/// create the cgroup with `error`.
fn can_do_without_cgroup(config: &Config, rollback: &Rollback<'_>, error: &Error) -> bool {
    let by_systemd = rollback.location.unit().is_some();
    let may_be_missing = match error.kind() {
        Kind::NoCgroups => true,
        // The unit and its cgroup belong to another container.
        Kind::UnitExists => false,
        _ => by_systemd,
    };
    config.can_do_without_cgroup() && may_be_missing
}

/// Connects to the seccomp agent, if the seccomp profile specifies one. If the container waits for
/// `start`, this function only checks that the agent's socket exists. `start` then connects to the
/// agent.
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

fn new_state(request: &CreateRequest<'_>, location: &CgroupLocation) -> Result<State> {
    let config = request.config;
    Ok(State {
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
        user_namespace: 0,
        new_pid_namespace: config.namespaces.is_new(Type::Pid),
        process: config.process_spec.clone(),
        personality: config.personality.clone(),
        memory_policy: config.memory_policy.clone(),
        keeps_keyring: !request.new_keyring,
        keyring: if request.new_keyring {
            keyring_name(request.id)?
        } else {
            String::new()
        },
        resctrl: ResctrlGroups::default(),
        hooks: config.hooks.clone(),
        seccomp: config.seccomp.clone(),
    })
}

/// Returns the user name of rrun's caller from the host's /etc/passwd. If this file has no entry
/// for the caller's user id, returns the user id.
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

/// Returns when the container's first process was started, in clock ticks since the boot. See the
/// field `starttime` in proc_pid_stat(5).
fn start_time(pid: i32) -> Result<u64> {
    let stat = process_stat(pid)?.ok_or_else(|| {
        let sentence = "the host's /proc does not list the container's first process";
        Error::new(format!("{sentence} (process id {pid})"))
    })?;
    Ok(stat.start_time)
}
