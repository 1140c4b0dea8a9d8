//! What tests of streams need: a container to exec in, and URLs of the streaming server.

use std::fs;
use std::path::Path;

use rrun_proto::v1::{ExecRequest, PortForwardRequest};

use crate::support::calls::Calls;
use crate::support::machine::Result;
use crate::support::node::{BUSYBOX, Node};

/// What crictl can carry streams over.
pub(crate) const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// A container that waits, in a pod of its own.
pub(crate) fn waiting(node: &Node, name: &str) -> Result<String> {
    node.pull(BUSYBOX)?;
    let pod = node.pod(name);
    let pod_id = node.runp(&pod)?;
    node.run(&pod_id, &pod, &node.container("c", &["/inside", "wait"]))
}

/// The processes in a cgroup and in those right below it, where execs are.
pub(crate) fn count_processes(cgroup: &Path) -> Result<usize> {
    let mut count = fs::read_to_string(cgroup.join("cgroup.procs"))?
        .lines()
        .count();
    for entry in fs::read_dir(cgroup)? {
        // One may go meanwhile, when it is empty.
        let inner = fs::read_to_string(entry?.path().join("cgroup.procs"));
        count += inner.map_or(0, |all| all.lines().count());
    }
    Ok(count)
}

/// The URL at which this command is executed in the container.
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

/// The URL at which these ports of the pod are forwarded.
pub(crate) fn port_forward_url(calls: &Calls, pod_id: &str, ports: &[i32]) -> Result<String> {
    let mut runtime = calls.runtime();
    let request = PortForwardRequest {
        pod_sandbox_id: pod_id.to_owned(),
        port: ports.to_vec(),
    };
    let answer = calls.wait(async move { runtime.port_forward(request).await })??;
    Ok(answer.into_inner().url)
}
