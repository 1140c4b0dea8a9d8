//! The server's metrics for Prometheus.
//!
//! The counters are a fixed set of atomics, so clients can't make the server create more counters.
//! [`exposition`] formats the metrics as text, and [`listener`] serves the text over HTTP.

mod exposition;
pub(crate) mod listener;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rrun_images::PullEnd;
use tonic::{Code, Status};

/// The methods of RuntimeService and ImageService. Calls of any other method are counted as
/// "other".
const METHODS: [&str; 42] = [
    "Attach",
    "CheckpointContainer",
    "ContainerStats",
    "ContainerStatus",
    "CreateContainer",
    "Exec",
    "ExecSync",
    "GetContainerEvents",
    "ImageFsInfo",
    "ImageStatus",
    "ListContainerStats",
    "ListContainers",
    "ListImages",
    "ListMetricDescriptors",
    "ListPodSandbox",
    "ListPodSandboxMetrics",
    "ListPodSandboxStats",
    "PodSandboxStats",
    "PodSandboxStatus",
    "PortForward",
    "PullImage",
    "RemoveContainer",
    "RemoveImage",
    "RemovePodSandbox",
    "ReopenContainerLog",
    "RunPodSandbox",
    "RuntimeConfig",
    "StartContainer",
    "Status",
    "StopContainer",
    "StopPodSandbox",
    "StreamContainerStats",
    "StreamContainers",
    "StreamImages",
    "StreamPodSandboxMetrics",
    "StreamPodSandboxStats",
    "StreamPodSandboxes",
    "UpdateContainerResources",
    "UpdatePodSandboxResources",
    "UpdateRuntimeConfig",
    "Version",
    "other",
];

/// The number of gRPC status codes. The codes are 0 to 16.
const CODES: usize = 17;

/// The upper limits of the histograms' buckets, in microseconds.
const BOUNDS: [u64; 16] = [
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    120_000_000,
];

/// A histogram of durations.
struct Histogram {
    /// The counts of durations. Each bucket has its upper limit in `BOUNDS`. A duration is counted
    /// only in the first bucket whose limit the duration does not exceed.
    buckets: [AtomicU64; BOUNDS.len()],
    count: AtomicU64,
    microseconds: AtomicU64,
}

impl Histogram {
    const fn new() -> Self {
        Histogram {
            buckets: [const { AtomicU64::new(0) }; BOUNDS.len()],
            count: AtomicU64::new(0),
            microseconds: AtomicU64::new(0),
        }
    }

    fn add(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.iter().position(|bound| took <= *bound);
        if let Some(bucket) = bucket.and_then(|at| self.buckets.get(at)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.microseconds.fetch_add(took, Ordering::Relaxed);
    }
}

struct Operation {
    codes: [AtomicU64; CODES],
    took: Histogram,
}

struct Counters {
    operations: [Operation; METHODS.len()],
    pulled: Histogram,
    pulled_bytes: AtomicU64,
    pulls_failed: AtomicU64,
}

/// The metrics of this server process.
static METRICS: Counters = Counters {
    operations: [const {
        Operation {
            codes: [const { AtomicU64::new(0) }; CODES],
            took: Histogram::new(),
        }
    }; METHODS.len()],
    pulled: Histogram::new(),
    pulled_bytes: AtomicU64::new(0),
    pulls_failed: AtomicU64::new(0),
};

/// A CRI call in progress. If this value is dropped before [`Call::answered`] is called, the client
/// has cancelled the call.
pub(crate) struct Call {
    method: usize,
    /// The name of the called method if the server does not have the method, otherwise `None`.
    unknown: Option<String>,
    begun: Instant,
    code: usize,
}

impl Call {
    /// Starts the measurement of a CRI call. `path` is the path of the request, such as
    /// `/runtime.v1.RuntimeService/Version`.
    pub(crate) fn begin(path: &str) -> Self {
        let name = path.rsplit('/').next().unwrap_or_default();
        let method = METHODS.iter().position(|method| *method == name);
        Call {
            method: method.unwrap_or(METHODS.len() - 1),
            unknown: method.is_none().then(|| name.to_owned()),
            begun: Instant::now(),
            code: Code::Cancelled as usize,
        }
    }

    /// Records that the response has begun. If the call failed, `status` is the gRPC status in the
    /// response's headers. This function also logs the failure. An operator can then find the
    /// failure without kubelet's log.
    pub(crate) fn answered(mut self, status: Option<Status>) {
        self.code = status.as_ref().map_or(Code::Ok, Status::code) as usize;
        if let Some(failure) = status.filter(|status| status.code() != Code::Ok) {
            self.log(&failure);
        }
    }

    fn log(&self, failure: &Status) {
        let known = METHODS.get(self.method).copied().unwrap_or_default();
        let (method, sentence) = (self.unknown.as_deref().unwrap_or(known), failure.message());
        match (method, failure.code()) {
            // A failure of PullImage is not logged here. The pull itself logs its failure, once for
            // all its callers.
            ("PullImage", _) => {}
            // A client called a method that this server does not have.
            (_, Code::Unimplemented) if sentence.is_empty() => {
                log::debug!("{method}: the method does not exist");
            }
            (_, Code::NotFound) => log::debug!("{method}: {sentence}"),
            _ => log::warn!("{method}: {sentence}"),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(operation) = METRICS.operations.get(self.method) {
            if let Some(code) = operation.codes.get(self.code) {
                code.fetch_add(1, Ordering::Relaxed);
            }
            operation.took.add(self.begun.elapsed());
        }
    }
}

/// Counts a pull that ended.
pub(crate) fn pull_ended(end: PullEnd) {
    match end {
        PullEnd::Pulled { bytes, took } => {
            METRICS.pulled.add(took);
            METRICS.pulled_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        PullEnd::Failed => {
            METRICS.pulls_failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}
