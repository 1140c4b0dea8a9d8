//! The processes whose namespaces a new container enters. config.json contains the ids of these
//! processes. The runtime opens `/proc/PID/ns/…` at some time during `create`. If such a process
//! exits before this time, the kernel can give its id to a process in another namespace, for example
//! in the node's namespace.
//!
//! These processes are children of the monitor. The kernel does not give the id of a child to
//! another process before the monitor has reaped the child. For this reason, the monitor checks
//! before and after the runtime's `create` that it has not reaped the processes.

use std::collections::BTreeMap;

use super::container::Container;
use super::serve::PodContext;
use rrun_protocol::{Failure, FailureKind};

/// A process whose namespaces a new container enters.
#[derive(Debug)]
pub(crate) enum Owner {
    Pause,
    /// The first process of the container with this serial number.
    Container(u64),
}

/// Returns the processes with the ids `pids`. Fails if one of these processes has exited.
pub(crate) fn owners(
    pids: &[i32],
    pod: &PodContext,
    containers: &BTreeMap<u64, Container>,
) -> Result<Vec<Owner>, Failure> {
    let owner = |pid: &i32| {
        if pod.pause() == Some(*pid) {
            return Ok(Owner::Pause);
        }
        let found = containers.values().find(|it| it.is_init(*pid));
        let found = found.ok_or_else(|| exited(&format!("process {pid}")))?;
        Ok(Owner::Container(found.serial))
    };
    pids.iter().map(owner).collect()
}

/// Returns a failure if the monitor has reaped one of the processes whose namespaces the container
/// enters.
pub(crate) fn failure(
    container: &Container,
    pod: &PodContext,
    containers: &BTreeMap<u64, Container>,
) -> Option<Failure> {
    container.joined.iter().find_map(|owner| match owner {
        Owner::Pause => pod
            .pause()
            .is_none()
            .then(|| exited("the pod's pause process")),
        Owner::Container(serial) => {
            let is_alive = containers.get(serial).is_some_and(Container::has_init);
            (!is_alive).then(|| exited("the first process of another container"))
        }
    })
}

fn exited(process: &str) -> Failure {
    Failure {
        kind: FailureKind::WrongState,
        message: format!("{process}, whose namespaces the container enters, has exited"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_refused_after_the_exit_of_a_process_whose_namespace_it_enters() {
        let mut pod = PodContext {
            dir: std::path::PathBuf::new(),
            runtime_timeout: std::time::Duration::ZERO,
            pid1: Some(7),
            holder: None,
            runtime: None,
        };
        let mut target = Container::for_test("joined-target");
        target.pid = 8;
        let mut containers = BTreeMap::from([(target.serial, target)]);
        let mut new = Container::for_test("joined-new");
        assert!(owners(&[9], &pod, &containers).is_err());
        new.joined = owners(&[7, 8], &pod, &containers).unwrap();
        assert!(failure(&new, &pod, &containers).is_none());

        let target = containers.remove(&1).unwrap();
        let failed = failure(&new, &pod, &containers).unwrap();
        assert!(failed.message.contains("another container"), "{failed:?}");
        pod.pid1 = None;
        let failed = failure(&new, &pod, &containers).unwrap();
        assert!(failed.message.contains("pause process"), "{failed:?}");
        for container in [target, new] {
            std::fs::remove_dir_all(&container.spec.bundle).unwrap();
        }
    }
}
