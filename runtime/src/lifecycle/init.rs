//! The code of a container's first process, from clone3 to the execve of its program.
//!
//! The first process starts as a copy of rrun, alone in its new namespaces and in its cgroup. The
//! first process sets up the container in the order that the kernel requires. If a step fails, the
//! first process sends the parent one sentence that describes the error, and exits.

use std::convert::Infallible;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{Hooks, LinuxNamespaceType as Type};
use rustix::fs::Mode;
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use crate::config::{Config, hooks};
use crate::error::{Context, Error, Result};
use crate::lifecycle::channel::Channel;
use crate::lifecycle::program::{apply_process, execute, hand_over_terminal, join_keyring};
use crate::lifecycle::start_socket;
use crate::lifecycle::state::{State, Status};
use crate::mounts::rootfs::Rootfs;
use crate::mounts::tree::{self, attach_root, clone_root, open_root};
use crate::mounts::{HostMounts, Isolation, Mount, devices, protection};
use crate::namespaces::{self, OpenNamespace, become_root_of_user_namespace, sysctl};
use crate::process::Process;
use crate::process::descriptors::Descriptors;
use crate::process::lsm::OpenLabels;
use crate::process::scheduling::leave_callers_cpus;
use crate::process::terminal::Terminal;
use crate::seccomp::{Filter, SharedPage};
use crate::sys::child::{NeverReturn, exit_now};
use crate::sys::dumpable::set_dumpable;
use crate::sys::syscalls::{self, Execution};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

/// The parameters of the first process, including the container's configuration.
pub(crate) struct Init<'a> {
    pub(crate) config: &'a Config,
    pub(crate) state: &'a State,
    pub(crate) channel: Channel,
    /// The existing namespaces that the first process must enter itself.
    pub(crate) joins: Vec<&'a OpenNamespace>,
    /// The mounts on the host that the parent opened for the first process.
    pub(crate) host_mounts: HostMounts,
    /// True if the parent sends the terminal's master side to a console socket.
    pub(crate) has_console_socket: bool,
    /// The start socket, until this process has accepted the connection of `start`.
    pub(crate) start_socket: Option<OwnedFd>,
    /// True if this process waits for `start` before it executes the program. If this process does
    /// not wait, it only keeps the start socket open, which shows that the container is still being
    /// created.
    pub(crate) waits: bool,
    pub(crate) no_pivot: bool,
    pub(crate) descriptors: Descriptors,
    /// True if rrun's caller is not root.
    pub(crate) unprivileged: bool,
    /// The id that the first process has in the host's PID namespace. This field is `None` until
    /// the first process has read this id from the host's /proc.
    pub(crate) host_pid: Option<i32>,
}

impl Init<'_> {
    /// Sets up the container and executes the program. If a step fails, reports the error to the
    /// parent and exits.
    pub(crate) fn run(mut self) -> ! {
        let _guard = NeverReturn;
        let Err(error) = self.run_to_execve();
        self.channel.send_error(&error);
        exit_now()
    }

    fn run_to_execve(&mut self) -> Result<Infallible> {
        let config = self.config;
        self.descriptors.close_leaked()?;
        let page = config.seccomp.as_ref().map(|_| SharedPage::new());
        let page = page.transpose()?;
        syscalls::set_signal_mask(&syscalls::signal_set(&[])).doing(|| "unblock signals")?;
        rustix::process::setsid().doing(|| "become a session leader")?;
        syscalls::default_signals().doing(|| "reset ignored signals to their default action")?;
        let callers_umask = rustix::process::umask(Mode::empty());
        // This function logs a warning if it fails. Later, standard error can be the container's
        // terminal.
        leave_callers_cpus();
        let labels = self.enter_container(callers_umask)?;

        if let Some(name) = self.state.keyring() {
            join_keyring(&name, &self.state.id, &labels)?;
        }
        let mut process = config.process.clone();
        if !config.namespaces.own(Type::User) {
            process.apply_limits(0)?;
        }
        if self.waits {
            terminate_at_signals()?;
        }
        self.host_mounts = HostMounts::default();
        let mut kept = vec![self.channel.as_fd()];
        kept.extend(self.start_socket.as_ref().map(AsFd::as_fd));
        kept.extend(page.as_ref().map(AsFd::as_fd));
        let filtered = config.seccomp.is_some();
        let program = apply_process(&mut process, labels, &self.descriptors, filtered, &kept)?;
        if self.waits
            && let Some(socket) = self.start_socket.take()
        {
            return self.wait_and_become_program(socket, &process, &program, page);
        }
        if !filtered {
            self.channel.send_ready()?;
        }
        let send = |page: BorrowedFd<'_>| self.channel.send_page(page);
        self.become_program(&process, &program, page, send)
    }

    /// Performs the setup steps of the first process, up to and including the change of its root.
    /// After the change of its root, the first process cannot reach the host's files. Returns the
    /// open files in the host's /proc through which the process sets its labels.
    fn enter_container(&mut self, callers_umask: Mode) -> Result<OpenLabels> {
        let config = self.config;
        let new_user = config.namespaces.own(Type::User);
        self.enter_namespaces(new_user)?;
        let rootfs = self.build_root(new_user)?;
        let terminal = self.make_terminal(&rootfs)?;
        self.run_hooks(callers_umask)?;
        // The following steps, up to the change of the root, are the last steps that need the
        // host's /proc.
        sysctl::apply(&config.sysctl)?;
        let labels = &config.process.labels;
        let labels = labels.open(labels.open_procfs()?.as_ref())?;
        if !new_user {
            config.process.apply_oom_score_adj("self")?;
        }
        self.finish_root(&rootfs)?;
        self.change_root(&rootfs)?;
        drop(rootfs);
        if let Some(terminal) = terminal {
            terminal.make_controlling()?;
        }
        Ok(labels)
    }

    /// Waits for `start` and executes the program. After `start` has connected, the first process
    /// sends its errors to `start`.
    fn wait_and_become_program(
        &self,
        socket: OwnedFd,
        process: &Process,
        program: &CStr,
        page: Option<SharedPage>,
    ) -> Result<Infallible> {
        self.channel.send_ready()?;
        let connection = start_socket::accept(socket.as_fd())?;
        drop(socket);
        let send = |page: BorrowedFd<'_>| start_socket::send_page(connection.as_fd(), page);
        let Err(error) = self.become_program(process, program, page, send);
        start_socket::send_error(connection.as_fd(), &error);
        exit_now()
    }

    /// Runs the startContainer hooks and executes the program.
    fn become_program(
        &self,
        process: &Process,
        program: &CStr,
        page: Option<SharedPage>,
        send: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<Infallible> {
        let filter = self.config.seccomp.as_ref().zip(page);
        let hooks = self.config.hooks.start_container().as_deref();
        let hooks = hooks.filter(|list| !list.is_empty());
        match (filter, hooks) {
            // The seccomp agent also decides about the system calls of the startContainer hooks. A
            // process can have only one seccomp listener. So this process loads the filter before
            // it starts the hooks, and the hooks inherit the filter.
            (Some((filter, page)), Some(_)) if filter.listener.is_some() => {
                let reporter = page.hand_over(program, send)?;
                filter.confine(&reporter)?;
                if let Err(error) = self.start_container_hooks(process, None) {
                    // The filter can forbid the system calls that send a message, so report the
                    // error through the shared page.
                    reporter.hook_failed(&error);
                    filter.end()
                }
                reporter.failed(Execution::new(program, &process.args, &process.env).execute());
                filter.end()
            }
            (filter, hooks) => {
                if hooks.is_some() {
                    let filter = filter.as_ref().map(|(filter, _)| *filter);
                    self.start_container_hooks(process, filter)?;
                }
                Err(execute(program, process, filter, send))
            }
        }
    }

    fn enter_namespaces(&self, new_user: bool) -> Result<()> {
        let config = self.config;
        for join in &self.joins {
            join.enter()?;
        }
        if config.needs_parent() {
            self.wait_for_parent()?;
        }
        if new_user {
            become_root_of_user_namespace()?;
        }
        // Do not create the cgroup namespace with clone3. The kernel (copy_cgroup_ns) makes the
        // cgroup of the process that calls clone3 the root of the new namespace. That process is
        // the parent, but the root must be the container's cgroup.
        if config.namespaces.is_new(Type::Cgroup) {
            namespaces::unshare_cgroup().doing(|| "create a cgroup namespace")?;
        }
        if config.namespaces.is_new(Type::Network) {
            syscalls::loopback_up().doing(|| "bring the loopback interface up")?;
        }
        if let Some(name) = &config.hostname {
            rustix::system::sethostname(name.as_bytes())
                .doing(|| format!("set hostname {name}"))?;
        }
        if let Some(name) = &config.domainname {
            rustix::system::setdomainname(name.as_bytes())
                .doing(|| format!("set domainname {name}"))?;
        }
        Ok(())
    }

    /// Waits until the parent has done its part.
    ///
    /// An unprivileged parent writes the id maps of a new user namespace through this process's
    /// files in /proc. The kernel allows this only if this process is dumpable. In a new user
    /// namespace, this process can be dumpable, because no other process is in the namespace yet.
    /// In an existing user namespace, a process of another container could then trace this process
    /// (ptrace(2)) and use its open files. So this process remains undumpable there.
    fn wait_for_parent(&self) -> Result<()> {
        if !self.unprivileged || !self.config.namespaces.is_new(Type::User) {
            return self.channel.wait_for_parent();
        }
        set_dumpable(true)?;
        self.channel.wait_for_parent()?;
        set_dumpable(false)
    }

    /// Builds the container's root and mounts all file systems in it. This function does not change
    /// the root of the calling process.
    fn build_root(&mut self, new_user: bool) -> Result<Rootfs> {
        let config = self.config;
        // A mount of type `cgroup` must show only the container's own cgroup. If the container does
        // not have a cgroup namespace, rrun needs the cgroup's path for this mount.
        let isolation = Isolation {
            cgroup: &self.state.cgroup,
            has_cgroup_namespace: config.namespaces.own(Type::Cgroup),
            has_new_ipc_namespace: config.namespaces.is_new(Type::Ipc),
        };

        // If the container's root is shared, later mounts below a bind mount must still propagate
        // to the host. Below, mount_change turns all mounts into slaves, so new mounts no longer
        // propagate to the host. The sources of the bind mounts are therefore opened before.
        if config.root_is_shared() {
            self.host_mounts
                .open(&config.mount_sources(), Mount::is_bind)?;
        }
        // After this call of mount_change, new mounts in the container do not propagate to the
        // host. New mounts on the host still propagate to the container's mounts that have the
        // option rslave.
        rustix::mount::mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .doing(|| "stop mounts from propagating to the host (make / a slave mount)")?;

        let mut rootfs = self.attach_own_root()?;
        if config.uses_dev_of_rootfs() {
            devices::record_dev(&mut rootfs)?;
        }
        for (index, mount) in config.mounts.iter().enumerate() {
            let prepared = self
                .host_mounts
                .mounts
                .get_mut(index)
                .and_then(Option::take);
            mount.mount(&mut rootfs, prepared, &isolation)?;
        }
        if config.fills_dev() {
            devices::make(&rootfs, &config.devices, new_user)?;
        }
        Ok(rootfs)
    }

    /// Attaches the container's root file system to the mounts of this process, at root.path. The
    /// root must not be attached on `/` before the prestart and createRuntime hooks have run. A hook
    /// that enters the mount namespace (setns(2)) would then have the container's root as `/`, and
    /// could execute a program of the image with the rights of rrun's caller.
    fn attach_own_root(&mut self) -> Result<Rootfs> {
        let is_new_namespace = self.config.namespaces.is_new(Type::Mount);
        if let Some(root) = self.host_mounts.root.take_if(|_| is_new_namespace) {
            self.channel.wait_for_root()?;
            return Rootfs::of_new_container(root);
        }
        let path = &self.config.rootfs;
        let directory = open_root(path)?;
        let root = match self.host_mounts.root.take() {
            Some(root) => root,
            None => clone_root(&directory, path, self.config.root_is_slave())?,
        };
        attach_root(&root, &directory, path)?;
        Rootfs::of_new_container(root)
    }

    fn make_terminal(&self, rootfs: &Rootfs) -> Result<Option<Terminal>> {
        if !self.config.process.terminal {
            return Ok(None);
        }
        let terminal = Terminal::open(rootfs, self.config.process.console_size)?;
        terminal.mount_console(rootfs)?;
        hand_over_terminal(&terminal, self.has_console_socket, &self.channel)?;
        Ok(Some(terminal))
    }

    fn run_hooks(&mut self, callers_umask: Mode) -> Result<()> {
        let config = self.config;
        if config.hooks != Hooks::default() {
            // Before the root changes, use the host's /proc to read the id that this process has on
            // the host.
            self.host_pid = Some(own_pid_on_host()?);
        }
        #[allow(deprecated)] // prestart is deprecated, but callers still use it
        let before = [config.hooks.prestart(), config.hooks.create_runtime()];
        if before
            .iter()
            .any(|list| list.as_ref().is_some_and(|list| !list.is_empty()))
        {
            self.channel.wait_for_hooks()?;
        }
        if let Some(list) = config
            .hooks
            .create_container()
            .as_ref()
            .filter(|list| !list.is_empty())
        {
            // The setup of the root needs the umask 0. With this umask, every user could write to
            // the files that a hook creates on the host.
            rustix::process::umask(callers_umask);
            hooks::run(
                "createContainer",
                Some(list),
                &self.hook_state(Status::Creating),
                hooks::HookPlace::OnHost(None),
            )?;
            rustix::process::umask(Mode::empty());
        }
        Ok(())
    }

    /// Runs the startContainer hooks. If `filter` is given, each hook's process loads the filter
    /// for itself. The calling process must load the filter after this function has returned.
    fn start_container_hooks(&self, process: &Process, filter: Option<&Filter>) -> Result<()> {
        hooks::run(
            "startContainer",
            self.config.hooks.start_container().as_ref(),
            &self.hook_state(Status::Created),
            hooks::HookPlace::InContainer {
                env: &process.env,
                filter,
            },
        )
    }

    /// Returns the container's state for hooks. The state contains the id that the first process
    /// has in the host's PID namespace.
    fn hook_state(&self, status: Status) -> String {
        let mut state = self.state.clone();
        state.pid = self.host_pid.unwrap_or(state.pid);
        state.json_for_hooks(status)
    }

    /// Makes mounts read-only and masks paths, as the configuration specifies.
    fn finish_root(&self, rootfs: &Rootfs) -> Result<()> {
        let config = self.config;
        self.make_working_directory(rootfs);
        rootfs.make_read_only()?;
        protection::mask(rootfs, &config.masked_paths, config.mount_label.as_deref())?;
        // This step copies the mounts that are below a path, so it must follow the step above.
        // Otherwise it could cover a mount such as /proc with a copy without masks.
        let with_root = protection::make_read_only(rootfs, &config.readonly_paths)?;
        if config.root_readonly || with_root {
            let field = if with_root {
                "linux.readonlyPaths"
            } else {
                "root.readonly"
            };
            mount_setattr(rootfs.as_fd(), false, &MountAttr::READ_ONLY)
                .doing(|| format!("make the root read-only ({field})"))?;
        }
        Ok(())
    }

    /// Creates a missing working directory, because this is possible only before the root is
    /// read-only, and because the directory can be one of `linux.readonlyPaths`. If this fails, the
    /// error is reported later, when the process enters the directory.
    fn make_working_directory(&self, rootfs: &Rootfs) {
        let process = &self.config.process;
        if process.cwd != Path::new("/") {
            let mode = Mode::from_raw_mode(0o777 & !process.umask.unwrap_or(0o022));
            let _ = rootfs.make_working_directory(&process.cwd, mode);
        }
    }

    fn change_root(&self, rootfs: &Rootfs) -> Result<()> {
        let doing = || format!("change the root to {}", self.config.rootfs.display());
        rustix::process::fchdir(rootfs).doing(doing)?;
        if self.no_pivot {
            // The old root remains mounted below the container's root, so rrun must unmount the old
            // root's procfs and sysfs.
            tree::move_to_root(rootfs).doing(doing)?;
            tree::unmount_host_proc_and_sys()?;
            rustix::process::chroot(".").doing(doing)?;
        } else {
            // pivot_root(".", ".") stacks the old root on top of the new root, so umount2(2) on "."
            // below unmounts the old root.
            rustix::process::pivot_root(".", ".").doing(|| {
                format!(
                    "{} (pivot_root; a root on a ramdisk needs --no-pivot)",
                    doing()
                )
            })?;
            rustix::mount::unmount(".", UnmountFlags::DETACH).doing(doing)?;
        }
        rustix::process::chdir("/").doing(doing)?;
        if let Some((propagation, recursive)) = self.config.final_propagation() {
            let attr = MountAttr {
                propagation,
                ..MountAttr::default()
            };
            mount_setattr(rootfs.as_fd(), recursive, &attr)
                .doing(|| "set the root's propagation (linux.rootfsPropagation)")?;
        }
        Ok(())
    }
}

/// Installs signal handlers that terminate this process. The first process of a PID namespace
/// ignores every signal for which it has no handler. Without these handlers, signals such as
/// SIGTERM could not terminate this process while it waits for `start`.
fn terminate_at_signals() -> Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        syscalls::end_at_signal(signal)
            .doing(|| "install a handler for signals that terminate the process")?;
    }
    Ok(())
}

/// Returns the process id under which the host's /proc lists this process.
fn own_pid_on_host() -> Result<i32> {
    let doing = || "read the id of this process on the host (/proc/self)";
    let link = rustix::fs::readlink("/proc/self", Vec::new()).doing(doing)?;
    let number = link.to_str().ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Error::new(doing()))
}
