//! Forwarded connections over WebSocket: a pair of channels for each requested port.

use std::io;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::forward::{ForwardChannels, forward};
use super::session_log::SessionLog;
use super::target::PodPorts;
use crate::backlog::{Backlog, QueueSender};
use crate::channels::Channels;
use crate::watch::Watch;
use crate::websocket::{ChannelMessage, WebSocketReader, WebSocketWriter};

/// The maximum number of ports on one WebSocket. The limit exists because each port has two
/// channels, and a channel's number is only one byte.
const MAX_PORTS: usize = 100;

/// Serves a pair of channels for each requested port.
pub(super) async fn serve(
    pod: Arc<impl PodPorts>,
    ports: &[i32],
    mut reader: WebSocketReader,
    writer: Arc<WebSocketWriter>,
    watch: &Watch,
) -> io::Result<()> {
    let channels = Channels::WebSocket(writer);
    let backlog = Arc::new(Backlog::default());
    let (inputs, mut tasks) = connect(&pod, ports, &channels, &backlog).await?;
    loop {
        let message = tokio::select! {
            message = reader.next() => message?,
            ended = tasks.join_next() => match ended {
                Some(_) => continue,
                // The connections to all ports have ended.
                None => {
                    let reading = async { while let Ok(Some(_)) = reader.next().await {} };
                    return channels.finish(reading).await;
                }
            },
        };
        match message {
            None => return Ok(()),
            Some(ChannelMessage::Data(channel, bytes)) if channel % 2 == 0 => {
                let Some(input) = inputs.get(usize::from(channel / 2)) else {
                    continue;
                };
                let _ = input.push(bytes);
                // Over WebSocket, the server can't close a single forwarded connection that has
                // stalled. For this reason, the server stops reading from the client while the
                // backlog or a queue is full.
                while input.is_full() || backlog.is_full() {
                    tokio::select! {
                        () = backlog.shrunk() => {}
                        () = watch.gone() => return Ok(()),
                    }
                }
            }
            Some(_) => {}
        }
    }
}

/// Sends each port's number as the first message on both channels of the port, and starts the
/// forwarded connections.
async fn connect(
    pod: &Arc<impl PodPorts>,
    ports: &[i32],
    channels: &Channels,
    backlog: &Arc<Backlog>,
) -> io::Result<(Vec<QueueSender>, JoinSet<()>)> {
    let mut inputs = Vec::new();
    let mut tasks = JoinSet::new();
    let log = SessionLog::new(pod.id());
    for (channel, port) in (0_u32..).step_by(2).zip(ports).take(MAX_PORTS) {
        let port = u16::try_from(*port).unwrap_or(0);
        for channel in [channel, channel + 1] {
            channels.send(channel, &port.to_le_bytes()).await?;
        }
        let (input, output) = backlog.queue();
        inputs.push(input);
        let pod = Arc::clone(pod);
        let client = ForwardChannels {
            channels: channels.clone(),
            log: Arc::clone(&log),
            data: channel,
            error: channel + 1,
        };
        tasks.spawn(async move { forward(&*pod, port, output, &client).await });
    }
    Ok((inputs, tasks))
}
