//! Helpers for the tests of exec and port-forward streams. The helpers start a container for the
//! commands, and request the URLs of the streams.

use std::fs;
use std::path::Path;

use rrun_proto::v1::{ExecRequest, PortForwardRequest};

use crate::support::calls::Calls;
use crate::support::machine::Result;
use crate::support::node::{BUSYBOX, Node};

/// The protocols over which crictl can send streams.
pub(crate) const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// Runs a container in a separate pod. The container waits for signals. Returns the container's id.
pub(crate) fn waiting(node: &Node, name: &str) -> Result<String> {
    node.pull(BUSYBOX)?;
    let pod = node.pod(name);
    let pod_id = node.runp(&pod)?;
    node.run(&pod_id, &pod, &node.container("c", &["/inside", "wait"]))
}

/// Returns the number of processes in a container's cgroup and in its child cgroups. The child
/// cgroups contain the processes that `exec` started.
pub(crate) fn count_processes(cgroup: &Path) -> Result<usize> {
    let mut count = fs::read_to_string(cgroup.join("cgroup.procs"))?
        .lines()
        .count();
    for entry in fs::read_dir(cgroup)? {
        // If a process that `exec` started exits during this loop, its cgroup is deleted. So a
        // missing cgroup counts as empty.
        let inner = fs::read_to_string(entry?.path().join("cgroup.procs"));
        count += inner.map_or(0, |all| all.lines().count());
    }
    Ok(count)
}

/// Returns the URL at which the streaming server executes the command `words` in the container
/// `id`.
pub(crate) fn exec_url(calls: &Calls, id: &str, words: &[&str]) -> Result<String> {
    let mut runtime = calls.runtime();
    let request = ExecRequest {
        container_id: id.to_owned(),
        cmd: words.iter().map(ToString::to_string).collect(),
        stdin: true,
        stdout: true,
        ..ExecRequest::default()
    };
    let answer = calls.wait(async move { runtime.exec(request).await })??;
    Ok(answer.into_inner().url)
}

/// Returns the URL at which the streaming server forwards the ports `ports` of the pod.
pub(crate) fn port_forward_url(calls: &Calls, pod_id: &str, ports: &[i32]) -> Result<String> {
    let mut runtime = calls.runtime();
    let request = PortForwardRequest {
        pod_sandbox_id: pod_id.to_owned(),
        port: ports.to_vec(),
    };
    let answer = calls.wait(async move { runtime.port_forward(request).await })??;
    Ok(answer.into_inner().url)
}
