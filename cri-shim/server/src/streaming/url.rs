//! The URLs of the streaming server that Exec, Attach and PortForward return.

use std::sync::Arc;

use rrun_proto::v1::{AttachRequest, ExecRequest, PortForwardRequest};

use super::tickets::StreamTicket;
use crate::container::{Container, Phase};
use crate::id::new_id;
use crate::node::Node;
use rrun_calls::error::{Error, Result};

/// Returns a URL that the client can use once, to run the command of the request.
pub(crate) fn exec_url(node: &Node, mut request: ExecRequest) -> Result<String> {
    let container = running(node, &request.container_id)?;
    if request.cmd.is_empty() {
        return Err(Error::invalid("cmd: the request contains no command"));
    }
    check(request.tty, request.stdin, request.stdout, request.stderr)?;
    request.container_id.clone_from(&container.id);
    let pod = &container.sandbox.id;
    node.streams
        .url(&new_id()?, pod, StreamTicket::Exec(request))
}

/// Returns a URL that the client can use once, to attach to the container.
pub(crate) fn attach_url(node: &Node, mut request: AttachRequest) -> Result<String> {
    let container = running(node, &request.container_id)?;
    check(request.tty, request.stdin, request.stdout, request.stderr)?;
    request.container_id.clone_from(&container.id);
    // If the container has a terminal, its stdout and stderr are one stream.
    if container.config.tty {
        request.stderr = false;
    }
    let pod = &container.sandbox.id;
    node.streams
        .url(&new_id()?, pod, StreamTicket::Attach(request))
}

/// Returns a URL that the client can use once, to connect to the pod's ports.
pub(crate) fn port_forward_url(node: &Node, mut request: PortForwardRequest) -> Result<String> {
    let sandbox = node.sandbox(&request.pod_sandbox_id)?;
    if !sandbox.state().ready {
        let name = sandbox.name();
        return Err(Error::wrong_state(format!("{name} is not ready")));
    }
    for port in &request.port {
        if u16::try_from(*port).is_err() || *port == 0 {
            return Err(Error::invalid(format!(
                "port: {port} is outside the range 1 to 65535"
            )));
        }
    }
    request.pod_sandbox_id.clone_from(&sandbox.id);
    node.streams
        .url(&new_id()?, &sandbox.id, StreamTicket::PortForward(request))
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
            "stderr: it cannot be combined with tty, because a terminal has one stream for all output",
        ));
    }
    if !stdin && !stdout && !stderr {
        return Err(Error::invalid(
            "stdin, stdout, stderr: at least one of them must be requested",
        ));
    }
    Ok(())
}
