//! RuntimeService.

mod statistics;
mod status;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::StreamExt;
use rrun_proto::v1::runtime_service_server::RuntimeService;
use rrun_proto::v1::*;
use serde_json::json;
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};

use super::{Answers, answer, in_chunks};
use crate::cgroup::CgroupDriver as ConfiguredDriver;
use crate::clock::now;
use crate::node::Node;
use crate::{container, sandbox, stats, streaming};
use rrun_calls::error::{Error, Result};
use rrun_calls::wait::slow;

/// The CRI's version, which clients compare with theirs.
const API_VERSION: &str = "v1";

/// What this server calls itself; kubelet shows `NAME://VERSION` on the node.
const NAME: &str = "rrun";

pub(crate) struct Runtime {
    pub(super) node: Arc<Node>,
}

impl Runtime {
    async fn run_sandbox(&self, request: RunPodSandboxRequest) -> Result<RunPodSandboxResponse> {
        let config = request
            .config
            .ok_or_else(|| Error::invalid("the request has no pod configuration"))?;
        let metadata = config.metadata.clone().unwrap_or_default();
        let node = Arc::clone(&self.node);
        let handler = request.runtime_handler;
        let key = sandbox::run::key(&metadata);
        let making = self
            .node
            .making
            .join(&key, || sandbox::run::run(node, config, handler));
        let pod_sandbox_id = slow(&key, making).await?;
        Ok(RunPodSandboxResponse { pod_sandbox_id })
    }

    async fn stop_sandbox(&self, id: &str) -> Result<StopPodSandboxResponse> {
        // What is gone is stopped.
        if let Ok(sandbox) = self.node.sandbox(id) {
            let node = Arc::clone(&self.node);
            let key = format!("stop pod {}", sandbox.id);
            let stopping = self
                .node
                .doing
                .join(&key, || sandbox::stop::stop(node, sandbox));
            stopping.await?;
        }
        Ok(StopPodSandboxResponse {})
    }

    async fn remove_sandbox(&self, id: &str) -> Result<RemovePodSandboxResponse> {
        if let Ok(sandbox) = self.node.sandbox(id) {
            let node = Arc::clone(&self.node);
            let key = format!("remove pod {}", sandbox.id);
            let removing = self
                .node
                .doing
                .join(&key, || sandbox::stop::remove(node, sandbox));
            removing.await?;
        }
        Ok(RemovePodSandboxResponse {})
    }

    async fn sandbox_status(
        &self,
        request: &PodSandboxStatusRequest,
    ) -> Result<PodSandboxStatusResponse> {
        let sandbox = self.node.sandbox(&request.pod_sandbox_id)?;
        let timestamp = now();
        let containers = self.node.containers_of(&sandbox.id);
        let mut info = BTreeMap::new();
        if request.verbose {
            let shown = sandbox::status::info(&self.node, &sandbox).await;
            info.insert("info".to_owned(), shown.to_string());
        }
        Ok(PodSandboxStatusResponse {
            status: Some(sandbox::status::status(&sandbox)),
            info,
            containers_statuses: containers
                .iter()
                .map(|container| container::status::status(container))
                .collect(),
            timestamp,
        })
    }

    fn sandboxes(&self, filter: Option<&PodSandboxFilter>) -> Vec<PodSandbox> {
        let all = self.node.sandboxes();
        all.iter()
            .filter(|sandbox| sandbox::status::matches(filter, sandbox))
            .map(|sandbox| sandbox::status::list_entry(sandbox))
            .collect()
    }

    async fn update_sandbox(
        &self,
        request: UpdatePodSandboxResourcesRequest,
    ) -> Result<UpdatePodSandboxResourcesResponse> {
        // Kubelet has changed the pod's cgroup itself: what is left is to know of it.
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
        Ok(UpdatePodSandboxResourcesResponse {})
    }

    async fn create(&self, request: CreateContainerRequest) -> Result<CreateContainerResponse> {
        let sandbox = self.node.sandbox(&request.pod_sandbox_id)?;
        let config = request
            .config
            .ok_or_else(|| Error::invalid("the request has no container configuration"))?;
        let node = Arc::clone(&self.node);
        let key = container::create::key(&sandbox.id, &config);
        let making = self
            .node
            .making
            .join(&key, || container::create::create(node, sandbox, config));
        let container_id = slow(&key, making).await?;
        Ok(CreateContainerResponse { container_id })
    }

    async fn start(&self, id: &str) -> Result<StartContainerResponse> {
        let container = self.node.container(id)?;
        let node = Arc::clone(&self.node);
        let key = format!("start container {}", container.id);
        let starting = self
            .node
            .doing
            .join(&key, || container::start::start(node, container));
        starting.await?;
        Ok(StartContainerResponse {})
    }

    async fn stop(&self, request: &StopContainerRequest) -> Result<StopContainerResponse> {
        if let Ok(container) = self.node.container(&request.container_id) {
            let node = Arc::clone(&self.node);
            let grace = request.timeout;
            // A second call with less patience is not to wait for the first one's.
            let key = format!("stop container {} within {grace} s", container.id);
            let stopping = self.node.doing.join(&key, || async move {
                container::stop::stop(&node, &container, grace).await
            });
            stopping.await?;
        }
        Ok(StopContainerResponse {})
    }

    async fn remove(&self, id: &str) -> Result<RemoveContainerResponse> {
        if let Ok(container) = self.node.container(id) {
            let node = Arc::clone(&self.node);
            let key = format!("remove container {}", container.id);
            let removing = self.node.doing.join(&key, || async move {
                container::remove::remove(&node, &container).await
            });
            removing.await?;
        }
        Ok(RemoveContainerResponse {})
    }

    fn containers(&self, filter: Option<&ContainerFilter>) -> Vec<Container> {
        let all = self.node.containers();
        all.iter()
            .filter(|container| container::status::matches(filter, container))
            .map(|container| container::status::list_entry(container))
            .collect()
    }

    fn container_status(
        &self,
        request: &ContainerStatusRequest,
    ) -> Result<ContainerStatusResponse> {
        let container = self.node.container(&request.container_id)?;
        let mut info = BTreeMap::new();
        if request.verbose {
            let bundle = self.node.bundle(&container.sandbox.id, &container.id);
            let spec = std::fs::read(bundle.join("config.json"))
                .ok()
                .and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
            let shown = json!({
                "pid": container.state().pid,
                "sandboxID": container.sandbox.id,
                "bundle": bundle,
                "runtimeSpec": spec,
            });
            info.insert("info".to_owned(), shown.to_string());
        }
        Ok(ContainerStatusResponse {
            status: Some(container::status::status(&container)),
            info,
        })
    }

    async fn update(
        &self,
        request: UpdateContainerResourcesRequest,
    ) -> Result<UpdateContainerResourcesResponse> {
        let container = self.node.container(&request.container_id)?;
        if request.windows.is_some() {
            return Err(Error::invalid(
                "the update has resources for Windows (windows)",
            ));
        }
        let Some(asked) = request.linux else {
            return Ok(UpdateContainerResourcesResponse {});
        };
        let (node, name) = (Arc::clone(&self.node), container.name());
        // Not joined: the next one may ask for something else.
        let task = tokio::spawn(container::start::update(node, container, asked));
        let ended = task.await;
        ended.map_err(|error| Error::internal(format!("update {name}: {error}")))??;
        Ok(UpdateContainerResourcesResponse {})
    }

    async fn reopen_log(&self, id: &str) -> Result<ReopenContainerLogResponse> {
        let container = self.node.container(id)?;
        let name = container.name();
        if container.phase() != container::Phase::Running {
            return Err(Error::wrong_state(format!("{name} is not running")));
        }
        let reopened = container.sandbox.monitor.reopen_log(&container.id).await;
        reopened.map_err(|error| Error::internal(format!("reopen the log of {name}: {error}")))?;
        Ok(ReopenContainerLogResponse {})
    }

    async fn exec_sync(&self, request: ExecSyncRequest) -> Result<ExecSyncResponse> {
        let container = self.node.container(&request.container_id)?;
        streaming::exec_sync(&self.node, &container, &request.cmd, request.timeout).await
    }
}

fn not_yet<T>(method: &str, what: &str) -> Result<Response<T>, Status> {
    answer(
        method,
        Err(Error::unimplemented(format!(
            "rrun-cri does not {what} yet"
        ))),
    )
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(
        &self,
        _request: Request<VersionRequest>,
    ) -> Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse {
            // The version of kubelet's runtime API, which has never been another one.
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
        let status = Runtime::status(self, request.into_inner().verbose).await;
        Ok(Response::new(status))
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
        if !cidr.is_empty()
            && let Err(error) = self.node.network.set_ranges(&cidr).await
        {
            return answer("UpdateRuntimeConfig", Err(error));
        }
        Ok(Response::new(UpdateRuntimeConfigResponse {}))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<RunPodSandboxRequest>,
    ) -> Result<Response<RunPodSandboxResponse>, Status> {
        answer(
            "RunPodSandbox",
            self.run_sandbox(request.into_inner()).await,
        )
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Result<Response<StopPodSandboxResponse>, Status> {
        let id = request.into_inner().pod_sandbox_id;
        answer("StopPodSandbox", self.stop_sandbox(&id).await)
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Result<Response<RemovePodSandboxResponse>, Status> {
        let id = request.into_inner().pod_sandbox_id;
        answer("RemovePodSandbox", self.remove_sandbox(&id).await)
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Result<Response<PodSandboxStatusResponse>, Status> {
        answer(
            "PodSandboxStatus",
            self.sandbox_status(request.get_ref()).await,
        )
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Result<Response<ListPodSandboxResponse>, Status> {
        let items = self.sandboxes(request.get_ref().filter.as_ref());
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
        let updated = self.update_sandbox(request.into_inner()).await;
        answer("UpdatePodSandboxResources", updated)
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        answer("CreateContainer", self.create(request.into_inner()).await)
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Result<Response<StartContainerResponse>, Status> {
        let id = request.into_inner().container_id;
        answer("StartContainer", self.start(&id).await)
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Result<Response<StopContainerResponse>, Status> {
        answer("StopContainer", self.stop(request.get_ref()).await)
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<RemoveContainerResponse>, Status> {
        let id = request.into_inner().container_id;
        answer("RemoveContainer", self.remove(&id).await)
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        let containers = self.containers(request.get_ref().filter.as_ref());
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
        let status = Runtime::container_status(self, request.get_ref());
        answer("ContainerStatus", status)
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Result<Response<UpdateContainerResourcesResponse>, Status> {
        let updated = self.update(request.into_inner()).await;
        answer("UpdateContainerResources", updated)
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Result<Response<ReopenContainerLogResponse>, Status> {
        let id = request.into_inner().container_id;
        answer("ReopenContainerLog", self.reopen_log(&id).await)
    }

    async fn checkpoint_container(
        &self,
        _request: Request<CheckpointContainerRequest>,
    ) -> Result<Response<CheckpointContainerResponse>, Status> {
        not_yet("CheckpointContainer", "checkpoint containers")
    }

    async fn exec_sync(
        &self,
        request: Request<ExecSyncRequest>,
    ) -> Result<Response<ExecSyncResponse>, Status> {
        let result = Runtime::exec_sync(self, request.into_inner()).await;
        answer("ExecSync", result)
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        let url = streaming::exec_url(&self.node, request.into_inner());
        answer("Exec", url.map(|url| ExecResponse { url }))
    }

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<AttachResponse>, Status> {
        let url = streaming::attach_url(&self.node, request.into_inner());
        answer("Attach", url.map(|url| AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<PortForwardRequest>,
    ) -> Result<Response<PortForwardResponse>, Status> {
        let url = streaming::port_forward_url(&self.node, request.into_inner());
        answer("PortForward", url.map(|url| PortForwardResponse { url }))
    }

    async fn container_stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Result<Response<ContainerStatsResponse>, Status> {
        let stats = Runtime::container_stats(self, &request.get_ref().container_id).await;
        answer("ContainerStats", stats)
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Result<Response<ListContainerStatsResponse>, Status> {
        let stats = self
            .all_container_stats(request.get_ref().filter.as_ref())
            .await;
        Ok(Response::new(ListContainerStatsResponse { stats }))
    }

    type StreamContainerStatsStream = Answers<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        let stats = self
            .all_container_stats(request.get_ref().filter.as_ref())
            .await;
        let message = |container_stats| StreamContainerStatsResponse { container_stats };
        Ok(Response::new(in_chunks(stats, message)))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<PodSandboxStatsRequest>,
    ) -> Result<Response<PodSandboxStatsResponse>, Status> {
        let stats = self.sandbox_stats(&request.get_ref().pod_sandbox_id).await;
        answer("PodSandboxStats", stats)
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Result<Response<ListPodSandboxStatsResponse>, Status> {
        let stats = self
            .all_sandbox_stats(request.get_ref().filter.as_ref())
            .await;
        Ok(Response::new(ListPodSandboxStatsResponse { stats }))
    }

    type StreamPodSandboxStatsStream = Answers<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        let stats = self
            .all_sandbox_stats(request.get_ref().filter.as_ref())
            .await;
        let message = |pod_sandbox_stats| StreamPodSandboxStatsResponse { pod_sandbox_stats };
        Ok(Response::new(in_chunks(stats, message)))
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<ListMetricDescriptorsRequest>,
    ) -> Result<Response<ListMetricDescriptorsResponse>, Status> {
        Ok(Response::new(ListMetricDescriptorsResponse {
            descriptors: stats::cadvisor::descriptors(),
        }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<ListPodSandboxMetricsRequest>,
    ) -> Result<Response<ListPodSandboxMetricsResponse>, Status> {
        let pod_metrics = self.sandbox_metrics().await;
        Ok(Response::new(ListPodSandboxMetricsResponse { pod_metrics }))
    }

    type StreamPodSandboxMetricsStream = Answers<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        let message = |pod_sandbox_metrics| StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        };
        let metrics = self.sandbox_metrics().await;
        Ok(Response::new(in_chunks(metrics, message)))
    }

    type GetContainerEventsStream = Answers<ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _request: Request<GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        // A subscriber that lagged loses events rather than memory.
        let events = BroadcastStream::new(self.node.events.subscribe())
            .filter_map(|event| async move { event.ok().map(Ok) });
        Ok(Response::new(Box::pin(events)))
    }
}
