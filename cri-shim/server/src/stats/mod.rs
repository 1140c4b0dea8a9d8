//! Reads statistics from cgroup files and returns them as CRI messages. If a cgroup controller is
//! not available, the message's fields for that controller are empty.

pub(crate) mod cadvisor;
mod cgroup_files;
mod writable;

use std::collections::HashMap;
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
    }

    /// Counts the disk usage of `containers` again. If the count takes too long, the previous disk
    /// usage is reported.
    pub(crate) async fn refresh(&self, node: &Node, containers: &[Arc<Container>]) {
        let ids = containers.iter().map(|container| container.id.as_str());
        self.writable.refresh(node, ids).await;
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

/// Returns a container's statistics. Blocks only while it reads a few kernel files.
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

/// Returns a pod's statistics, including the statistics of its running containers.
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
    let processes = u64::try_from(cgroup_files::process_ids(&dir).len()).ok();
    let mut interfaces = counters.of(&sandbox.id).into_iter().map(usage);
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
            process: processes.map(|count| ProcessUsage {
                timestamp: now(),
                process_count: value(count),
            }),
            containers,
            io: cgroup_files::io(&dir),
        }),
        windows: None,
    }
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
