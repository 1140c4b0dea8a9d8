//! A container's life.
//!
//! [`create`] makes it: the [`bundle`] (its writable layer mounted over the image's layers,
//! [`rootfs`], and its OCI configuration, [`spec`], of [`mounts`], [`capabilities`], [`devices`],
//! [`resources`], [`seccomp`] and the [`user`] it runs as), and the runtime's `create` through the
//! pod's monitor.
//! [`start`], [`stop`] and [`remove`] (by way of [`trash`]) are the rest; [`status`] is the CRI's
//! view.

pub(crate) mod annotations;
pub(crate) mod apparmor;
mod bundle;
pub(crate) mod capabilities;
pub(crate) mod cdi;
pub(crate) mod create;
pub(crate) mod devices;
pub(crate) mod idmap;
pub(crate) mod image_volume;
pub(crate) mod mounts;
pub(crate) mod propagation;
pub(crate) mod remove;
pub(crate) mod resources;
pub(crate) mod rootfs;
pub(crate) mod seccomp;
mod seccomp_default;
pub(crate) mod signal;
pub(crate) mod spec;
pub(crate) mod start;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod trash;
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

/// One container. What can change is in `state`.
pub(crate) struct Container {
    pub id: String,
    pub sandbox: Arc<Sandbox>,
    pub config: ContainerConfig,
    /// The image's id, `sha256:…`.
    pub image_id: String,
    /// The image with its digest.
    pub image_ref: String,
    /// The image by the name that a user knows it by; empty if it has none.
    pub image_name: String,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    pub user: User,
    /// What StopContainer sends first.
    pub stop_signal: i32,
    /// A start is under way, which will tell of the container's end after it has told of its
    /// start. Written, and read by [`Container::ended`], while the state is held.
    starting: AtomicBool,
    state: watch::Sender<ContainerState>,
    /// The record in the store.
    record: Entry,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    Created,
    Running,
    Exited,
}

/// What changes in a container's life. Times are nanoseconds since the epoch, 0 for not yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerState {
    pub phase: Phase,
    /// The first process, while it lives.
    pub pid: i32,
    pub started_at: i64,
    pub finished_at: i64,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    /// The monitor and the runtime may know it still.
    pub in_runtime: bool,
    #[serde(with = "rrun_store::record")]
    pub resources: LinuxContainerResources,
}

impl ContainerState {
    /// A container that is about to be made.
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

/// The container in the store, and in its bundle while it is being made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub id: String,
    pub sandbox: String,
    #[serde(with = "rrun_store::record")]
    pub config: ContainerConfig,
    pub image_id: String,
    pub image_ref: String,
    /// Not in the records of older servers.
    #[serde(default)]
    pub image_name: String,
    pub created_at: i64,
    pub user: User,
    pub stop_signal: i32,
    pub state: ContainerState,
    /// The runtime's create has succeeded: what is in the bundle is a container.
    pub made: bool,
}

/// The name of the record in a container's bundle.
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

    /// Changes the state; waiting calls look at it again.
    pub(crate) fn change(&self, change: impl FnOnce(&mut ContainerState)) {
        self.state.send_modify(change);
    }

    /// Waits for the container's end.
    pub(crate) async fn wait_exited(&self) {
        let mut state = self.state.subscribe();
        // The sender is in `self`: it can't close.
        let _ = state.wait_for(|state| state.phase == Phase::Exited).await;
    }

    /// `BUNDLE/container.json`: the container as it is being made and, once made and once started,
    /// as it is, until the store has it; as with [`Sandbox::write_down`].
    pub(crate) fn write_down(&self, node: &Node) -> Result<()> {
        let bundle = node.bundle(&self.sandbox.id, &self.id);
        files::write_record(&bundle.join(RECORD), &self.to_record())
    }

    /// Writes the container's state to the store.
    pub(crate) async fn save(&self, node: &Node) -> Result<()> {
        let saved = self.record.save(&node.store, || self.to_record());
        let written = slow(format!("{}: write its record", self.name()), saved).await;
        written.map_err(Error::from)
    }

    /// Takes the container out of the store, for good.
    pub(crate) async fn delete_record(&self, node: &Node) -> Result<()> {
        let deleted = self.record.delete(&node.store);
        let written = slow(format!("{}: write its record", self.name()), deleted).await;
        written.map_err(Error::from)
    }

    /// Saves without anyone waiting: what is lost by a kill before that has been written down, or
    /// is known to the monitor.
    pub(crate) fn save_soon(self: &Arc<Self>, node: &Arc<Node>) {
        let (container, node) = (Arc::clone(self), Arc::clone(node));
        tokio::spawn(async move {
            let saved = container
                .record
                .save_soon(&node.store, || container.to_record());
            if let Err(error) = slow(format!("{}: write its record", container.name()), saved).await
            {
                log::error!("{}: {error}", container.name());
            }
        });
    }

    /// The monitor says that it runs.
    pub(crate) fn is_running(self: &Arc<Self>, node: &Arc<Node>, pid: i32) {
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

    /// The monitor says how it ended.
    pub(crate) fn has_exited(self: &Arc<Self>, node: &Arc<Node>, exit: &ExitRecord) {
        let reason = if exit.oom_killed {
            "OOMKilled"
        } else if exit.code == 0 {
            "Completed"
        } else {
            "Error"
        };
        self.ended(node, exit.code, exit.finished_at, reason, "");
    }

    /// Records an end, unless there is one already.
    pub(crate) fn ended(
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
                // The monitor tells of a start when it has happened; the end may have by then.
                state.started_at = state.started_at.min(at);
                reason.clone_into(&mut state.reason);
                message.clone_into(&mut state.message);
            }
        });
        if changed {
            log::info!("{}: ended with code {code}, {reason}", self.name());
            self.save_soon(node);
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

    /// The command of the pod's runtime handler, without a subcommand.
    pub(crate) fn runtime_command(&self, node: &Node) -> Option<Vec<String>> {
        let (handler, cgroup) = (&self.sandbox.handler, &self.sandbox.cgroup);
        node.config.runtime_command(handler, cgroup)
    }

    /// Where its log goes; `None` without a log directory or path.
    pub(crate) fn log_path(&self) -> Option<PathBuf> {
        log_path(&self.sandbox.config.log_directory, &self.config.log_path)
    }

    /// `container NAME (ID) of pod …`, for the log and for errors.
    pub(crate) fn name(&self) -> String {
        let name = self.config.metadata.as_ref().map(|m| m.name.as_str());
        let short = crate::id::short(&self.id);
        let pod = self.sandbox.name();
        format!("container {} ({short}) of {pod}", name.unwrap_or_default())
    }
}

fn log_path(directory: &str, path: &str) -> Option<PathBuf> {
    (!directory.is_empty() && !path.is_empty()).then(|| Path::new(directory).join(path))
}
