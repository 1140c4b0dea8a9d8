//! Attach: connects a client to the stdio of a container's first process. Several clients can be
//! attached at the same time.
//!
//! The monitor copies the container's output into the client's pipes. The output for a slow client
//! therefore occupies at most the memory of the client's pipes. The monitor also passes the
//! server a socket that leads to the container's stdin or terminal.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rrun_proto::v1::AttachRequest;
use rustix::pipe::{PipeFlags, pipe_with};

use super::shutdown::{Reason, Shutdown};
use super::terminal::Terminal;
use crate::container::Container;
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_monitor_client::AttachHandle;
use rrun_protocol::Attach;
use rrun_protocol::omission_notice;
use rrun_streams::Descriptor;
use rrun_streams::remotecommand::{
    Channel, ClientInput, ClientReceiver, ClientSender, Outcome, Resizable, StdinWrite, copy_output,
};

/// The server's descriptors for a client that is attached to a container.
struct Attached {
    stdout: Option<Descriptor>,
    stderr: Option<Descriptor>,
    /// A socket that leads to the container's stdin or terminal. With a monitor of an earlier version,
    /// the stdin pipe or the terminal's master.
    stdin: Option<Descriptor>,
    /// The connection to the monitor. Dropping the handle detaches the client.
    handle: AttachHandle,
}

/// Serves the client until the client disconnects, the container exits or the server stops.
pub(super) async fn attach(
    node: &Node,
    request: &AttachRequest,
    sender: &ClientSender,
    mut receiver: ClientReceiver,
    shutdown: &mut Shutdown,
) -> io::Result<()> {
    let outcome = match begin(node, request, sender).await {
        Ok((container, mut attached)) => {
            let stdin = attached.stdin.take();
            tokio::select! {
                ended = outputs(&container, attached, sender) => {
                    ended?;
                    Outcome::Exit(0)
                }
                reason = shutdown.begun() => Outcome::Failed(sentence(reason).to_owned()),
                detached = input(&container, request.stdin, &mut receiver, stdin, sender) => {
                    match detached? {
                        Detached::ClientGone => return Ok(()),
                        Detached::StdinClosed => Outcome::Exit(0),
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

/// Returns the message to a client whose session must end.
fn sentence(reason: Reason) -> &'static str {
    match reason {
        Reason::ServerStops => "the CRI server is stopping; the container continues to run",
        Reason::Replaced => {
            "the limit on streams (stream_sessions) is reached and this pod has the most streams, so the CRI server closed this stream; the container continues to run"
        }
    }
}

async fn begin(
    node: &Node,
    request: &AttachRequest,
    sender: &ClientSender,
) -> Result<(Arc<Container>, Attached)> {
    let container = node.container(&request.container_id)?;
    let attached = connect(&container, request, sender.watch().pipe_bytes()).await?;
    Ok((container, attached))
}

/// Copies the container's output until the container exits, and then reports how much output the
/// client missed.
async fn outputs(
    container: &Container,
    mut attached: Attached,
    sender: &ClientSender,
) -> io::Result<()> {
    tokio::try_join!(
        copy_output(attached.stdout.as_ref(), Channel::Stdout, sender),
        copy_output(attached.stderr.as_ref(), Channel::Stderr, sender),
    )?;
    // A client without output streams also waits here until the container exits.
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

/// Creates pipes with a capacity of `pipe_bytes` for the requested streams, and attaches them to the
/// container.
async fn connect(
    container: &Container,
    request: &AttachRequest,
    pipe_bytes: usize,
) -> Result<Attached> {
    let what = || "create pipes for a container's output".to_owned();
    let mut theirs: Vec<OwnedFd> = Vec::new();
    let mut pipe = |requested: bool| {
        if !requested {
            return Ok(None);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(what)?;
        // If few clients are connected, the pipe is larger than the default of 64 KiB. It can
        // therefore buffer the output while a client is briefly slow.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, pipe_bytes);
        theirs.push(write);
        Descriptor::new(read).during(what).map(Some)
    };
    let (stdout, stderr) = (pipe(request.stdout)?, pipe(request.stderr)?);
    let attach = Attach {
        id: container.id.clone(),
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        relays_terminal: true,
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
    /// The client disconnected.
    ClientGone,
    /// The client closed its stdin. The end of stdin ends the session, as in all CRI servers.
    StdinClosed,
}

async fn input(
    container: &Container,
    requested: bool,
    receiver: &mut ClientReceiver,
    mut stdin: Option<Descriptor>,
    sender: &ClientSender,
) -> io::Result<Detached> {
    let config = &container.config;
    while let Some(input) = receiver.next().await? {
        match input {
            ClientInput::Stdin(bytes) => {
                // A monitor of an earlier version always passes the terminal. If the client requested
                // no stdin, its input is ignored.
                let Some(to) = stdin.as_ref().filter(|_| requested) else {
                    continue;
                };
                let terminal = Terminal::new(container, None, stdin.as_ref());
                let terminal = config.tty.then_some(&terminal);
                match receiver.feed(to, &bytes, terminal, sender.watch()).await {
                    StdinWrite::Complete => {}
                    StdinWrite::Closed => stdin = None,
                    StdinWrite::ClientGone => return Ok(Detached::ClientGone),
                }
            }
            ClientInput::StdinEnd if stdin.is_none() => {}
            ClientInput::StdinEnd if config.stdin_once && !config.tty => {
                // With `stdin_once`, the end of the client's stdin closes the container's stdin,
                // and the client continues to receive output.
                stdin = None;
                let closed = container.sandbox.monitor.close_stdin(&container.id).await;
                closed.map_err(io::Error::other)?;
            }
            ClientInput::StdinEnd => return Ok(Detached::StdinClosed),
            ClientInput::Resize(size) => {
                if config.tty {
                    let terminal = Terminal::new(container, None, stdin.as_ref());
                    terminal.resize(size).await;
                }
            }
        }
    }
    Ok(Detached::ClientGone)
}
