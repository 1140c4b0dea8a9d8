//! The state of a container. rrun stores the state in ROOT/ID/state.json, and later rrun commands
//! read the state from this file.
//!
//! To change the state, rrun replaces the whole file. rrun writes a new file in the same directory,
//! and renames the new file to state.json. A reader therefore sees either the old state or the new
//! state.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Hooks;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::config::spec::{MemoryPolicySpec, OciState, PersonalitySpec, ProcessSpec};
use crate::error::{Context, Error, Kind, Result, refuse};
use crate::lifecycle::container_dir::{
    self, ContainerDir, START_SOCKET, STATE_FILE, STATE_FILE_NEW, directory,
};
use crate::lifecycle::start_socket;
use crate::lifecycle::state_root::StateRoot;
use crate::namespaces::resctrl::ResctrlGroups;
use crate::seccomp::Filter;
use crate::sys::files::{is_socket, open_own, read_own, write_replacing};
use crate::sys::procfs::{process_stat, running_thread, thread_stat};
use rrun_kernel::regular_file::Unfit;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State {
    pub(crate) oci_version: String,
    pub(crate) id: String,
    /// The id that the container's first process has in the PID namespace of rrun's caller. This id
    /// is 0 until the first process exists.
    pub(crate) pid: i32,
    /// The time at which the first process started, in clock ticks after boot (proc_pid_stat(5),
    /// field 22). Together with the pid, the start time identifies the process, even if the kernel
    /// reuses the pid later.
    pub(crate) start_time: u64,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
    /// The time at which the container was created, as RFC 3339 text.
    pub(crate) created: String,
    pub(crate) owner: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
    /// The path of the cgroup's directory on the host.
    pub(crate) cgroup: PathBuf,
    /// The name of the systemd unit of the cgroup, if systemd created the cgroup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unit: Option<String>,
    /// The last requested limit for the sum of memory and swap, in bytes. 0 means that no limit was
    /// requested. The cgroup cannot store this limit, because cgroup v2 limits swap separately from
    /// memory.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) memory_swap: i64,
    /// The `CLONE_NEW*` flags of the namespaces that the container does not share with the host. A
    /// process that `exec` creates enters these namespaces.
    pub(crate) namespaces: u64,
    /// The inode number of the container's user namespace, which can be the namespace of rrun's
    /// caller. This field is 0 in the states that older versions of rrun wrote, and if a user other
    /// than root created the container with a new user namespace.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) user_namespace: u64,
    /// True if the container has a new PID namespace. With a new PID namespace, the kernel kills
    /// all processes of the container when the first process exits.
    pub(crate) new_pid_namespace: bool,
    /// The default values for processes that `exec` creates.
    pub(crate) process: ProcessSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) personality: Option<PersonalitySpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory_policy: Option<MemoryPolicySpec>,
    /// True if the container's processes keep the session keyring of rrun's caller.
    #[serde(default)]
    pub(crate) keeps_keyring: bool,
    /// The name of the container's session keyring. This field is empty if the container has no
    /// session keyring, and in the states that rrun 0.1.0 wrote.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) keyring: String,
    /// The container's resctrl groups.
    #[serde(default, skip_serializing_if = "ResctrlGroups::is_empty")]
    pub(crate) resctrl: ResctrlGroups,
    #[serde(default)]
    pub(crate) hooks: Hooks,
    /// The seccomp filter. Processes that `exec` creates also load this filter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) seccomp: Option<Filter>,
}

fn is_zero<T: Default + PartialEq>(number: &T) -> bool {
    *number == T::default()
}

/// Opens the directory of the container `id` in the --root directory. Returns its path and its
/// descriptor.
fn open_directory(root: &StateRoot, id: &str) -> Result<(PathBuf, OwnedFd)> {
    let path = directory(root, id)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::open(&path, flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR) if !path.is_dir() => Err(no_container(id)),
        opened => {
            let opened = opened.doing(|| format!("open {}", path.display()))?;
            Ok((path, opened))
        }
    }
}

fn no_container(id: &str) -> Error {
    Error::new(format!("container does not exist: {id}")).with_kind(Kind::NoSuchContainer)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

impl State {
    /// Reads the state of the container `id`, on which rrun will act.
    ///
    /// # Errors
    /// Fails if another user can change the state (see [`container_dir::check_owner`]) or can
    /// choose it (see [`StateRoot::check`]), or if the state does not contain the path of a cgroup.
    pub(crate) fn load(root: &StateRoot, id: &str) -> Result<State> {
        root.check()?;
        let (path, directory) = open_directory(root, id)?;
        container_dir::check_owner(root, &path, &directory)?;
        let careful = root.any_owner && !container_dir::is_private(root, &path, &directory)?;
        let (state, stat) = State::read(&path, &directory, id, careful)?;
        if !root.any_owner && !stat.as_ref().is_some_and(container_dir::is_callers) {
            refuse!(
                "read {}: another user owns this file or can write to it; use --any-owner if you trust the other user",
                path.join(STATE_FILE).display()
            );
        }
        if !cgroup::is_path_of_cgroup(&state.cgroup) {
            refuse!(
                "read {}: {} is not the path of a cgroup",
                path.join(STATE_FILE).display(),
                state.cgroup.display()
            );
        }
        Ok(state)
    }

    /// Reads the state of the container `id`, which rrun will only print. The container can belong
    /// to another user.
    pub(crate) fn load_to_print(root: &StateRoot, id: &str) -> Result<State> {
        let (path, directory) = open_directory(root, id)?;
        Ok(State::read(&path, &directory, id, true)?.0)
    }

    /// Reads the state from the open directory of a container. If another user can change the files
    /// in the directory, `careful` must be true. This function then checks the type of the file
    /// before it opens the file. If `careful` is false, also returns the attributes of the file.
    fn read(
        directory: &Path,
        fd: &OwnedFd,
        id: &str,
        careful: bool,
    ) -> Result<(State, Option<Stat>)> {
        let path = directory.join(STATE_FILE);
        let (file, stat) = match open_own(fd, STATE_FILE, careful) {
            Err(Unfit::Kernel(Errno::NOENT)) if !path.exists() => return Err(no_container(id)),
            Err(Unfit::Kind(_)) => refuse!("read {}: it is not a regular file", path.display()),
            file => file.doing(|| format!("read {}", path.display()))?,
        };
        let bytes = read_own(file, &path)?;
        let state: State = serde_json::from_slice(&bytes)
            .map_err(|error| Error::new(format!("parse {}: {error}", path.display())))?;
        if state.id != id {
            refuse!(
                "read {}: it is the state of container {}",
                path.display(),
                state.id
            );
        }
        Ok((state, stat))
    }

    pub(crate) fn save(&self, dir: &ContainerDir) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|error| {
            Error::new(format!("write the state of container {}: {error}", self.id))
        })?;
        write_replacing(
            dir,
            Path::new(STATE_FILE_NEW),
            Path::new(STATE_FILE),
            &text,
            0o600,
        )
        .map_err(|error| error.while_doing(format!("write the state of container {}", self.id)))
    }

    /// Returns a pidfd of the first process, if the process still exists and has not exited.
    pub(crate) fn open_process(&self) -> Result<Option<OwnedFd>> {
        Ok(self.open()?.map(|(pidfd, _)| pidfd))
    }

    /// Returns a pidfd with which setns(2) can enter the container's namespaces, if the first
    /// process still exists and has not exited.
    ///
    /// A thread loses its namespaces when it exits. If the main thread has exited and another
    /// thread of the process runs on, this function therefore returns a pidfd of this other thread.
    pub(crate) fn open_namespaces(&self) -> Result<Option<OwnedFd>> {
        let thread = match self.open()? {
            Some((_, Some(thread))) => thread,
            other => return Ok(other.map(|(pidfd, _)| pidfd)),
        };
        let doing = || {
            format!(
                "open thread {thread} of process {}, whose main thread has exited",
                self.pid
            )
        };
        // rustix and libc have no name for PIDFD_THREAD. Its value is O_EXCL.
        let flags = PidfdFlags::from_bits_retain(OFlags::EXCL.bits());
        let pid = Pid::from_raw(thread).ok_or(Errno::SRCH).doing(doing)?;
        let pidfd = pidfd_open(pid, flags).doing(doing)?;
        // If the thread has exited before the call of pidfd_open(2), its id can belong to a thread
        // on the host.
        let is_thread = thread_stat(self.pid, thread)?.is_some_and(|stat| !stat.has_exited);
        Ok((is_thread && self.open()?.is_some()).then_some(pidfd))
    }

    /// Returns a pidfd of the first process, if the process still exists and has not exited. If the
    /// main thread has exited, also returns the id of a thread that runs on.
    fn open(&self) -> Result<Option<(OwnedFd, Option<i32>)>> {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.pid > 0) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // EINVAL, or ENOENT since Linux 6.16, means that the kernel has reused the process id
            // as a thread id.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno).doing(|| format!("open process {}", self.pid)),
        };
        // Compare the start times after opening the pidfd. If both start times are equal, the pidfd
        // refers to the recorded process.
        let stat = process_stat(self.pid)?.filter(|stat| stat.start_time == self.start_time);
        match stat {
            None => Ok(None),
            Some(stat) if !stat.has_exited => Ok(Some((pidfd, None))),
            Some(_) => Ok(self
                .remaining_thread(&pidfd)?
                .map(|thread| (pidfd, Some(thread)))),
        }
    }

    /// Returns the id of a thread of the first process that runs on after the main thread has
    /// exited. `pidfd` refers to the first process.
    fn remaining_thread(&self, pidfd: &OwnedFd) -> Result<Option<i32>> {
        let doing = || format!("find out whether process {} has exited", self.pid);
        let now = Timespec::default();
        let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
        if retry_on_intr(|| poll(&mut watched, Some(&now))).doing(doing)? != 0 {
            return Ok(None);
        }
        // The pidfd is not readable either if all threads have exited, but the tracer of one of
        // them has not reaped it.
        running_thread(self.pid)
    }

    /// Returns whether the first process exists and has not exited.
    fn is_alive(&self) -> Result<bool> {
        if self.pid <= 0 {
            return Ok(false);
        }
        match process_stat(self.pid)? {
            Some(stat) if stat.start_time != self.start_time => Ok(false),
            Some(stat) if stat.has_exited => Ok(self.open()?.is_some()),
            stat => Ok(stat.is_some()),
        }
    }

    pub(crate) fn status(&self, directory: &Path) -> Result<Status> {
        match self.status_from_files(directory)? {
            // Possibly, a `start` command was killed after the first process had accepted its
            // request. The start socket then remains in the container's directory, although the
            // container runs.
            Status::Created if !start_socket::is_waiting(directory)? => Ok(if self.is_alive()? {
                Status::Running
            } else {
                Status::Stopped
            }),
            status => Ok(status),
        }
    }

    /// Returns the status without checking that a process waits at the start socket. The callers of
    /// this function connect to the socket themselves, and so find out whether a process waits.
    pub(crate) fn status_from_files(&self, directory: &Path) -> Result<Status> {
        if self.pid == 0 {
            return Ok(Status::Creating);
        }
        if !self.is_alive()? {
            return Ok(Status::Stopped);
        }
        if cgroup::is_frozen(&self.cgroup)? {
            return Ok(Status::Paused);
        }
        let has_start_socket = || is_socket(&directory.join(START_SOCKET));
        if has_start_socket()? {
            return Ok(Status::Created);
        }
        if start_socket::is_pending(directory)? {
            return Ok(Status::Creating);
        }
        // Between the two checks, `create` can have given the start socket its final name.
        Ok(if has_start_socket()? {
            Status::Created
        } else {
            Status::Running
        })
    }

    /// Returns whether rrun is still creating the container in `directory`.
    pub(crate) fn is_being_created(&self, directory: &Path) -> Result<bool> {
        Ok(self.pid == 0 || start_socket::is_pending(directory)?)
    }

    pub(crate) fn oci_state<'a>(&'a self, status: Status) -> OciState<'a> {
        let alive = !matches!(status, Status::Stopped | Status::Creating);
        OciState {
            oci_version: &self.oci_version,
            id: &self.id,
            pid: if alive { self.pid } else { 0 },
            status: status.as_str(),
            bundle: &self.bundle,
            rootfs: &self.rootfs,
            created: &self.created,
            annotations: &self.annotations,
            owner: &self.owner,
        }
    }

    /// Returns the name of the container's session keyring, or `None` if the container's processes
    /// keep the session keyring of rrun's caller.
    pub(crate) fn keyring(&self) -> Option<String> {
        match &*self.keyring {
            _ if self.keeps_keyring => None,
            "" => Some(format!("_ses.{}", self.id)),
            name => Some(name.to_owned()),
        }
    }

    /// Returns the container's state for hooks and seccomp agents. While rrun creates the
    /// container, this state already contains the id of the first process, but the output of `rrun
    /// state` does not.
    pub(crate) fn oci_state_for_others(&self, status: Status) -> OciState<'_> {
        let mut shown = self.oci_state(status);
        if status == Status::Creating {
            shown.pid = self.pid;
        }
        shown
    }

    /// Returns the state as the JSON text that a hook receives on its standard input.
    pub(crate) fn json_for_hooks(&self, status: Status) -> String {
        serde_json::to_string(&self.oci_state_for_others(status)).unwrap_or_default()
    }
}
