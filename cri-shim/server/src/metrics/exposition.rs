//! Export of the metrics in Prometheus's text format, version 0.0.4.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{BOUNDS, Histogram, METHODS, METRICS};
use crate::container::Phase;
use crate::node::Node;

fn value(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Formats a number of microseconds as seconds.
fn seconds(microseconds: u64) -> String {
    let text = format!(
        "{}.{:06}",
        microseconds / 1_000_000,
        microseconds % 1_000_000
    );
    let text = text.trim_end_matches('0');
    text.trim_end_matches('.').to_owned()
}

/// The text of the metrics, to which the methods append lines. The methods of this type ignore
/// errors, because writing to a string can't fail.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Appends a sample. `labels` includes the braces, or is empty.
    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, kind, help);
        self.sample(name, "", value);
    }

    /// Appends a histogram. `label` has the form `method="Version"`, or is empty.
    fn histogram(&mut self, name: &str, label: &str, histogram: &Histogram) {
        let comma = if label.is_empty() { "" } else { "," };
        let mut below = 0;
        for (bound, bucket) in BOUNDS.iter().zip(&histogram.buckets) {
            below += value(bucket);
            let bound = seconds(*bound);
            let labels = format!("{{{label}{comma}le=\"{bound}\"}}");
            self.sample(&format!("{name}_bucket"), &labels, below);
        }
        let count = value(&histogram.count).max(below);
        let labels = format!("{{{label}{comma}le=\"+Inf\"}}");
        self.sample(&format!("{name}_bucket"), &labels, count);
        let labels = match label {
            "" => String::new(),
            label => format!("{{{label}}}"),
        };
        let sum = seconds(value(&histogram.microseconds));
        self.sample(&format!("{name}_sum"), &labels, sum);
        self.sample(&format!("{name}_count"), &labels, count);
    }
}

/// Returns all metrics as text.
pub(super) fn text(node: &Node) -> String {
    let mut text = Text::default();
    operations(&mut text);
    pulls(&mut text);
    pods(&mut text, node);
    process(&mut text);
    text.0
}

fn operations(text: &mut Text) {
    let called = || {
        METHODS
            .iter()
            .zip(&METRICS.operations)
            .filter(|(_, operation)| value(&operation.took.count) > 0)
    };
    let name = "rrun_cri_operations_total";
    text.family(
        name,
        "counter",
        "Number of CRI calls that the server answered, including failed calls.",
    );
    for (method, operation) in called() {
        let count = value(&operation.took.count);
        text.sample(name, &format!("{{method=\"{method}\"}}"), count);
    }
    let name = "rrun_cri_operations_errors_total";
    text.family(
        name,
        "counter",
        "Number of CRI calls that failed, by gRPC code.",
    );
    for (method, operation) in called() {
        for (number, count) in (0..).zip(&operation.codes).skip(1) {
            let count = value(count);
            if count > 0 {
                let code = tonic::Code::from_i32(number);
                let labels = format!("{{method=\"{method}\",code=\"{code:?}\"}}");
                text.sample(name, &labels, count);
            }
        }
    }
    let name = "rrun_cri_operations_duration_seconds";
    text.family(name, "histogram", "Duration of CRI calls, by method.");
    for (method, operation) in called() {
        text.histogram(name, &format!("method=\"{method}\""), &operation.took);
    }
}

fn pulls(text: &mut Text) {
    let name = "rrun_cri_image_pull_seconds";
    text.family(name, "histogram", "Duration of successful image pulls.");
    text.histogram(name, "", &METRICS.pulled);
    text.single(
        "rrun_cri_image_pull_bytes_total",
        "counter",
        "Compressed size of the pulled images, in bytes.",
        value(&METRICS.pulled_bytes),
    );
    text.single(
        "rrun_cri_image_pull_failures_total",
        "counter",
        "Number of image pulls that failed.",
        value(&METRICS.pulls_failed),
    );
}

fn pods(text: &mut Text, node: &Node) {
    let (mut ready, mut monitors, mut not_ready) = (0, 0, 0);
    for pod in node.sandboxes() {
        let state = pod.state();
        monitors += u32::from(state.monitor != 0);
        *(if state.ready {
            &mut ready
        } else {
            &mut not_ready
        }) += 1;
    }
    text.single(
        "rrun_cri_monitors",
        "gauge",
        "Number of pods whose rrun-monitor process is running.",
        monitors,
    );
    text.family("rrun_cri_pods", "gauge", "Number of pods, by state.");
    for (state, count) in [("ready", ready), ("notready", not_ready)] {
        text.sample("rrun_cri_pods", &format!("{{state=\"{state}\"}}"), count);
    }
    let containers = node.containers();
    let of = |phase| containers.iter().filter(|one| one.phase() == phase).count();
    text.family(
        "rrun_cri_containers",
        "gauge",
        "Number of containers, by state.",
    );
    for (state, phase) in [
        ("created", Phase::Created),
        ("running", Phase::Running),
        ("exited", Phase::Exited),
    ] {
        let labels = format!("{{state=\"{state}\"}}");
        text.sample("rrun_cri_containers", &labels, of(phase));
    }
}

/// Appends the metrics of this process, under the names that Prometheus's client libraries use.
fn process(text: &mut Text) {
    text.family(
        "rrun_cri_build_info",
        "gauge",
        "The running version of rrun-cri.",
    );
    let labels = format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    text.sample("rrun_cri_build_info", &labels, 1);
    let Ok(process) = procfs() else { return };
    for (name, kind, help, value) in [
        (
            "process_cpu_seconds_total",
            "counter",
            "User and system CPU time.",
            process.cpu,
        ),
        (
            "process_start_time_seconds",
            "gauge",
            "Start time of the process, in seconds since the epoch.",
            process.started,
        ),
        (
            "process_virtual_memory_bytes",
            "gauge",
            "Virtual memory of the server process, in bytes.",
            process.virtual_bytes,
        ),
        (
            "process_resident_memory_bytes",
            "gauge",
            "Resident memory of the server process, in bytes.",
            process.resident_bytes,
        ),
        (
            "process_open_fds",
            "gauge",
            "Number of open file descriptors.",
            process.fds,
        ),
        (
            "process_max_fds",
            "gauge",
            "The server process's limit on open file descriptors.",
            process.max_fds,
        ),
        (
            "process_threads",
            "gauge",
            "Number of threads.",
            process.threads,
        ),
    ] {
        text.single(name, kind, help, value);
    }
}

struct Process {
    cpu: f64,
    started: f64,
    virtual_bytes: f64,
    resident_bytes: f64,
    fds: f64,
    max_fds: f64,
    threads: f64,
}

/// Reads /proc/self/stat (proc_pid_stat(5)). The second field, the program name in parentheses, can
/// contain spaces. The fields are therefore counted from the third field, after the closing
/// parenthesis.
fn procfs() -> std::io::Result<Process> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_ascii_whitespace()
        .collect();
    let field = |number: usize| -> f64 {
        let text = fields.get(number - 3);
        text.and_then(|text| text.parse().ok()).unwrap_or_default()
    };
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let boot = std::fs::read_to_string("/proc/stat")?;
    let boot = boot
        .lines()
        .find_map(|line| line.strip_prefix("btime "))
        .and_then(|text| text.trim().parse::<f64>().ok())
        .unwrap_or_default();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    Ok(Process {
        cpu: (field(14) + field(15)) / ticks,
        started: boot + field(22) / ticks,
        virtual_bytes: field(23),
        resident_bytes: field(24) * rustix::param::page_size() as f64,
        fds: std::fs::read_dir("/proc/self/fd")?.count() as f64,
        max_fds: limit.current.map_or(f64::INFINITY, |limit| limit as f64),
        threads: field(20),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_histogram_counts_each_duration_in_all_higher_buckets() {
        let histogram = Histogram::new();
        for milliseconds in [0, 1, 3, 200_000] {
            histogram.add(Duration::from_millis(milliseconds));
        }
        let mut text = Text::default();
        text.histogram("h", "method=\"Version\"", &histogram);
        let all = text.0;
        for line in [
            "h_bucket{method=\"Version\",le=\"0.0005\"} 1",
            "h_bucket{method=\"Version\",le=\"0.001\"} 2",
            "h_bucket{method=\"Version\",le=\"0.005\"} 3",
            "h_bucket{method=\"Version\",le=\"120\"} 3",
            "h_bucket{method=\"Version\",le=\"+Inf\"} 4",
            "h_sum{method=\"Version\"} 200.004",
            "h_count{method=\"Version\"} 4",
        ] {
            assert!(
                all.lines().any(|printed| printed == line),
                "the metrics lack the line {line}:\n{all}"
            );
        }
    }
}
