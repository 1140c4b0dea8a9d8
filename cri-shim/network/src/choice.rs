//! Which network a pod gets: CNI's where a configuration says so, else the embedded one. A pod is
//! taken out of the one that it was put into, whatever the choice is by then.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rrun_proto::v1::PodSandboxConfig;
use serde_json::{Value, json};

use crate::cni::{Cni, DetachOutcome, RetryBy};
use crate::config::Mode;
use crate::embedded::EmbeddedNetwork;
use crate::host_ports::{self, HostPort};
use crate::namespace::Namespaces;
use rrun_calls::error::{Error, Result};

/// The networks that pods can have; clones share one state.
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

    /// Whether the next pod gets its network from CNI.
    pub(crate) async fn is_cni(&self) -> bool {
        match self.mode {
            Mode::Auto => self.cni.is_configured().await,
            Mode::Cni => true,
            Mode::Embedded => false,
        }
    }

    /// Refuses what the pod's network could not do.
    pub async fn check(&self, config: &PodSandboxConfig) -> Result<()> {
        if self.is_cni().await {
            return self.cni.check(config);
        }
        host_ports(config).map(drop)
    }

    /// Chooses, and writes down what [`PodNetwork::attach`] is going to make. A pod in the node's
    /// network gets nothing but its ports: nobody else's then. `name` is for whoever wants them.
    pub async fn reserve(
        &self,
        pod: &str,
        name: &str,
        config: &PodSandboxConfig,
        own_network: bool,
    ) -> Result<()> {
        if self.is_cni().await {
            if own_network {
                self.cni.reserve(pod, config).await?;
            }
            return Ok(());
        }
        let ports = host_ports(config)?;
        if ports.is_empty() && !own_network {
            return Ok(());
        }
        let reserved = self.embedded.reserve(pod, name, ports, own_network).await;
        reserved.map_err(Error::from)
    }

    /// Connects the namespace pinned at `netns`: the pod's addresses, the primary one first.
    pub async fn attach(&self, pod: &str, netns: &Path) -> Result<Vec<IpAddr>> {
        if self.cni.has(pod) {
            return self.cni.attach(pod, netns).await;
        }
        Ok(self.embedded.attach(pod, netns).await?.addresses)
    }

    /// Takes the pod's network away, also one that was never made, or half.
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

    /// Whether the pod's network is CNI's. One that is gone still needs its namespace then.
    pub fn keeps(&self, pod: &str) -> bool {
        self.cni.has(pod)
    }

    /// After a start, before the first attach: `live` are the pods that are there.
    pub async fn reconcile(&self, live: &HashSet<String>) -> Result<()> {
        self.cni.start(live);
        Ok(self.embedded.reconcile(live).await?)
    }

    /// Makes the interfaces of these pods refuse router advertisements and redirects. Pods that CNI
    /// plugins connected stay as they are.
    pub async fn refuse_routers(&self, pods: &[String]) -> Result<()> {
        let embedded = pods.iter().filter(|pod| !self.cni.has(pod));
        let netns = embedded.map(|pod| self.namespaces.of(pod)).collect();
        Ok(self.embedded.refuse_routers(netns).await?)
    }

    /// Looks for new configurations, and makes the embedded network's rules anew.
    pub async fn reload(&self) {
        if let Err(error) = self.embedded.renew().await {
            log::error!("SIGHUP: make the rules of the embedded network anew: {error}");
        }
        self.cni.reload().await;
    }

    /// For the CRI's condition NetworkReady: a sentence if pods can't be given a network.
    pub async fn ready(&self) -> std::result::Result<(), String> {
        if self.is_cni().await {
            self.cni.ready().await
        } else {
            self.embedded.ready().await
        }
    }

    /// The node's ranges for pods, as kubelet tells them.
    pub async fn set_ranges(&self, cidrs: &str) -> Result<()> {
        if !self.is_cni().await {
            log::info!(
                "the pods' range {cidrs} of UpdateRuntimeConfig is not for the embedded network: \
                 the configuration's is in use"
            );
        }
        self.cni.set_ranges(cidrs).await
    }

    /// For the verbose Status.
    pub async fn shown(&self) -> BTreeMap<String, String> {
        let network = if self.is_cni().await {
            "cni"
        } else {
            "embedded"
        };
        let (addresses, ports) = self.embedded.given();
        let embedded = json!({ "podsWithAddresses": addresses, "podsWithHostPorts": ports });
        let mut all = BTreeMap::from([
            ("network".to_owned(), network.to_owned()),
            ("embeddedNetwork".to_owned(), embedded.to_string()),
        ]);
        let cni = self.cni.shown().await;
        all.extend(cni.map(|(key, value)| (key.to_owned(), value)));
        all
    }

    /// What CNI gave the pod, for the verbose PodSandboxStatus.
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
