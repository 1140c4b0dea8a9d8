//! Copies data between a client and a process's stdio.

use std::io;
use std::time::Duration;

use tokio::sync::watch;

use super::channel::Channel;
use super::receiver::{ClientInput, ClientReceiver, StdinWrite};
use super::resize::Resizable;
use super::sender::ClientSender;
use crate::descriptor::Descriptor;

/// The time for which the server waits for the last output from a terminal. The wait begins when
/// the command's first process exits. The server waits only if other processes still have the
/// terminal open. The kernel delivers the last output to the terminal's master with a short delay.
const TERMINAL_DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// The maximum number of bytes that the server reads from a terminal after the command's first
/// process has exited. The kernel's buffer for a terminal is smaller than this limit. The server
/// therefore reads all output that the buffer contained at the exit.
const MAX_TERMINAL_DRAIN_BYTES: usize = 256 << 10;

/// Copies the client's input to `stdin` or, if `stdin` is `None`, to the terminal. `terminal` is the
/// terminal, and a descriptor for its data. Returns when the client has disconnected.
pub async fn copy_input(
    receiver: &mut ClientReceiver,
    mut stdin: Option<Descriptor>,
    terminal: Option<(&impl Resizable, &Descriptor)>,
    sender: &ClientSender,
) -> io::Result<()> {
    let (terminal, data) = terminal.unzip();
    while let Some(input) = receiver.next().await? {
        match input {
            ClientInput::Stdin(bytes) => {
                let Some(to) = stdin.as_ref().or(data) else {
                    continue;
                };
                match receiver.feed(to, &bytes, terminal, sender.watch()).await {
                    StdinWrite::Complete => {}
                    StdinWrite::Closed => stdin = None,
                    StdinWrite::ClientGone => return Ok(()),
                }
            }
            // The terminal remains open at the end of stdin, because closing it would also end the
            // output.
            ClientInput::StdinEnd => stdin = None,
            ClientInput::Resize(size) => {
                if let Some(terminal) = terminal {
                    terminal.resize(size).await;
                }
            }
        }
    }
    Ok(())
}

/// Copies the output stream `from` to the client until the stream ends.
pub async fn copy_output(
    from: Option<&Descriptor>,
    channel: Channel,
    sender: &ClientSender,
) -> io::Result<()> {
    if let Some(from) = from {
        let never = std::future::pending::<()>();
        copy_until(never, from, channel, sender, &mut Vec::new()).await?;
    }
    Ok(())
}

/// Copies the output stream `from` to the client until the stream ends or the process exits.
/// `exited` reports the exit. The function copies all output from before the exit. If other
/// processes are still running after the exit, the function does not copy the output that they
/// write after the exit.
pub async fn copy_output_until_exit(
    from: Option<&Descriptor>,
    channel: Channel,
    sender: &ClientSender,
    exited: &watch::Receiver<bool>,
) -> io::Result<()> {
    let Some(from) = from else {
        return Ok(());
    };
    let mut exited = exited.clone();
    let exited = exited.wait_for(|exited| *exited);
    let mut buffer = Vec::new();
    match copy_until(exited, from, channel, sender, &mut buffer).await? {
        Copied::ToEnd => Ok(()),
        Copied::UntilExit => copy_rest(from, channel, sender, &mut buffer).await,
    }
}

enum Copied {
    ToEnd,
    UntilExit,
}

async fn copy_until(
    exited: impl Future,
    from: &Descriptor,
    channel: Channel,
    sender: &ClientSender,
    buffer: &mut Vec<u8>,
) -> io::Result<Copied> {
    let mut exited = std::pin::pin!(exited);
    // The exit of the process cancels only the wait for more data. Data that has already been read
    // is not lost.
    loop {
        let mut ready = tokio::select! {
            ready = from.readable() => ready?,
            _ = &mut exited => return Ok(Copied::UntilExit),
        };
        match sender.pass(channel, from, buffer, usize::MAX).await? {
            Some(0) => return Ok(Copied::ToEnd),
            Some(_) => {}
            None => ready.clear_ready(),
        }
        // A process can write as fast as the server reads. Other tasks must run nevertheless, even
        // if the client has not opened the channel and the data is dropped.
        tokio::task::consume_budget().await;
    }
}

/// Copies the data that is available now. For a terminal, the function also waits for more data,
/// for at most [`TERMINAL_DRAIN_TIMEOUT`] each time.
async fn copy_rest(
    from: &Descriptor,
    channel: Channel,
    sender: &ClientSender,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    from.release();
    let mut left = if from.is_terminal() {
        MAX_TERMINAL_DRAIN_BYTES
    } else {
        usize::try_from(from.pending()?).unwrap_or(usize::MAX)
    };
    while left > 0 {
        let mut ready = None;
        if from.is_terminal() {
            match tokio::time::timeout(TERMINAL_DRAIN_TIMEOUT, from.readable()).await {
                Ok(guard) => ready = Some(guard?),
                Err(_) => return Ok(()),
            }
        }
        match (sender.pass(channel, from, buffer, left).await?, ready) {
            (Some(0), _) | (None, None) => return Ok(()),
            (Some(count), _) => left = left.saturating_sub(count),
            (None, Some(mut ready)) => ready.clear_ready(),
        }
    }
    Ok(())
}
