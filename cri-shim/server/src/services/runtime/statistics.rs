//! The statistics of pods and containers.

use std::sync::Arc;

use rrun_proto::v1::{
    ContainerStats, ContainerStatsFilter, PodSandboxMetrics, PodSandboxStats, PodSandboxStatsFilter,
};

use crate::container::{Container, Phase};
use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::stats;
use rrun_calls::wait::blocking;

pub(super) async fn container(node: &Arc<Node>, container: &Arc<Container>) -> ContainerStats {
    let only = std::slice::from_ref(container);
    node.stats.refresh(node, only).await;
    stats::container(node, container)
}

/// Returns the statistics of the running containers that match the filter.
pub(super) async fn containers(
    node: &Arc<Node>,
    filter: Option<&ContainerStatsFilter>,
) -> Vec<ContainerStats> {
    let mut all = node.containers();
    all.retain(|container| {
        stats::matches_container(filter, container) && container.phase() == Phase::Running
    });
    node.stats.refresh(node, &all).await;
    all.iter()
        .map(|container| stats::container(node, container))
        .collect()
}

pub(super) async fn sandbox(node: &Arc<Node>, sandbox: &Sandbox) -> PodSandboxStats {
    let containers = node.containers_of(&sandbox.id);
    node.stats.refresh(node, &containers).await;
    stats::sandbox(node, sandbox, &node.network.counters())
}

/// Returns the statistics of the ready pods that match the filter.
pub(super) async fn sandboxes(
    node: &Arc<Node>,
    filter: Option<&PodSandboxStatsFilter>,
) -> Vec<PodSandboxStats> {
    refresh_running(node).await;
    let counters = node.network.counters();
    let all = node.sandboxes();
    all.iter()
        .filter(|sandbox| stats::matches_sandbox(filter, sandbox) && sandbox.state().ready)
        .map(|sandbox| stats::sandbox(node, sandbox, &counters))
        .collect()
}

/// Returns the metrics of the ready pods. Stopped pods are omitted, because they use no resources.
pub(super) async fn metrics(node: &Arc<Node>) -> Vec<PodSandboxMetrics> {
    refresh_running(node).await;
    let node = Arc::clone(node);
    blocking("read the pods' metrics", move || {
        let counters = node.network.counters();
        let all = node.sandboxes();
        all.iter()
            .filter(|sandbox| sandbox.state().ready)
            .map(|sandbox| stats::cadvisor::sandbox(&node, sandbox, &counters))
            .collect()
    })
    .await
}

async fn refresh_running(node: &Arc<Node>) {
    let mut all = node.containers();
    all.retain(|container| container.phase() == Phase::Running);
    node.stats.refresh(node, &all).await;
}
