//! ExecSync: a command's output as one answer.
//!
//! The monitor starts the process, its stdio are pipes that this server reads: nothing is written
//! to a disk on the way.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rrun_proto::v1::ExecSyncResponse;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe::Receiver;

use super::command;
use crate::container::{Container, Phase};
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::slow;
use rrun_protocol::Exec;

/// The most bytes kept of each of stdout and stderr; more is read and dropped, so that the
/// process is not stopped by a full pipe (CVE-2022-1708).
const MAX_OUTPUT_BYTES: usize = 16 << 20;

/// Ends an output of which more has been dropped.
const TRUNCATION_NOTE: &[u8] = b"\n[rrun: the rest of the output was dropped]\n";

/// Runs a command in a container and returns what it wrote and its exit code. `timeout` in
/// seconds, 0 for none; after it the command is killed.
pub(crate) async fn exec_sync(
    node: &Node,
    container: &Container,
    command: &[String],
    timeout: i64,
) -> Result<ExecSyncResponse> {
    let name = container.name();
    if command.is_empty() {
        return Err(Error::invalid("there is no command to execute"));
    }
    if container.phase() != Phase::Running {
        return Err(Error::wrong_state(format!("{name} is not running")));
    }
    let running = run(node, container, command);
    let limit = match u64::try_from(timeout) {
        Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
        _ => return running.await.during(|| format!("execute in {name}")),
    };
    // Dropping it closes the connection to the monitor, which kills the command.
    match tokio::time::timeout(limit, running).await {
        Ok(result) => result.during(|| format!("execute in {name}")),
        Err(_) => Err(Error::new(
            tonic::Code::DeadlineExceeded,
            format!(
                "execute in {name}: command {command:?} timed out: it did not end within {timeout} s and was killed"
            ),
        )),
    }
}

async fn run(node: &Node, container: &Container, arguments: &[String]) -> Result<ExecSyncResponse> {
    let exec = Exec {
        id: container.id.clone(),
        process: command::process(node, container, arguments, false)?.to_string(),
        terminal: false,
    };
    let null = command::null()?;
    let (stdout, stdout_end) = pipe()?;
    let (stderr, stderr_end) = pipe()?;
    let stdio = [null.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()];
    let started = container.sandbox.monitor.exec(exec, &stdio);
    let mut process = slow(format!("{}: start a command", container.name()), started).await?;
    drop((null, stdout_end, stderr_end));

    let (mut out, mut err) = (CapturedOutput::new(stdout), CapturedOutput::new(stderr));
    let exit_code = loop {
        tokio::select! {
            code = process.wait() => break code,
            read = out.read(), if out.open => read?,
            read = err.read(), if err.open => read?,
        }
    };
    let exit_code = exit_code?;
    // What the process wrote is in the pipes by now. A child that it left behind may hold them
    // open for ever and is not waited for.
    out.drain()?;
    err.drain()?;
    Ok(ExecSyncResponse {
        stdout: out.bytes(),
        stderr: err.bytes(),
        exit_code,
    })
}

fn pipe() -> Result<(Receiver, OwnedFd)> {
    let what = || "make a pipe for a command's output".to_owned();
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(what)?;
    let receiver = Receiver::from_owned_fd(read).during(what)?;
    Ok((receiver, write))
}

/// One stream of a command, read as it comes.
struct CapturedOutput {
    pipe: Receiver,
    kept: Vec<u8>,
    dropped: bool,
    open: bool,
}

impl CapturedOutput {
    fn new(pipe: Receiver) -> Self {
        CapturedOutput {
            pipe,
            kept: Vec::new(),
            dropped: false,
            open: true,
        }
    }

    /// Waits for something to read, and reads it. Cancel-safe.
    async fn read(&mut self) -> Result<()> {
        self.pipe
            .readable()
            .await
            .during(|| "wait for a command's output".to_owned())?;
        self.take(Receiver::try_read)
    }

    /// Reads what is there, asking the kernel: `try_read` asks the reactor, which need not have
    /// heard yet of what was written a moment before the process ended.
    fn drain(&mut self) -> Result<()> {
        self.take(|pipe, buffer| Ok(rustix::io::read(pipe, buffer)?))
    }

    /// Reads until there is no more.
    fn take(&mut self, read: impl Fn(&Receiver, &mut [u8]) -> io::Result<usize>) -> Result<()> {
        let mut buffer = [0_u8; 16 << 10];
        while self.open {
            match read(&self.pipe, &mut buffer) {
                Ok(0) => self.open = false,
                Ok(length) => {
                    let room = MAX_OUTPUT_BYTES.saturating_sub(self.kept.len()).min(length);
                    self.dropped |= room < length;
                    self.kept
                        .extend_from_slice(buffer.get(..room).unwrap_or_default());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).during(|| "read a command's output".to_owned()),
            }
        }
        Ok(())
    }

    fn bytes(mut self) -> Vec<u8> {
        if self.dropped {
            self.kept.truncate(MAX_OUTPUT_BYTES - TRUNCATION_NOTE.len());
            self.kept.extend_from_slice(TRUNCATION_NOTE);
        }
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn output_is_read_to_its_end_and_no_further() -> Result<()> {
        let (receiver, write) = pipe()?;
        let mut file = std::fs::File::from(write);
        let mut output = CapturedOutput::new(receiver);
        let written = file.write_all(b"one\n");
        written.during(|| "write".to_owned())?;
        output.read().await?;
        // Still open, nothing in it: no waiting.
        output.drain()?;
        assert!(output.open);
        drop(file);
        output.read().await?;
        assert!(!output.open);
        assert_eq!(output.bytes(), b"one\n");
        Ok(())
    }

    #[tokio::test]
    async fn what_was_written_is_read_before_the_reactor_tells_of_it() -> Result<()> {
        let (receiver, write) = pipe()?;
        let mut output = CapturedOutput::new(receiver);
        let written = std::fs::File::from(write).write_all(b"late\n");
        written.during(|| "write".to_owned())?;
        // Nothing was awaited since: the reactor has not looked.
        output.drain()?;
        assert!(!output.open);
        assert_eq!(output.bytes(), b"late\n");
        Ok(())
    }

    #[tokio::test]
    async fn what_is_dropped_is_said() -> Result<()> {
        let (receiver, _write) = pipe()?;
        let mut output = CapturedOutput::new(receiver);
        output.kept = vec![b'x'; MAX_OUTPUT_BYTES];
        output.dropped = true;
        let bytes = output.bytes();
        assert_eq!(bytes.len(), MAX_OUTPUT_BYTES);
        assert!(bytes.ends_with(TRUNCATION_NOTE));
        Ok(())
    }
}
