//! Reads statistics from cgroup files and returns them as CRI messages. If a cgroup controller is
//! not available, the message's fields for that controller are empty.

pub(crate) mod cadvisor;
mod cgroup_files;
mod descriptors;
mod writable;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use rrun_proto::v1::{
    ContainerAttributes, ContainerStats, ContainerStatsFilter, CpuUsage, FilesystemIdentifier,
    FilesystemUsage, LinuxPodSandboxStats, NetworkInterfaceUsage, NetworkUsage,
    PodSandboxAttributes, PodSandboxStats, PodSandboxStatsFilter, ProcessUsage, UInt64Value,
};

use crate::cgroup;
use crate::clock::now;
use crate::container::{Container, Phase};
use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::sandbox::status::has_labels;
use rrun_calls::lock::lock;
use rrun_network::{Counters, InterfaceCounters};

pub(crate) use writable::Usage;

/// The minimum time in nanoseconds between two readings from which a CPU rate is computed.
const RATE_WINDOW_NANOSECONDS: i64 = 1_000_000_000;

/// The data that the server keeps between two requests for statistics. The keys of the maps are the
/// ids of pods and containers.
#[derive(Default)]
pub(crate) struct StatsCache {
    cpu: Mutex<HashMap<String, Reading>>,
    writable: writable::UsageCache,
    /// The pods and containers that have reached a limit, each with the limit's key. A warning about
    /// each of them was logged.
    warned: Mutex<HashSet<(String, &'static str)>>,
}

/// A measurement of a pod's or a container's CPU time. `used` is the CPU time in nanoseconds until
/// the time `at`. `rate` is the last computed CPU rate.
#[derive(Clone, Copy, Debug)]
struct Reading {
    at: i64,
    used: u64,
    rate: Option<u64>,
}

impl StatsCache {
    pub(crate) fn forget(&self, id: &str) {
        let mut cpu = lock(&self.cpu);
        cpu.remove(id);
        self.writable.forget(id);
        lock(&self.warned).retain(|(warned, _)| warned != id);
    }

    /// Logs a warning that the pod or container `id` has reached the limit with the key `key`. Each
    /// warning is logged only once.
    fn warn_once(&self, id: &str, key: &'static str, sentence: impl FnOnce() -> String) {
        if lock(&self.warned).insert((id.to_owned(), key)) {
            log::warn!("{} ({key})", sentence());
        }
    }

    /// Counts the disk usage of `containers` again. If the count takes too long, the previous disk
    /// usage is reported.
    pub(crate) async fn refresh(&self, node: &Node, containers: &[Arc<Container>]) {
        self.writable.refresh(node, containers).await;
    }

    /// Returns the average CPU usage since the stored reading, in nanoseconds of CPU time per
    /// second. If the stored reading is too recent, returns the rate of that reading again and does
    /// not replace the reading.
    fn rate(&self, id: &str, at: i64, used: u64) -> Option<u64> {
        let mut cpu = lock(&self.cpu);
        let Some(last) = cpu.get_mut(id) else {
            let rate = None;
            cpu.insert(id.to_owned(), Reading { at, used, rate });
            return None;
        };
        let elapsed = at - last.at;
        if elapsed < RATE_WINDOW_NANOSECONDS {
            return last.rate;
        }
        let spent = u128::from(used.saturating_sub(last.used));
        let rate = u64::try_from(spent * 1_000_000_000 / elapsed.unsigned_abs() as u128).ok();
        *last = Reading { at, used, rate };
        rate
    }
}

fn value(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn cpu(cache: &StatsCache, id: &str, dir: &Path) -> Option<CpuUsage> {
    let mut usage = cgroup_files::cpu(dir)?;
    usage.usage_nano_cores = usage
        .usage_core_nano_seconds
        .and_then(|used| cache.rate(id, usage.timestamp, used.value))
        .and_then(value);
    Some(usage)
}

/// Returns a container's statistics. This call blocks, because it reads a few kernel files.
pub(crate) fn container(node: &Arc<Node>, container: &Arc<Container>) -> ContainerStats {
    let config = &container.config;
    let attributes = ContainerAttributes {
        id: container.id.clone(),
        metadata: config.metadata.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
    };
    let writable = node.stats.writable.of(&container.id);
    let dir = container.cgroup_dir();
    if container.phase() == Phase::Exited || !dir.is_dir() {
        return ContainerStats {
            attributes: Some(attributes),
            writable_layer: Some(writable_layer(node, container, writable)),
            ..ContainerStats::default()
        };
    }
    ContainerStats {
        attributes: Some(attributes),
        cpu: cpu(&node.stats, &container.id, &dir),
        memory: Some(cgroup_files::memory(&dir)),
        writable_layer: Some(writable_layer(node, container, writable)),
        swap: cgroup_files::swap(&dir),
        io: cgroup_files::io(&dir),
    }
}

fn writable_layer(node: &Node, container: &Container, usage: Usage) -> FilesystemUsage {
    let dir = node.writable_layer(&container.id);
    FilesystemUsage {
        timestamp: if usage.at == 0 { now() } else { usage.at },
        fs_id: Some(FilesystemIdentifier {
            mountpoint: dir.to_string_lossy().into_owned(),
        }),
        used_bytes: value(usage.bytes),
        inodes_used: value(usage.inodes),
    }
}

/// Returns a pod's statistics, including the statistics of its running containers. This call
/// blocks, because it reads a limited number of cgroups.
pub(crate) fn sandbox(node: &Arc<Node>, sandbox: &Sandbox, counters: &Counters) -> PodSandboxStats {
    let config = &sandbox.config;
    let attributes = PodSandboxAttributes {
        id: sandbox.id.clone(),
        metadata: config.metadata.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
    };
    let dir = cgroup::directory(&sandbox.cgroup);
    let containers: Vec<ContainerStats> = node
        .containers_of(&sandbox.id)
        .iter()
        .filter(|one| one.phase() == Phase::Running)
        .map(|one| container(node, one))
        .collect();
    let limit = node.config.stats_cgroups.get();
    let processes = cgroup_files::Processes::of(&dir, limit);
    if !processes.complete {
        node.stats.warn_once(&sandbox.id, "stats_cgroups", || {
            format!(
                "count the processes of {}: its threads are reported as processes, because it has more than the limit of {limit} cgroups or of {} processes, or a process holds a lease on a file cgroup.procs",
                sandbox.name(),
                cgroup_files::MAX_PROCESSES
            )
        });
    }
    let mut interfaces = interfaces(node, sandbox, counters).into_iter().map(usage);
    let network = interfaces.next().map(|default| NetworkUsage {
        timestamp: now(),
        default_interface: Some(default),
        interfaces: interfaces.collect(),
    });
    PodSandboxStats {
        attributes: Some(attributes),
        linux: Some(LinuxPodSandboxStats {
            cpu: cpu(&node.stats, &sandbox.id, &dir),
            memory: Some(cgroup_files::memory(&dir)),
            network,
            process: Some(ProcessUsage {
                timestamp: now(),
                process_count: value(processes.count(&dir)),
            }),
            containers,
            io: cgroup_files::io(&dir),
        }),
        windows: None,
    }
}

/// Returns the counters of the pod's interfaces, of which the first is eth0.
fn interfaces(node: &Node, sandbox: &Sandbox, counters: &Counters) -> Vec<InterfaceCounters> {
    let limit = node.config.stats_interfaces.get();
    let counted = counters.of(&sandbox.id, limit);
    if counted.limited {
        node.stats.warn_once(&sandbox.id, "stats_interfaces", || {
            format!(
                "read the counters of the interfaces of {}: only the limit of {limit} interfaces are reported, because the pod has more",
                sandbox.name()
            )
        });
    }
    counted.interfaces
}

fn usage(counted: InterfaceCounters) -> NetworkInterfaceUsage {
    NetworkInterfaceUsage {
        name: counted.name,
        rx_bytes: value(counted.rx_bytes),
        rx_errors: value(counted.rx_errors),
        tx_bytes: value(counted.tx_bytes),
        tx_errors: value(counted.tx_errors),
    }
}

/// Returns whether the container matches the filter.
pub(crate) fn matches_container(
    filter: Option<&ContainerStatsFilter>,
    container: &Container,
) -> bool {
    let Some(filter) = filter else { return true };
    container.id.starts_with(&filter.id)
        && container.sandbox.id.starts_with(&filter.pod_sandbox_id)
        && has_labels(&filter.label_selector, &container.config.labels)
}

/// Returns whether the pod matches the filter.
pub(crate) fn matches_sandbox(filter: Option<&PodSandboxStatsFilter>, sandbox: &Sandbox) -> bool {
    let Some(filter) = filter else { return true };
    sandbox.id.starts_with(&filter.id) && has_labels(&filter.label_selector, &sandbox.config.labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_readings_a_second_apart() {
        let cache = StatsCache::default();
        let second = 1_000_000_000;
        assert_eq!(cache.rate("c", second, 100), None);
        assert_eq!(cache.rate("c", second + 1, 200), None);
        assert_eq!(
            cache.rate("c", 3 * second, 1_000_000_100),
            Some(500_000_000)
        );
        // The stored reading is too recent, so its rate is reported again.
        assert_eq!(cache.rate("c", 3 * second + 5, 9), Some(500_000_000));
        cache.forget("c");
        assert_eq!(cache.rate("c", 9 * second, 9), None);
    }
}
