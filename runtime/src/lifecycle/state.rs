//! What rrun remembers of a container between two of its commands: ROOT/ID/state.json.
//!
//! The file is replaced as a whole
//! (written beside, then renamed), so that a reader sees an old state or a new one.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Hooks;
use rustix::fs::Access;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::config::spec::{MemoryPolicySpec, OciState, PersonalitySpec, ProcessSpec};
use crate::error::{Context, Error, Kind, Result};
use crate::lifecycle::container_dir::{
    ContainerDir, START_SOCKET, START_SOCKET_PENDING, STATE_FILE, STATE_FILE_NEW, directory,
};
use crate::namespaces::resctrl::ResctrlGroups;
use crate::seccomp::Filter;
use crate::sys::files::{read_bounded, write_replacing};
use crate::sys::procfs::process_stat;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State {
    pub(crate) oci_version: String,
    pub(crate) id: String,
    /// Process id of the first process, in rrun's caller's PID namespace; 0 until it exists.
    pub(crate) pid: i32,
    /// When that process was started, in clock ticks after boot (proc_pid_stat(5), field
    /// 22). With the pid, it names one process and no later one.
    pub(crate) start_time: u64,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
    /// RFC 3339.
    pub(crate) created: String,
    pub(crate) owner: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
    /// The cgroup's directory on the host.
    pub(crate) cgroup: PathBuf,
    /// The unit of systemd that the cgroup is, if systemd made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unit: Option<String>,
    /// The limit on memory and swap together, in bytes, that was asked for last; the cgroup
    /// itself knows only what is left of it for swap. 0 if none was.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) memory_swap: i64,
    /// `CLONE_NEW*` of the namespaces that are not the host's, for exec to enter.
    pub(crate) namespaces: u64,
    /// Whether its PID namespace ends with its first process.
    pub(crate) new_pid_namespace: bool,
    /// Defaults for the processes of `exec`.
    pub(crate) process: ProcessSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) personality: Option<PersonalitySpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory_policy: Option<MemoryPolicySpec>,
    /// Whether its processes keep their callers' session keyring.
    #[serde(default)]
    pub(crate) keeps_keyring: bool,
    /// Its groups in resctrl.
    #[serde(default, skip_serializing_if = "ResctrlGroups::is_empty")]
    pub(crate) resctrl: ResctrlGroups,
    #[serde(default)]
    pub(crate) hooks: Hooks,
    /// Also loaded by the processes of `exec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) seccomp: Option<Filter>,
}

fn is_zero(number: &i64) -> bool {
    *number == 0
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
    pub(crate) fn load(root: &Path, id: &str) -> Result<State> {
        let directory = directory(root, id)?;
        let path = directory.join(STATE_FILE);
        let bytes = match read_bounded(&path) {
            Ok(bytes) => bytes,
            Err(_) if !path.exists() => {
                return Err(Error::new(format!("container does not exist: {id}"))
                    .with_kind(Kind::NoSuchContainer));
            }
            Err(error) => return Err(error),
        };
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::new(format!("parse {}: {error}", path.display())))
    }

    pub(crate) fn save(&self, dir: &ContainerDir) -> Result<()> {
        let text = serde_json::to_vec(self)
            .map_err(|error| Error::new(format!("write state of {}: {error}", self.id)))?;
        write_replacing(
            dir,
            Path::new(STATE_FILE_NEW),
            Path::new(STATE_FILE),
            &text,
            0o600,
        )
        .map_err(|error| error.while_doing(format!("write state of {}", self.id)))
    }

    /// A descriptor of the first process, if that very process still exists (it may be a
    /// zombie: then the descriptor is readable).
    pub(crate) fn open_process(&self) -> Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.pid > 0) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // EINVAL: the id is a thread's by now.
            Err(Errno::SRCH | Errno::INVAL) => return Ok(None),
            Err(errno) => return Err(errno).doing(|| format!("open process {}", self.pid)),
        };
        // Only now is it sure that a look at /proc is a look at the process held.
        match process_stat(self.pid)? {
            Some((start_time, dead)) if start_time == self.start_time && !dead => Ok(Some(pidfd)),
            _ => Ok(None),
        }
    }

    /// Whether the first process exists and is no zombie.
    fn is_alive(&self) -> Result<bool> {
        if self.pid <= 0 {
            return Ok(false);
        }
        Ok(matches!(
            process_stat(self.pid)?,
            Some((start_time, false)) if start_time == self.start_time
        ))
    }

    pub(crate) fn status(&self, directory: &Path) -> Result<Status> {
        match self.status_from_files(directory)? {
            // A `start` that was killed after it was accepted has left the socket's name behind.
            Status::Created if !crate::lifecycle::start_socket::is_waiting(directory) => {
                Ok(if self.is_alive()? {
                    Status::Running
                } else {
                    Status::Stopped
                })
            }
            status => Ok(status),
        }
    }

    /// The status from the files alone, for callers that connect to the start socket themselves.
    pub(crate) fn status_from_files(&self, directory: &Path) -> Result<Status> {
        if self.pid == 0 {
            return Ok(Status::Creating);
        }
        if !self.is_alive()? {
            return Ok(Status::Stopped);
        }
        if crate::cgroup::is_frozen(&self.cgroup) {
            return Ok(Status::Paused);
        }
        if rustix::fs::access(directory.join(START_SOCKET), Access::EXISTS).is_ok() {
            return Ok(Status::Created);
        }
        match rustix::fs::access(directory.join(START_SOCKET_PENDING), Access::EXISTS) {
            Ok(()) => Ok(Status::Creating),
            Err(_) => Ok(Status::Running),
        }
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

    /// The state as hooks and seccomp agents get it: with the process id even while the
    /// container is being made.
    pub(crate) fn oci_state_for_others(&self, status: Status) -> OciState<'_> {
        let mut shown = self.oci_state(status);
        if status == Status::Creating {
            shown.pid = self.pid;
        }
        shown
    }

    /// The state as a hook gets it on its standard input.
    pub(crate) fn json_for_hooks(&self, status: Status) -> String {
        serde_json::to_string(&self.oci_state_for_others(status)).unwrap_or_default()
    }
}
