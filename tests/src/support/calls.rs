//! CRI requests over gRPC, as kubelet sends them.

use rrun_proto::v1::image_service_client::ImageServiceClient;
use rrun_proto::v1::runtime_service_client::RuntimeServiceClient;
use rrun_proto::v1::{
    ContainerConfig, ContainerMetadata, ImageSpec, PodSandboxConfig, PodSandboxMetadata,
};
use tonic::transport::{Channel, Endpoint};

use crate::support::machine::{Result, deadline};
use crate::support::node::{BUSYBOX, Node};

/// The client of the CRI's runtime service. [`Calls::runtime`] returns such a client.
pub(crate) type RuntimeClient = RuntimeServiceClient<Channel>;

/// A gRPC connection to a node's CRI server.
pub(crate) struct Calls {
    threads: tokio::runtime::Runtime,
    channel: Channel,
}

impl Calls {
    pub(crate) fn new(node: &Node) -> Result<Self> {
        let threads = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let address = format!("unix://{}", node.socket().display());
        let channel = threads.block_on(Endpoint::try_from(address)?.connect())?;
        Ok(Calls { threads, channel })
    }

    pub(crate) fn runtime(&self) -> RuntimeClient {
        RuntimeServiceClient::new(self.channel.clone())
    }

    pub(crate) fn image(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// Runs the future `work` to completion. Fails if the future does not complete within
    /// [`deadline`].
    pub(crate) fn wait<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        let limited = async { tokio::time::timeout(deadline(), work).await };
        self.threads
            .block_on(limited)
            .map_err(|_| format!("the server did not respond within {:?}", deadline()).into())
    }

    /// Runs the futures `work` concurrently, and returns their results.
    pub(crate) fn together<T: Send + 'static>(
        &self,
        work: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>,
    ) -> Result<Vec<T>> {
        let mut set = tokio::task::JoinSet::new();
        let _inside = self.threads.enter();
        for one in work {
            set.spawn(one);
        }
        self.wait(set.join_all())
    }
}

/// Returns the configuration of a pod as kubelet would request it.
pub(crate) fn pod(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            uid: format!("uid-of-{name}"),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        ..PodSandboxConfig::default()
    }
}

/// Returns the configuration of a busybox container that runs `command`.
pub(crate) fn container(name: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(image(BUSYBOX)),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        ..ContainerConfig::default()
    }
}

pub(crate) fn image(name: &str) -> ImageSpec {
    ImageSpec {
        image: name.to_owned(),
        ..ImageSpec::default()
    }
}
