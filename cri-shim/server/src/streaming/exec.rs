//! Exec: runs a command in a container, with its stdio connected to a client.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rrun_proto::v1::ExecRequest;
use tokio::sync::watch;

use super::channel::{channel, terminal_channel};
use super::command;
use super::shutdown::{Reason, Shutdown};
use super::terminal::Terminal;
use crate::container::{Container, Phase};
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::slow;
use rrun_monitor_client::ExecHandle;
use rrun_protocol::Exec;
use rrun_streams::Descriptor;
use rrun_streams::remotecommand::{
    Channel, ClientReceiver, ClientSender, Outcome, copy_input, copy_output_until_exit,
};

/// The server's ends of the channels for a command's stdio, or the command's terminal.
#[derive(Default)]
struct Stdio {
    stdin: Option<Descriptor>,
    stdout: Option<Descriptor>,
    stderr: Option<Descriptor>,
    /// The channel for the data of the command's terminal, which replaces the other three channels.
    terminal: Option<Descriptor>,
}

/// Runs the command until it exits, and sends its exit status to the client. The command is killed
/// if the client disconnects or the server is stopped.
pub(super) async fn exec(
    node: &Node,
    request: ExecRequest,
    sender: &ClientSender,
    mut receiver: ClientReceiver,
    shutdown: &mut Shutdown,
) -> io::Result<()> {
    let outcome = match begin(node, request, sender.watch().pipe_bytes()).await {
        Ok((container, process, stdio)) => {
            tokio::select! {
                // Dropping `process` kills the command.
                ended = run(&container, process, stdio, sender, &mut receiver) => match ended? {
                    Some(outcome) => outcome,
                    None => return Ok(()),
                },
                reason = shutdown.begun() => Outcome::Failed(sentence(reason).to_owned()),
            }
        }
        Err(error) => Outcome::Failed(format!(
            "error executing command in container: {}",
            error.sentence()
        )),
    };
    sender.finish(&outcome, &mut receiver).await
}

/// Returns the message to a client whose session must end while its command runs.
fn sentence(reason: Reason) -> &'static str {
    match reason {
        Reason::ServerStops => "the CRI server is stopping, and it killed the command",
        Reason::Replaced => {
            "the limit on streams (stream_sessions) is reached and this pod has the most streams, so the CRI server killed the command"
        }
    }
}

/// Copies data between the client and the command's stdio until the command exits. If the client
/// disconnects first, the result is `None`.
async fn run(
    container: &Container,
    mut process: ExecHandle,
    mut stdio: Stdio,
    sender: &ClientSender,
    receiver: &mut ClientReceiver,
) -> io::Result<Option<Outcome>> {
    let stdin = stdio.stdin.take();
    let data = stdio.terminal.as_ref();
    let terminal = Terminal::new(container, Some(process.pid), data);
    let terminal = data.map(|data| (&terminal, data));
    let (exit, exited) = watch::channel(false);
    let exiting = async {
        let outcome = match process.wait().await {
            Ok(code) => Outcome::Exit(code),
            // Without an error message, clients treat a closed connection as a success.
            Err(error) => Outcome::Failed(format!("the command's exit code is unknown: {error}")),
        };
        let _ = exit.send(true);
        Ok(outcome)
    };
    let output = async {
        tokio::try_join!(
            exiting,
            copy_output_until_exit(stdio.stdout.as_ref(), Channel::Stdout, sender, &exited),
            copy_output_until_exit(stdio.stderr.as_ref(), Channel::Stderr, sender, &exited),
            copy_output_until_exit(stdio.terminal.as_ref(), Channel::Stdout, sender, &exited),
        )
    };
    tokio::select! {
        ended = output => Ok(Some(ended?.0)),
        gone = copy_input(receiver, stdin, terminal, sender) => gone.map(|()| None),
    }
}

/// Starts the command. Drops the request, because a session can last long and its command can be
/// long, too. The channels for its output have a capacity of `pipe_bytes`.
async fn begin(
    node: &Node,
    request: ExecRequest,
    pipe_bytes: usize,
) -> Result<(Arc<Container>, ExecHandle, Stdio)> {
    let container = node.container(&request.container_id)?;
    let name = container.name();
    if container.phase() != Phase::Running {
        return Err(Error::wrong_state(format!("{name} is not running")));
    }
    let started = start(node, &container, &request, pipe_bytes).await;
    let (process, stdio) = started.during(|| format!("execute in {name}"))?;
    Ok((container, process, stdio))
}

async fn start(
    node: &Node,
    container: &Container,
    request: &ExecRequest,
    pipe_bytes: usize,
) -> Result<(ExecHandle, Stdio)> {
    let process = command::process(node, container, &request.cmd, request.tty).await?;
    let exec = Exec {
        id: container.id.clone(),
        process: process.to_string(),
        terminal: request.tty,
    };
    let (mut stdio, theirs) = if request.tty {
        Stdio::terminal(container, pipe_bytes)?
    } else {
        Stdio::channels(request, container, pipe_bytes)?
    };
    let given: Vec<_> = theirs.iter().map(std::os::fd::AsFd::as_fd).collect();
    let started = container.sandbox.monitor.exec(exec, &given);
    let started = slow(format!("{}: start a command", container.name()), started).await;
    let mut process = started?;
    if request.tty && stdio.terminal.is_none() {
        let terminal = process
            .terminal
            .take()
            .ok_or_else(|| Error::internal("the monitor did not pass the command's terminal"))?;
        stdio.terminal = Some(Descriptor::held_open(terminal).during(making_stdio)?);
    }
    Ok((process, stdio))
}

impl Stdio {
    /// Creates the channel for the data of the command's terminal, which the runtime creates. The
    /// channel has a capacity of `bytes`. Returns the server's end of the channel, and the descriptor
    /// for the monitor. A monitor of an earlier version needs no channel.
    fn terminal(container: &Container, bytes: usize) -> Result<(Self, Vec<OwnedFd>)> {
        let channel = terminal_channel(&container.sandbox, bytes).during(making_stdio)?;
        let (ours, theirs) = channel.unzip();
        let stdio = Stdio {
            terminal: ours.map(Descriptor::new).transpose().during(making_stdio)?,
            ..Stdio::default()
        };
        Ok((stdio, theirs.into_iter().collect()))
    }

    /// Creates channels for the requested streams. Returns the server's ends of the channels, and the
    /// descriptors of the command's stdin, stdout and stderr. The channels for output have a capacity
    /// of `bytes`.
    fn channels(
        request: &ExecRequest,
        container: &Container,
        bytes: usize,
    ) -> Result<(Self, Vec<OwnedFd>)> {
        let mut ours = Stdio::default();
        let mut theirs = Vec::new();
        theirs.push(if request.stdin {
            let (read, write) = channel(&container.sandbox, None).during(making_stdio)?;
            ours.stdin = Some(Descriptor::new(write).during(making_stdio)?);
            read
        } else {
            command::null()?
        });
        for (requested, output) in [
            (request.stdout, &mut ours.stdout),
            (request.stderr, &mut ours.stderr),
        ] {
            theirs.push(if requested {
                let (read, write) =
                    channel(&container.sandbox, Some(bytes)).during(making_stdio)?;
                *output = Some(Descriptor::new(read).during(making_stdio)?);
                write
            } else {
                command::null()?
            });
        }
        Ok((ours, theirs))
    }
}

fn making_stdio() -> String {
    "create the channels for a command's stdio".to_owned()
}
