//! The metrics that kubelet shows at /metrics/cadvisor if its feature gate
//! PodAndContainerStatsFromCRI is enabled. The names and labels are the same as in cAdvisor, and
//! dashboards for cAdvisor therefore work unchanged. All values, including times in seconds, are
//! integers, because the CRI supports only integers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use rrun_proto::v1::{
    ContainerMetrics, Metric, MetricDescriptor, MetricType, PodSandboxMetrics, UInt64Value,
};

use super::cgroup_files;
use super::cgroup_files::Processes;
use super::descriptors::OpenDescriptors;
use super::interfaces;
use crate::cgroup::{MOUNT_POINT, directory, keyed, number, read};
use crate::clock::now;
use crate::container::{Container, Phase};
use crate::node::Node;
use crate::sandbox::Sandbox;
use rrun_network::Counters;

/// The labels of every metric, in the order of the report.
const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

use MetricType::{Counter, Gauge};

/// A metric's name, type, additional labels and help text.
struct Descriptor {
    name: &'static str,
    kind: MetricType,
    labels: &'static [&'static str],
    help: &'static str,
}

macro_rules! descriptors {
    ($($name:ident: $kind:expr, [$($label:literal),*], $help:literal;)*) => {
        const DESCRIPTORS: &[Descriptor] = &[$(Descriptor {
            name: stringify!($name),
            kind: $kind,
            labels: &[$($label),*],
            help: $help,
        }),*];
    };
}

descriptors! {
    container_blkio_device_usage_total: Counter, ["device", "major", "minor", "operation"], "Bytes read from and written to a device.";
    container_cpu_cfs_periods_total: Counter, [], "Number of periods in which the CPU quota was enforced.";
    container_cpu_cfs_throttled_periods_total: Counter, [], "Number of periods in which the CPU quota was used up.";
    container_cpu_cfs_throttled_seconds_total: Counter, [], "Seconds spent waiting for the next period of the CPU quota.";
    container_cpu_system_seconds_total: Counter, [], "CPU seconds spent in the kernel.";
    container_cpu_usage_seconds_total: Counter, ["cpu"], "CPU seconds used.";
    container_cpu_user_seconds_total: Counter, [], "CPU seconds spent in user space.";
    container_file_descriptors: Gauge, [], "Number of open file descriptors.";
    container_fs_inodes_free: Gauge, ["device"], "Number of free inodes in the writable layer's file system.";
    container_fs_inodes_total: Gauge, ["device"], "Number of inodes in the writable layer's file system.";
    container_fs_limit_bytes: Gauge, ["device"], "Size of the writable layer's file system in bytes.";
    container_fs_reads_bytes_total: Counter, ["device"], "Bytes read from a device.";
    container_fs_reads_total: Counter, ["device"], "Number of read operations on a device.";
    container_fs_usage_bytes: Gauge, ["device"], "Bytes in the writable layer.";
    container_fs_writes_bytes_total: Counter, ["device"], "Bytes written to a device.";
    container_fs_writes_total: Counter, ["device"], "Number of write operations on a device.";
    container_hugetlb_usage_bytes: Gauge, ["pagesize"], "Bytes of huge pages in use.";
    container_last_seen: Gauge, [], "Time at which the container's metrics were last read, in seconds since the epoch.";
    container_memory_active_anon_bytes: Gauge, [], "Bytes of anonymous memory on the active list.";
    container_memory_anon_thp_bytes: Gauge, [], "Bytes of anonymous memory in transparent huge pages.";
    container_memory_cache: Gauge, [], "Bytes of page cache.";
    container_memory_failcnt: Counter, [], "Number of times that the memory limit was reached.";
    container_memory_failures_total: Counter, ["failure_type", "scope"], "Number of page faults, by kind.";
    container_memory_file_thp_bytes: Gauge, [], "Bytes of page cache in transparent huge pages.";
    container_memory_inactive_anon_bytes: Gauge, [], "Bytes of anonymous memory on the inactive list.";
    container_memory_kernel_usage: Gauge, [], "Bytes of memory that the kernel uses for itself.";
    container_memory_mapped_file: Gauge, [], "Bytes of files that are mapped into memory.";
    container_memory_max_usage_bytes: Gauge, [], "Highest memory usage so far, in bytes.";
    container_memory_rss: Gauge, [], "Bytes of anonymous memory.";
    container_memory_shmem_thp_bytes: Gauge, [], "Bytes of shared memory in transparent huge pages.";
    container_memory_swap: Gauge, [], "Bytes of swap in use.";
    container_memory_total_active_file_bytes: Gauge, [], "Bytes of page cache on the active list.";
    container_memory_total_inactive_file_bytes: Gauge, [], "Bytes of page cache on the inactive list.";
    container_memory_usage_bytes: Gauge, [], "Bytes of memory in use, including the page cache.";
    container_memory_working_set_bytes: Gauge, [], "Bytes of memory in use, without the page cache's inactive list.";
    container_network_receive_bytes_total: Counter, ["interface"], "Bytes received.";
    container_network_receive_errors_total: Counter, ["interface"], "Number of errors while receiving.";
    container_network_receive_packets_dropped_total: Counter, ["interface"], "Number of packets dropped while receiving.";
    container_network_receive_packets_total: Counter, ["interface"], "Number of packets received.";
    container_network_transmit_bytes_total: Counter, ["interface"], "Bytes sent.";
    container_network_transmit_errors_total: Counter, ["interface"], "Number of errors while sending.";
    container_network_transmit_packets_dropped_total: Counter, ["interface"], "Number of packets dropped while sending.";
    container_network_transmit_packets_total: Counter, ["interface"], "Number of packets sent.";
    container_oom_events_total: Counter, [], "Number of processes that the kernel killed for lack of memory.";
    container_pressure_cpu_stalled_seconds_total: Counter, [], "Seconds in which all processes waited for a CPU.";
    container_pressure_cpu_waiting_seconds_total: Counter, [], "Seconds in which at least one process waited for a CPU.";
    container_pressure_io_stalled_seconds_total: Counter, [], "Seconds in which all processes waited for I/O.";
    container_pressure_io_waiting_seconds_total: Counter, [], "Seconds in which at least one process waited for I/O.";
    container_pressure_memory_stalled_seconds_total: Counter, [], "Seconds in which all processes waited for memory.";
    container_pressure_memory_waiting_seconds_total: Counter, [], "Seconds in which at least one process waited for memory.";
    container_processes: Gauge, [], "Number of processes.";
    container_sockets: Gauge, [], "Number of open sockets.";
    container_spec_cpu_period: Gauge, [], "The CPU quota's period in microseconds.";
    container_spec_cpu_quota: Gauge, [], "The CPU quota in microseconds.";
    container_spec_cpu_shares: Gauge, [], "CPU shares.";
    container_spec_memory_limit_bytes: Gauge, [], "The memory limit, 0 if there is no limit.";
    container_spec_memory_reservation_limit_bytes: Gauge, [], "The memory reservation, 0 if there is no reservation.";
    container_spec_memory_swap_limit_bytes: Gauge, [], "The limit of memory and swap together, 0 if there is no limit.";
    container_start_time_seconds: Gauge, [], "Start time of the container, in seconds since the epoch.";
    container_threads: Gauge, [], "Number of threads.";
    container_threads_max: Gauge, [], "Maximum number of threads, 0 if there is no limit.";
    container_ulimits_soft: Gauge, ["ulimit"], "Soft resource limits of the container's first process.";
}

/// The maximum number of processes per container whose open file descriptors are counted.
const MAX_PROCESSES: usize = 256;

/// Returns the descriptors of all metrics that [`sandbox`] can return.
pub(crate) fn descriptors() -> Vec<MetricDescriptor> {
    let labels = |more: &[&str]| {
        let all = LABELS.iter().chain(more);
        all.map(|label| (*label).to_owned()).collect()
    };
    let all = DESCRIPTORS.iter().map(|one| MetricDescriptor {
        name: one.name.to_owned(),
        help: one.help.to_owned(),
        label_keys: labels(one.labels),
    });
    all.collect()
}

/// The metrics of one pod or container, while they are collected.
struct LabelledMetrics {
    labels: Vec<String>,
    all: Vec<Metric>,
}

impl LabelledMetrics {
    fn add(&mut self, name: &str, more: &[&str], value: Option<u64>) {
        let (Some(value), Some(descriptor)) = (
            value,
            DESCRIPTORS
                .iter()
                .find(|descriptor| descriptor.name == name),
        ) else {
            return;
        };
        let mut label_values = self.labels.clone();
        label_values.extend(more.iter().map(|label| (*label).to_owned()));
        self.all.push(Metric {
            name: name.to_owned(),
            timestamp: 0,
            metric_type: descriptor.kind.into(),
            label_values,
            value: Some(UInt64Value { value }),
        });
    }
}

/// Returns a pod's metrics, including the metrics of its running containers. This call blocks. It
/// reads several dozen kernel files for the pod and for each container, and a limited number of
/// cgroups and open descriptors.
pub(crate) fn sandbox(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    counters: &Counters,
) -> PodSandboxMetrics {
    let metadata = sandbox.config.metadata.clone().unwrap_or_default();
    let dir = directory(&sandbox.cgroup);
    let labels = [
        "",
        &path_of(&dir),
        "",
        &sandbox.id,
        &metadata.namespace,
        &metadata.name,
    ];
    let mut metrics = LabelledMetrics {
        labels: labels.map(str::to_owned).into(),
        all: Vec::new(),
    };
    of_cgroup(&mut metrics, &dir);
    for counted in interfaces(node, sandbox, counters) {
        for (name, value) in [
            ("container_network_receive_bytes_total", counted.rx_bytes),
            ("container_network_receive_errors_total", counted.rx_errors),
            (
                "container_network_receive_packets_dropped_total",
                counted.rx_dropped,
            ),
            (
                "container_network_receive_packets_total",
                counted.rx_packets,
            ),
            ("container_network_transmit_bytes_total", counted.tx_bytes),
            ("container_network_transmit_errors_total", counted.tx_errors),
            (
                "container_network_transmit_packets_dropped_total",
                counted.tx_dropped,
            ),
            (
                "container_network_transmit_packets_total",
                counted.tx_packets,
            ),
        ] {
            metrics.add(name, &[&counted.name], Some(value));
        }
    }
    let containers = node.containers_of(&sandbox.id);
    let mut descriptors = node.config.stats_descriptors;
    let running = containers
        .iter()
        .filter(|one| one.phase() == Phase::Running);
    PodSandboxMetrics {
        pod_sandbox_id: sandbox.id.clone(),
        metrics: metrics.all,
        container_metrics: running
            .map(|one| container(node, one, &mut descriptors))
            .collect(),
    }
}

/// Returns a container's metrics. `descriptors` is the number of open descriptors that the server
/// can still read for the pod.
fn container(node: &Node, container: &Container, descriptors: &mut u64) -> ContainerMetrics {
    let dir = container.cgroup_dir();
    let mut metrics = LabelledMetrics {
        labels: labels(container, &dir),
        all: Vec::new(),
    };
    of_cgroup(&mut metrics, &dir);
    of_processes(&mut metrics, node, container, &dir, descriptors);
    of_disk(&mut metrics, node, container);
    of_specification(&mut metrics, container);
    ContainerMetrics {
        container_id: container.id.clone(),
        metrics: metrics.all,
    }
}

/// Returns the labels that all metrics of a container have.
fn labels(container: &Container, dir: &Path) -> Vec<String> {
    let config = &container.config;
    let pod = container
        .sandbox
        .config
        .metadata
        .clone()
        .unwrap_or_default();
    let name = config.metadata.as_ref().map(|data| data.name.as_str());
    let image = config.image.as_ref().map(|image| {
        // Prefer the user's name for the image, because `image.image` can be an id.
        match image.user_specified_image.as_str() {
            "" => image.image.as_str(),
            name => name,
        }
    });
    let labels = [
        name.unwrap_or_default(),
        &path_of(dir),
        image.unwrap_or_default(),
        &container.id,
        &pod.namespace,
        &pod.name,
    ];
    labels.map(str::to_owned).into()
}

fn of_specification(metrics: &mut LabelledMetrics, container: &Container) {
    let state = container.state();
    let positive = |value: i64| u64::try_from(value).ok();
    let seconds = |nanoseconds: i64| positive(nanoseconds / 1_000_000_000);
    let requested = &state.resources;
    for (name, value) in [
        ("container_last_seen", seconds(now())),
        ("container_start_time_seconds", seconds(state.started_at)),
        ("container_spec_cpu_period", positive(requested.cpu_period)),
        ("container_spec_cpu_shares", positive(requested.cpu_shares)),
        (
            "container_spec_memory_limit_bytes",
            positive(requested.memory_limit_in_bytes),
        ),
        ("container_spec_memory_reservation_limit_bytes", Some(0)),
        (
            "container_spec_memory_swap_limit_bytes",
            positive(requested.memory_swap_limit_in_bytes),
        ),
    ] {
        metrics.add(name, &[], value);
    }
    // As in cAdvisor, the CPU quota is reported only if the container has a quota.
    let quota = positive(requested.cpu_quota).filter(|quota| *quota != 0);
    metrics.add("container_spec_cpu_quota", &[], quota);
}

/// Returns a cgroup's path, such as `/kubepods/pod1`.
fn path_of(dir: &Path) -> String {
    let below = dir.strip_prefix(MOUNT_POINT).unwrap_or(dir);
    format!("/{}", below.display())
}

/// Adds the metrics of a cgroup's controllers, which the kernel's cgroup-v2.rst describes. If a
/// controller is not enabled, its metrics are omitted.
fn of_cgroup(metrics: &mut LabelledMetrics, dir: &Path) {
    if let Some(stat) = read(dir, "cpu.stat") {
        let seconds = |name| keyed(&stat, name).map(|microseconds| microseconds / 1_000_000);
        metrics.add(
            "container_cpu_usage_seconds_total",
            &["total"],
            seconds("usage_usec"),
        );
        metrics.add(
            "container_cpu_user_seconds_total",
            &[],
            seconds("user_usec"),
        );
        metrics.add(
            "container_cpu_system_seconds_total",
            &[],
            seconds("system_usec"),
        );
        let throttled = seconds("throttled_usec");
        metrics.add("container_cpu_cfs_throttled_seconds_total", &[], throttled);
        for (name, of) in [
            ("container_cpu_cfs_periods_total", "nr_periods"),
            ("container_cpu_cfs_throttled_periods_total", "nr_throttled"),
        ] {
            metrics.add(name, &[], keyed(&stat, of));
        }
    }
    of_memory(metrics, dir);
    for (resource, file) in [
        ("cpu", "cpu.pressure"),
        ("memory", "memory.pressure"),
        ("io", "io.pressure"),
    ] {
        let Some(pressure) = cgroup_files::pressure(dir, file) else {
            continue;
        };
        for (what, data) in [("waiting", pressure.some), ("stalled", pressure.full)] {
            let name = format!("container_pressure_{resource}_{what}_seconds_total");
            metrics.add(&name, &[], data.map(|data| data.total / 1_000_000_000));
        }
    }
    of_devices(metrics, &read(dir, "io.stat").unwrap_or_default());
    for size in HUGE_PAGES.iter() {
        let used = number(dir, &format!("hugetlb.{size}.current"));
        metrics.add("container_hugetlb_usage_bytes", &[size], used);
    }
}

/// The sizes of the kernel's huge pages, as the hugetlb controller names them, such as `2MB`. The
/// sizes are not read from the files in a cgroup's directory, which can contain any number of other
/// cgroups.
static HUGE_PAGES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let entries = std::fs::read_dir("/sys/kernel/mm/hugepages");
    let names = entries.into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let mut sizes: Vec<u64> = names.filter_map(|name| kilobytes(&name)).collect();
    sizes.sort_unstable();
    sizes.into_iter().map(page_size).collect()
});

/// Returns the size in the name of a directory such as `hugepages-2048kB`.
fn kilobytes(name: &str) -> Option<u64> {
    let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
    size.parse().ok()
}

/// Formats the size of huge pages like the kernel's function `mem_fmt`.
fn page_size(kilobytes: u64) -> String {
    match kilobytes {
        1_048_576.. => format!("{}GB", kilobytes >> 20),
        1_024.. => format!("{}MB", kilobytes >> 10),
        _ => format!("{kilobytes}KB"),
    }
}

fn of_memory(metrics: &mut LabelledMetrics, dir: &Path) {
    let Some(usage) = number(dir, "memory.current") else {
        return;
    };
    let stat = read(dir, "memory.stat").unwrap_or_default();
    let events = read(dir, "memory.events").unwrap_or_default();
    metrics.add("container_memory_usage_bytes", &[], Some(usage));
    let working = usage.saturating_sub(keyed(&stat, "inactive_file").unwrap_or_default());
    metrics.add("container_memory_working_set_bytes", &[], Some(working));
    for (name, of) in [
        ("container_memory_active_anon_bytes", "active_anon"),
        ("container_memory_anon_thp_bytes", "anon_thp"),
        ("container_memory_cache", "file"),
        ("container_memory_file_thp_bytes", "file_thp"),
        ("container_memory_inactive_anon_bytes", "inactive_anon"),
        ("container_memory_kernel_usage", "kernel"),
        ("container_memory_mapped_file", "file_mapped"),
        ("container_memory_rss", "anon"),
        ("container_memory_shmem_thp_bytes", "shmem_thp"),
        ("container_memory_total_active_file_bytes", "active_file"),
        (
            "container_memory_total_inactive_file_bytes",
            "inactive_file",
        ),
    ] {
        metrics.add(name, &[], keyed(&stat, of));
    }
    // In cgroup v2, memory.stat includes the cgroup's descendants. The metric therefore has the
    // same value for the scopes `container` and `hierarchy`.
    for (kind, of) in [("pgfault", "pgfault"), ("pgmajfault", "pgmajfault")] {
        for scope in ["container", "hierarchy"] {
            let value = keyed(&stat, of);
            metrics.add("container_memory_failures_total", &[kind, scope], value);
        }
    }
    metrics.add("container_memory_failcnt", &[], keyed(&events, "max"));
    metrics.add(
        "container_oom_events_total",
        &[],
        keyed(&events, "oom_kill"),
    );
    metrics.add(
        "container_memory_max_usage_bytes",
        &[],
        number(dir, "memory.peak"),
    );
    let swap = number(dir, "memory.swap.current");
    metrics.add("container_memory_swap", &[], swap);
}

/// Adds the metrics of io.stat, whose lines look like `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0
/// dios=0`.
fn of_devices(metrics: &mut LabelledMetrics, stat: &str) {
    for line in stat.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some((major, minor)) = words.next().and_then(|number| number.split_once(':')) else {
            continue;
        };
        let counted: BTreeMap<&str, u64> = words
            .filter_map(|word| word.split_once('='))
            .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
            .collect();
        let device = device_name(&format!("{major}:{minor}"));
        let device = device.as_str();
        for (name, of) in [
            ("container_fs_reads_bytes_total", "rbytes"),
            ("container_fs_reads_total", "rios"),
            ("container_fs_writes_bytes_total", "wbytes"),
            ("container_fs_writes_total", "wios"),
        ] {
            metrics.add(name, &[device], counted.get(of).copied());
        }
        for (operation, of) in [("Read", "rbytes"), ("Write", "wbytes")] {
            let labels = [device, major, minor, operation];
            let value = counted.get(of).copied();
            metrics.add("container_blkio_device_usage_total", &labels, value);
        }
    }
}

/// Returns the name of the block device with the device number `number`, such as `/dev/vda` for
/// `254:0`. If the device has no name, returns `number`.
fn device_name(number: &str) -> String {
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{number}/uevent"));
    let uevent = uevent.unwrap_or_default();
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="));
    name.map_or_else(|| number.to_owned(), |name| format!("/dev/{name}"))
}

fn of_processes(
    metrics: &mut LabelledMetrics,
    node: &Node,
    container: &Container,
    dir: &Path,
    left: &mut u64,
) {
    let processes = Processes::of(dir, node.config.stats_cgroups.get());
    metrics.add("container_processes", &[], Some(processes.count(dir)));
    let threads = number(dir, "pids.current");
    metrics.add("container_threads", &[], threads);
    let max_threads = read(dir, "pids.max").map(|text| text.trim().parse().unwrap_or(0));
    metrics.add("container_threads_max", &[], max_threads);
    let processes = processes.ids;
    let counted = processes.get(..MAX_PROCESSES).unwrap_or(&processes);
    let open = OpenDescriptors::of(counted, left);
    if open.sockets.is_none() {
        node.stats.warn_once(&container.id, "stats_descriptors", || {
            format!(
                "count the sockets of {}: the metric container_sockets is omitted, because the pod has more than the limit of {} open descriptors",
                container.name(),
                node.config.stats_descriptors
            )
        });
    }
    metrics.add("container_file_descriptors", &[], open.all);
    metrics.add("container_sockets", &[], open.sockets);
    let first = processes.first().copied().unwrap_or_default();
    let limits = std::fs::read_to_string(format!("/proc/{first}/limits")).unwrap_or_default();
    let open_files = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok());
    metrics.add("container_ulimits_soft", &["max_open_files"], open_files);
}

fn of_disk(metrics: &mut LabelledMetrics, node: &Node, container: &Container) {
    let usage = node.stats.writable.of(&container.id);
    let layer: PathBuf = node.writable_layer(&container.id);
    let Ok(disk) = rustix::fs::statvfs(&layer) else {
        return;
    };
    let device = rustix::fs::stat(&layer).map_or_else(
        |_| String::new(),
        |stat| {
            let (major, minor) = (
                rustix::fs::major(stat.st_dev),
                rustix::fs::minor(stat.st_dev),
            );
            device_name(&format!("{major}:{minor}"))
        },
    );
    for (name, value) in [
        ("container_fs_inodes_free", disk.f_ffree),
        ("container_fs_inodes_total", disk.f_files),
        (
            "container_fs_limit_bytes",
            disk.f_blocks.saturating_mul(disk.f_frsize),
        ),
        ("container_fs_usage_bytes", usage.bytes),
    ] {
        metrics.add(name, &[&device], Some(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_a_name_is_labelled_by_its_number() {
        let mut metrics = LabelledMetrics {
            labels: vec![String::new(); LABELS.len()],
            all: Vec::new(),
        };
        of_devices(
            &mut metrics,
            "4095:7 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
        );
        assert_eq!(metrics.all.len(), 6);
        let read = metrics.all.first().map(|metric| &metric.label_values);
        assert_eq!(
            read.and_then(|labels| labels.last()).map(String::as_str),
            Some("4095:7")
        );
    }

    #[test]
    fn huge_pages_have_the_names_of_the_kernel() {
        let names = [
            "hugepages-64kB",
            "hugepages-2048kB",
            "hugepages-1048576kB",
            "x",
        ];
        let sizes = names.map(|name| kilobytes(name).map(page_size));
        let expected = [Some("64KB"), Some("2MB"), Some("1GB"), None];
        assert_eq!(sizes.each_ref().map(Option::as_deref), expected);
    }

    #[test]
    fn descriptors_are_sorted_and_their_names_are_unique() {
        let names: Vec<&str> = DESCRIPTORS.iter().map(|one| one.name).collect();
        assert!(names.is_sorted_by(|one, next| one < next), "{names:?}");
    }
}
