//! The kernel objects of the embedded network. These objects are the bridge ([`device`]), the
//! nftables rules, and a veth pair for each pod ([`pair`]). Every function in this module blocks,
//! for microseconds to a few milliseconds.

mod device;
mod pair;

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::address::Range;
use crate::config::NetworkConfig;
use crate::conntrack::{self, Stale};
use crate::error::NetworkError;
use crate::forwarding;
use crate::host_ports::Mapping;
use crate::link::{self, POD_INTERFACE};
use crate::namespace;
use crate::netlink::{Batch, Socket};
use crate::nftables::{self, Generation};
use device::{BridgeDevice, Repaired};
pub(crate) use pair::{PodNamespace, host_interface};
use rrun_calls::lock::lock;

/// The bridge and its nftables rules.
pub(crate) struct Bridge {
    config: NetworkConfig,
    /// The ranges from which new pods get their addresses.
    ranges: Vec<Range>,
    /// The state of the bridge at the last check. `None` before the first check, or if the bridge
    /// was not complete.
    state: Mutex<Option<BridgeState>>,
    /// True if this server process has created the nftables table. If the value is false, the
    /// server replaces the table, because another version of the server may have created the table
    /// with a different structure.
    made_table: AtomicBool,
}

/// The kernel objects that should exist for the pods.
pub(crate) struct Desired {
    /// The ids of the pods that have an interface.
    pub pods: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub mappings: Vec<Mapping>,
}

/// A function that returns the desired kernel objects. The function is called only if the bridge or
/// the nftables table must be repaired.
type GetDesired<'a> = &'a dyn Fn() -> Desired;

/// The state of a bridge that was complete at the last check.
#[derive(Clone, Copy)]
struct BridgeState {
    index: u32,
    mtu: u32,
    /// True if host ports are also open at ::1.
    loopback6: bool,
    rules: Generation,
}

impl Bridge {
    pub(crate) fn new(config: NetworkConfig, ranges: Vec<Range>) -> Self {
        Bridge {
            config,
            ranges,
            state: Mutex::new(None),
            made_table: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, Option<BridgeState>> {
        lock(&self.state)
    }

    fn device(&self) -> BridgeDevice<'_> {
        BridgeDevice {
            name: &self.config.bridge,
            ranges: &self.ranges,
            mtu: self.config.mtu,
        }
    }

    /// Checks the bridge and its rules, and creates the missing objects. If the bridge is created
    /// again, the interfaces of the pods become its ports again.
    pub(crate) fn repair(&self, desired: GetDesired) -> Result<(), NetworkError> {
        self.repair_all(&mut self.state(), false, desired).map(drop)
    }

    /// Replaces the nftables table if the bridge exists or a pod needs the bridge.
    pub(crate) fn renew(&self, desired: GetDesired) -> Result<(), NetworkError> {
        let exists = link::find(&mut Socket::route()?, &self.config.bridge)?.is_some();
        if exists || !desired().addresses.is_empty() {
            self.repair_all(&mut self.state(), true, desired)?;
        }
        Ok(())
    }

    /// Creates the veth pair of `pod`, unless it already exists. [`Bridge::configure`] adds the
    /// addresses to the pod's interface.
    pub(crate) fn connect(
        &self,
        pod: &str,
        mac: link::Mac,
        netns: &Path,
        desired: GetDesired,
    ) -> Result<PodNamespace, NetworkError> {
        let namespace = PodNamespace::open(netns)?;
        let state = self.ensure_bridge(desired)?;
        let mut socket = Socket::route()?;
        let state = self.with_mtu_of_uplink(&mut socket, state, desired)?;
        let ensure_pair = |socket: &mut Socket, state: BridgeState| {
            let pair = link::VethPair {
                host: &host_interface(pod),
                alias: &pair::alias(&self.config.bridge, pod),
                bridge: state.index,
                mtu: state.mtu,
                mac,
            };
            pair::ensure(socket, &pair, &namespace)
        };
        match ensure_pair(&mut socket, state) {
            // In this match arm, another program has deleted the bridge. `ensure_bridge` has not
            // detected the deletion. If the nftables rules are unchanged, `ensure_bridge` does not
            // look up the bridge.
            Err(_) if self.is_gone(&mut socket, state) => {
                let state = self.repair_all(&mut self.state(), false, desired)?;
                ensure_pair(&mut socket, state)?;
            }
            result => result?,
        }
        Ok(namespace)
    }

    /// Adds the addresses to the pod's interface, and adds the pod's default routes. If this
    /// function is called again, it changes nothing.
    pub(crate) fn configure(
        &self,
        namespace: &PodNamespace,
        addresses: &[IpAddr],
        mac: link::Mac,
    ) -> Result<(), NetworkError> {
        pair::configure(namespace, addresses, mac, &self.ranges)
    }

    /// Opens host ports. If another program removed the bridge or the nftables table, this function
    /// creates the removed objects again.
    pub(crate) fn publish(
        &self,
        mappings: &[Mapping],
        desired: GetDesired,
    ) -> Result<(), NetworkError> {
        let known = &mut self.state();
        let name = &self.config.bridge;
        match known.as_ref().map(|state| (state.index, state.loopback6)) {
            Some((index, loopback6)) if loopback6 == forwarding::can_translate_loopback6() => {
                self.route_loopbacks(&mut Socket::route()?, index, loopback6, mappings)?;
                change_rules(known, |socket| nftables::publish(socket, name, mappings))
                    .or_else(|_| self.repair_all(known, true, desired).map(drop))?;
            }
            _ => drop(self.repair_all(known, true, desired)?),
        }
        forget_flows(mappings, Stale::Elsewhere);
        Ok(())
    }

    /// Closes host ports. The function `free` makes the ports available to other pods. `withdraw`
    /// holds the lock on the bridge's state until `withdraw` returns. If another pod reserves the
    /// same ports, [`Bridge::publish`] for that pod waits for this lock. The other pod's ports are
    /// therefore opened only after the old ports were closed.
    pub(crate) fn withdraw(
        &self,
        mappings: &[Mapping],
        free: impl FnOnce(),
        desired: GetDesired,
    ) -> Result<(), NetworkError> {
        let known = &mut self.state();
        free();
        let name = &self.config.bridge;
        change_rules(known, |socket| nftables::withdraw(socket, name, mappings))
            .or_else(|_| self.repair_all(known, true, desired).map(drop))?;
        forget_flows(mappings, Stale::ToThePod);
        Ok(())
    }

    /// Configures how the node routes the replies on connections to host ports at 127.0.0.1 and
    /// ::1.
    fn route_loopbacks(
        &self,
        socket: &mut Socket,
        index: u32,
        loopback6: bool,
        mappings: &[Mapping],
    ) -> Result<(), NetworkError> {
        if mappings.iter().any(|mapping| mapping.address.is_ipv4()) {
            forwarding::route_localnet(&self.config.bridge)?;
        }
        let mut batch = Batch::default();
        if loopback6 && mappings.iter().any(|mapping| mapping.address.is_ipv6()) {
            link::add_loopback_route(&mut batch, index);
        }
        socket.execute(&batch).map(drop)
    }

    /// Deletes the node's ends of the pods' veth pairs. The kernel then also deletes the pods'
    /// ends. This function ignores an interface that does not exist.
    pub(crate) fn disconnect(&self, pods: &[String]) -> Result<(), NetworkError> {
        let mut socket = Socket::route()?;
        let names: Vec<String> = pods.iter().map(|pod| host_interface(pod)).collect();
        if let [name] = names.as_slice() {
            return link::delete(&mut socket, name);
        }
        link::delete_together(&mut socket, &names)
    }

    /// Deletes the interfaces that rrun created, except the interfaces of the pods in `keep`. The
    /// interfaces of the pods in `keep` are configured to refuse router advertisements and
    /// redirects.
    pub(crate) fn sweep(&self, keep: &HashSet<String>) -> Result<(), NetworkError> {
        let mut socket = Socket::route()?;
        let links = link::list(&mut socket)?;
        let bridge = links.iter().find(|link| self.device().is_bridge(link));
        let bridge = bridge.map(|link| link.index);
        let keep: HashSet<String> = keep.iter().map(|pod| host_interface(pod)).collect();
        for link in &links {
            let on_bridge = bridge.is_some() && link.master == bridge;
            let alias = link.alias.as_deref().unwrap_or_default();
            let ours = link.kind.as_deref() == Some("veth")
                && pair::is_host_interface(&link.name)
                && (on_bridge || alias.starts_with(&pair::alias(&self.config.bridge, "")));
            if !ours {
                continue;
            }
            if !keep.contains(&link.name) {
                link::delete(&mut socket, &link.name)?;
            } else if let Err(error) = forwarding::refuse_routers(&link.name) {
                // The error is only logged. Interfaces that this version of rrun created already
                // refuse router advertisements and redirects. `refuse_routers` changes only
                // interfaces from an earlier version.
                log::error!("{error}");
            }
        }
        Ok(())
    }

    /// Configures the interfaces of running pods to refuse router advertisements and redirects. If
    /// a pod's interface can't be changed, this function continues with the other pods and returns
    /// the last error.
    pub(crate) fn refuse_routers(&self, netns: &[PathBuf]) -> Result<(), NetworkError> {
        let refuse = |path: &PathBuf| {
            namespace::enter(namespace::open(path)?.as_fd(), path)?;
            forwarding::refuse_routers_in_running_pod(POD_INTERFACE)
        };
        namespace::on_own_thread(|| {
            let mut last = Ok(());
            for path in netns {
                last = refuse(path).and(last);
            }
            last
        })
    }

    /// Returns the state of the bridge. If necessary, this function first creates or repairs the
    /// bridge. If nothing has changed since the last check, this function only sends one request to
    /// the kernel and reads one file for each address family.
    fn ensure_bridge(&self, desired: GetDesired) -> Result<BridgeState, NetworkError> {
        let known = *self.state();
        if let Some(state) = known
            && nftables::generation(&mut Socket::netfilter()?)? == state.rules
            && self.forwards()
        {
            return Ok(state);
        }
        self.repair_all(&mut self.state(), false, desired)
    }

    /// Sets the bridge's MTU to the MTU of the uplink, unless an MTU is configured. Existing pods
    /// keep their MTU.
    fn with_mtu_of_uplink(
        &self,
        socket: &mut Socket,
        state: BridgeState,
        desired: GetDesired,
    ) -> Result<BridgeState, NetworkError> {
        let device = self.device();
        let mtu = device.mtu_of_pods(socket, Some(state.index))?;
        if mtu == state.mtu {
            return Ok(state);
        }
        if device::gets_ipv6(state.mtu, mtu) {
            // The MTU was below the minimum for IPv6, and the kernel therefore deleted the bridge's
            // IPv6 addresses and routes. The larger MTU enables IPv6 on the bridge again. The
            // repair restores the deleted addresses and routes.
            return self.repair_all(&mut self.state(), false, desired);
        }
        device.set_mtu(socket, state.index, state.mtu, mtu)?;
        if let Some(known) = self.state().as_mut() {
            known.mtu = mtu;
        }
        Ok(BridgeState { mtu, ..state })
    }

    /// Returns whether packet forwarding is enabled for every address family in which pods have
    /// addresses.
    fn forwards(&self) -> bool {
        let mut ranges = self.ranges.iter();
        ranges.all(|range| forwarding::is_on(range.is_ipv6()))
    }

    /// Repairs the bridge, the node's packet forwarding, the routes and the nftables rules. If
    /// `renew` is true, the rules are replaced even if they are complete.
    ///
    /// The caller holds the lock on the bridge's state while this function sends requests to the
    /// kernel. Other calls wait for the lock meanwhile. This wait does no harm, because no call can
    /// attach a pod before the bridge exists.
    fn repair_all(
        &self,
        known: &mut Option<BridgeState>,
        renew: bool,
        desired: GetDesired,
    ) -> Result<BridgeState, NetworkError> {
        *known = None;
        let mut socket = Socket::route()?;
        let desired = desired();
        let repaired = self
            .device()
            .repair(&mut socket, &desired.pods, &desired.addresses)?;
        let Repaired { index, mtu, ranges } = repaired;
        for range in &self.ranges {
            forwarding::turn_on(range.is_ipv6())?;
        }
        let loopback6 = forwarding::can_translate_loopback6();
        self.route_loopbacks(&mut socket, index, loopback6, &desired.mappings)?;
        let rules = self.repair_rules(renew, ranges, loopback6, desired.mappings)?;
        let state = BridgeState {
            index,
            mtu,
            loopback6,
            rules,
        };
        *known = Some(state);
        Ok(state)
    }

    fn repair_rules(
        &self,
        renew: bool,
        ranges: Vec<Range>,
        loopback6: bool,
        mappings: Vec<Mapping>,
    ) -> Result<Generation, NetworkError> {
        let table = nftables::NftTable {
            name: &self.config.bridge,
            ranges,
            masquerade: self.config.masquerade,
            loopback6,
            mappings,
        };
        let mut socket = Socket::netfilter()?;
        // The generation is read before the check. If another program changes nftables during this
        // check, the next check detects the change.
        let before = nftables::generation(&mut socket)?;
        let must_replace = renew || !self.made_table.load(Ordering::Relaxed);
        if !must_replace && nftables::is_complete(&mut socket, &table)? {
            return Ok(before);
        }
        nftables::replace(&mut socket, &table)?;
        forget_flows(&table.mappings, Stale::Elsewhere);
        self.made_table.store(true, Ordering::Relaxed);
        nftables::generation(&mut socket)
    }

    fn is_gone(&self, socket: &mut Socket, state: BridgeState) -> bool {
        !matches!(
            link::find(socket, &self.config.bridge),
            Ok(Some(link)) if link.index == state.index
        )
    }
}

/// Calls `change`, which changes the nftables table. If no other program changes nftables during
/// the call of `change`, this function updates the generation in `known`. The state in `known` then
/// remains valid.
fn change_rules(
    known: &mut Option<BridgeState>,
    change: impl FnOnce(&mut Socket) -> Result<(), NetworkError>,
) -> Result<(), NetworkError> {
    let mut socket = Socket::netfilter()?;
    let before = nftables::generation(&mut socket)?;
    change(&mut socket)?;
    let after = nftables::generation(&mut socket)?;
    if let Some(state) = known
        && state.rules == before
        && after.follows(before)
    {
        state.rules = after;
    }
    Ok(())
}

/// Deletes stale flows. An error is only logged, because the error affects only peers that have
/// already sent packets to a host port.
fn forget_flows(mappings: &[Mapping], stale: Stale) {
    if let Err(error) = conntrack::forget(mappings, stale) {
        log::warn!(
            "packets for host ports may still be sent to their previous destination: {error}"
        );
    }
}
