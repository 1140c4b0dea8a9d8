//! Exec: a command in a container with its stdio at a client.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rrun_proto::v1::ExecRequest;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::watch;

use super::command;
use super::server::Ending;
use crate::container::{Container, Phase};
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::slow;
use rrun_monitor_client::ExecHandle;
use rrun_protocol::Exec;
use rrun_streams::descriptor::Descriptor;
use rrun_streams::pipe;
use rrun_streams::remotecommand::{Channel, Fed, Input, Outcome, Receiver, Sender, resize};

/// How long a terminal is read after its process has ended while others hold it open: the kernel
/// passes on what was written there a moment later.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// How much of that at most: more than a terminal holds.
const MAX_LAST_WORDS: usize = 256 << 10;

/// What a client is told when the server is stopped: a command's stdio goes with it.
const STOPPED: &str = "the CRI server is being stopped, and the command was ended with it";

/// Our ends of a command's stdio.
struct Stdio {
    stdin: Option<Descriptor>,
    stdout: Option<Descriptor>,
    stderr: Option<Descriptor>,
    /// Stdin and stdout both.
    terminal: Option<Descriptor>,
}

/// Runs the command until it ends or the client goes, which ends it, and tells the client. So does the
/// server's end.
pub(crate) async fn exec(
    node: &Node,
    request: &ExecRequest,
    sender: &Sender,
    mut receiver: Receiver,
    ending: &mut Ending,
) -> io::Result<()> {
    let outcome = match begin(node, request).await {
        Ok((mut process, mut stdio)) => {
            let stdin = stdio.stdin.take();
            let (tell, ended) = watch::channel(false);
            let exiting = async {
                let outcome = match process.wait().await {
                    Ok(code) => Outcome::Exit(code),
                    // Clients take a connection that just ends for a success.
                    Err(error) => {
                        Outcome::Failed(format!("the command's exit code is lost: {error}"))
                    }
                };
                let _ = tell.send(true);
                Ok(outcome)
            };
            let output = async {
                tokio::try_join!(
                    exiting,
                    output(stdio.stdout.as_ref(), Channel::Stdout, sender, &ended),
                    output(stdio.stderr.as_ref(), Channel::Stderr, sender, &ended),
                    output(stdio.terminal.as_ref(), Channel::Stdout, sender, &ended),
                )
            };
            tokio::select! {
                // An error drops the process, which kills it.
                ended = output => ended?.0,
                () = ending.come() => Outcome::Failed(STOPPED.to_owned()),
                gone = input(&mut receiver, stdin, stdio.terminal.as_ref(), sender) => return gone,
            }
        }
        Err(error) => Outcome::Failed(format!(
            "error executing command in container: {}",
            error.sentence()
        )),
    };
    sender.finish(&outcome, &mut receiver).await
}

async fn begin(node: &Node, request: &ExecRequest) -> Result<(ExecHandle, Stdio)> {
    let container = node.container(&request.container_id)?;
    let name = container.name();
    if container.phase() != Phase::Running {
        return Err(Error::wrong_state(format!("{name} is not running")));
    }
    start(node, &container, request)
        .await
        .during(|| format!("execute in {name}"))
}

async fn start(
    node: &Node,
    container: &Container,
    request: &ExecRequest,
) -> Result<(ExecHandle, Stdio)> {
    let process = command::process(node, container, &request.cmd, request.tty)?;
    let exec = Exec {
        id: container.id.clone(),
        process: process.to_string(),
        terminal: request.tty,
    };
    let what = || "make the stdio of a command".to_owned();
    let mut stdio = Stdio {
        stdin: None,
        stdout: None,
        stderr: None,
        terminal: None,
    };
    let mut theirs: Vec<OwnedFd> = Vec::new();
    if !request.tty {
        theirs.push(if request.stdin {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(what)?;
            stdio.stdin = Some(Descriptor::new(write).during(what)?);
            read
        } else {
            command::null()?
        });
        for (wanted, ours) in [
            (request.stdout, &mut stdio.stdout),
            (request.stderr, &mut stdio.stderr),
        ] {
            theirs.push(if wanted {
                let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(what)?;
                // Without that it holds 64 KiB, and a command that writes much wakes us as often.
                let _ = rustix::pipe::fcntl_setpipe_size(&write, pipe::ROOM);
                *ours = Some(Descriptor::new(read).during(what)?);
                write
            } else {
                command::null()?
            });
        }
    }
    let given: Vec<_> = theirs.iter().map(std::os::fd::AsFd::as_fd).collect();
    let started = container.sandbox.monitor.exec(exec, &given);
    let started = slow(format!("{}: start a command", container.name()), started).await;
    let mut process = started.map_err(|error| Error::internal(error.to_string()))?;
    if request.tty {
        let terminal = process
            .terminal
            .take()
            .ok_or_else(|| Error::internal("the monitor passed no terminal"))?;
        stdio.terminal = Some(Descriptor::new(terminal).during(what)?);
    }
    Ok((process, stdio))
}

/// Passes on what the client sends. Returns when it is gone.
async fn input(
    receiver: &mut Receiver,
    mut stdin: Option<Descriptor>,
    terminal: Option<&Descriptor>,
    sender: &Sender,
) -> io::Result<()> {
    while let Some(input) = receiver.next().await? {
        match input {
            Input::Stdin(bytes) => {
                let Some(to) = stdin.as_ref().or(terminal) else {
                    continue;
                };
                match receiver.feed(to, &bytes, terminal, sender.watch()).await {
                    Fed::All => {}
                    Fed::Unread => stdin = None,
                    Fed::Gone => return Ok(()),
                }
            }
            // A terminal stays: its end would be that of the output, too.
            Input::StdinEnd => stdin = None,
            Input::Resize(size) => {
                if let Some(terminal) = terminal {
                    resize(terminal, size);
                }
            }
        }
    }
    Ok(())
}

/// Passes on one stream to its end, or to what had been written when the command ended: not what
/// processes that it left behind go on to write.
async fn output(
    from: Option<&Descriptor>,
    channel: Channel,
    sender: &Sender,
    ended: &watch::Receiver<bool>,
) -> io::Result<()> {
    let Some(from) = from else {
        return Ok(());
    };
    let mut ended = ended.clone();
    let mut buffer = Vec::new();
    // Nothing that was read may be lost: only the waiting is given up.
    loop {
        let mut ready = tokio::select! {
            ready = from.readable() => ready?,
            _ = ended.wait_for(|ended| *ended) => break,
        };
        match sender.pass(channel, from, &mut buffer, usize::MAX).await? {
            Some(0) => return Ok(()),
            Some(_) => {}
            None => ready.clear_ready(),
        }
    }
    let mut left = match from.is_terminal() {
        true => MAX_LAST_WORDS,
        false => usize::try_from(from.pending()).unwrap_or(usize::MAX),
    };
    while left > 0 {
        let mut ready = None;
        if from.is_terminal() {
            match tokio::time::timeout(LAST_WORDS, from.readable()).await {
                Ok(guard) => ready = Some(guard?),
                Err(_) => return Ok(()),
            }
        }
        match (sender.pass(channel, from, &mut buffer, left).await?, ready) {
            (Some(0), _) | (None, None) => return Ok(()),
            (Some(count), _) => left = left.saturating_sub(count),
            (None, Some(mut ready)) => ready.clear_ready(),
        }
    }
    Ok(())
}

/// What a closed pipe says; anything else is worth telling.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    let kinds = [
        io::ErrorKind::BrokenPipe,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::UnexpectedEof,
        io::ErrorKind::NotConnected,
    ];
    kinds.contains(&error.kind()) || error.raw_os_error() == Some(Errno::PIPE.raw_os_error())
}
