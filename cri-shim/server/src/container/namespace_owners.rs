//! The processes whose namespaces a new container enters.

use rrun_proto::v1::{ContainerConfig, NamespaceMode};

use super::Phase;
use super::spec::{self, PidNamespace};
use crate::node::Node;
use crate::sandbox::{Sandbox, namespaces};
use rrun_calls::error::{Error, Result};

#[derive(Clone, Copy)]
pub(super) struct NamespaceOwners {
    /// The id of the process whose IPC, UTS and user namespaces the container enters. This process
    /// is the pod's monitor or pause process.
    pub holder: i32,
    pub pid: PidNamespace,
    monitor: i32,
}

impl NamespaceOwners {
    pub(super) fn find(node: &Node, sandbox: &Sandbox, config: &ContainerConfig) -> Result<Self> {
        let exited = || {
            Error::wrong_state(format!(
                "the process that keeps the namespaces of {} has exited",
                sandbox.name()
            ))
        };
        Ok(NamespaceOwners {
            holder: sandbox.namespaces().ok_or_else(exited)?,
            pid: pid_namespace(node, sandbox, config)?,
            monitor: sandbox.state().monitor,
        })
    }

    /// Returns the ids of the processes that are children of the monitor
    /// ([`rrun_protocol::Create::namespaces_of`]).
    pub(super) fn children_of_monitor(self) -> Vec<i32> {
        let holder = Some(self.holder).filter(|pid| *pid != self.monitor);
        let first = match self.pid {
            PidNamespace::Join(pid) => Some(pid),
            PidNamespace::New | PidNamespace::Node => None,
        };
        holder.into_iter().chain(first).collect()
    }
}

fn pid_namespace(node: &Node, sandbox: &Sandbox, config: &ContainerConfig) -> Result<PidNamespace> {
    match spec::pid_mode(config) {
        (NamespaceMode::Pod, _) => {
            if !namespaces::sharing(&sandbox.config)?.shared_pid {
                return Ok(PidNamespace::New);
            }
            let exited = || {
                Error::wrong_state(format!(
                    "the first process of the PID namespace of {} has exited",
                    sandbox.name()
                ))
            };
            let pid1 = sandbox.state().pid1;
            Ok(PidNamespace::Join(pid1.ok_or_else(exited)?))
        }
        (NamespaceMode::Container, _) => Ok(PidNamespace::New),
        (NamespaceMode::Node, _) => Ok(PidNamespace::Node),
        (NamespaceMode::Target, target) => {
            let target = node.container(&target)?;
            if target.sandbox.id != sandbox.id {
                return Err(Error::invalid(format!(
                    "the container {}, whose PID namespace is requested, is in another pod",
                    target.id
                )));
            }
            let state = target.state();
            match state.phase {
                Phase::Running => Ok(PidNamespace::Join(state.pid)),
                _ => Err(Error::wrong_state(format!(
                    "the container {}, whose PID namespace is requested, is not running",
                    target.id
                ))),
            }
        }
    }
}
