//! ExecSync: runs a command and returns its output in the response.
//!
//! The monitor starts the process, and the server reads its output from sockets. The output is not
//! written to a disk.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rrun_proto::v1::ExecSyncResponse;

use super::channel::channel;
use super::command;
use super::exec_output::{KeptOutput, MAX_OUTPUT_BYTES, Stream};
use crate::container::{Container, Phase};
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::lock::lock;
use rrun_calls::wait::slow;
use rrun_protocol::Exec;
use rrun_streams::Descriptor;

/// The maximum number of bytes that one read returns.
const READ_BYTES: usize = 16 << 10;

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
        process: command::process(node, container, arguments, false)
            .await?
            .to_string(),
        terminal: false,
    };
    let null = command::null()?;
    let making = || "create the channels for a command's output".to_owned();
    let (stdout, stdout_end) = channel(&container.sandbox, None).during(making)?;
    let (stderr, stderr_end) = channel(&container.sandbox, None).during(making)?;
    let stdout = Descriptor::new(stdout).during(making)?;
    let stderr = Descriptor::new(stderr).during(making)?;
    let stdio = [null.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()];
    let started = container.sandbox.monitor.exec(exec, &stdio);
    let mut process = slow(format!("{}: start a command", container.name()), started).await?;
    drop((null, stdout_end, stderr_end));

    let kept = Mutex::new(KeptOutput::new(&node.exec_outputs, &container.sandbox.id));
    let mut out = CapturedOutput::new(stdout, Stream::Stdout, &kept);
    let mut err = CapturedOutput::new(stderr, Stream::Stderr, &kept);
    let exit_code = loop {
        tokio::select! {
            code = process.wait() => break code,
            read = out.read(), if out.open => read?,
            read = err.read(), if err.open => read?,
        }
    };
    let exit_code = exit_code?;
    // The command has exited, so the channels contain all its output. The command may have left a
    // child process running, which can keep its streams open forever. The server therefore does not
    // wait until the channels are closed.
    out.drain().await?;
    err.drain().await?;
    drop((out, err));
    let kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (stdout, stderr) = kept.end();
    Ok(ExecSyncResponse {
        stdout,
        stderr,
        exit_code,
    })
}

/// One output stream of a command, which the server reads continuously.
struct CapturedOutput<'a> {
    channel: Descriptor,
    stream: Stream,
    kept: &'a Mutex<KeptOutput>,
    open: bool,
}

impl<'a> CapturedOutput<'a> {
    fn new(channel: Descriptor, stream: Stream, kept: &'a Mutex<KeptOutput>) -> Self {
        CapturedOutput {
            channel,
            stream,
            kept,
            open: true,
        }
    }

    /// Waits for output and reads a part of it. A caller can cancel this function without a loss of
    /// output.
    async fn read(&mut self) -> Result<()> {
        let what = || "wait for a command's output".to_owned();
        let mut ready = self.channel.readable().await.during(what)?;
        let mut buffer = [0_u8; READ_BYTES];
        match self.channel.try_read(&mut buffer).during(reading)? {
            None => ready.clear_ready(),
            Some(0) => self.open = false,
            Some(length) => self.keep(buffer.get(..length).unwrap_or_default()),
        }
        Ok(())
    }

    /// Reads the output that is in the channel now. The process can write output immediately before its
    /// exit, and tokio's reactor may not have noticed this output yet. The function does not read the
    /// output that other processes write later, because this output may never end.
    async fn drain(&mut self) -> Result<()> {
        let pending = self.channel.pending();
        let pending = pending.during(|| "measure the rest of a command's output".to_owned())?;
        // One byte more than the maximum is enough to detect that output was dropped.
        let most = usize::try_from(pending).unwrap_or(usize::MAX);
        let most = most.min(MAX_OUTPUT_BYTES + 1);
        self.take(most, Descriptor::try_read).await
    }

    fn keep(&self, bytes: &[u8]) {
        lock(self.kept).add(self.stream, bytes);
    }

    /// Reads until no more output is available, at most `most` bytes. Between the reads, the
    /// function lets other tasks run, because processes can write as fast as the server reads.
    async fn take(
        &mut self,
        most: usize,
        read: impl Fn(&Descriptor, &mut [u8]) -> io::Result<Option<usize>>,
    ) -> Result<()> {
        let mut buffer = [0_u8; READ_BYTES];
        let mut left = most;
        while self.open && left > 0 {
            let part = buffer.get_mut(..left.min(READ_BYTES)).unwrap_or_default();
            match read(&self.channel, part) {
                Ok(Some(0)) => self.open = false,
                Ok(Some(length)) => {
                    left -= length.min(left);
                    self.keep(buffer.get(..length).unwrap_or_default());
                }
                Ok(None) => break,
                Err(error) => return Err(error).during(reading),
            }
            tokio::task::consume_budget().await;
        }
        Ok(())
    }
}

fn reading() -> String {
    "read a command's output".to_owned()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Write;

    use super::*;
    use crate::streaming::exec_output::OutputBudget;

    fn pipe() -> Result<(Descriptor, std::io::PipeWriter)> {
        let what = || "create a pipe".to_owned();
        let (read, write) = std::io::pipe().during(what)?;
        Ok((Descriptor::new(read.into()).during(what)?, write))
    }

    fn kept() -> Mutex<KeptOutput> {
        let budget = OutputBudget::new(MAX_OUTPUT_BYTES);
        Mutex::new(KeptOutput::new(&budget, "pod"))
    }

    fn stdout(kept: Mutex<KeptOutput>) -> Vec<u8> {
        let kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
        kept.end().0
    }

    #[tokio::test]
    async fn reads_stop_at_the_end_of_the_available_output() -> Result<()> {
        let (receiver, mut file) = pipe()?;
        let kept = kept();
        let mut output = CapturedOutput::new(receiver, Stream::Stdout, &kept);
        let written = file.write_all(b"one\n");
        written.during(|| "write".to_owned())?;
        output.read().await?;
        // The pipe is open and empty, so `drain` must return without waiting.
        output.drain().await?;
        assert!(output.open);
        drop(file);
        output.read().await?;
        assert!(!output.open);
        assert_eq!(stdout(kept), b"one\n");
        Ok(())
    }

    #[tokio::test]
    async fn output_is_read_before_the_reactor_reports_it() -> Result<()> {
        let (receiver, mut write) = pipe()?;
        let kept = kept();
        let mut output = CapturedOutput::new(receiver, Stream::Stdout, &kept);
        let written = write.write_all(b"late\n");
        written.during(|| "write".to_owned())?;
        // The test has not awaited anything since the write, so the reactor has not noticed the
        // write.
        output.drain().await?;
        assert_eq!(stdout(kept), b"late\n");
        Ok(())
    }

    /// A read that always returns data, as if processes wrote without a pause.
    fn endless(
        reads: &Cell<usize>,
    ) -> impl Fn(&Descriptor, &mut [u8]) -> io::Result<Option<usize>> {
        |_, buffer| {
            reads.set(reads.get() + 1);
            match reads.get() {
                1..10_000 => Ok(Some(buffer.len())),
                _ => Err(io::Error::other("the server reads without end")),
            }
        }
    }

    #[tokio::test]
    async fn endless_output_does_not_prevent_other_tasks() -> Result<()> {
        let (receiver, _write) = pipe()?;
        let kept = kept();
        let mut output = CapturedOutput::new(receiver, Stream::Stdout, &kept);
        let reads = Cell::new(0);
        tokio::select! {
            biased;
            read = output.take(usize::MAX, endless(&reads)) => read?,
            () = tokio::task::yield_now() => {}
        }
        assert!(reads.get() < 10_000);
        Ok(())
    }

    #[tokio::test]
    async fn output_after_the_exit_is_not_read() -> Result<()> {
        let (receiver, _write) = pipe()?;
        let kept = kept();
        let mut output = CapturedOutput::new(receiver, Stream::Stdout, &kept);
        output.take(READ_BYTES + 5, endless(&Cell::new(0))).await?;
        assert_eq!(stdout(kept).len(), READ_BYTES + 5);
        Ok(())
    }
}
