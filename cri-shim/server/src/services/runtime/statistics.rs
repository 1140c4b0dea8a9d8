//! The statistics of pods and containers. They are read on separate threads, because a container can
//! determine how long this takes, for example with many cgroups.

use std::sync::Arc;

use rrun_proto::v1::{
    ContainerStats, ContainerStatsFilter, PodSandboxMetrics, PodSandboxStats, PodSandboxStatsFilter,
};

use crate::container::{Container, Phase};
use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::stats;
use rrun_calls::wait::blocking;
use rrun_network::Counters;

pub(super) async fn container(node: &Arc<Node>, container: &Arc<Container>) -> ContainerStats {
    let only = std::slice::from_ref(container);
    node.stats.refresh(node, only).await;
    let (node, container) = (Arc::clone(node), Arc::clone(container));
    blocking("read a container's statistics", move || {
        stats::container(&node, &container)
    })
    .await
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
    let node = Arc::clone(node);
    blocking("read the containers' statistics", move || {
        let all = all.iter();
        all.map(|container| stats::container(&node, container))
            .collect()
    })
    .await
}

pub(super) async fn sandbox(node: &Arc<Node>, sandbox: &Arc<Sandbox>) -> PodSandboxStats {
    let containers = node.containers_of(&sandbox.id);
    node.stats.refresh(node, &containers).await;
    let (node, sandbox) = (Arc::clone(node), Arc::clone(sandbox));
    blocking("read a pod's statistics", move || {
        stats::sandbox(&node, &sandbox, &node.network.counters())
    })
    .await
}

/// Returns the statistics of the ready pods that match the filter.
pub(super) async fn sandboxes(
    node: &Arc<Node>,
    filter: Option<&PodSandboxStatsFilter>,
) -> Vec<PodSandboxStats> {
    refresh_running(node).await;
    let mut all = ready(node);
    all.retain(|sandbox| stats::matches_sandbox(filter, sandbox));
    of_each(node, all, "read the pods' statistics", stats::sandbox).await
}

/// Returns the metrics of the ready pods. Stopped pods are omitted, because they use no resources.
pub(super) async fn metrics(node: &Arc<Node>) -> Vec<PodSandboxMetrics> {
    refresh_running(node).await;
    let read = stats::cadvisor::sandbox;
    of_each(node, ready(node), "read the pods' metrics", read).await
}

fn ready(node: &Node) -> Vec<Arc<Sandbox>> {
    let mut all = node.sandboxes();
    all.retain(|sandbox| sandbox.state().ready);
    all
}

/// Calls `read`, which blocks, for each pod on a separate thread. If the client disconnects, this
/// future is dropped, and no further pods are read.
async fn of_each<T: Send + 'static>(
    node: &Arc<Node>,
    pods: Vec<Arc<Sandbox>>,
    what: &str,
    read: fn(&Arc<Node>, &Sandbox, &Counters) -> T,
) -> Vec<T> {
    let node = Arc::clone(node);
    let caller = Arc::new(());
    let waiting = Arc::downgrade(&caller);
    let all = blocking(what, move || {
        let counters = node.network.counters();
        let pods = pods.iter().take_while(|_| waiting.strong_count() > 0);
        pods.map(|pod| read(&node, pod, &counters)).collect()
    })
    .await;
    drop(caller);
    all
}

async fn refresh_running(node: &Arc<Node>) {
    let mut all = node.containers();
    all.retain(|container| container.phase() == Phase::Running);
    node.stats.refresh(node, &all).await;
}
