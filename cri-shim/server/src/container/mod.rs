//! The life cycle of a container.
//!
//! [`create`] creates a container in two steps. The first step creates the [`bundle`], which
//! contains the root filesystem ([`rootfs`]) and the OCI configuration ([`spec`]). The root
//! filesystem is the writable layer mounted over the image's layers. The OCI configuration is built
//! from [`mounts`], [`capabilities`], [`devices`], [`resources`], [`seccomp`] and the [`user`] that
//! the container runs as. The second step is the runtime's `create`, which runs through the pod's
//! monitor.
//!
//! [`start`], [`stop`] and [`remove`] are the later steps of the life cycle.
//! [`status`] reports the containers to CRI clients.

pub(crate) mod annotations;
pub(crate) mod apparmor;
mod bundle;
pub(crate) mod capabilities;
pub(crate) mod cdi;
pub(crate) mod create;
pub(crate) mod devices;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
pub(crate) mod idmap;
pub(crate) mod image_volume;
mod in_root;
pub(crate) mod mounts;
mod namespace_owners;
pub(crate) mod propagation;
pub(crate) mod remove;
pub(crate) mod resources;
pub(crate) mod rootfs;
pub(crate) mod seccomp;
mod seccomp_default;
pub(crate) mod signal;
mod size;
pub(crate) mod spec;
pub(crate) mod start;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod unmount;
pub(crate) mod user;
pub(crate) mod volumes;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rrun_proto::v1::{ContainerConfig, ContainerEventType, LinuxContainerResources};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::cgroup::{self, slice};
use crate::clock::now;
use crate::node::Node;
use crate::sandbox::{Sandbox, files};
use rrun_calls::error::{Error, Result};
use rrun_calls::wait::slow;
use rrun_protocol::ExitRecord;
use rrun_store::{Entry, Table};
use user::User;

/// A container. The field `state` contains all data about the container that can change.
pub(crate) struct Container {
    pub id: String,
    pub sandbox: Arc<Sandbox>,
    pub config: ContainerConfig,
    /// The image's id, `sha256:…`.
    pub image_id: String,
    /// The first repository digest of the image, or the image's id if it has no repository digest.
    pub image_ref: String,
    /// The name of the image for display to users. The text is empty if the image has no name.
    pub image_name: String,
    /// The time of the container's creation, in nanoseconds since the epoch.
    pub created_at: i64,
    pub user: User,
    /// The signal that StopContainer sends first.
    pub stop_signal: i32,
    /// The size of the configuration that counts for `pod_configuration_bytes`.
    pub configuration_bytes: usize,
    /// True while a StartContainer call is in progress. If the container exits during this time,
    /// the StartContainer call publishes the exit event after the start event. The lock on the
    /// state also protects this flag: [`Container::record_end`] reads the flag, and the
    /// StartContainer call clears it.
    starting: AtomicBool,
    state: watch::Sender<ContainerState>,
    /// The container's entry in the store.
    record: Entry,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    Created,
    Running,
    Exited,
}

/// The fields of a container that can change. Times are nanoseconds since the epoch; 0 means that
/// the event has not happened yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerState {
    pub phase: Phase,
    /// The process id of the container's first process, or 0 if that process does not exist.
    pub pid: i32,
    pub started_at: i64,
    pub finished_at: i64,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    /// True until the container is deleted from the monitor and from the runtime.
    pub in_runtime: bool,
    #[serde(with = "rrun_store::record")]
    pub resources: LinuxContainerResources,
}

impl ContainerState {
    /// Returns the state of a container that is about to be created.
    pub(crate) fn new(resources: LinuxContainerResources) -> Self {
        ContainerState {
            phase: Phase::Created,
            pid: 0,
            started_at: 0,
            finished_at: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            in_runtime: true,
            resources,
        }
    }
}

/// The container's record in the store. While the container is being created, only its bundle
/// contains the record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub id: String,
    pub sandbox: String,
    #[serde(with = "rrun_store::record")]
    pub config: ContainerConfig,
    pub image_id: String,
    pub image_ref: String,
    /// Records that older versions of the server wrote do not contain this field.
    #[serde(default)]
    pub image_name: String,
    pub created_at: i64,
    pub user: User,
    pub stop_signal: i32,
    /// Records that older versions of the server wrote do not contain this field.
    #[serde(default)]
    pub configuration_bytes: usize,
    pub state: ContainerState,
    /// True if the runtime's `create` has succeeded. The bundle then contains a complete container.
    pub made: bool,
}

/// The status message of a container if the pod's monitor has no record of the container.
pub(crate) const UNKNOWN_TO_MONITOR: &str = "the pod's monitor has no record of the container";

/// The name of the file with the container's record, in the container's bundle.
pub(crate) const RECORD: &str = "container.json";

impl Container {
    pub(crate) fn from_record(sandbox: Arc<Sandbox>, record: ContainerRecord) -> Self {
        Container {
            record: Entry::new(Table::CONTAINERS, &record.id),
            id: record.id,
            sandbox,
            config: record.config,
            image_id: record.image_id,
            image_ref: record.image_ref,
            image_name: record.image_name,
            created_at: record.created_at,
            user: record.user,
            stop_signal: record.stop_signal,
            configuration_bytes: record.configuration_bytes,
            starting: AtomicBool::new(false),
            state: watch::Sender::new(record.state),
        }
    }

    pub(crate) fn to_record(&self) -> ContainerRecord {
        ContainerRecord {
            id: self.id.clone(),
            sandbox: self.sandbox.id.clone(),
            config: self.config.clone(),
            image_id: self.image_id.clone(),
            image_ref: self.image_ref.clone(),
            image_name: self.image_name.clone(),
            created_at: self.created_at,
            user: self.user.clone(),
            stop_signal: self.stop_signal,
            configuration_bytes: self.configuration_bytes,
            state: self.state(),
            made: true,
        }
    }

    pub(crate) fn state(&self) -> ContainerState {
        self.state.borrow().clone()
    }

    pub(crate) fn phase(&self) -> Phase {
        self.state.borrow().phase
    }

    /// Changes the state and wakes the tasks that wait for a change of the state.
    pub(crate) fn change(&self, change: impl FnOnce(&mut ContainerState)) {
        self.state.send_modify(change);
    }

    /// Waits until the container has exited.
    pub(crate) async fn wait_exited(&self) {
        let mut state = self.state.subscribe();
        // An error would mean that the channel is closed. This error is impossible, because `self`
        // contains the channel's sender.
        let _ = state.wait_for(|state| state.phase == Phase::Exited).await;
    }

    /// Writes the container's current record to `BUNDLE/container.json`. The server writes the file
    /// after the container's creation, and again after its start. The server needs the file until
    /// the store contains the record; see [`Sandbox::write_pod_json`].
    pub(crate) fn write_container_json(&self, node: &Node) -> Result<()> {
        let bundle = node.bundle(&self.sandbox.id, &self.id);
        files::write_record(&bundle.join(RECORD), &self.to_record())
    }

    /// Writes the container's state to the store.
    pub(crate) async fn save(&self, node: &Node) -> Result<()> {
        let saved = self.record.save(&node.store, || self.to_record());
        let written = slow(
            format!("{}: write the container's record", self.name()),
            saved,
        )
        .await;
        written.map_err(Error::from)
    }

    /// Deletes the container's record from the store permanently.
    pub(crate) async fn delete_record(&self, node: &Node) -> Result<()> {
        let deleted = self.record.delete(&node.store);
        let written = slow(
            format!("{}: delete the container's record", self.name()),
            deleted,
        )
        .await;
        written.map_err(Error::from)
    }

    /// Saves the state in the background. If the server is killed before the state is saved, no
    /// information is lost. At its next start, the server gets the state from the bundle's record
    /// or from the monitor.
    pub(crate) fn save_soon(self: &Arc<Self>, node: &Arc<Node>) {
        let (container, node) = (Arc::clone(self), Arc::clone(node));
        tokio::spawn(async move {
            let saved = container
                .record
                .save_soon(&node.store, || container.to_record());
            if let Err(error) = slow(
                format!("{}: write the container's record", container.name()),
                saved,
            )
            .await
            {
                log::error!("{}: {error}; the server tries again", container.name());
            }
        });
    }

    /// Records that the monitor reported the container as running.
    pub(crate) fn record_running(self: &Arc<Self>, node: &Arc<Node>, pid: i32) {
        let mut changed = false;
        self.change(|state| {
            changed = state.phase == Phase::Created;
            if changed {
                state.phase = Phase::Running;
                state.started_at = now();
            }
            if state.phase == Phase::Running {
                state.pid = pid;
            }
        });
        if changed {
            self.save_soon(node);
        }
    }

    /// Records the exit that the monitor reported.
    pub(crate) fn record_exit(self: &Arc<Self>, node: &Arc<Node>, exit: &ExitRecord) {
        let reason = if exit.oom_killed {
            "OOMKilled"
        } else if exit.code == 0 {
            "Completed"
        } else {
            "Error"
        };
        self.record_end(node, exit.code, exit.finished_at, reason, "");
    }

    /// Records the container's exit, unless an exit is already recorded.
    pub(crate) fn record_end(
        self: &Arc<Self>,
        node: &Arc<Node>,
        code: i32,
        at: i64,
        reason: &str,
        message: &str,
    ) {
        let mut changed = false;
        let mut starting = false;
        self.change(|state| {
            if state.phase != Phase::Exited {
                changed = true;
                starting = self.starting.load(Ordering::Relaxed);
                state.phase = Phase::Exited;
                state.pid = 0;
                state.exit_code = code;
                state.finished_at = at;
                // `started_at` is the time at which the server received the monitor's report of the
                // start. The monitor measured `at`, the time of the exit. `started_at` can
                // therefore be later than `at`.
                state.started_at = state.started_at.min(at);
                reason.clone_into(&mut state.reason);
                message.clone_into(&mut state.message);
            }
        });
        if changed {
            log::info!("{}: exited with code {code}, {reason}", self.name());
            self.save_soon(node);
            unmount::soon(&self.name(), node.bundle(&self.sandbox.id, &self.id));
            if !starting {
                status::publish(node, self, ContainerEventType::ContainerStoppedEvent);
            }
        }
    }

    pub(crate) fn cgroup_dir(&self) -> PathBuf {
        let pod = &self.sandbox.cgroup;
        let path = if slice::is_slice(pod) {
            slice::scope(pod, &self.id)
        } else {
            format!("{pod}/{}", self.id)
        };
        cgroup::directory(&path)
    }

    /// Returns the program and the global options of the pod's runtime handler. The caller appends
    /// a subcommand such as `delete`.
    pub(crate) fn runtime_command(&self, node: &Node) -> Option<Vec<String>> {
        let (handler, cgroup) = (&self.sandbox.handler, &self.sandbox.cgroup);
        node.config.runtime_command(handler, cgroup)
    }

    /// Returns the path of the container's log, or `None` if the log directory or the log path is
    /// empty.
    pub(crate) fn log_path(&self) -> Option<PathBuf> {
        log_path(&self.sandbox.config.log_directory, &self.config.log_path)
    }

    /// Returns `container NAME (ID) of pod …`, for logs and errors.
    pub(crate) fn name(&self) -> String {
        let name = self.config.metadata.as_ref().map(|m| m.name.as_str());
        let short = crate::id::short(&self.id);
        let pod = self.sandbox.name();
        format!("container {} ({short}) of {pod}", name.unwrap_or_default())
    }
}

/// Returns the path of a log. The path is always inside the pod's log directory, even if `path` is
/// absolute. CreateContainer refuses a path with `..`.
fn log_path(directory: &str, path: &str) -> Option<PathBuf> {
    let inside = path.trim_start_matches('/');
    (!directory.is_empty() && !path.is_empty()).then(|| Path::new(directory).join(inside))
}
