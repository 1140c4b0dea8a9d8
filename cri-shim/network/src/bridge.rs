//! The kernel objects of the embedded network. These objects are the bridge ([`device`]), the
//! nftables rules, and a veth pair for each pod ([`pair`]). Every function in this module blocks,
//! for microseconds to a few milliseconds.

mod device;
mod pair;

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use nix::errno::Errno;

use crate::address::Range;
use crate::config::NetworkConfig;
use crate::error::NetworkError;
use crate::flows::Flows;
use crate::forwarding;
use crate::host_ports::{Listener, Mapping};
use crate::link::{self, POD_INTERFACE, neighbour};
use crate::namespace;
use crate::netlink::{Batch, Socket};
use crate::nftables::{self, Elements, Generation, PodPort, TableFamily, Tables, Watch};
use crate::traffic_control;
use device::{BridgeDevice, Repaired};
pub(crate) use pair::{PodNamespace, host_interface};
use rrun_calls::lock::lock;

/// The bridge and its nftables rules.
pub(crate) struct Bridge {
    config: NetworkConfig,
    /// The ranges from which new pods get their addresses.
    ranges: Vec<Range>,
    /// The sockets on which the server itself listens.
    listeners: OnceLock<Vec<Listener>>,
    rules: Mutex<Rules>,
    flows: Arc<Flows>,
    /// The number of the socket in [`Rules`], see [`Socket::port`].
    own_socket: Arc<AtomicU32>,
    /// True if this server process has created the nftables tables. If the value is false, the
    /// server replaces the tables, because another version of the server may have created the tables
    /// with a different structure.
    has_tables: AtomicBool,
    /// True if the kernel lacks nftables for frames.
    lacks_filter: AtomicBool,
}

/// The nftables tables. While a thread changes the tables, it holds the lock on this value.
#[derive(Default)]
struct Rules {
    /// The socket for changes of the tables. Other sockets are not used, because a watch of the
    /// tables recognises the server's own changes by the socket.
    socket: Option<Socket>,
    /// The state of the bridge at the last check. `None` before the first check, or if the bridge
    /// was not complete.
    known: Option<BridgeState>,
    /// How often this server process has created or replaced the nftables tables.
    replacements: u64,
}

/// The pods of the embedded network.
pub(crate) trait Pods {
    /// Returns the kernel objects that should exist for the pods. This function is called only if
    /// the bridge or the nftables tables must be repaired.
    fn desired(&self) -> Desired;

    /// Returns whether a pod has a host port at 127.0.0.1.
    fn has_port_on_loopback4(&self) -> bool;
}

/// The kernel objects that should exist for the pods.
pub(crate) struct Desired {
    /// The pods that have an interface.
    pub pods: Vec<DesiredPod>,
    pub addresses: Vec<IpAddr>,
    pub elements: Elements,
}

pub(crate) struct DesiredPod {
    pub id: String,
    /// The pod's bridge port, if the pod can send packets only from its own addresses.
    pub port: Option<PodPort>,
}

impl DesiredPod {
    /// Returns the pod's hardware address and the addresses for which the node has permanent
    /// neighbour entries. A pod that can send packets from all addresses has no such entries.
    fn neighbours(&self) -> (link::Mac, &[IpAddr]) {
        let port = self.port.as_ref();
        port.map_or(Default::default(), |port| (port.mac, &port.addresses))
    }
}

/// The state of a bridge that was complete at the last check.
#[derive(Clone, Copy)]
struct BridgeState {
    index: u32,
    mtu: u32,
    mac: Option<link::Mac>,
    /// True if host ports are also open at ::1.
    loopback6: bool,
    rules: Generation,
}

impl Bridge {
    pub(crate) fn new(config: NetworkConfig, ranges: Vec<Range>) -> Self {
        Bridge {
            config,
            ranges,
            listeners: OnceLock::new(),
            rules: Mutex::default(),
            flows: Arc::default(),
            own_socket: Arc::default(),
            has_tables: AtomicBool::new(false),
            lacks_filter: AtomicBool::new(false),
        }
    }

    /// Excludes the sockets `listeners` from the translation of host ports. This function must be
    /// called once, and before the nftables tables are created.
    pub(crate) fn protect(&self, listeners: Vec<Listener>) {
        let _ = self.listeners.set(listeners);
    }

    pub(crate) fn listeners(&self) -> &[Listener] {
        self.listeners.get().map_or(&[], Vec::as_slice)
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        lock(&self.rules)
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
    pub(crate) fn repair(&self, pods: &dyn Pods) -> Result<(), NetworkError> {
        self.repair_all(&mut self.rules(), Repair::IfChanged, pods)
            .map(drop)
    }

    /// Replaces the nftables tables if the bridge exists or a pod needs the bridge.
    pub(crate) fn renew(&self, pods: &dyn Pods) -> Result<(), NetworkError> {
        let exists = link::find(&mut Socket::route()?, &self.config.bridge)?.is_some();
        if exists || !pods.desired().addresses.is_empty() {
            self.repair_all(&mut self.rules(), Repair::Replace, pods)?;
        }
        Ok(())
    }

    /// Creates the veth pair of `pod`, unless it already exists. `port` is the pod's bridge port if
    /// the pod can send packets only from its own addresses. The node then gets permanent neighbour
    /// entries for these addresses, and the pod gets one for its gateway. [`Bridge::configure`]
    /// adds the addresses to the pod's interface.
    pub(crate) fn connect(
        &self,
        pod: &str,
        mac: link::Mac,
        port: Option<PodPort>,
        netns: &Path,
        pods: &dyn Pods,
    ) -> Result<PodNamespace, NetworkError> {
        let mut namespace = PodNamespace::open(netns)?;
        let forwarded_groups = pair::forwarded_groups(port.is_some());
        let neighbours = port.as_ref().map(|port| port.addresses.clone());
        let state = self.ensure_bridge(port, pods)?;
        let mut socket = Socket::route()?;
        let state = self.with_mtu_of_uplink(&mut socket, state, pods)?;
        // If another program deletes the bridge, the new bridge gets this hardware address, too.
        let lasting = self.device().mac();
        let lasts = |mac: &link::Mac| neighbours.is_some() && *mac == lasting;
        namespace.gateway = state.mac.filter(lasts);
        let ensure_pair = |socket: &mut Socket, state: BridgeState| {
            let port = link::BridgePort {
                name: &host_interface(pod),
                alias: &pair::alias(&self.config.bridge, pod),
                bridge: state.index,
                forwarded_groups,
                mac,
                neighbours: neighbours.as_deref().unwrap_or_default(),
            };
            let mtu = state.mtu;
            pair::ensure(socket, &link::VethPair { port, mtu }, &namespace)
        };
        match ensure_pair(&mut socket, state) {
            // In this match arm, another program has deleted the bridge. `ensure_bridge` has not
            // detected the deletion. If the nftables rules are unchanged, `ensure_bridge` does not
            // look up the bridge.
            Err(_) if self.is_gone(&mut socket, state) => {
                let state = self.repair_all(&mut self.rules(), Repair::IfChanged, pods)?;
                ensure_pair(&mut socket, state)?;
            }
            result => result?,
        }
        // The check follows the creation of the port. If a pod gets the first host port at 127.0.0.1
        // after the check, `route_loopback4` finds the port.
        if pods.has_port_on_loopback4() {
            traffic_control::guard_loopback(&mut socket, &host_interface(pod))?;
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

    /// Opens host ports. If another program removed the bridge or the nftables tables, this function
    /// creates the removed objects again. The number of flows to the host ports can be large, so the
    /// lock on the rules is released before stale flows are deleted.
    pub(crate) fn publish(
        &self,
        mappings: Vec<Mapping>,
        pods: &dyn Pods,
    ) -> Result<(), NetworkError> {
        let elements = Elements {
            mappings,
            ports: Vec::new(),
        };
        self.add_mappings(&elements, pods)?;
        self.flows.direct_to_the_pod(&elements.mappings);
        Ok(())
    }

    fn add_mappings(&self, elements: &Elements, pods: &dyn Pods) -> Result<(), NetworkError> {
        let translates6 = forwarding::can_translate_loopback6()?;
        let rules = &mut self.rules();
        let mappings = &elements.mappings;
        self.flows.open(mappings);
        match rules.known.map(|state| (state.index, state.loopback6)) {
            Some((index, loopback6)) if loopback6 == translates6 => {
                let mut socket = Socket::route()?;
                self.route_loopbacks(&mut socket, index, loopback6, mappings, pods)?;
                self.change(rules, nftables::add, elements, pods)?;
            }
            _ => drop(self.repair_all(rules, Repair::Replace, pods)?),
        }
        Ok(())
    }

    /// Closes host ports. The function `free` makes the ports available to other pods. `free` is
    /// called while the lock on the rules is held, until the ports are closed. If another pod
    /// reserves the same ports, [`Bridge::publish`] for that pod waits for this lock. The other
    /// pod's ports are therefore opened only after the old ports were closed. The flows to this
    /// pod are deleted after the release of the lock.
    pub(crate) fn withdraw(
        &self,
        mappings: Vec<Mapping>,
        free: impl FnOnce(),
        pods: &dyn Pods,
    ) -> Result<(), NetworkError> {
        let elements = Elements {
            mappings,
            ports: Vec::new(),
        };
        let routed = self.remove_mappings(&elements, free, pods)?;
        self.flows.forget_the_pod(&elements.mappings);
        routed
    }

    /// Closes host ports for [`Bridge::withdraw`]. The inner result is about the node's routes. Its
    /// error does not mean that the ports are still open.
    fn remove_mappings(
        &self,
        elements: &Elements,
        free: impl FnOnce(),
        pods: &dyn Pods,
    ) -> Result<Result<(), NetworkError>, NetworkError> {
        let rules = &mut self.rules();
        free();
        self.flows.close(&elements.mappings);
        self.change(rules, nftables::remove, elements, pods)?;
        let routed = if pods.has_port_on_loopback4() {
            Ok(())
        } else {
            let clear = || self.route_loopback4(&mut Socket::route()?, pods);
            clear().or_else(|_| clear())
        };
        if routed.is_err() {
            // The sysctl must not stay 1. The next pod repairs the bridge.
            rules.known = None;
        }
        Ok(routed)
    }

    /// Deletes the bridge ports of removed pods from the nftables sets. The function `free` makes
    /// the pods' addresses available to other pods.
    pub(crate) fn retire(
        &self,
        ports: Vec<PodPort>,
        free: impl FnOnce(),
        pods: &dyn Pods,
    ) -> Result<(), NetworkError> {
        let rules = &mut self.rules();
        free();
        // If the state of the tables is not known, the next repair removes the ports.
        if rules.known.is_none() || ports.is_empty() {
            return Ok(());
        }
        let elements = Elements {
            mappings: Vec::new(),
            ports,
        };
        self.change(rules, nftables::remove, &elements, pods)
            .map(drop)
    }

    /// Configures how the node routes the packets of its processes from 127.0.0.0/8 and ::1 to host
    /// ports, and the replies. `mappings` are new host ports.
    fn route_loopbacks(
        &self,
        socket: &mut Socket,
        index: u32,
        loopback6: bool,
        mappings: &[Mapping],
        pods: &dyn Pods,
    ) -> Result<(), NetworkError> {
        self.route_loopback4(socket, pods)?;
        let mut batch = Batch::default();
        if loopback6 && mappings.iter().any(|mapping| mapping.address.is_ipv6()) {
            link::add_loopback_route(&mut batch, index);
        }
        socket.execute(&batch).map(drop)
    }

    /// Sets the sysctl route_localnet of the bridge. The sysctl is 1 only while a pod has a host port
    /// at 127.0.0.1.
    fn route_loopback4(&self, socket: &mut Socket, pods: &dyn Pods) -> Result<(), NetworkError> {
        let bridge = &self.config.bridge;
        let is_needed = pods.has_port_on_loopback4();
        if is_needed == forwarding::routes_localnet(bridge)? {
            return Ok(());
        }
        if is_needed {
            for pod in pods.desired().pods {
                traffic_control::guard_loopback(socket, &host_interface(&pod.id))?;
            }
        }
        forwarding::set_route_localnet(bridge, is_needed)
    }

    /// Changes elements of the nftables tables with the function `change`. If another program has
    /// changed the tables, they are repaired.
    fn change(
        &self,
        rules: &mut Rules,
        change: ChangeElements,
        elements: &Elements,
        pods: &dyn Pods,
    ) -> Result<BridgeState, NetworkError> {
        let Some(mut state) = rules.known else {
            return self.repair_all(rules, Repair::Replace, pods);
        };
        let name = &self.config.bridge;
        let socket = self.socket(rules)?;
        let how = match change(socket, name, elements, Some(state.rules)) {
            Ok(changes) => {
                // The kernel increments the generation only if the transaction changes something.
                let now = nftables::generation(socket)?;
                if now == state.rules || now == state.rules.after(changes) {
                    state.rules = now;
                    rules.known = Some(state);
                    return Ok(state);
                }
                Repair::Check
            }
            // Another program has changed nftables tables, but perhaps not the tables of rrun.
            Err(error) if error.is(Errno::ERESTART) => match change(socket, name, elements, None) {
                Ok(_) => Repair::Check,
                Err(_) => Repair::Replace,
            },
            Err(_) => Repair::Replace,
        };
        self.repair_all(rules, how, pods)
    }

    /// Returns the socket for changes of the nftables tables.
    fn socket<'a>(&self, rules: &'a mut Rules) -> Result<&'a mut Socket, NetworkError> {
        match &mut rules.socket {
            Some(socket) => Ok(socket),
            none => {
                let socket = Socket::netfilter()?;
                self.own_socket.store(socket.port()?, Ordering::Relaxed);
                Ok(none.insert(socket))
            }
        }
    }

    /// Deletes the node's ends of the pods' veth pairs, and the neighbour entries for `addresses`,
    /// the pods' addresses. The kernel then also deletes the pods' ends. This function ignores an
    /// interface or an entry that does not exist.
    pub(crate) fn disconnect(
        &self,
        pods: &[String],
        addresses: &[IpAddr],
    ) -> Result<(), NetworkError> {
        let mut socket = Socket::route()?;
        let bridge = rustix::net::netdevice::name_to_index(socket.fd(), &self.config.bridge);
        if let Ok(index) = bridge {
            let mut batch = Batch::default();
            for address in addresses {
                neighbour::delete(&mut batch, index, *address);
            }
            // A pod from an earlier version of rrun has no permanent entries. An entry that remains
            // does no harm, because the next pod with the address replaces it.
            let _ = socket.execute(&batch);
        }
        let names: Vec<String> = pods.iter().map(|pod| host_interface(pod)).collect();
        if let [name] = names.as_slice() {
            return link::delete(&mut socket, name);
        }
        link::delete_together(&mut socket, &names)
    }

    /// Deletes the interfaces that rrun created, except the interfaces of the pods in `keep`. The
    /// interfaces of the pods in `keep` get the settings that [`Bridge::connect`] gives to new
    /// interfaces.
    pub(crate) fn sweep(&self, keep: &[DesiredPod], pods: &dyn Pods) -> Result<(), NetworkError> {
        let mut socket = Socket::route()?;
        let links = link::list(&mut socket)?;
        let bridge = links.iter().find(|link| self.device().is_bridge(link));
        let bridge = bridge.map(|link| link.index);
        let keep: HashMap<String, &DesiredPod> = keep
            .iter()
            .map(|pod| (host_interface(&pod.id), pod))
            .collect();
        for link in &links {
            let on_bridge = bridge.is_some() && link.master == bridge;
            let alias = link.alias.as_deref().unwrap_or_default();
            let ours = link.kind.as_deref() == Some("veth")
                && pair::is_host_interface(&link.name)
                && (on_bridge || alias.starts_with(&pair::alias(&self.config.bridge, "")));
            if !ours {
                continue;
            }
            let Some(pod) = keep.get(&link.name) else {
                link::delete(&mut socket, &link.name)?;
                continue;
            };
            if pods.has_port_on_loopback4()
                && let Err(error) = traffic_control::guard_loopback(&mut socket, &link.name)
            {
                log::error!("{error}");
            }
            let groups = pair::forwarded_groups(pod.port.is_some());
            let changed = forwarding::refuse_routers(&link.name).and_then(|()| {
                let Some(bridge) = bridge.filter(|_| on_bridge) else {
                    return Ok(());
                };
                link::forward_groups(&mut socket, &link.name, groups)?;
                let (mac, neighbours) = pod.neighbours();
                let mut batch = Batch::default();
                for address in neighbours {
                    neighbour::add(&mut batch, bridge, *address, mac);
                }
                socket.execute(&batch).map(drop)
            });
            // The error is only logged, because one broken interface must not prevent the start of
            // the server. Interfaces that this version of rrun created already have the settings.
            if let Err(error) = changed {
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

    /// Adds the bridge port of a new pod to the nftables sets, and returns the state of the bridge.
    /// If necessary, this function first creates or repairs the bridge. If nothing has changed since
    /// the last check, it only sends two requests to the kernel and reads one file for each address
    /// family.
    fn ensure_bridge(
        &self,
        port: Option<PodPort>,
        pods: &dyn Pods,
    ) -> Result<BridgeState, NetworkError> {
        let rules = &mut self.rules();
        let port = port.filter(|_| self.filters_sources());
        match (rules.known, port) {
            (Some(_), Some(port)) if self.forwards()? => {
                let elements = Elements {
                    mappings: Vec::new(),
                    ports: vec![port],
                };
                self.change(rules, nftables::add, &elements, pods)
            }
            (Some(state), None)
                if self.forwards()?
                    && nftables::generation(self.socket(rules)?)? == state.rules =>
            {
                Ok(state)
            }
            _ => self.repair_all(rules, Repair::Check, pods),
        }
    }

    /// Returns whether the nftables table for frames exists.
    fn filters_sources(&self) -> bool {
        self.config.spoof_protection && !self.lacks_filter.load(Ordering::Relaxed)
    }

    /// Sets the bridge's MTU to the MTU of the uplink, unless an MTU is configured. Existing pods
    /// keep their MTU.
    fn with_mtu_of_uplink(
        &self,
        socket: &mut Socket,
        state: BridgeState,
        pods: &dyn Pods,
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
            return self.repair_all(&mut self.rules(), Repair::IfChanged, pods);
        }
        device.set_mtu(socket, state.index, state.mtu, mtu)?;
        if let Some(known) = self.rules().known.as_mut() {
            known.mtu = mtu;
        }
        Ok(BridgeState { mtu, ..state })
    }

    /// Returns whether packet forwarding is enabled for every address family in which pods have
    /// addresses.
    fn forwards(&self) -> Result<bool, NetworkError> {
        for range in &self.ranges {
            if !forwarding::is_on(range.is_ipv6())? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Repairs the bridge, the node's packet forwarding, the routes and the nftables rules.
    ///
    /// The caller holds the lock on the rules while this function sends requests to the kernel. Other
    /// calls wait for the lock meanwhile. This wait does no harm, because no call can attach a pod
    /// before the bridge exists.
    fn repair_all(
        &self,
        rules: &mut Rules,
        how: Repair,
        pods: &dyn Pods,
    ) -> Result<BridgeState, NetworkError> {
        let before = rules.known.take();
        if matches!(how, Repair::Replace) {
            // An earlier request may have failed because of the state of the socket.
            rules.socket = None;
        }
        let mut socket = Socket::route()?;
        let mut desired = pods.desired();
        let repaired = self
            .device()
            .repair(&mut socket, &desired.pods, &desired.addresses)?;
        let Repaired {
            index,
            mtu,
            mac,
            ranges,
        } = repaired;
        for range in &self.ranges {
            forwarding::turn_on(range.is_ipv6())?;
        }
        let loopback6 = forwarding::can_translate_loopback6()?;
        let mappings = &desired.elements.mappings;
        self.route_loopbacks(&mut socket, index, loopback6, mappings, pods)?;
        let how = match how {
            Repair::IfChanged if before.is_none_or(|one| one.loopback6 != loopback6) => {
                Repair::Check
            }
            how => how,
        };
        if !self.filters_sources() {
            desired.elements.ports.clear();
        }
        let tables = Tables {
            name: &self.config.bridge,
            hidden: self.config.hidden(&ranges),
            ranges,
            masquerade: self.config.masquerade,
            loopback6,
            listeners: self.listeners(),
            filters_sources: self.filters_sources(),
            elements: desired.elements,
        };
        let generation = self.repair_rules(rules, how, before.map(|one| one.rules), tables)?;
        let state = BridgeState {
            index,
            mtu,
            mac,
            loopback6,
            rules: generation,
        };
        rules.known = Some(state);
        Ok(state)
    }

    /// Repairs the nftables tables, and returns their generation. `known` is the generation at the
    /// last check.
    fn repair_rules(
        &self,
        rules: &mut Rules,
        how: Repair,
        known: Option<Generation>,
        mut tables: Tables,
    ) -> Result<Generation, NetworkError> {
        let is_first = !self.has_tables();
        let socket = self.socket(rules)?;
        // The generation is read before the check. If another program changes nftables during this
        // check, the next check detects the change.
        let before = nftables::generation(socket)?;
        let is_complete = match how {
            _ if is_first => false,
            Repair::IfChanged if known == Some(before) => true,
            Repair::IfChanged | Repair::Check => {
                nftables::is_complete(socket, &tables).unwrap_or(false)
            }
            Repair::Replace => false,
        };
        if is_complete {
            return Ok(before);
        }
        self.flows.replace(&tables.elements.mappings);
        nftables::replace(socket, &tables, TableFamily::Inet)?;
        if tables.filters_sources
            && let Err(error) = nftables::replace(socket, &tables, TableFamily::Bridge)
        {
            self.lack_filter(error)?;
            tables.filters_sources = false;
        }
        if !tables.filters_sources && is_first {
            // An earlier server process may have created the table. A kernel without tables of this
            // family returns an error.
            let _ = nftables::delete(socket, tables.name, TableFamily::Bridge);
        }
        self.flows.check_all_soon();
        let after = nftables::generation(socket)?;
        rules.replacements += 1;
        self.has_tables.store(true, Ordering::Relaxed);
        Ok(after)
    }

    /// Disables the filter of source addresses if `error` means that the kernel lacks the filter.
    fn lack_filter(&self, error: NetworkError) -> Result<(), NetworkError> {
        if !matches!(error, NetworkError::Feature { .. }) {
            return Err(error);
        }
        log::warn!(
            "pods can send packets from addresses of other pods (network.spoof_protection): {error}"
        );
        self.lacks_filter.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Returns whether this server process has created the nftables tables.
    pub(crate) fn has_tables(&self) -> bool {
        self.has_tables.load(Ordering::Relaxed)
    }

    /// Begins to watch the nftables tables for changes by other programs.
    pub(crate) fn watch(&self) -> Result<Watch, NetworkError> {
        Watch::open(self.config.bridge.clone(), Arc::clone(&self.own_socket))
    }

    /// Updates the generation of the nftables tables after another program has changed only other
    /// tables. The next attach of a pod can then skip the check of the tables. If a thread is
    /// changing the tables, this function does nothing.
    pub(crate) fn pass_over(&self, generation: Generation) {
        if let Ok(mut rules) = self.rules.try_lock()
            && let Some(known) = &mut rules.known
            && known.rules.after(1) == generation
        {
            known.rules = generation;
        }
    }

    /// Repairs the nftables tables after another program has changed them. Returns whether the
    /// tables had to be replaced.
    pub(crate) fn restore(&self, pods: &dyn Pods) -> Result<bool, NetworkError> {
        let rules = &mut self.rules();
        let before = rules.replacements;
        self.repair_all(rules, Repair::Check, pods)?;
        Ok(rules.replacements > before)
    }

    fn is_gone(&self, socket: &mut Socket, state: BridgeState) -> bool {
        !matches!(
            link::find(socket, &self.config.bridge),
            Ok(Some(link)) if link.index == state.index
        )
    }
}

/// A function that changes elements of the nftables tables, see [`nftables::add`].
type ChangeElements =
    fn(&mut Socket, &str, &Elements, Option<Generation>) -> Result<u32, NetworkError>;

/// The condition under which the nftables tables are replaced.
#[derive(Clone, Copy)]
enum Repair {
    /// The tables are replaced if any nftables table has changed since the last check and the tables
    /// are not complete.
    IfChanged,
    /// The tables are replaced if they are not complete.
    Check,
    Replace,
}
