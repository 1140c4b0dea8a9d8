//! What pods and containers use, for whoever asks.

use std::sync::Arc;

use rrun_proto::v1::{
    ContainerStats, ContainerStatsFilter, ContainerStatsResponse, PodSandboxMetrics,
    PodSandboxStats, PodSandboxStatsFilter, PodSandboxStatsResponse,
};

use super::Runtime;
use crate::{container, stats};
use rrun_calls::error::Result;
use rrun_calls::wait::blocking;

impl Runtime {
    pub(super) async fn container_stats(&self, id: &str) -> Result<ContainerStatsResponse> {
        let container = self.node.container(id)?;
        let only = std::slice::from_ref(&container);
        self.node.stats.refresh(&self.node, only).await;
        Ok(ContainerStatsResponse {
            stats: Some(stats::container(&self.node, &container)),
        })
    }

    pub(super) async fn all_container_stats(
        &self,
        filter: Option<&ContainerStatsFilter>,
    ) -> Vec<ContainerStats> {
        let mut all = self.node.containers();
        all.retain(|container| {
            stats::matches_container(filter, container)
                && container.phase() == container::Phase::Running
        });
        self.node.stats.refresh(&self.node, &all).await;
        let all = all.iter();
        all.map(|container| stats::container(&self.node, container))
            .collect()
    }

    pub(super) async fn sandbox_stats(&self, id: &str) -> Result<PodSandboxStatsResponse> {
        let sandbox = self.node.sandbox(id)?;
        let containers = self.node.containers_of(&sandbox.id);
        self.node.stats.refresh(&self.node, &containers).await;
        Ok(PodSandboxStatsResponse {
            stats: Some(stats::sandbox(
                &self.node,
                &sandbox,
                &self.node.network.counters(),
            )),
        })
    }

    pub(super) async fn all_sandbox_stats(
        &self,
        filter: Option<&PodSandboxStatsFilter>,
    ) -> Vec<PodSandboxStats> {
        self.refresh_running().await;
        let all = self.node.sandboxes();
        let counters = self.node.network.counters();
        all.iter()
            .filter(|sandbox| stats::matches_sandbox(filter, sandbox))
            .filter(|sandbox| sandbox.state().ready)
            .map(|sandbox| stats::sandbox(&self.node, sandbox, &counters))
            .collect()
    }

    async fn refresh_running(&self) {
        let mut all = self.node.containers();
        all.retain(|container| container.phase() == container::Phase::Running);
        self.node.stats.refresh(&self.node, &all).await;
    }

    /// Of the pods that are ready: what has ended uses nothing.
    pub(super) async fn sandbox_metrics(&self) -> Vec<PodSandboxMetrics> {
        self.refresh_running().await;
        let node = Arc::clone(&self.node);
        blocking("read the pods' metrics", move || {
            let all = node.sandboxes();
            let counters = node.network.counters();
            let ready = all.iter().filter(|sandbox| sandbox.state().ready);
            ready
                .map(|sandbox| stats::cadvisor::sandbox(&node, sandbox, &counters))
                .collect()
        })
        .await
    }
}
