//! The embedded network, which needs no plugin: a bridge on the node, one veth pair and one address
//! of each family for each pod, and an nftables table of our own that masquerades what leaves the
//! pods' range. Everything goes over netlink, from short-lived threads; no program is run.
//!
//! A host firewall whose `forward` hook drops keeps dropping: in nftables a packet must be accepted
//! by every base chain, so no table of ours could let it through. Such a firewall has to accept
//! what comes from and goes to the bridge.
//!
//! `state` is what pods have, in memory, in the store and on the [`crate::bridge`]; `pod_lock` lets
//! one call at a time work on a pod; `teardown` takes pods away in the background.

mod pod_lock;
mod state;
mod teardown;

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::NetworkConfig;
use crate::error::NetworkError;
use crate::host_ports::{HostPort, PortReservation};
use crate::link::POD_INTERFACE;
use rrun_calls::wait::blocking;
use rrun_store::Store;
use state::EmbeddedState;
use teardown::Teardown;

/// What a pod got: to be kept with the pod's record and shown in its status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The pod's addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// The interface's name inside the pod.
    pub interface: String,
    /// The interface's hardware address.
    pub mac: [u8; 6],
    /// Where the pod's default route leads, of the primary family.
    pub gateway: Option<IpAddr>,
}

/// The embedded network; clones share one state.
#[derive(Clone)]
pub struct EmbeddedNetwork {
    state: Arc<EmbeddedState>,
    teardown: Arc<Teardown>,
}

impl EmbeddedNetwork {
    /// Reads the addresses that are given out. The kernel is not touched until the first pod.
    pub fn open(store: Store, config: NetworkConfig) -> Result<EmbeddedNetwork, NetworkError> {
        let state = Arc::new(EmbeddedState::load(store, config)?);
        Ok(EmbeddedNetwork {
            teardown: Arc::new(Teardown::new(Arc::clone(&state))),
            state,
        })
    }

    /// Gives the pod its addresses, ahead of [`EmbeddedNetwork::attach`], which would do it
    /// otherwise, and the host ports that it asks for; only these if it is in the node's network.
    /// They last as long as a commit to the store, which shares its transaction with a commit of
    /// the caller's that is under way. `name` is the pod's for others that want the same port.
    pub async fn reserve(
        &self,
        pod: &str,
        name: &str,
        ports: Vec<HostPort>,
        own_network: bool,
    ) -> Result<(), NetworkError> {
        let (state, pod, name) = (Arc::clone(&self.state), pod.to_owned(), name.to_owned());
        finish(async move {
            let _locked = state.lock(&pod).await;
            if state.has_reserved(&pod) {
                return Ok(());
            }
            let reserved = async {
                state.take_ports(&pod, PortReservation { name, ports }, own_network)?;
                if own_network {
                    state.take_addresses(&pod)?;
                }
                state.commit(&pod).await
            };
            let reserved = reserved.await;
            if reserved.is_err() {
                state.free_addresses(&pod);
                state.free_ports(&pod);
            }
            reserved
        })
        .await
    }

    /// Connects the namespace pinned at `netns`. For a pod that is connected, gives the same
    /// answer again. A caller that goes away does not stop it half-way; if it fails, nothing of it
    /// stays but what was reserved before.
    pub async fn attach(&self, pod: &str, netns: &Path) -> Result<Attachment, NetworkError> {
        let (state, teardown) = (Arc::clone(&self.state), Arc::clone(&self.teardown));
        let (pod, netns) = (pod.to_owned(), netns.to_owned());
        finish(async move {
            let locked = state.lock(&pod).await;
            let known = state.addresses_of(&pod);
            let reserved = !known.is_empty();
            let addresses = if reserved {
                known
            } else {
                state.take_addresses(&pod)?
            };
            match state.connect(&pod, &addresses, netns, reserved).await {
                Ok(mac) => Ok(Attachment {
                    gateway: state.primary_gateway(),
                    addresses,
                    interface: POD_INTERFACE.to_owned(),
                    mac,
                }),
                Err(error) => {
                    if !reserved {
                        teardown.add(locked);
                    }
                    Err(error)
                }
            }
        })
        .await
    }

    /// Takes the pod's host ports, interface and addresses away. Succeeds also if nothing is there,
    /// if only half of it is, and if the namespace, which the embedded network does not need for
    /// this, is lost.
    ///
    /// The host ports are free when it returns. The rest goes after that: for 10 to 20 ms the
    /// kernel waits until no processor has the interface in hand, and no caller waits with it,
    /// except in [`EmbeddedNetwork::settled`] and in an attach of the same pod. If the server dies
    /// meanwhile, [`EmbeddedNetwork::reconcile`] completes the work.
    pub async fn detach(&self, pod: &str, _netns: Option<&Path>) -> Result<(), NetworkError> {
        let (state, teardown) = (Arc::clone(&self.state), Arc::clone(&self.teardown));
        let pod = pod.to_owned();
        finish(async move {
            // If it goes already, and nobody waits to attach it again, all is done.
            if state.is_awaited(&pod) || !teardown.has(&pod) {
                let locked = state.lock(&pod).await;
                let closed = state.close_ports(&pod).await;
                teardown.add(locked);
                return closed;
            }
            Ok(())
        })
        .await
    }

    /// Waits until everything that was detached is gone from the kernel and the store.
    pub async fn settled(&self) {
        self.teardown.settled().await;
    }

    /// After a start: removes interfaces and addresses of pods that are not in `live_pods`, only
    /// ever our own. Pods attached since [`EmbeddedNetwork::open`] are left alone. To be called
    /// before the first attach: an interface that is being made has no owner yet.
    pub async fn reconcile(&self, live_pods: &HashSet<String>) -> Result<(), NetworkError> {
        let dead = self.state.take_inherited_except(live_pods);
        for pod in &dead {
            // The table is made anew below; theirs may be another pod's by now.
            self.state.free_ports(pod);
        }
        for pod in dead {
            self.detach(&pod, None).await?;
        }
        self.settled().await;
        let state = Arc::clone(&self.state);
        let mut keep = live_pods.clone();
        blocking("remove interfaces that belong to no pod", move || {
            keep.extend(state.desired().pods);
            state.bridge().sweep(&keep)?;
            state.bridge().renew(&|| state.desired())
        })
        .await
    }

    /// Makes the interfaces of connected pods refuse router advertisements and redirects, as those
    /// of new pods do from the beginning. `netns` are the paths of the pods' network namespaces.
    pub(crate) async fn refuse_routers(&self, netns: Vec<PathBuf>) -> Result<(), NetworkError> {
        let state = Arc::clone(&self.state);
        let what = "make pods' interfaces refuse router advertisements";
        blocking(what, move || state.bridge().refuse_routers(&netns)).await
    }

    /// How many pods have addresses, and how many host ports.
    pub(crate) fn given(&self) -> (usize, usize) {
        self.state.given()
    }

    /// Makes the rules anew, whatever somebody has done to them; without pods or a bridge there
    /// are none.
    pub(crate) async fn renew(&self) -> Result<(), NetworkError> {
        let state = Arc::clone(&self.state);
        let what = "replace the embedded network's nftables rules";
        blocking(what, move || state.bridge().renew(&|| state.desired())).await
    }

    /// For the CRI's condition NetworkReady; brings bridge and rules right if somebody removed
    /// them, also for the pods that are there.
    pub async fn ready(&self) -> Result<(), String> {
        let state = Arc::clone(&self.state);
        let what = "check the embedded network's bridge and nftables rules";
        blocking(what, move || state.bridge().repair(&|| state.desired()))
            .await
            .map_err(|error| error.to_string())
    }
}

/// Runs `work` to its end, whether or not the caller stays.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, NetworkError>> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::spawn(work)
        .await
        .unwrap_or(Err(NetworkError::ThreadDied))
}
