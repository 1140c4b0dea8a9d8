//! A container's first process, from clone3 to the execve of its program.
//!
//! It runs as a copy of rrun, alone in its new namespaces and in its cgroup, and sets itself up in
//! the order in which the kernel has to see it. If a step fails, it sends one sentence to the
//! parent and ends.

use std::convert::Infallible;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{Hooks, LinuxNamespaceType as Type};
use rustix::fs::Mode;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::DumpableBehavior;

use crate::config::{Config, hooks};
use crate::error::{Context, Result};
use crate::lifecycle::channel::Channel;
use crate::lifecycle::program::{apply_process, execute, hand_over_terminal, join_keyring};
use crate::lifecycle::start_socket;
use crate::lifecycle::state::{State, Status};
use crate::mounts::rootfs::Rootfs;
use crate::mounts::tree::{self, attach_root, clone_root};
use crate::mounts::{HostMounts, Mount, OwnCgroup, devices, protection};
use crate::namespaces::{self, OpenNamespace, become_root_of_user_namespace, sysctl};
use crate::process::Process;
use crate::process::descriptors::Descriptors;
use crate::process::lsm::OpenLabels;
use crate::process::scheduling::leave_callers_cpus;
use crate::process::terminal::Terminal;
use crate::seccomp::{Filter, SharedPage};
use crate::sys::child::{NeverReturn, exit_now};
use crate::sys::syscalls::{self, Execution};
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

/// What the first process needs to know beside its configuration.
pub(crate) struct Init<'a> {
    pub(crate) config: &'a Config,
    pub(crate) state: &'a State,
    pub(crate) channel: Channel,
    /// Existing namespaces that are left for it to enter.
    pub(crate) joins: Vec<OpenNamespace>,
    /// Parts of the host's file system that were opened for it.
    pub(crate) host_mounts: HostMounts,
    /// Where the terminal's master side goes, if not to the parent.
    pub(crate) console_socket: Option<OwnedFd>,
    /// The socket at which it waits for `start`; without one it does not wait.
    pub(crate) start_socket: Option<OwnedFd>,
    pub(crate) no_pivot: bool,
    pub(crate) new_keyring: bool,
    pub(crate) descriptors: Descriptors,
    /// Whether rrun's caller is not root.
    pub(crate) unprivileged: bool,
    /// Its id in the host's PID namespace, once it has looked.
    pub(crate) host_pid: Option<i32>,
}

impl Init<'_> {
    /// Executes the program, or reports why it could not.
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
        rustix::process::umask(Mode::empty());
        let labels = self.enter_container()?;

        if self.new_keyring {
            make_keyring(self.state, &labels)?;
        }
        let mut process = config.process.clone();
        if !config.namespaces.own(Type::User) {
            process.apply_limits(0)?;
        }
        leave_callers_cpus();
        if self.start_socket.is_some() {
            end_at_signals()?;
        }
        self.joins.clear();
        self.host_mounts = HostMounts::default();
        self.console_socket = None;
        let mut kept = vec![self.channel.as_fd()];
        kept.extend(self.start_socket.as_ref().map(AsFd::as_fd));
        kept.extend(page.as_ref().map(AsFd::as_fd));
        let filtered = config.seccomp.is_some();
        let program = apply_process(&mut process, labels, &self.descriptors, filtered, &kept)?;
        match self.start_socket.take() {
            Some(socket) => self.wait_and_become_program(socket, &process, &program, page),
            None => {
                if !filtered {
                    self.channel.send_ready()?;
                }
                let send = |page: BorrowedFd<'_>| self.channel.send_page(page);
                self.become_program(&process, &program, page, send)
            }
        }
    }

    /// Everything up to the change of the root, after which the host is out of reach. Returns the
    /// files of the host's /proc that set the process's labels.
    fn enter_container(&mut self) -> Result<OpenLabels> {
        let config = self.config;
        let new_user = config.namespaces.own(Type::User);
        self.enter_namespaces(new_user)?;
        let rootfs = self.build_root(new_user)?;
        let terminal = self.make_terminal(&rootfs)?;
        self.run_hooks()?;
        // The last that need the host's /proc.
        sysctl::apply(&config.sysctl)?;
        let labels = config.process.labels.open()?;
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

    /// Waits for `start`, which gets the errors from then on.
    fn wait_and_become_program(
        &self,
        socket: OwnedFd,
        process: &Process,
        program: &CStr,
        page: Option<SharedPage>,
    ) -> Result<Infallible> {
        self.channel.send_ready()?;
        let starter = start_socket::accept(socket.as_fd())?;
        drop(socket);
        let send = |page: BorrowedFd<'_>| start_socket::send_page(starter.as_fd(), page);
        let Err(error) = self.become_program(process, program, page, send);
        start_socket::send_error(starter.as_fd(), &error);
        exit_now()
    }

    /// Runs the hooks startContainer and executes the program.
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
            // The agent also decides about the hooks' system calls. A process can have only one
            // listener, so this process loads the filter before it starts the hooks.
            (Some((filter, page)), Some(_)) if filter.listener.is_some() => {
                let reporter = page.hand_over(program, send)?;
                filter.confine(&reporter)?;
                if let Err(error) = self.start_container_hooks(process, None) {
                    // The filter may forbid every other way to report this.
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
            // To an unprivileged parent the kernel shows no files of /proc that belong to a
            // process which may not be looked into. Nothing of the container runs yet.
            if self.unprivileged {
                rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)
                    .doing(|| "let the parent process look into this one")?;
            }
            self.channel.wait_for_parent()?;
            if self.unprivileged {
                rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
                    .doing(|| "forbid other processes to look into this one")?;
            }
        }
        if new_user {
            become_root_of_user_namespace()?;
        }
        // Not made by clone3: the kernel would take the cgroup that the parent is in for its
        // root (copy_cgroup_ns looks at the process that calls clone3).
        if config.namespaces.is_new(Type::Cgroup) {
            namespaces::unshare_cgroup().doing(|| "make a cgroup namespace")?;
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

    /// Mounts everything on the root, which is not the root yet.
    fn build_root(&mut self, new_user: bool) -> Result<Rootfs> {
        let config = self.config;
        // Without a cgroup namespace, only its own cgroup is shown to the container.
        let cgroup = OwnCgroup {
            path: &self.state.cgroup,
            has_namespace: config.namespaces.own(Type::Cgroup),
        };

        // What is to be shared with the host must be opened while it still is, and all of it
        // before the new root covers the old one.
        if config.root_is_shared() || self.no_pivot {
            self.host_mounts
                .open(&config.mount_sources(), Mount::is_bind)?;
        }
        // From here on nothing that is mounted reaches the host; what the host mounts
        // still reaches those that ask for it (rslave).
        rustix::mount::mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .doing(|| "cut the mounts off from the host's (make / a slave)")?;

        let old_root = Path::new("/");
        let mut rootfs = match self.host_mounts.root.take() {
            // Every process can reach that place; nothing has to be copied from it any more.
            Some(root) => attach_root(root, old_root)?,
            None if self.no_pivot => attach_root(clone_root(&config.rootfs)?, old_root)?,
            // Not on the old root: a recursive copy of that would have it on top.
            None => attach_root(clone_root(&config.rootfs)?, &config.rootfs)?,
        };
        for (index, mount) in config.mounts.iter().enumerate() {
            let prepared = self
                .host_mounts
                .mounts
                .get_mut(index)
                .and_then(Option::take);
            mount.mount(&mut rootfs, prepared, &cgroup)?;
        }
        if config.fills_dev() {
            devices::make(&rootfs, &config.devices, new_user)?;
        }
        Ok(rootfs)
    }

    fn make_terminal(&self, rootfs: &Rootfs) -> Result<Option<Terminal>> {
        if !self.config.process.terminal {
            return Ok(None);
        }
        let terminal = Terminal::open(rootfs, self.config.process.console_size)?;
        terminal.mount_console(rootfs)?;
        let socket = self.console_socket.as_ref().map(AsFd::as_fd);
        hand_over_terminal(&terminal, socket, &self.channel)?;
        Ok(Some(terminal))
    }

    fn run_hooks(&mut self) -> Result<()> {
        let config = self.config;
        if config.hooks != Hooks::default() {
            // While /proc is the host's.
            self.host_pid = own_pid_on_host();
        }
        #[allow(deprecated)] // prestart is: callers use it all the same
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
            hooks::run(
                "createContainer",
                Some(list),
                &self.hook_state(Status::Creating),
                hooks::HookPlace::OnHost(None),
            )?;
        }
        Ok(())
    }

    /// Each hook loads `filter`, if there is one, for itself alone; this process loads its own only
    /// after the hooks.
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

    /// The state for hooks, with this process's id as the host knows it.
    fn hook_state(&self, status: Status) -> String {
        let mut state = self.state.clone();
        state.pid = self.host_pid.unwrap_or(state.pid);
        state.json_for_hooks(status)
    }

    /// Protects what is mounted.
    fn finish_root(&self, rootfs: &Rootfs) -> Result<()> {
        let config = self.config;
        rootfs.make_read_only()?;
        protection::make_read_only(rootfs, &config.readonly_paths)?;
        protection::mask(rootfs, &config.masked_paths, config.mount_label.as_deref())?;
        if config.root_readonly {
            mount_setattr(rootfs.as_fd(), false, &MountAttr::READ_ONLY)
                .doing(|| "make the root read-only (root.readonly)")?;
        }
        Ok(())
    }

    fn change_root(&self, rootfs: &Rootfs) -> Result<()> {
        let doing = || format!("change the root to {}", self.config.rootfs.display());
        rustix::process::fchdir(rootfs).doing(doing)?;
        if self.no_pivot {
            // It is on top of the old root already, which stays below it for good.
            tree::unmount_host_proc_and_sys()?;
            rustix::process::chroot(".").doing(doing)?;
        } else {
            // The old root ends up on top of the new one, from where it is taken off.
            rustix::process::pivot_root(".", ".").doing(|| {
                format!(
                    "{} (pivot_root; on a ramdisk, --no-pivot is needed)",
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

/// The first process of a PID namespace ignores every signal that it has no handler for. While it
/// waits for `start`, signals are to end it like any other process.
fn end_at_signals() -> Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        syscalls::end_at_signal(signal).doing(|| "prepare to be ended by signals")?;
    }
    Ok(())
}

/// This process's id in the PID namespace of the host's /proc.
fn own_pid_on_host() -> Option<i32> {
    let link = rustix::fs::readlink("/proc/self", Vec::new()).ok()?;
    link.to_str().ok()?.parse().ok()
}

/// Gives the container's first process a session keyring in place of that of rrun's caller,
/// whose keys are none of the container's business.
fn make_keyring(state: &State, labels: &OpenLabels) -> Result<()> {
    // linux/keyctl.h. All that the possessor may do, and its user may see, read and link it,
    // which is what a new one comes with.
    const DEFAULT: u32 = 0x3f00_0000 | 0x0001_0000 | 0x0002_0000 | 0x0010_0000;
    const USER_MAY_SEARCH: u32 = 0x0008_0000;
    const OTHERS_MAY_SEARCH: u32 = 0x0000_0008;
    let Some(keyring) = join_keyring(&state.id, labels)? else {
        return Ok(());
    };
    // What exec brings finds it by its name.
    let search = if state.namespaces & namespaces::flag(Type::User) != 0 {
        OTHERS_MAY_SEARCH
    } else {
        USER_MAY_SEARCH
    };
    syscalls::set_key_permissions(keyring, DEFAULT | search)
        .doing(|| "let the container's other processes find the session keyring")
}
