//! Forwarded connections over SPDY. For each forwarded connection, the client opens a pair of
//! streams: one for data and one for errors.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use super::forward::{ForwardChannels, count_open, forward};
use super::session_log::SessionLog;
use super::target::PodPorts;
use crate::backlog::{Backlog, QueueSender};
use crate::channels::Channels;
use crate::spdy::{Event, Headers};
use crate::spdy_connection::{SpdyReader, SpdyWriter};
use crate::watch::Watch;
use rrun_kernel::descriptor_limit;

/// The timeout for a program in the pod that does not read while the backlog or a queue is full.
/// After this timeout, the server closes the forwarded connection to the program. The client's
/// other forwarded connections can then continue. Kubernetes' clients wait 30 s for the answer to a new
/// stream, and end all forwarding after this time.
const STALL_TIMEOUT: Duration = Duration::from_secs(20);

/// The time limit for a client to open the second stream of a pair.
const PAIR_TIMEOUT: Duration = Duration::from_secs(30);

/// The maximum number of simultaneous forwarded connections of one client.
const MAX_PAIRS: usize = 500;

/// The number of simultaneous forwarded connections that each client can have, even if all clients
/// together have too many, see [`pair_limit`].
const MIN_PAIRS: usize = 8;

/// Serves a client's streams until the client disconnects.
pub(super) async fn serve(
    pod: Arc<impl PodPorts>,
    reader: SpdyReader,
    writer: Arc<SpdyWriter>,
    watch: &Watch,
) -> io::Result<()> {
    let pairs = Pairs {
        log: SessionLog::new(pod.id()),
        pod,
        channels: Channels::Spdy(writer),
        half_open: BTreeMap::new(),
        served: Vec::new(),
        tasks: JoinSet::new(),
        backlog: Arc::default(),
        full: false,
    };
    pairs.serve(reader, watch).await
}

/// The forwarded connections of a client.
struct Pairs<P> {
    pod: Arc<P>,
    channels: Channels,
    log: Arc<SessionLog>,
    /// The pairs of which only one stream is open, with the pair's id as the key.
    half_open: BTreeMap<String, HalfOpen>,
    served: Vec<ServedPair>,
    /// The tasks that serve the pairs. Dropping the set ends all tasks.
    tasks: JoinSet<()>,
    backlog: Arc<Backlog>,
    /// True while the backlog or the queue of a pair is full. The server must then not read from
    /// the client.
    full: bool,
}

/// A pair of streams of which the client has opened only one.
struct HalfOpen {
    data: Option<u32>,
    error: Option<u32>,
    since: Instant,
}

/// A pair of streams that a task serves.
struct ServedPair {
    data: u32,
    error: u32,
    port: u16,
    input: QueueSender,
    task: AbortHandle,
}

impl<P: PodPorts> Pairs<P> {
    async fn serve(mut self, mut reader: SpdyReader, watch: &Watch) -> io::Result<()> {
        loop {
            self.full = self.full && self.has_no_room();
            self.close_stalled();
            let stall_deadline = self.stalled().map(stall_deadline);
            let pair_deadline = self.pair_deadline();
            tokio::select! {
                event = reader.next(), if !self.full => match event? {
                    Some(event) => self.event(event),
                    None => return Ok(()),
                },
                () = self.backlog.shrunk(), if self.full => {}
                () = sleep_until(stall_deadline), if self.full => {}
                () = watch.gone(), if self.full => return Ok(()),
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    self.served.retain(|pair| !pair.task.is_finished());
                }
                () = sleep_until(pair_deadline) => self.expire(),
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Opened {
                stream,
                headers,
                fin,
            } => self.opened(stream, &headers, fin),
            Event::Data { stream, bytes, fin } => self.data(stream, bytes, fin),
            Event::Reset { stream } => self.reset(stream),
            // The client will not open any more streams, but the open streams continue.
            Event::GoAway => {}
        }
    }

    /// Handles a stream that the client has opened. The second stream of a pair starts the
    /// forwarded connection.
    fn opened(&mut self, stream: u32, headers: &Headers, fin: bool) {
        let Some(described) = DescribedStream::parse(stream, headers) else {
            self.log.add(format_args!(
                "the server reset a port-forward stream, because the stream's headers contain no valid port or no valid type"
            ));
            self.channels.reset(stream);
            return;
        };
        let DescribedStream { id, is_data, port } = described;
        let pairs = self.half_open.len() + self.tasks.len();
        let all = 4 * descriptor_limit::share();
        if pairs >= pair_limit(all, count_open()) && !self.half_open.contains_key(&id) {
            self.channels.reset(stream);
            return;
        }
        let half = self
            .half_open
            .entry(id.clone())
            .or_insert_with(|| HalfOpen {
                data: None,
                error: None,
                since: Instant::now(),
            });
        let slot = if is_data {
            &mut half.data
        } else {
            &mut half.error
        };
        if slot.is_some() {
            self.channels.reset(stream);
            return;
        }
        *slot = Some(stream);
        if let (Some(data), Some(error)) = (half.data, half.error) {
            self.half_open.remove(&id);
            self.begin(port, data, error, fin && is_data);
        }
    }

    /// Starts to serve a pair of streams. If `input_ended` is true, the client sends no data.
    fn begin(&mut self, port: u16, data: u32, error: u32, input_ended: bool) {
        let (input, output) = self.backlog.queue();
        if input_ended {
            input.close();
        }
        let pod = Arc::clone(&self.pod);
        let client = ForwardChannels {
            channels: self.channels.clone(),
            log: Arc::clone(&self.log),
            data,
            error,
        };
        let task = self.tasks.spawn(async move {
            forward(&*pod, port, output, &client).await;
        });
        self.served.push(ServedPair {
            data,
            error,
            port,
            input,
            task,
        });
    }

    fn data(&mut self, stream: u32, bytes: Bytes, fin: bool) {
        let Some(pair) = self.served.iter().find(|pair| pair.data == stream) else {
            self.channels.consumed(stream, bytes.len());
            return;
        };
        if !bytes.is_empty() {
            let length = bytes.len();
            if !pair.input.push(bytes) {
                // The program in the pod has stopped reading, so the server drops the data and
                // counts it as processed.
                self.channels.consumed(stream, length);
            }
            self.full = pair.input.is_full() || self.backlog.is_full();
        }
        if fin {
            pair.input.close();
        }
    }

    /// Handles a stream that the client has reset.
    fn reset(&mut self, stream: u32) {
        self.half_open
            .retain(|_, half| half.data != Some(stream) && half.error != Some(stream));
        if let Some(pair) = self.served.iter().find(|pair| pair.data == stream) {
            self.abandon(pair);
        }
    }

    /// Ends a forwarded connection whose data stream was reset. The server sends no error text,
    /// because clients treat any error text as fatal for all their forwarded connections.
    fn abandon(&self, pair: &ServedPair) {
        pair.task.abort();
        // The client waits until the error stream is closed, so the server closes this stream.
        self.channels.close_soon(pair.error);
    }

    /// Returns the time at which the oldest incomplete pair is reset.
    fn pair_deadline(&self) -> Option<Instant> {
        let halves = self.half_open.values();
        halves.map(|half| half.since + PAIR_TIMEOUT).min()
    }

    /// Resets the streams whose pair was not completed in time.
    fn expire(&mut self) {
        let now = Instant::now();
        self.half_open.retain(|_, half| {
            let expired = now >= half.since + PAIR_TIMEOUT;
            if let Some(stream) = half.data.or(half.error).filter(|_| expired) {
                self.channels.reset(stream);
            }
            !expired
        });
    }

    fn has_no_room(&self) -> bool {
        self.backlog.is_full() || self.served.iter().any(|pair| pair.input.is_full())
    }

    /// Returns the pair with the longest queue. If the backlog or a queue remains full, the server
    /// must close this pair. Returns `None` if neither the backlog nor a queue is full.
    fn stalled(&self) -> Option<&ServedPair> {
        let served = self.served.iter().filter(|_| self.full);
        served.max_by_key(|pair| pair.input.waiting())
    }

    /// Closes the forwarded connection with the longest queue, if the backlog or a queue is full.
    /// The connection remains open if its program has read data within [`STALL_TIMEOUT`].
    fn close_stalled(&mut self) {
        let stalled = self.stalled();
        let Some(pair) = stalled.filter(|pair| pair.input.stalled_for() >= STALL_TIMEOUT) else {
            return;
        };
        self.log.add(format_args!(
            "the server closed the forwarded connection to port {}, because the program in the pod has \
             not read for {} s while the client was sending data",
            pair.port,
            STALL_TIMEOUT.as_secs()
        ));
        self.channels.reset(pair.data);
        self.abandon(pair);
        self.full = false;
    }
}

/// Returns the limit on one client's forwarded connections. `all` is the limit on the connections of
/// all clients, of which `open` are open. A client can use half of the remaining connections, so a
/// few clients cannot use up all of them.
fn pair_limit(all: usize, open: usize) -> usize {
    (all.saturating_sub(open) / 2).clamp(MIN_PAIRS, MAX_PAIRS)
}

/// Returns the time at which the server closes this pair if the program reads no data until then.
fn stall_deadline(pair: &ServedPair) -> Instant {
    Instant::now() + STALL_TIMEOUT.saturating_sub(pair.input.stalled_for())
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The properties that the headers of a stream specify.
#[derive(Debug, PartialEq, Eq)]
struct DescribedStream {
    /// The id of the pair to which the stream belongs.
    id: String,
    is_data: bool,
    port: u16,
}

impl DescribedStream {
    fn parse(stream: u32, headers: &Headers) -> Option<Self> {
        let port = headers.get("port")?.parse().ok().filter(|port| *port > 0)?;
        let is_data = match headers.get("streamtype")? {
            "data" => true,
            "error" => false,
            _ => return None,
        };
        // The oldest clients send no id, but open the data stream of a pair directly after its
        // error stream. For these clients, the id contains the number of the error stream.
        let id = match headers.get("requestid").filter(|id| !id.is_empty()) {
            Some(id) => id.to_owned(),
            None if is_data => format!("stream {}", stream.saturating_sub(2)),
            None => format!("stream {stream}"),
        };
        Some(DescribedStream { id, is_data, port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_can_use_half_of_the_remaining_connections() {
        assert_eq!(pair_limit(4096, 0), MAX_PAIRS);
        assert_eq!(pair_limit(4096, 4000), 48);
        assert_eq!(pair_limit(4096, 5000), MIN_PAIRS);
    }

    #[test]
    fn a_stream_belongs_to_the_pair_with_its_id_or_to_the_pair_of_the_previous_stream() {
        let headers = |pairs: &[(&str, &str)]| {
            let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            Headers(pairs.iter().map(owned).collect())
        };
        let with_id = headers(&[("port", "80"), ("streamtype", "data"), ("requestid", "7")]);
        let described = DescribedStream {
            id: "7".to_owned(),
            is_data: true,
            port: 80,
        };
        assert_eq!(DescribedStream::parse(3, &with_id), Some(described));
        let error = headers(&[("port", "80"), ("streamtype", "error")]);
        let data = headers(&[("port", "80"), ("streamtype", "data")]);
        let first = DescribedStream::parse(1, &error);
        let second = DescribedStream::parse(3, &data);
        assert_eq!(first.map(|first| first.id), second.map(|second| second.id));
        for wrong in [
            headers(&[("port", "0"), ("streamtype", "data")]),
            headers(&[("port", "65536"), ("streamtype", "data")]),
            headers(&[("port", "80"), ("streamtype", "stdin")]),
            headers(&[("port", "80")]),
        ] {
            assert_eq!(DescribedStream::parse(1, &wrong), None);
        }
    }
}
