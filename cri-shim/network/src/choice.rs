//! The choice of a pod's network. By default, a pod gets networks from CNI plugins if CNI is
//! configured. If CNI is not configured, the pod gets the embedded network. The choice remains in
//! force until the pod is detached, even if the CNI configurations change.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rrun_proto::v1::PodSandboxConfig;
use serde_json::{Value, json};

use crate::cni::{Cni, DetachOutcome, RetryBy};
use crate::config::Mode;
use crate::embedded::EmbeddedNetwork;
use crate::host_ports::{self, HostPort, Listener};
use crate::namespace::Namespaces;
use rrun_calls::error::{Error, Result};

/// The networks to which pods can be attached. Clones share one state.
#[derive(Clone)]
pub struct PodNetwork {
    mode: Mode,
    embedded: EmbeddedNetwork,
    cni: Cni,
    namespaces: Namespaces,
}

impl PodNetwork {
    pub fn new(mode: Mode, embedded: EmbeddedNetwork, cni: Cni, namespaces: Namespaces) -> Self {
        PodNetwork {
            mode,
            embedded,
            cni,
            namespaces,
        }
    }

    /// Ensures that host ports of pods on the embedded network never receive connections to the
    /// sockets on which the server itself listens. The server must call this function once, and
    /// before [`PodNetwork::reconcile`].
    pub fn protect(&self, listeners: Vec<Listener>) {
        self.embedded.protect(listeners);
    }

    /// Returns the numbers of the TCP host ports of all pods.
    pub fn tcp_host_ports(&self) -> Result<HashSet<u16>> {
        let mut all = self.embedded.tcp_ports();
        all.extend(self.cni.tcp_ports()?);
        Ok(all)
    }

    /// Returns whether a new pod gets its network from CNI plugins.
    pub(crate) async fn is_cni(&self) -> bool {
        match self.mode {
            Mode::Auto => self.cni.is_configured().await,
            Mode::Cni => true,
            Mode::Embedded => false,
        }
    }

    /// Checks the pod configuration `config`. Returns an error if the network of a new pod would
    /// not support this configuration.
    pub async fn check(&self, config: &PodSandboxConfig) -> Result<()> {
        if self.is_cni().await {
            return self.cni.check(config);
        }
        host_ports(config).map(drop)
    }

    /// Chooses the pod's network, and stores the parameters for the following
    /// [`PodNetwork::attach`]. If `own_network` is false, the pod is in the node's network
    /// namespace, and only its host ports are reserved. `name` is the name of this pod. If another
    /// pod requests the same host port, the error message for the other pod contains `name`.
    pub async fn reserve(
        &self,
        pod: &str,
        name: &str,
        config: &PodSandboxConfig,
        own_network: bool,
    ) -> Result<()> {
        if self.is_cni().await {
            if own_network {
                let listeners = self.embedded.listeners();
                self.cni.reserve(pod, config, listeners).await?;
            }
            return Ok(());
        }
        let ports = host_ports(config)?;
        if ports.is_empty() && !own_network {
            return Ok(());
        }
        self.adopt(pod, config);
        let reserved = self.embedded.reserve(pod, name, ports, own_network).await;
        reserved.map_err(Error::from)
    }

    /// Allows the pod to send packets from all addresses if it is privileged. A privileged pod has
    /// all rights on the node, so a filter of its packets would protect nothing. After its start,
    /// the server must call this function for all existing pods before [`PodNetwork::reconcile`].
    pub fn adopt(&self, pod: &str, config: &PodSandboxConfig) {
        let linux = config.linux.as_ref();
        let security = linux.and_then(|linux| linux.security_context.as_ref());
        if security.is_some_and(|security| security.privileged) {
            self.embedded.do_not_filter(pod);
        }
    }

    /// Connects the pod's network namespace, which is pinned at `netns`, to the pod's network.
    /// Returns the pod's addresses, beginning with the primary address.
    pub async fn attach(&self, pod: &str, netns: &Path) -> Result<Vec<IpAddr>> {
        if self.cni.has(pod) {
            return self.cni.attach(pod, netns).await;
        }
        Ok(self.embedded.attach(pod, netns).await?.addresses)
    }

    /// Removes the pod's network. `detach` also succeeds if the network was never created or only
    /// partly created.
    pub async fn detach(
        &self,
        pod: &str,
        netns: &Path,
        retry_by: RetryBy,
    ) -> Result<DetachOutcome> {
        if self.cni.has(pod) {
            return self.cni.detach(pod, retry_by).await;
        }
        self.embedded.detach(pod, Some(netns)).await?;
        Ok(DetachOutcome::Done)
    }

    /// Returns whether CNI plugins have connected the pod and not yet disconnected it. The plugins
    /// need the pod's network namespace to disconnect the pod. While this function returns true,
    /// the server must therefore keep the namespace, even if the pod was deleted.
    pub fn uses_cni(&self, pod: &str) -> bool {
        self.cni.has(pod)
    }

    /// Frees the host ports of the embedded network's pods that are not in `live`. After its start,
    /// the server must call this function before it detaches a pod.
    pub fn free_ports_except(&self, live: &HashSet<String>) {
        self.embedded.free_ports_except(live);
    }

    /// Removes the networks of deleted pods. The server must call this function after its start and
    /// before the first attach. `live` contains the ids of the pods that still exist.
    pub async fn reconcile(&self, live: &HashSet<String>) -> Result<()> {
        self.cni.start(live);
        Ok(self.embedded.reconcile(live).await?)
    }

    /// Configures the interfaces of `pods` to refuse router advertisements and redirects.
    /// Interfaces from CNI plugins are not changed.
    pub async fn refuse_routers(&self, pods: &[String]) -> Result<()> {
        let embedded = pods.iter().filter(|pod| !self.cni.has(pod));
        let netns = embedded.map(|pod| self.namespaces.of(pod)).collect();
        Ok(self.embedded.refuse_routers(netns).await?)
    }

    /// Replaces the embedded network's nftables rules, and reads the CNI configurations again.
    pub async fn reload(&self) {
        if let Err(error) = self.embedded.renew().await {
            log::error!("SIGHUP: replace the nftables rules of the embedded network: {error}");
        }
        self.cni.reload().await;
    }

    /// Checks whether pods can be attached to a network. The result is used for the CRI condition
    /// NetworkReady. An error is a sentence with the reason why pods can't be attached.
    pub async fn ready(&self) -> std::result::Result<(), String> {
        if self.is_cni().await {
            self.cni.ready().await
        } else {
            self.embedded.ready().await
        }
    }

    /// Sets the node's pod ranges, which kubelet sends in UpdateRuntimeConfig. Only CNI plugins use
    /// these ranges.
    pub async fn set_ranges(&self, cidrs: &str) -> Result<()> {
        if !self.is_cni().await {
            log::info!(
                "the embedded network ignores the pod range {cidrs} of UpdateRuntimeConfig: it uses \
                 the ranges of its configuration"
            );
        }
        self.cni.set_ranges(cidrs).await
    }

    /// Returns the entries about the networks for the response to a verbose Status request.
    pub async fn status_info(&self) -> BTreeMap<String, String> {
        let network = if self.is_cni().await {
            "cni"
        } else {
            "embedded"
        };
        let (addresses, ports) = self.embedded.pod_counts();
        let embedded = json!({ "podsWithAddresses": addresses, "podsWithHostPorts": ports });
        let mut all = BTreeMap::from([
            ("network".to_owned(), network.to_owned()),
            ("embeddedNetwork".to_owned(), embedded.to_string()),
        ]);
        let cni = self.cni.status_info().await;
        all.extend(cni.map(|(key, value)| (key.to_owned(), value)));
        all
    }

    /// Returns the CNI results of the pod, for the response to a verbose PodSandboxStatus request.
    pub async fn results(&self, pod: &str) -> Option<Value> {
        self.cni.results(pod).await
    }

    pub(crate) fn namespace_of(&self, pod: &str) -> PathBuf {
        self.namespaces.of(pod)
    }
}

fn host_ports(config: &PodSandboxConfig) -> Result<Vec<HostPort>> {
    let ports = host_ports::parse(&config.port_mappings);
    ports.map_err(|error| Error::invalid(error.to_string()))
}
