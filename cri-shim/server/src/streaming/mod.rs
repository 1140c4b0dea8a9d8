//! Streams between clients and containers.
//!
//! [`exec_sync`] answers with what a command wrote. Exec, Attach and PortForward answer with a URL
//! ([`token`]) of the streaming [`server`]; the client that comes there chooses what to speak
//! ([`upgrade`]): SPDY ([`spdy`], on a socket [`connection`]) or WebSocket ([`websocket`]), either
//! on a [`transport`], sending by its [`output`]. [`exec`] and [`attach`] then serve five channels ([`remotecommand`]),
//! [`port_forward`] as many as the client opens.

pub(crate) mod attach;
mod command;
pub(crate) mod exec;
pub(crate) mod exec_sync;
pub(crate) mod port_forward;
pub(crate) mod server;
pub(crate) mod token;

pub(crate) use exec_sync::exec_sync;

use std::sync::OnceLock;

use rrun_proto::v1::{AttachRequest, ExecRequest, PortForwardRequest};

use crate::container::{Container, Phase};
use crate::node::Node;
use rrun_calls::error::{Error, Result};
use token::{Permit, Tokens};

/// What the gRPC service and the streaming server share.
#[derive(Default)]
pub(crate) struct Streams {
    tokens: Tokens,
    /// `http://ADDRESS:PORT`, once the server listens.
    base: OnceLock<String>,
}

impl Streams {
    fn url(&self, permit: Permit) -> Result<String> {
        let base = self
            .base
            .get()
            .ok_or_else(|| Error::internal("the streaming server does not listen yet"))?;
        let method = permit.method();
        let token = self.tokens.give(permit)?;
        Ok(format!("{base}/{method}/{token}"))
    }
}

/// The URL for an exec.
pub(crate) fn exec_url(node: &Node, mut request: ExecRequest) -> Result<String> {
    let container = running(node, &request.container_id)?;
    if request.cmd.is_empty() {
        return Err(Error::invalid("cmd: there is no command to execute"));
    }
    check(request.tty, request.stdin, request.stdout, request.stderr)?;
    request.container_id.clone_from(&container.id);
    node.streams.url(Permit::Exec(request))
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
    node.streams.url(Permit::Attach(request))
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
    node.streams.url(Permit::PortForward(request))
}

fn running(node: &Node, id: &str) -> Result<std::sync::Arc<Container>> {
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
