//! ExecSync: runs a command and returns its output in the response.
//!
//! The monitor starts the process, and the server reads its output from pipes. The output is not
//! written to a disk.

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

/// The maximum number of bytes of stdout, and of stderr, that are returned. Further output is read
/// and dropped. The process therefore never blocks on a full pipe, and the server's memory use is
/// limited (CVE-2022-1708).
const MAX_OUTPUT_BYTES: usize = 16 << 20;

/// The text that the server appends to truncated output.
const TRUNCATION_NOTE: &[u8] = b"\n[rrun: the rest of the output was dropped]\n";

/// Runs a command in a container and returns its output and its exit code. The command is killed
/// after `timeout` seconds; 0 means no timeout.
pub(crate) async fn exec_sync(
    node: &Node,
    container: &Container,
    command: &[String],
    timeout: i64,
) -> Result<ExecSyncResponse> {
    let name = container.name();
    if command.is_empty() {
        return Err(Error::invalid("the request contains no command"));
    }
    if container.phase() != Phase::Running {
        return Err(Error::wrong_state(format!("{name} is not running")));
    }
    let running = run(node, container, command);
    let limit = match u64::try_from(timeout) {
        Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
        _ => return running.await.during(|| format!("execute in {name}")),
    };
    // When the timeout drops `running`, the connection to the monitor closes, and the monitor kills
    // the command.
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
    // The command has exited, so the pipes contain all its output. The command may have left a
    // child process running, which can keep the pipes open forever. The server therefore does not
    // wait until the pipes are closed.
    out.drain()?;
    err.drain()?;
    Ok(ExecSyncResponse {
        stdout: out.bytes(),
        stderr: err.bytes(),
        exit_code,
    })
}

fn pipe() -> Result<(Receiver, OwnedFd)> {
    let what = || "create a pipe for a command's output".to_owned();
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(what)?;
    let receiver = Receiver::from_owned_fd(read).during(what)?;
    Ok((receiver, write))
}

/// One output stream of a command, which the server reads continuously.
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

    /// Waits for output and reads it. A caller can cancel this function without a loss of output.
    async fn read(&mut self) -> Result<()> {
        self.pipe
            .readable()
            .await
            .during(|| "wait for a command's output".to_owned())?;
        self.take(Receiver::try_read)
    }

    /// Reads the available output directly from the kernel. `try_read` is not used, because it
    /// depends on tokio's reactor. The process can write output immediately before its exit, and
    /// the reactor may not have noticed this output yet.
    fn drain(&mut self) -> Result<()> {
        self.take(|pipe, buffer| Ok(rustix::io::read(pipe, buffer)?))
    }

    /// Reads until no more output is available.
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
    async fn reads_stop_at_the_end_of_the_available_output() -> Result<()> {
        let (receiver, write) = pipe()?;
        let mut file = std::fs::File::from(write);
        let mut output = CapturedOutput::new(receiver);
        let written = file.write_all(b"one\n");
        written.during(|| "write".to_owned())?;
        output.read().await?;
        // The pipe is open and empty, so `drain` must return without waiting.
        output.drain()?;
        assert!(output.open);
        drop(file);
        output.read().await?;
        assert!(!output.open);
        assert_eq!(output.bytes(), b"one\n");
        Ok(())
    }

    #[tokio::test]
    async fn output_is_read_before_the_reactor_reports_it() -> Result<()> {
        let (receiver, write) = pipe()?;
        let mut output = CapturedOutput::new(receiver);
        let written = std::fs::File::from(write).write_all(b"late\n");
        written.during(|| "write".to_owned())?;
        // The test has not awaited anything since the write, so the reactor has not noticed the
        // write.
        output.drain()?;
        assert!(!output.open);
        assert_eq!(output.bytes(), b"late\n");
        Ok(())
    }

    #[tokio::test]
    async fn dropped_output_is_replaced_by_a_note() -> Result<()> {
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
