//! Copying between a client and a process's stdio.

use std::io;
use std::time::Duration;

use tokio::sync::watch;

use super::channel::Channel;
use super::receiver::{ClientInput, ClientReceiver, StdinWrite};
use super::resize::resize;
use super::sender::ClientSender;
use crate::descriptor::Descriptor;

/// How long a terminal is read after its process has ended while others hold it open: the kernel
/// passes on what was written there a moment later.
const TERMINAL_DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// The most that is read then: more than a terminal holds.
const MAX_TERMINAL_DRAIN_BYTES: usize = 256 << 10;

/// Copies what the client sends to stdin, or else to the terminal. Returns when the client is gone.
pub async fn copy_input(
    receiver: &mut ClientReceiver,
    mut stdin: Option<Descriptor>,
    terminal: Option<&Descriptor>,
    sender: &ClientSender,
) -> io::Result<()> {
    while let Some(input) = receiver.next().await? {
        match input {
            ClientInput::Stdin(bytes) => {
                let Some(to) = stdin.as_ref().or(terminal) else {
                    continue;
                };
                match receiver.feed(to, &bytes, terminal, sender.watch()).await {
                    StdinWrite::Complete => {}
                    StdinWrite::Closed => stdin = None,
                    StdinWrite::ClientGone => return Ok(()),
                }
            }
            // A terminal stays: its end would be that of the output, too.
            ClientInput::StdinEnd => stdin = None,
            ClientInput::Resize(size) => {
                if let Some(terminal) = terminal {
                    resize(terminal, size);
                }
            }
        }
    }
    Ok(())
}

/// Copies one stream of output to its end.
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

/// Copies one stream of output to its end, or to what had been written when the process `exited`:
/// not what processes that it left behind go on to write.
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
    // Nothing that was read may be lost: only the waiting is given up.
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
    }
}

/// Copies what is there, without waiting for more; only a terminal is given a moment.
async fn copy_rest(
    from: &Descriptor,
    channel: Channel,
    sender: &ClientSender,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    let mut left = if from.is_terminal() {
        MAX_TERMINAL_DRAIN_BYTES
    } else {
        usize::try_from(from.pending()).unwrap_or(usize::MAX)
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
