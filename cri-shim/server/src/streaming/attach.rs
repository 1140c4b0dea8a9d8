//! Attach: a client at a container's own stdio, one of many.
//!
//! The monitor copies the container's output into pipes of the client's, whose size is all that a
//! slow client costs, and hands over the container's stdin, or its terminal, to write to.

use std::io;
use std::os::fd::OwnedFd;

use rrun_proto::v1::AttachRequest;
use rustix::pipe::{PipeFlags, pipe_with};

use super::server::Ending;
use crate::container::Container;
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_monitor_client::AttachHandle;
use rrun_protocol::Attach;
use rrun_protocol::omission_notice;
use rrun_streams::descriptor::Descriptor;
use rrun_streams::pipe;
use rrun_streams::remotecommand::{Channel, Fed, Input, Outcome, Receiver, Sender, resize};

/// How much output waits for a client that is slow for a moment.
const PIPE: usize = pipe::ROOM;

/// A client's end of a container's stdio.
struct Attached {
    stdout: Option<Descriptor>,
    stderr: Option<Descriptor>,
    /// The container's stdin or terminal.
    stdin: Option<Descriptor>,
    /// Dropping it detaches.
    handle: AttachHandle,
}

/// What a client is told when the server is stopped.
const STOPPED: &str = "the CRI server is being stopped; the container runs on";

/// Serves the client until it goes, or the container or the server ends.
pub(crate) async fn attach(
    node: &Node,
    request: &AttachRequest,
    sender: &Sender,
    mut receiver: Receiver,
    ending: &mut Ending,
) -> io::Result<()> {
    let attached = match node.container(&request.container_id) {
        Ok(container) => begin(&container, request)
            .await
            .map(|attached| (container, attached)),
        Err(error) => Err(error),
    };
    let outcome = match attached {
        Ok((container, mut attached)) => {
            let stdin = attached.stdin.take();
            let outputs = async {
                tokio::try_join!(
                    output(attached.stdout.as_ref(), Channel::Stdout, sender),
                    output(attached.stderr.as_ref(), Channel::Stderr, sender),
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
                Ok::<_, io::Error>(())
            };
            let mut outcome = Outcome::Exit(0);
            tokio::select! {
                ended = outputs => ended?,
                () = ending.come() => outcome = Outcome::Failed(STOPPED.to_owned()),
                detached = input(&container, request.stdin, &mut receiver, stdin, sender) => match detached? {
                    Detached::Gone => return Ok(()),
                    Detached::Stdin => {}
                },
            }
            outcome
        }
        Err(error) => Outcome::Failed(format!(
            "error attaching to container: {}",
            error.sentence()
        )),
    };
    sender.finish(&outcome, &mut receiver).await
}

async fn begin(container: &Container, request: &AttachRequest) -> Result<Attached> {
    let what = || "make pipes for a container's output".to_owned();
    let mut theirs: Vec<OwnedFd> = Vec::new();
    let mut pipe = |wanted: bool| {
        if !wanted {
            return Ok(None);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(what)?;
        // Without that it holds 64 KiB.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE);
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
        .map_err(|error| Error::internal(error.to_string()))
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
    receiver: &mut Receiver,
    mut stdin: Option<Descriptor>,
    sender: &Sender,
) -> io::Result<Detached> {
    let config = &container.config;
    while let Some(input) = receiver.next().await? {
        match input {
            Input::Stdin(bytes) => {
                // A terminal is there for its size, too.
                let Some(to) = stdin.as_ref().filter(|_| wanted) else {
                    continue;
                };
                let terminal = config.tty.then_some(to);
                match receiver.feed(to, &bytes, terminal, sender.watch()).await {
                    Fed::All => {}
                    Fed::Unread => stdin = None,
                    Fed::Gone => return Ok(Detached::Gone),
                }
            }
            Input::StdinEnd if stdin.is_none() => {}
            Input::StdinEnd if config.stdin_once && !config.tty => {
                // The container reads to its end, and the client what comes of that.
                stdin = None;
                let closed = container.sandbox.monitor.close_stdin(&container.id).await;
                closed.map_err(io::Error::other)?;
            }
            Input::StdinEnd => return Ok(Detached::Stdin),
            Input::Resize(size) => {
                if let Some(terminal) = stdin.as_ref().filter(|_| config.tty) {
                    resize(terminal, size);
                }
            }
        }
    }
    Ok(Detached::Gone)
}

/// Passes on one stream to its end.
async fn output(from: Option<&Descriptor>, channel: Channel, sender: &Sender) -> io::Result<()> {
    let Some(from) = from else {
        return Ok(());
    };
    let mut buffer = Vec::new();
    loop {
        let mut ready = from.readable().await?;
        match sender.pass(channel, from, &mut buffer, usize::MAX).await? {
            Some(0) => return Ok(()),
            Some(_) => {}
            None => ready.clear_ready(),
        }
    }
}
