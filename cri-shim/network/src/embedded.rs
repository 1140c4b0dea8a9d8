//! The embedded network, which needs no CNI plugin. The embedded network consists of a bridge on
//! the node and an nftables table. Each pod has a veth pair and one address of each address family.
//! The table masquerades packets that leave the pod range. Short-lived threads configure these
//! objects over netlink, without running other programs.
//!
//! A host firewall that drops packets in its `forward` hook must accept the packets to and from the
//! bridge. The nftables table of rrun can't override the firewall. The kernel forwards a packet
//! only if the base chains of all tables accept the packet.
//!
//! The module `state` manages the addresses and host ports of pods. It keeps them in memory and in
//! the server's store, and configures the kernel with [`crate::bridge`]. `pod_lock` ensures that
//! only one call at a time changes a pod's network. `bridge_check` checks the bridge and the rules for
//! kubelet. `teardown` removes pods' networks in the background. `watch` restores the nftables tables
//! if another program deletes them.

mod bridge_check;
mod pod_lock;
mod state;
mod teardown;
mod watch;

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bridge::{DesiredPod, Pods};
use crate::config::NetworkConfig;
use crate::error::NetworkError;
use crate::host_ports::{HostPort, Listener, PortReservation};
use crate::link::POD_INTERFACE;
use bridge_check::BridgeCheck;
use rrun_calls::wait::blocking;
use rrun_store::Store;
use state::EmbeddedState;
use teardown::Teardown;

/// The result of an attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The pod's addresses, beginning with the primary address.
    pub addresses: Vec<IpAddr>,
    /// The name of the pod's interface inside the pod.
    pub interface: String,
    /// The hardware address of the pod's interface.
    pub mac: [u8; 6],
    /// The gateway of the pod's default route in the primary address family.
    pub gateway: Option<IpAddr>,
}

/// The embedded network. Clones share one state.
#[derive(Clone)]
pub struct EmbeddedNetwork {
    state: Arc<EmbeddedState>,
    teardown: Arc<Teardown>,
    check: BridgeCheck,
}

impl EmbeddedNetwork {
    /// Loads the assigned addresses from the store. This function changes nothing in the kernel.
    pub fn open(store: Store, config: NetworkConfig) -> Result<EmbeddedNetwork, NetworkError> {
        let state = Arc::new(EmbeddedState::load(store, config)?);
        Ok(EmbeddedNetwork {
            teardown: Arc::new(Teardown::new(Arc::clone(&state))),
            check: BridgeCheck::new(),
            state,
        })
    }

    /// Excludes the sockets on which the server itself listens from the translation of host ports.
    /// The server must call this function once, and before [`EmbeddedNetwork::reconcile`].
    pub fn protect(&self, listeners: Vec<Listener>) {
        self.state.bridge().protect(listeners);
    }

    pub(crate) fn listeners(&self) -> &[Listener] {
        self.state.bridge().listeners()
    }

    /// Returns the numbers of all TCP host ports.
    pub(crate) fn tcp_ports(&self) -> HashSet<u16> {
        self.state.tcp_ports()
    }

    /// Assigns addresses to the pod and reserves the host ports that the pod requests. If `reserve`
    /// was not called for a pod, [`EmbeddedNetwork::attach`] assigns the addresses. If
    /// `own_network` is false, the pod is in the node's network namespace, and only the host ports
    /// are reserved. This call waits for a commit to the store. If the caller commits other changes
    /// at the same time, the store writes all changes in one transaction. `name` is the name of
    /// this pod. If another pod requests the same host port, the error message for the other pod
    /// contains `name`.
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
                state.abandon(&pod);
            }
            reserved
        })
        .await
    }

    /// Connects the pod's network namespace, which is pinned at `netns`, to the bridge. If the pod
    /// is already connected, this call returns the same result as the call that connected the pod.
    /// The attach is completed even if the caller is cancelled. If the attach fails, only the
    /// reservations from an earlier [`EmbeddedNetwork::reserve`] remain.
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
            let connected = state.connect(&pod, &addresses, netns, reserved).await;
            watch::start(&state);
            match connected {
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

    /// Removes the pod's host ports, interface and addresses. `detach` also succeeds if some or all
    /// of these objects do not exist. `detach` does not need the pod's network namespace. The
    /// namespace may have been deleted already.
    ///
    /// The host ports are free when this call returns. The interface and the addresses are removed
    /// in the background. Their removal takes 10 to 20 ms, because the kernel waits until no
    /// processor uses the interface. Only [`EmbeddedNetwork::settled`] and an attach of the same
    /// pod wait for the background removal. If the server dies before the removal is complete,
    /// [`EmbeddedNetwork::reconcile`] completes it.
    pub async fn detach(&self, pod: &str, _netns: Option<&Path>) -> Result<(), NetworkError> {
        let (state, teardown) = (Arc::clone(&self.state), Arc::clone(&self.teardown));
        let pod = pod.to_owned();
        finish(async move {
            // If the pod's network is already being removed, this call usually has nothing to do.
            // However, another call may be waiting for the pod's lock and could attach the pod
            // again. In this case, this call must remove the network after the other call.
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

    /// Waits until the interfaces and addresses of all detached pods have been removed from the
    /// kernel and the store.
    pub async fn settled(&self) {
        self.teardown.settled().await;
    }

    /// Frees the host ports of pods from an earlier server process, except the pods in `live`. The
    /// server must call this function before it detaches such a pod. The ports are freed only in
    /// memory, and [`EmbeddedNetwork::reconcile`] closes them when it replaces the nftables rules.
    pub fn free_ports_except(&self, live: &HashSet<String>) {
        self.state.free_ports_except(live);
    }

    /// Removes the interfaces and addresses of pods that are not in `live_pods`. Removes only
    /// objects that rrun created. The interfaces and addresses of pods that were attached after
    /// [`EmbeddedNetwork::open`] are kept. The server must call `reconcile` after its start and
    /// before the first attach. During an attach, the pod is not recorded yet, and `reconcile`
    /// could remove the pod's new interface.
    pub async fn reconcile(&self, live_pods: &HashSet<String>) -> Result<(), NetworkError> {
        self.free_ports_except(live_pods);
        let dead = self.state.take_inherited_except(live_pods);
        let mut detached = Ok(());
        for pod in dead {
            detached = detached.and(self.detach(&pod, None).await);
        }
        self.settled().await;
        // A failure can have a cause that passes, so the sweep is repeated once. Nothing repeats it
        // before the next start of the server.
        if let Err(error) = self.sweep(live_pods).await {
            log::warn!("{error}; the server tries again");
            self.sweep(live_pods).await?;
        }
        detached
    }

    /// Removes the interfaces that belong to no pod, and replaces the nftables rules.
    async fn sweep(&self, live_pods: &HashSet<String>) -> Result<(), NetworkError> {
        let state = Arc::clone(&self.state);
        let mut keep: Vec<DesiredPod> = live_pods
            .iter()
            .map(|pod| DesiredPod {
                id: pod.clone(),
                port: None,
            })
            .collect();
        blocking("remove interfaces that belong to no pod", move || {
            // If both lists contain a pod, the entry from `desired` applies.
            keep.extend(state.desired().pods);
            // The rules protect the server's listeners, so a failed removal must not prevent their
            // replacement.
            let swept = state.bridge().sweep(&keep, &*state);
            state.bridge().renew(&*state).and(swept)
        })
        .await?;
        watch::start(&self.state);
        Ok(())
    }

    /// Allows the pod to send packets from all addresses. This function must be called before
    /// [`EmbeddedNetwork::reserve`], and after a restart of the server before
    /// [`EmbeddedNetwork::reconcile`].
    pub fn do_not_filter(&self, pod: &str) {
        self.state.do_not_filter(pod);
    }

    /// Configures the interfaces of connected pods to refuse router advertisements and redirects.
    /// Only interfaces from an earlier version of rrun are changed. The interfaces from this
    /// version already refuse these packets. `netns` contains the paths of the pods' network
    /// namespaces.
    pub(crate) async fn refuse_routers(&self, netns: Vec<PathBuf>) -> Result<(), NetworkError> {
        let state = Arc::clone(&self.state);
        let what = "configure pods' interfaces to refuse router advertisements";
        blocking(what, move || state.bridge().refuse_routers(&netns)).await
    }

    /// Returns two numbers, namely how many pods have addresses, and how many pods have host ports.
    pub(crate) fn pod_counts(&self) -> (usize, usize) {
        self.state.pod_counts()
    }

    /// Replaces the nftables rules, which another program may have changed. If there is no bridge
    /// and no pod, this call does nothing.
    pub(crate) async fn renew(&self) -> Result<(), NetworkError> {
        let state = Arc::clone(&self.state);
        let what = "replace the embedded network's nftables rules";
        blocking(what, move || state.bridge().renew(&*state)).await
    }

    /// Checks the embedded network for the CRI condition NetworkReady. If another program removed
    /// the bridge or the rules, `ready` creates them again. It also connects the existing pods to
    /// the new bridge. If the check takes long, `ready` returns the result of the check before. An
    /// error is a sentence with the reason why the network is not ready.
    pub async fn ready(&self) -> Result<(), String> {
        let state = Arc::clone(&self.state);
        let check = move || state.bridge().repair(&*state);
        self.check.get(check).await
    }
}

/// Completes `work` even if the caller is cancelled.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, NetworkError>> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::spawn(work)
        .await
        .unwrap_or(Err(NetworkError::ThreadDied))
}
