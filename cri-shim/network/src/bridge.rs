//! What the embedded network has in the kernel: the bridge ([`device`]), the nftables rules, a veth
//! pair for each pod ([`pair`]). Everything here blocks, for microseconds to a few milliseconds.

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

/// The bridge and its rules, as configured.
pub(crate) struct Bridge {
    config: NetworkConfig,
    /// What new pods get addresses of.
    ranges: Vec<Range>,
    /// What was found or made last.
    state: Mutex<Option<BridgeState>>,
    /// Whether this server has made the table: an older one's may be of another shape.
    made_table: AtomicBool,
}

/// What should be in the kernel for pods.
pub(crate) struct Desired {
    /// Those that have an interface.
    pub pods: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub mappings: Vec<Mapping>,
}

/// Called only when the bridge or the table is made anew.
type GetDesired<'a> = &'a dyn Fn() -> Desired;

/// A bridge that was whole when it was looked at.
#[derive(Clone, Copy)]
struct BridgeState {
    index: u32,
    mtu: u32,
    /// Whether host ports are at ::1 too.
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

    /// Looks at everything, and makes what is missing. If the bridge had to be made anew, the pods
    /// that have an interface are put back on it.
    pub(crate) fn repair(&self, desired: GetDesired) -> Result<(), NetworkError> {
        self.repair_all(&mut self.state(), false, desired).map(drop)
    }

    /// Makes the table anew, if there is a bridge or a pod that wants one.
    pub(crate) fn renew(&self, desired: GetDesired) -> Result<(), NetworkError> {
        let there = link::find(&mut Socket::route()?, &self.config.bridge)?.is_some();
        if there || !desired().addresses.is_empty() {
            self.repair_all(&mut self.state(), true, desired)?;
        }
        Ok(())
    }

    /// Makes `pod`'s pair of interfaces, or finds it. It has no address yet.
    pub(crate) fn connect(
        &self,
        pod: &str,
        mac: link::Mac,
        netns: &Path,
        desired: GetDesired,
    ) -> Result<PodNamespace, NetworkError> {
        let namespace = PodNamespace::open(netns)?;
        let state = self.whole(desired)?;
        let mut socket = Socket::route()?;
        let state = self.with_mtu_of_uplink(&mut socket, state, desired)?;
        let make = |socket: &mut Socket, state: BridgeState| {
            let pair = link::VethPair {
                host: &host_interface(pod),
                alias: &pair::alias(&self.config.bridge, pod),
                bridge: state.index,
                mtu: state.mtu,
                mac,
            };
            pair::make(socket, &pair, &namespace)
        };
        match make(&mut socket, state) {
            // If somebody deleted the bridge, only its absence shows it.
            Err(_) if self.is_gone(&mut socket, state) => {
                let state = self.repair_all(&mut self.state(), false, desired)?;
                make(&mut socket, state)?;
            }
            result => result?,
        }
        Ok(namespace)
    }

    /// Gives the pod's interface its addresses and the pod its default routes. Done again it
    /// changes nothing.
    pub(crate) fn configure(
        &self,
        namespace: &PodNamespace,
        addresses: &[IpAddr],
        mac: link::Mac,
    ) -> Result<(), NetworkError> {
        pair::configure(namespace, addresses, mac, &self.ranges)
    }

    /// Opens host ports. What a foreign hand took away is made anew with it.
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

    /// Closes host ports. `free` gives them back: until then no other pod gets them, and what is
    /// published after that comes after this.
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

    /// Adds the routes for replies to host ports on loopback.
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

    /// Deletes the node's ends of the pods' pairs, and with them the pods'. They need not be
    /// there.
    pub(crate) fn disconnect(&self, pods: &[String]) -> Result<(), NetworkError> {
        let mut socket = Socket::route()?;
        let names: Vec<String> = pods.iter().map(|pod| host_interface(pod)).collect();
        if let [name] = names.as_slice() {
            return link::delete(&mut socket, name);
        }
        link::delete_together(&mut socket, &names)
    }

    /// Deletes every interface of rrun's but those in `keep`, and makes those refuse router
    /// advertisements and redirects.
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
                // The interface may be an earlier version's, so this can be its first refusal.
                log::error!("{error}");
            }
        }
        Ok(())
    }

    /// Makes the interfaces of running pods refuse router advertisements and redirects. After a
    /// failure for one pod, the others still follow; the error is the last one.
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

    /// The bridge, made or repaired if need be. If nothing has changed since the last time this is
    /// one question to the kernel and one file read.
    fn whole(&self, desired: GetDesired) -> Result<BridgeState, NetworkError> {
        let known = *self.state();
        if let Some(state) = known
            && nftables::generation(&mut Socket::netfilter()?)? == state.rules
            && self.forwards()
        {
            return Ok(state);
        }
        self.repair_all(&mut self.state(), false, desired)
    }

    /// Follows the uplink's MTU, unless one is configured. Pods that are there keep theirs.
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
            // The bridge gets IPv6 again, but the kernel has forgotten its IPv6 addresses and
            // routes.
            return self.repair_all(&mut self.state(), false, desired);
        }
        device.set_mtu(socket, state.index, state.mtu, mtu)?;
        if let Some(known) = self.state().as_mut() {
            known.mtu = mtu;
        }
        Ok(BridgeState { mtu, ..state })
    }

    /// Whether the node passes packets on, of each family that pods have.
    fn forwards(&self) -> bool {
        let mut ranges = self.ranges.iter();
        ranges.all(|range| forwarding::is_on(range.is_ipv6()))
    }

    /// Brings the bridge, forwarding, routes and rules right; with `renew` the rules are made anew
    /// in any case.
    ///
    /// The lock is held while the kernel is asked, against the custom of this crate: ten first
    /// pods need one bridge, and none can go on before it is there.
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
        // Read first: a change while the table is looked at is seen the next time.
        let before = nftables::generation(&mut socket)?;
        let old = renew || !self.made_table.load(Ordering::Relaxed);
        if !old && nftables::is_there(&mut socket, &table)? {
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

/// Our own changes must not invalidate the known generation of the rules.
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

/// Host ports work without this, but for those who have sent to the port before.
fn forget_flows(mappings: &[Mapping], stale: Stale) {
    if let Err(error) = conntrack::forget(mappings, stale) {
        log::warn!("packets for host ports may go on to where they went before: {error}");
    }
}
