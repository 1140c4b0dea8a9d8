//! The memory for the output of commands that ExecSync runs.
//!
//! The output of one command is limited by the size of a response. The output of all commands has a
//! common limit, of which each pod gets a fair share. Programs in a few pods can therefore not use up
//! the limit.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use rrun_calls::lock::lock;

/// The maximum number of bytes of stdout and stderr together that are returned. kubelet and crictl
/// refuse a message of more than 16 MiB. The response's fields need at most 32 bytes in addition to
/// the output. Further output is read and dropped. The process therefore never blocks on a full
/// pipe, and the server's memory use is limited (CVE-2022-1708).
pub(super) const MAX_OUTPUT_BYTES: usize = (16 << 20) - 32;

/// The number of bytes that each pod can have, even if the limit for all pods is reached.
const MIN_POD_BYTES: usize = 64 << 10;

/// The unused memory at which a shortened buffer is reallocated.
const MAX_SLACK_BYTES: usize = 1 << 20;

/// The text that the server appends to truncated output.
const TRUNCATION_NOTE: &[u8] = b"\n[rrun: the rest of the output was dropped]\n";

/// The text that the server appends if the output of other commands needs the memory.
const SHARE_NOTE: &[u8] = b"\n[rrun: the rest of the output was dropped, because the output of all commands that run now would exceed the limit exec_output_bytes]\n";

/// The number of bytes of output that the server keeps for all commands.
pub(crate) struct OutputBudget {
    limit: usize,
    /// The number of kept bytes for each pod.
    pods: Mutex<HashMap<String, usize>>,
}

impl OutputBudget {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(OutputBudget {
            limit,
            pods: Mutex::default(),
        })
    }

    /// Takes up to `wanted` bytes for the pod, and returns how many. A pod can have as many bytes as
    /// it leaves for other pods.
    fn take(&self, pod: &str, wanted: usize) -> usize {
        if wanted == 0 {
            return 0;
        }
        let mut pods = lock(&self.pods);
        let all: usize = pods.values().sum();
        let held = pods.entry(pod.to_owned()).or_default();
        let others = all - *held;
        let share = (self.limit.saturating_sub(others) / 2).max(MIN_POD_BYTES);
        let taken = wanted.min(share.saturating_sub(*held));
        *held += taken;
        taken
    }

    fn give_back(&self, pod: &str, bytes: usize) {
        let mut pods = lock(&self.pods);
        if let Some(held) = pods.get_mut(pod) {
            *held -= bytes.min(*held);
            if *held == 0 {
                pods.remove(pod);
            }
        }
    }
}

/// An output stream of a command.
#[derive(Clone, Copy)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

/// The kept output of one command. Dropping this value gives its bytes back to the budget.
pub(super) struct KeptOutput {
    budget: Arc<OutputBudget>,
    pod: String,
    stdout: KeptStream,
    stderr: KeptStream,
}

#[derive(Default)]
struct KeptStream {
    bytes: Vec<u8>,
    /// The text that replaces the dropped rest of the output. `None` if no output was dropped.
    note: Option<&'static [u8]>,
}

impl KeptOutput {
    pub(super) fn new(budget: &Arc<OutputBudget>, pod: &str) -> Self {
        KeptOutput {
            budget: Arc::clone(budget),
            pod: pod.to_owned(),
            stdout: KeptStream::default(),
            stderr: KeptStream::default(),
        }
    }

    /// Adds output to a stream. If the output of both streams is too long, each stream gets half of
    /// the room, and the part that the other stream does not need.
    pub(super) fn add(&mut self, stream: Stream, bytes: &[u8]) {
        let (own, other) = match stream {
            Stream::Stdout => (&mut self.stdout, &mut self.stderr),
            Stream::Stderr => (&mut self.stderr, &mut self.stdout),
        };
        if own.note.is_some() {
            return;
        }
        let room = room(other).saturating_sub(own.bytes.len());
        let fits = bytes.len().min(room);
        let kept = own.bytes.len() + other.bytes.len();
        let excess = (kept + fits).saturating_sub(MAX_OUTPUT_BYTES);
        if excess > 0 {
            other.shorten(excess);
            self.budget.give_back(&self.pod, excess);
        }
        let taken = self.budget.take(&self.pod, fits);
        own.bytes
            .extend_from_slice(bytes.get(..taken).unwrap_or_default());
        if taken < fits {
            own.note = Some(SHARE_NOTE);
        } else if taken < bytes.len() {
            own.note = Some(TRUNCATION_NOTE);
        }
    }

    /// Returns the output of stdout and stderr.
    pub(super) fn end(mut self) -> (Vec<u8>, Vec<u8>) {
        let kept = self.stdout.bytes.len() + self.stderr.bytes.len();
        self.budget.give_back(&self.pod, kept);
        let stdout = std::mem::take(&mut self.stdout);
        let stderr = std::mem::take(&mut self.stderr);
        let (out_room, err_room) = (room(&stderr), room(&stdout));
        (stdout.end(out_room), stderr.end(err_room))
    }
}

impl Drop for KeptOutput {
    fn drop(&mut self) {
        let kept = self.stdout.bytes.len() + self.stderr.bytes.len();
        self.budget.give_back(&self.pod, kept);
    }
}

/// Returns the maximum length of a stream if `other` is the other stream of the command.
fn room(other: &KeptStream) -> usize {
    MAX_OUTPUT_BYTES - other.bytes.len().min(MAX_OUTPUT_BYTES / 2)
}

impl KeptStream {
    fn shorten(&mut self, excess: usize) {
        let length = self.bytes.len().saturating_sub(excess);
        self.bytes.truncate(length);
        if self.bytes.capacity() - length > MAX_SLACK_BYTES {
            self.bytes.shrink_to_fit();
        }
        self.note = self.note.or(Some(TRUNCATION_NOTE));
    }

    /// Returns the output, which has at most `room` bytes.
    fn end(mut self, room: usize) -> Vec<u8> {
        if let Some(note) = self.note {
            self.bytes.truncate(room.saturating_sub(note.len()));
            self.bytes.extend_from_slice(note);
        }
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use rrun_proto::Message;
    use rrun_proto::v1::ExecSyncResponse;

    use super::*;

    const HALF: usize = MAX_OUTPUT_BYTES / 2;
    const ALL: usize = MAX_OUTPUT_BYTES + 1;

    fn add(kept: &mut KeptOutput, stream: Stream, length: usize) {
        let bytes = vec![b'x'; length];
        for chunk in bytes.chunks(16 << 10) {
            kept.add(stream, chunk);
        }
    }

    #[test]
    fn a_response_is_never_larger_than_kubelet_accepts() {
        for (out, err, expected) in [
            (ALL, 0, (MAX_OUTPUT_BYTES, 0)),
            (0, ALL, (0, MAX_OUTPUT_BYTES)),
            (ALL, ALL, (HALF, HALF)),
            (ALL, 5, (MAX_OUTPUT_BYTES - 5, 5)),
            (HALF + 1, HALF, (HALF, HALF)),
            (HALF, HALF, (HALF, HALF)),
        ] {
            let budget = OutputBudget::new(usize::MAX);
            let mut kept = KeptOutput::new(&budget, "pod");
            add(&mut kept, Stream::Stdout, out);
            add(&mut kept, Stream::Stderr, err);
            let held: usize = lock(&budget.pods).values().sum();
            assert!(held <= MAX_OUTPUT_BYTES, "{held} bytes are kept");
            let capacity = kept.stdout.bytes.capacity() + kept.stderr.bytes.capacity();
            assert!(
                capacity <= MAX_OUTPUT_BYTES + 3 * MAX_SLACK_BYTES,
                "{capacity} bytes are allocated for {out} and {err} bytes"
            );
            let (stdout, stderr) = kept.end();
            let lengths = (stdout.len(), stderr.len());
            assert_eq!(lengths, expected, "lengths for {out} and {err} bytes");
            for (bytes, length) in [(&stdout, out), (&stderr, err)] {
                let cut = bytes.ends_with(TRUNCATION_NOTE);
                assert_eq!(cut, bytes.len() < length, "note for {out} and {err} bytes");
            }
            let response = ExecSyncResponse {
                stdout,
                stderr,
                exit_code: -1,
            };
            let message = response.encoded_len();
            assert!(message <= 16 << 20, "a message of {message} bytes");
            assert!(lock(&budget.pods).is_empty());
        }
    }

    #[test]
    fn one_pod_can_not_use_up_the_memory_for_the_output_of_all_commands() {
        let budget = OutputBudget::new(4 << 20);
        let mut many: Vec<_> = (0..3).map(|_| KeptOutput::new(&budget, "many")).collect();
        for kept in &mut many {
            add(kept, Stream::Stdout, 1 << 20);
        }
        let mut few = KeptOutput::new(&budget, "few");
        add(&mut few, Stream::Stderr, 1 << 20);
        assert_eq!(few.end().1.len(), 1 << 20);
        let mut least = Vec::new();
        for pod in 0..100 {
            let mut kept = KeptOutput::new(&budget, &format!("pod {pod}"));
            add(&mut kept, Stream::Stdout, MIN_POD_BYTES);
            assert!(kept.stdout.note.is_none(), "pod {pod} gets too little");
            least.push(kept);
        }
        let last = many.pop().map(|kept| kept.end().0).unwrap_or_default();
        assert!(last.ends_with(SHARE_NOTE));
        drop((many, least));
        assert!(lock(&budget.pods).is_empty());
    }
}
