//! Attach: a client at a container's own stdio, one of many.
//!
//! The monitor copies the container's output into pipes of the client's, whose size is all that a
//! slow client costs, and hands over the container's stdin, or its terminal, to write to.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rrun_proto::v1::AttachRequest;
use rustix::pipe::{PipeFlags, pipe_with};

use super::shutdown::Shutdown;
use crate::container::Container;
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_monitor_client::AttachHandle;
use rrun_protocol::Attach;
use rrun_protocol::omission_notice;
use rrun_streams::remotecommand::{
    Channel, ClientInput, ClientReceiver, ClientSender, Outcome, StdinWrite, copy_output, resize,
};
use rrun_streams::{Descriptor, PIPE_BYTES};

/// A client's end of a container's stdio.
struct Attached {
    stdout: Option<Descriptor>,
    stderr: Option<Descriptor>,
    /// The container's stdin or terminal.
    stdin: Option<Descriptor>,
    /// Dropping it detaches.
    handle: AttachHandle,
}

/// What a client reads when the server is stopped.
const STOPPED: &str = "the CRI server is being stopped; the container runs on";

/// Serves the client until it goes, or the container or the server ends.
pub(super) async fn attach(
    node: &Node,
    request: &AttachRequest,
    sender: &ClientSender,
    mut receiver: ClientReceiver,
    shutdown: &mut Shutdown,
) -> io::Result<()> {
    let outcome = match begin(node, request).await {
        Ok((container, mut attached)) => {
            let stdin = attached.stdin.take();
            tokio::select! {
                ended = outputs(&container, attached, sender) => {
                    ended?;
                    Outcome::Exit(0)
                }
                () = shutdown.begun() => Outcome::Failed(STOPPED.to_owned()),
                detached = input(&container, request.stdin, &mut receiver, stdin, sender) => {
                    match detached? {
                        Detached::Gone => return Ok(()),
                        Detached::Stdin => Outcome::Exit(0),
                    }
                }
            }
        }
        Err(error) => Outcome::Failed(format!(
            "error attaching to container: {}",
            error.sentence()
        )),
    };
    sender.finish(&outcome, &mut receiver).await
}

async fn begin(node: &Node, request: &AttachRequest) -> Result<(Arc<Container>, Attached)> {
    let container = node.container(&request.container_id)?;
    let attached = connect(&container, request).await?;
    Ok((container, attached))
}

/// Copies the container's output until the container ends, and then notes how much was left out.
async fn outputs(
    container: &Container,
    mut attached: Attached,
    sender: &ClientSender,
) -> io::Result<()> {
    tokio::try_join!(
        copy_output(attached.stdout.as_ref(), Channel::Stdout, sender),
        copy_output(attached.stderr.as_ref(), Channel::Stderr, sender),
    )?;
    // Without any output there is still the container's end to wait for.
    let (stdout, stderr) = attached.handle.ended().await;
    let newline = if container.config.tty { "\r\n" } else { "\n" };
    for (channel, lost) in [(Channel::Stdout, stdout), (Channel::Stderr, stderr)] {
        if lost > 0 {
            let note = omission_notice(lost, newline);
            sender.send(channel, note.as_bytes()).await?;
        }
    }
    Ok(())
}

/// Makes pipes for what was requested, and attaches them to the container.
async fn connect(container: &Container, request: &AttachRequest) -> Result<Attached> {
    let what = || "make pipes for a container's output".to_owned();
    let mut theirs: Vec<OwnedFd> = Vec::new();
    let mut pipe = |wanted: bool| {
        if !wanted {
            return Ok(None);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(what)?;
        // Holds output for a client that is slow for a moment. Without that it is 64 KiB.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
        theirs.push(write);
        Descriptor::new(read).during(what).map(Some)
    };
    let (stdout, stderr) = (pipe(request.stdout)?, pipe(request.stderr)?);
    let attach = Attach {
        id: container.id.clone(),
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    };
    let attached = container.sandbox.monitor.attach(attach, theirs).await;
    let mut handle = attached
        .map_err(Error::from)
        .during(|| format!("attach to {}", container.name()))?;
    let stdin = handle.stdin.take().map(Descriptor::new);
    Ok(Attached {
        stdout,
        stderr,
        stdin: stdin.transpose().during(what)?,
        handle,
    })
}

enum Detached {
    /// The client has gone.
    Gone,
    /// Its stdin has ended, and with it the session: so do all CRI servers.
    Stdin,
}

async fn input(
    container: &Container,
    wanted: bool,
    receiver: &mut ClientReceiver,
    mut stdin: Option<Descriptor>,
    sender: &ClientSender,
) -> io::Result<Detached> {
    let config = &container.config;
    while let Some(input) = receiver.next().await? {
        match input {
            ClientInput::Stdin(bytes) => {
                // A terminal is there for its size, too.
                let Some(to) = stdin.as_ref().filter(|_| wanted) else {
                    continue;
                };
                let terminal = config.tty.then_some(to);
                match receiver.feed(to, &bytes, terminal, sender.watch()).await {
                    StdinWrite::Complete => {}
                    StdinWrite::Closed => stdin = None,
                    StdinWrite::ClientGone => return Ok(Detached::Gone),
                }
            }
            ClientInput::StdinEnd if stdin.is_none() => {}
            ClientInput::StdinEnd if config.stdin_once && !config.tty => {
                // The container reads to its end, and the client what comes of that.
                stdin = None;
                let closed = container.sandbox.monitor.close_stdin(&container.id).await;
                closed.map_err(io::Error::other)?;
            }
            ClientInput::StdinEnd => return Ok(Detached::Stdin),
            ClientInput::Resize(size) => {
                if let Some(terminal) = stdin.as_ref().filter(|_| config.tty) {
                    resize(terminal, size);
                }
            }
        }
    }
    Ok(Detached::Gone)
}
