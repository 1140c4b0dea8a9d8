//! The runtime service of the CRI. A method reads its request, calls another module, and builds the
//! response.
//!
//! Pods and containers are created, started, stopped and removed in separate tasks. A task
//! continues if its client disconnects, and a retry of the client's request joins the running task.

mod statistics;
mod status;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::StreamExt;
use rrun_proto::v1::runtime_service_server::RuntimeService;
use rrun_proto::v1::*;
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};

use super::answers::{Answers, in_chunks};
use crate::cgroup::CgroupDriver as ConfiguredDriver;
use crate::clock::now;
use crate::node::Node;
use crate::report_size::{self, STATUS_BYTES};
use crate::{container, sandbox, stats, streaming};
use rrun_calls::error::{During, Error};
use rrun_calls::wait::{blocking, slow};

/// The version of the CRI, which clients compare with their own version.
const API_VERSION: &str = "v1";

/// The server's name. Kubelet displays `NAME://VERSION` as the container runtime of the node.
const NAME: &str = "rrun";

pub(crate) struct Runtime {
    pub(super) node: Arc<Node>,
}

impl Runtime {
    fn sandboxes(&self, filter: Option<&PodSandboxFilter>) -> Vec<PodSandbox> {
        let all = self.node.sandboxes();
        all.iter()
            .filter(|sandbox| sandbox::status::matches(filter, sandbox))
            .map(|sandbox| sandbox::status::list_entry(sandbox))
            .collect()
    }

    fn containers(&self, filter: Option<&ContainerFilter>) -> Vec<Container> {
        let all = self.node.containers();
        all.iter()
            .filter(|container| container::status::matches(filter, container))
            .map(|container| container::status::list_entry(container))
            .collect()
    }
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(
        &self,
        _request: Request<VersionRequest>,
    ) -> Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse {
            // The version of kubelet's runtime API. Kubernetes never defined another version of
            // this API.
            version: "0.1.0".to_owned(),
            runtime_name: NAME.to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: API_VERSION.to_owned(),
        }))
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let verbose = request.into_inner().verbose;
        Ok(Response::new(status::status(&self.node, verbose).await))
    }

    async fn runtime_config(
        &self,
        _request: Request<RuntimeConfigRequest>,
    ) -> Result<Response<RuntimeConfigResponse>, Status> {
        let driver = match self.node.config.cgroup_driver {
            ConfiguredDriver::Cgroupfs => CgroupDriver::Cgroupfs,
            ConfiguredDriver::Systemd => CgroupDriver::Systemd,
        };
        Ok(Response::new(RuntimeConfigResponse {
            linux: Some(LinuxRuntimeConfiguration {
                cgroup_driver: driver.into(),
            }),
        }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<UpdateRuntimeConfigRequest>,
    ) -> Result<Response<UpdateRuntimeConfigResponse>, Status> {
        let config = request.into_inner().runtime_config.unwrap_or_default();
        let cidr = config.network_config.unwrap_or_default().pod_cidr;
        if !cidr.is_empty() {
            self.node.network.set_ranges(&cidr).await?;
        }
        Ok(Response::new(UpdateRuntimeConfigResponse {}))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<RunPodSandboxRequest>,
    ) -> Result<Response<RunPodSandboxResponse>, Status> {
        let request = request.into_inner();
        let config = request
            .config
            .ok_or_else(|| Error::invalid("the request has no pod configuration"))?;
        let metadata = config.metadata.clone().unwrap_or_default();
        let (node, handler) = (Arc::clone(&self.node), request.runtime_handler);
        let key = sandbox::run::key(&metadata);
        let run = || sandbox::run::run(node, config, handler);
        let pod_sandbox_id = slow(&key, self.node.creations.join(&key, run)).await?;
        Ok(Response::new(RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Result<Response<StopPodSandboxResponse>, Status> {
        // A pod that does not exist counts as stopped.
        if let Ok(sandbox) = self.node.sandbox(&request.get_ref().pod_sandbox_id) {
            let node = Arc::clone(&self.node);
            let key = format!("stop pod {}", sandbox.id);
            let stop = || sandbox::stop::stop(node, sandbox);
            self.node.changes.join(&key, stop).await?;
        }
        Ok(Response::new(StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Result<Response<RemovePodSandboxResponse>, Status> {
        if let Ok(sandbox) = self.node.sandbox(&request.get_ref().pod_sandbox_id) {
            let node = Arc::clone(&self.node);
            let key = format!("remove pod {}", sandbox.id);
            let remove = || sandbox::stop::remove(node, sandbox);
            self.node.changes.join(&key, remove).await?;
        }
        Ok(Response::new(RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Result<Response<PodSandboxStatusResponse>, Status> {
        let request = request.into_inner();
        let sandbox = self.node.sandbox(&request.pod_sandbox_id)?;
        let timestamp = now();
        let containers_statuses = container::status::of_pod(&self.node, &sandbox);
        let mut info = BTreeMap::new();
        if request.verbose {
            let shown = sandbox::status::info(&self.node, &sandbox).await;
            info.insert("info".to_owned(), shown.to_string());
        }
        let mut status = sandbox::status::status(&sandbox);
        report_size::limit(&mut status, STATUS_BYTES);
        Ok(Response::new(PodSandboxStatusResponse {
            status: Some(status),
            info,
            // Without a timestamp, kubelet requests the status of each container separately.
            timestamp: containers_statuses.as_ref().map_or(0, |_| timestamp),
            containers_statuses: containers_statuses.unwrap_or_default(),
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Result<Response<ListPodSandboxResponse>, Status> {
        let mut items = self.sandboxes(request.get_ref().filter.as_ref());
        report_size::limit_list(&mut items);
        Ok(Response::new(ListPodSandboxResponse { items }))
    }

    type StreamPodSandboxesStream = Answers<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let items = self.sandboxes(request.get_ref().filter.as_ref());
        let message = |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes };
        Ok(Response::new(in_chunks(items, message)))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<UpdatePodSandboxResourcesResponse>, Status> {
        let request = request.into_inner();
        // Kubelet has already changed the pod's cgroup itself, so the server only updates the pod's
        // record.
        let sandbox = self.node.sandbox(&request.pod_sandbox_id)?;
        {
            let mut state = sandbox.state();
            if request.resources.is_some() {
                state.resources = request.resources;
            }
            if request.overhead.is_some() {
                state.overhead = request.overhead;
            }
        }
        sandbox.save(&self.node).await?;
        Ok(Response::new(UpdatePodSandboxResourcesResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let request = request.into_inner();
        let sandbox = self.node.sandbox(&request.pod_sandbox_id)?;
        let config = request
            .config
            .ok_or_else(|| Error::invalid("the request has no container configuration"))?;
        let node = Arc::clone(&self.node);
        let key = container::create::key(&sandbox.id, &config);
        let create = || container::create::create(node, sandbox, config);
        let container_id = slow(&key, self.node.creations.join(&key, create)).await?;
        Ok(Response::new(CreateContainerResponse { container_id }))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Result<Response<StartContainerResponse>, Status> {
        let container = self.node.container(&request.get_ref().container_id)?;
        let node = Arc::clone(&self.node);
        let key = format!("start container {}", container.id);
        let start = || container::start::start(node, container);
        self.node.changes.join(&key, start).await?;
        Ok(Response::new(StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Result<Response<StopContainerResponse>, Status> {
        let request = request.into_inner();
        if let Ok(container) = self.node.container(&request.container_id) {
            let node = Arc::clone(&self.node);
            let grace = request.timeout;
            // The key includes the timeout. A second call with a shorter timeout therefore does not
            // join the first call.
            let key = format!("stop container {} within {grace} s", container.id);
            let stop = || async move { container::stop::stop(&node, &container, grace).await };
            self.node.changes.join(&key, stop).await?;
        }
        Ok(Response::new(StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<RemoveContainerResponse>, Status> {
        if let Ok(container) = self.node.container(&request.get_ref().container_id) {
            let node = Arc::clone(&self.node);
            let key = format!("remove container {}", container.id);
            let remove = || async move { container::remove::remove(&node, &container).await };
            self.node.changes.join(&key, remove).await?;
        }
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        let mut containers = self.containers(request.get_ref().filter.as_ref());
        report_size::limit_list(&mut containers);
        Ok(Response::new(ListContainersResponse { containers }))
    }

    type StreamContainersStream = Answers<StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let containers = self.containers(request.get_ref().filter.as_ref());
        let message = |containers| StreamContainersResponse { containers };
        Ok(Response::new(in_chunks(containers, message)))
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Result<Response<ContainerStatusResponse>, Status> {
        let request = request.into_inner();
        let container = self.node.container(&request.container_id)?;
        let mut info = BTreeMap::new();
        if request.verbose {
            let (node, of) = (Arc::clone(&self.node), Arc::clone(&container));
            let what = format!("read the configuration of {}", container.name());
            let shown = blocking(what, move || container::status::info(&node, &of)).await;
            info.insert("info".to_owned(), shown.to_string());
        }
        let mut status = container::status::status(&container);
        report_size::limit(&mut status, STATUS_BYTES);
        Ok(Response::new(ContainerStatusResponse {
            status: Some(status),
            info,
        }))
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Result<Response<UpdateContainerResourcesResponse>, Status> {
        let request = request.into_inner();
        let container = self.node.container(&request.container_id)?;
        if request.windows.is_some() {
            let sentence = "the update contains resources for Windows (windows)";
            return Err(Error::invalid(sentence).into());
        }
        if let Some(resources) = request.linux {
            let (node, name) = (Arc::clone(&self.node), container.name());
            // The update runs in a separate task and therefore continues when the client
            // disconnects. Two updates of a container are not joined, because they can request
            // different values.
            let update = tokio::spawn(container::start::update(node, container, resources));
            let ended = update.await;
            ended.map_err(|error| Error::internal(format!("update {name}: {error}")))??;
        }
        Ok(Response::new(UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Result<Response<ReopenContainerLogResponse>, Status> {
        let container = self.node.container(&request.get_ref().container_id)?;
        let name = container.name();
        if container.phase() != container::Phase::Running {
            return Err(Error::wrong_state(format!("{name} is not running")).into());
        }
        let reopened = container.sandbox.monitor.reopen_log(&container.id).await;
        reopened
            .map_err(Error::from)
            .during(|| format!("reopen the log of {name}"))?;
        Ok(Response::new(ReopenContainerLogResponse {}))
    }

    async fn checkpoint_container(
        &self,
        _request: Request<CheckpointContainerRequest>,
    ) -> Result<Response<CheckpointContainerResponse>, Status> {
        Err(Error::unimplemented("rrun-cri does not support checkpoints of containers").into())
    }

    async fn exec_sync(
        &self,
        request: Request<ExecSyncRequest>,
    ) -> Result<Response<ExecSyncResponse>, Status> {
        let request = request.into_inner();
        let container = self.node.container(&request.container_id)?;
        let executed =
            streaming::exec_sync(&self.node, &container, &request.cmd, request.timeout).await?;
        Ok(Response::new(executed))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        let url = streaming::exec_url(&self.node, request.into_inner())?;
        Ok(Response::new(ExecResponse { url }))
    }

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<AttachResponse>, Status> {
        let url = streaming::attach_url(&self.node, request.into_inner())?;
        Ok(Response::new(AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<PortForwardRequest>,
    ) -> Result<Response<PortForwardResponse>, Status> {
        let url = streaming::port_forward_url(&self.node, request.into_inner())?;
        Ok(Response::new(PortForwardResponse { url }))
    }

    async fn container_stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Result<Response<ContainerStatsResponse>, Status> {
        let container = self.node.container(&request.get_ref().container_id)?;
        let stats = statistics::container(&self.node, &container).await;
        Ok(Response::new(ContainerStatsResponse { stats: Some(stats) }))
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Result<Response<ListContainerStatsResponse>, Status> {
        let filter = request.get_ref().filter.as_ref();
        let mut stats = statistics::containers(&self.node, filter).await;
        report_size::limit_list(&mut stats);
        Ok(Response::new(ListContainerStatsResponse { stats }))
    }

    type StreamContainerStatsStream = Answers<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        let filter = request.get_ref().filter.as_ref();
        let stats = statistics::containers(&self.node, filter).await;
        let message = |container_stats| StreamContainerStatsResponse { container_stats };
        Ok(Response::new(in_chunks(stats, message)))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<PodSandboxStatsRequest>,
    ) -> Result<Response<PodSandboxStatsResponse>, Status> {
        let sandbox = self.node.sandbox(&request.get_ref().pod_sandbox_id)?;
        let stats = statistics::sandbox(&self.node, &sandbox).await;
        Ok(Response::new(PodSandboxStatsResponse {
            stats: Some(stats),
        }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Result<Response<ListPodSandboxStatsResponse>, Status> {
        let filter = request.get_ref().filter.as_ref();
        let mut stats = statistics::sandboxes(&self.node, filter).await;
        report_size::limit_list(&mut stats);
        Ok(Response::new(ListPodSandboxStatsResponse { stats }))
    }

    type StreamPodSandboxStatsStream = Answers<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        let filter = request.get_ref().filter.as_ref();
        let stats = statistics::sandboxes(&self.node, filter).await;
        let message = |pod_sandbox_stats| StreamPodSandboxStatsResponse { pod_sandbox_stats };
        Ok(Response::new(in_chunks(stats, message)))
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<ListMetricDescriptorsRequest>,
    ) -> Result<Response<ListMetricDescriptorsResponse>, Status> {
        let descriptors = stats::cadvisor::descriptors();
        Ok(Response::new(ListMetricDescriptorsResponse { descriptors }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<ListPodSandboxMetricsRequest>,
    ) -> Result<Response<ListPodSandboxMetricsResponse>, Status> {
        let mut pod_metrics = statistics::metrics(&self.node).await;
        report_size::limit_list(&mut pod_metrics);
        Ok(Response::new(ListPodSandboxMetricsResponse { pod_metrics }))
    }

    type StreamPodSandboxMetricsStream = Answers<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        let metrics = statistics::metrics(&self.node).await;
        let message = |pod_sandbox_metrics| StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        };
        Ok(Response::new(in_chunks(metrics, message)))
    }

    type GetContainerEventsStream = Answers<ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _request: Request<GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        // To limit the server's memory use, a slow subscriber loses events.
        let events = BroadcastStream::new(self.node.events.subscribe())
            .filter_map(|event| async move { event.ok().map(|event| Ok(event.message())) });
        Ok(Response::new(Box::pin(events)))
    }
}
