//! RunPodSandbox: everything that the containers of a pod share, or nothing.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use rrun_proto::v1::{ContainerEventType, PodSandboxConfig, PodSandboxMetadata, SeLinuxOption};

use super::namespaces::{self, Sharing};
use super::{RECORD, Sandbox, SandboxRecord, files, stop, sysctl, users, watch};
use crate::cgroup;
use crate::clock::now;
use crate::id::new_id;
use crate::node::Node;
use crate::selinux::categories::LevelHold;
use crate::selinux::label;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_network::namespace as netns;
use rrun_protocol::{Hello, Pod};

/// The host name's limit, sethostname(2).
const HOST_NAME_MAX: usize = 64;

/// How long a monitor may take to come up.
const MONITOR_START_TIMEOUT: Duration = Duration::from_secs(30);

/// What two calls for the same pod have in common.
pub(crate) fn key(metadata: &PodSandboxMetadata) -> String {
    let PodSandboxMetadata {
        name,
        uid,
        namespace,
        attempt,
    } = metadata;
    format!("run pod {namespace:?}/{name:?} uid {uid:?} attempt {attempt}")
}

/// Logged when a retry differs from the object that exists. It is no error, because kubelet would
/// retry forever.
pub(crate) const EXISTS_WITH_OTHER_CONFIG: &str = "asked for again with another configuration, which has no effect: \
    it is there already; remove it first, or ask for another attempt";

/// Runs a pod and returns its id; of one that is ready already for the same metadata, that one's.
pub(crate) async fn run(
    node: Arc<Node>,
    config: PodSandboxConfig,
    handler: String,
) -> Result<String> {
    if let Some(there) = existing(&node, &config) {
        return Ok(there);
    }
    let sharing = check(&node, &config, &handler)?;
    check_network(&node, &config, sharing).await?;
    // Held until the pod itself holds its SELinux level.
    let (record, _level) = new_record(&node, config, handler)?;
    let sandbox = match make(&node, &record, sharing).await {
        Ok(sandbox) => Arc::new(sandbox),
        Err(error) => {
            let rest = Sandbox::from_record(&node, left_behind(&node, record));
            unmake(&node, &rest).await;
            return Err(error).during(|| format!("run {}", rest.name()));
        }
    };
    sandbox.state().ready = true;
    if let Err(error) = sandbox.write_down(&node) {
        unmake(&node, &sandbox).await;
        return Err(error);
    }
    node.add_sandbox(Arc::clone(&sandbox));
    sandbox.save_soon(&node);
    watch::begin(&node, &sandbox);
    // Others make a container for a pod and start it: clients wait for both.
    for kind in [
        ContainerEventType::ContainerCreatedEvent,
        ContainerEventType::ContainerStartedEvent,
    ] {
        crate::container::status::publish_sandbox(&node, &sandbox, kind);
    }
    log::info!("{}: ready", sandbox.name());
    Ok(sandbox.id.clone())
}

/// The id of the pod that is ready for the same metadata.
fn existing(node: &Node, config: &PodSandboxConfig) -> Option<String> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let there = node.sandbox_named(&metadata)?;
    if !there.state().ready {
        return None;
    }
    if there.config != *config {
        log::warn!("{}: {}", there.name(), EXISTS_WITH_OTHER_CONFIG);
    }
    Some(there.id.clone())
}

async fn check_network(node: &Node, config: &PodSandboxConfig, sharing: Sharing) -> Result<()> {
    if sharing.own_network {
        return node.network.check(config).await;
    }
    if !config.hostname.is_empty() {
        // CRI-O takes it so, too; containerd refuses it.
        let metadata = config.metadata.clone().unwrap_or_default();
        log::warn!(
            "pod {}/{}: its hostname, {:?}, has no effect: it is on the node's network, which goes with the node's name",
            metadata.namespace,
            metadata.name,
            config.hostname
        );
    }
    Ok(())
}

/// The record of a pod that is about to be made, and the hold on its SELinux level.
fn new_record(
    node: &Node,
    config: PodSandboxConfig,
    handler: String,
) -> Result<(SandboxRecord, Option<LevelHold>)> {
    let id = new_id()?;
    let cgroup = match config.linux.as_ref().map(|linux| &linux.cgroup_parent) {
        Some(parent) if !parent.is_empty() => cgroup::of_pod(node.config.cgroup_driver, parent)?,
        _ => cgroup::own(node.config.default_cgroup_parent(), &id),
    };
    let (selinux, level) = node.selinux.of_pod(&id, &selinux_options(&config))?.unzip();
    let record = SandboxRecord {
        id,
        config,
        handler,
        created_at: now(),
        cgroup,
        cgroups_made: Vec::new(),
        ready: false,
        addresses: Vec::new(),
        selinux,
    };
    Ok((record, level))
}

/// Makes the pod: its files, and beside them its addresses, which are written to the disk; then its
/// monitor and network.
async fn make(node: &Arc<Node>, record: &SandboxRecord, sharing: Sharing) -> Result<Sandbox> {
    let name = format!("pod {}", record.id);
    let files = {
        let (node, record) = (Arc::clone(node), record.clone());
        blocking(format!("{name}: make its files"), move || {
            prepare(&node, record, sharing)
        })
    };
    let address = async {
        let config = &record.config;
        if !sharing.own_network && config.port_mappings.is_empty() {
            return Ok(());
        }
        let pod = super::name(&record.id, config);
        node.network
            .reserve(&record.id, &pod, config, sharing.own_network)
            .await
            .map(drop)
    };
    let (files, address) = tokio::join!(files, slow(format!("{name}: its address"), address));
    let sandbox = files?;
    address?;
    connect(node, &sandbox, sharing).await?;
    Ok(sandbox)
}

/// Undoes what was made of a pod that failed.
async fn unmake(node: &Arc<Node>, sandbox: &Sandbox) {
    if let Err(more) = stop::unmake(node, sandbox).await {
        log::error!("{}: clean up after a failure: {more}", sandbox.name());
    }
}

fn selinux_options(config: &PodSandboxConfig) -> SeLinuxOption {
    let linux = config.linux.as_ref();
    linux
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.selinux_options.clone())
        .unwrap_or_default()
}

fn check(node: &Node, config: &PodSandboxConfig, handler: &str) -> Result<Sharing> {
    let Some(runtime) = node.config.runtime(handler) else {
        return Err(Error::invalid(format!(
            "there is no runtime handler {handler:?} in the configuration"
        )));
    };
    if let Some(missing) = runtime.missing() {
        let name = node.config.handler_name(handler);
        return Err(Error::wrong_state(format!(
            "the runtime handler {name:?} can't run pods: {missing}"
        )));
    }
    let metadata = config.metadata.as_ref();
    let Some(metadata) = metadata.filter(|metadata| !metadata.name.is_empty()) else {
        return Err(Error::invalid("the pod's configuration has no metadata"));
    };
    let sharing = namespaces::sharing(config)?;
    sysctl::check_sysctls(config, sharing)?;
    if let Some(linux) = &config.linux
        && !linux.cgroup_parent.is_empty()
    {
        cgroup::of_pod(node.config.cgroup_driver, &linux.cgroup_parent)?;
    }
    check_fields(config)?;
    if config.hostname.len() > HOST_NAME_MAX || config.hostname.contains(['\0', '\n', '/']) {
        let name = &metadata.name;
        return Err(Error::invalid(format!(
            "the hostname {:?} of pod {name} is no host name of at most {HOST_NAME_MAX} bytes",
            config.hostname
        )));
    }
    Ok(sharing)
}

/// Refuses what is contradictory, or can't be done, by the field's name.
fn check_fields(config: &PodSandboxConfig) -> Result<()> {
    if config.windows.is_some() {
        return Err(Error::invalid(
            "the pod has a configuration for Windows (windows)",
        ));
    }
    if !config.log_directory.is_empty() && !config.log_directory.starts_with('/') {
        let directory = &config.log_directory;
        return Err(Error::invalid(format!(
            "the pod's log_directory {directory:?} is not an absolute path"
        )));
    }
    if let Some(dns) = &config.dns_config {
        files::check_dns(dns)?;
    }
    let context = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    if context
        .is_some_and(|context| context.run_as_group.is_some() && context.run_as_user.is_none())
    {
        return Err(Error::invalid(
            "the pod's security context has run_as_group without run_as_user",
        ));
    }
    label::check(context.and_then(|context| context.selinux_options.as_ref()))
}

/// The record as far as making the pod had come.
fn left_behind(node: &Node, record: SandboxRecord) -> SandboxRecord {
    files::read_record(&node.sandbox_dir(&record.id).join(RECORD)).unwrap_or(record)
}

/// Directory, files, cgroup and network namespace. Blocks.
fn prepare(node: &Node, mut record: SandboxRecord, sharing: Sharing) -> Result<Sandbox> {
    let dir = node.sandbox_dir(&record.id);
    files::private_dir(&dir.join("containers"))?;
    // A kill at any later instruction finds the pod by its directory, and what it owns in there.
    let intent = dir.join(RECORD);
    files::write_record(&intent, &record)?;
    if !cgroup::slice::is_slice(&record.cgroup) {
        record.cgroups_made = cgroup::create(&record.cgroup)?;
        files::write_record(&intent, &record)?;
    }

    let config = &record.config;
    if !config.log_directory.is_empty() {
        std::fs::create_dir_all(&config.log_directory)
            .during(|| format!("make the pod's log directory {}", config.log_directory))?;
    }
    let hostname = if config.hostname.is_empty() || !sharing.own_network {
        files::of_node("/etc/hostname")
    } else {
        format!("{}\n", config.hostname)
    };
    files::write(&dir.join("hostname"), &hostname)?;
    files::write(
        &dir.join("resolv.conf"),
        &files::resolv_conf(config.dns_config.as_ref()),
    )?;
    if !sharing.own_network {
        files::write(&dir.join("hosts"), &files::of_node("/etc/hosts"))?;
    }
    let root = users::mappings(config)?.map(|users| users.root());
    if let Some(root) = root {
        files::give_to(&dir, root)?;
        let state = &node.config.state;
        let (all, own) = (
            [state, &state.join("pods")],
            [&dir, &dir.join("containers")],
        );
        files::let_through(&all.map(AsRef::as_ref), &own.map(AsRef::as_ref), root.1)?;
    }
    if let Some(labels) = &record.selinux {
        files::label(&dir, &labels.files)?;
    }
    if sharing.own_ipc {
        let label = record.selinux.as_ref().map(|labels| &labels.files);
        files::mount_shm(&dir.join("shm"), root, label)?;
    }
    if sharing.own_network && !sharing.own_users {
        netns::create(&node.netns(&record.id))?;
    }
    Ok(Sandbox::from_record(node, record))
}

/// Starts the monitor and connects the network, side by side, and applies what needs both.
async fn connect(node: &Arc<Node>, sandbox: &Sandbox, sharing: Sharing) -> Result<()> {
    let (hello, addresses) = start_monitor_and_network(node, sandbox, sharing).await?;
    if sharing.own_network {
        write_hosts(node, sandbox, &addresses)?;
    }
    set_sysctls(node, sandbox, sharing, hello.holder.unwrap_or(hello.pid)).await?;
    let mut state = sandbox.state();
    state.monitor = hello.pid;
    state.pid1 = hello.pid1;
    state.holder = hello.holder;
    state.passes_after = hello.passes_after;
    state.addresses = addresses;
    Ok(())
}

async fn start_monitor_and_network(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    sharing: Sharing,
) -> Result<(Hello, Vec<IpAddr>)> {
    let name = sandbox.name();
    let monitor = slow(
        format!("{name}: start its monitor"),
        start_monitor(node, sandbox, sharing),
    );
    let network = slow(
        format!("{name}: connect its network"),
        attach(node, sandbox, sharing),
    );
    if !sharing.own_users {
        let (monitor, network) = tokio::join!(monitor, network);
        return Ok((monitor?, network?));
    }
    // The user namespace owns the network namespace, so it must be there first.
    let hello = monitor.await?;
    if let Some(holder) = hello.holder {
        let netns = node.netns(&sandbox.id);
        let of_holder = format!("/proc/{holder}/ns/net");
        blocking(format!("{name}: keep its network namespace"), move || {
            netns::pin(of_holder.as_ref(), &netns)
        })
        .await?;
    }
    Ok((hello, network.await?))
}

fn write_hosts(node: &Node, sandbox: &Sandbox, addresses: &[IpAddr]) -> Result<()> {
    let hosts = files::hosts(&sandbox.config.hostname, addresses);
    let dir = node.sandbox_dir(&sandbox.id);
    files::write(&dir.join("hosts"), &hosts)?;
    if let Some(users) = users::mappings(&sandbox.config)? {
        files::give_to(&dir, users.root())?;
    }
    if let Some(labels) = &sandbox.selinux {
        files::label(&dir, &labels.files)?;
    }
    Ok(())
}

async fn set_sysctls(node: &Node, sandbox: &Sandbox, sharing: Sharing, holder: i32) -> Result<()> {
    let (config, netns) = (sandbox.config.clone(), node.netns(&sandbox.id));
    blocking(format!("{}: set its sysctls", sandbox.name()), move || {
        sysctl::write_sysctls(&config, sharing, &netns, holder)
    })
    .await?;
    let config = &sandbox.config;
    if sharing.own_network
        && sysctl::switches_forwarding(config)
        && !sysctl::chooses_routers(config)
    {
        let pods = std::slice::from_ref(&sandbox.id);
        node.network.refuse_routers(pods).await?;
    }
    Ok(())
}

async fn start_monitor(node: &Node, sandbox: &Sandbox, sharing: Sharing) -> Result<Hello> {
    let hostname = &sandbox.config.hostname;
    let handler = node.config.runtime(&sandbox.handler);
    let pod = Pod {
        id: sandbox.id.clone(),
        hostname: sharing.own_uts.then(|| hostname.clone()),
        new_ipc: sharing.own_ipc,
        shared_pid: sharing.shared_pid,
        users: users::mappings(&sandbox.config)?.map(|users| users.for_monitor()),
        runtime: handler.map(|handler| handler.path.clone()),
    };
    let dir = node.sandbox_dir(&sandbox.id);
    rrun_monitor_client::spawn(&dir, &pod, &node.config.monitor).await?;
    // Its answer means that the namespaces are there.
    match tokio::time::timeout(MONITOR_START_TIMEOUT, sandbox.monitor.subscribe()).await {
        Ok(Ok((hello, _events))) => Ok(hello),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Error::internal(format!(
            "the monitor {} did not come up within {} s",
            node.config.monitor.display(),
            MONITOR_START_TIMEOUT.as_secs()
        ))),
    }
}

async fn attach(node: &Node, sandbox: &Sandbox, sharing: Sharing) -> Result<Vec<IpAddr>> {
    if !sharing.own_network {
        return Ok(Vec::new());
    }
    let netns = node.netns(&sandbox.id);
    node.network.attach(&sandbox.id, &netns).await
}
