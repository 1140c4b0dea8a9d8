//! What Exec, Attach and PortForward answer: a URL of the streaming server.

use std::sync::Arc;

use rrun_proto::v1::{AttachRequest, ExecRequest, PortForwardRequest};

use super::tickets::StreamTicket;
use crate::container::{Container, Phase};
use crate::id::new_id;
use crate::node::Node;
use rrun_calls::error::{Error, Result};

/// The URL for an exec.
pub(crate) fn exec_url(node: &Node, mut request: ExecRequest) -> Result<String> {
    let container = running(node, &request.container_id)?;
    if request.cmd.is_empty() {
        return Err(Error::invalid("cmd: there is no command to execute"));
    }
    check(request.tty, request.stdin, request.stdout, request.stderr)?;
    request.container_id.clone_from(&container.id);
    node.streams.url(&new_id()?, StreamTicket::Exec(request))
}

/// The URL for an attach.
pub(crate) fn attach_url(node: &Node, mut request: AttachRequest) -> Result<String> {
    let container = running(node, &request.container_id)?;
    check(request.tty, request.stdin, request.stdout, request.stderr)?;
    request.container_id.clone_from(&container.id);
    // What the container has is what there is: one stream, or two.
    if container.config.tty {
        request.stderr = false;
    }
    node.streams.url(&new_id()?, StreamTicket::Attach(request))
}

/// The URL for a port-forward.
pub(crate) fn port_forward_url(node: &Node, mut request: PortForwardRequest) -> Result<String> {
    let sandbox = node.sandbox(&request.pod_sandbox_id)?;
    if !sandbox.state().ready {
        let name = sandbox.name();
        return Err(Error::wrong_state(format!("{name} is not ready")));
    }
    for port in &request.port {
        if u16::try_from(*port).is_err() || *port == 0 {
            return Err(Error::invalid(format!("port: {port} is not in 1 to 65535")));
        }
    }
    request.pod_sandbox_id.clone_from(&sandbox.id);
    node.streams
        .url(&new_id()?, StreamTicket::PortForward(request))
}

fn running(node: &Node, id: &str) -> Result<Arc<Container>> {
    let container = node.container(id)?;
    if container.phase() != Phase::Running {
        let name = container.name();
        return Err(Error::wrong_state(format!("{name} is not running")));
    }
    Ok(container)
}

fn check(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<()> {
    if tty && stderr {
        return Err(Error::invalid(
            "stderr: a terminal has one stream for all output: tty and stderr exclude each other",
        ));
    }
    if !stdin && !stdout && !stderr {
        return Err(Error::invalid(
            "stdin, stdout, stderr: at least one of them must be asked for",
        ));
    }
    Ok(())
}
