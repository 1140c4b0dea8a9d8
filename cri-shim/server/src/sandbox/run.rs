//! RunPodSandbox: everything that the containers of a pod share, or nothing.

use std::sync::Arc;
use std::time::Duration;

use rrun_proto::v1::{ContainerEventType, PodSandboxConfig, PodSandboxMetadata, SeLinuxOption};

use super::namespaces::{self, Sharing};
use super::{RECORD, Record, Sandbox, files, stop, sysctl, users, watch};
use crate::cgroup;
use crate::node::{Node, new_id, now};
use crate::selinux::label;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_network::namespace as netns;
use rrun_protocol::{Hello, Pod};

/// The host name's limit, sethostname(2).
const HOST_NAME_MAX: usize = 64;

/// How long a monitor may take to come up.
const MONITOR_START: Duration = Duration::from_secs(30);

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

/// Said of what is asked for again, otherwise than it was made. No refusal: kubelet would be stuck.
pub(crate) const MADE_ALREADY: &str = "asked for again with another configuration, which has no effect: \
    it is there already; remove it first, or ask for another attempt";

/// Runs a pod and returns its id; of one that is ready already for the same metadata, that one's.
pub(crate) async fn run(
    node: Arc<Node>,
    config: PodSandboxConfig,
    handler: String,
) -> Result<String> {
    let metadata = config.metadata.clone().unwrap_or_default();
    if let Some(there) = node.sandbox_named(&metadata)
        && there.state().ready
    {
        if there.config != config {
            log::warn!("{}: {}", there.name(), MADE_ALREADY);
        }
        return Ok(there.id.clone());
    }
    let sharing = check(&node, &config, &handler)?;
    if sharing.own_network {
        node.network.check(&config).await?;
    } else if !config.hostname.is_empty() {
        // CRI-O takes it so, too; containerd refuses it.
        log::warn!(
            "pod {}/{}: its hostname, {:?}, has no effect: it is on the node's network, which goes with the node's name",
            metadata.namespace,
            metadata.name,
            config.hostname
        );
    }
    let id = new_id()?;
    let cgroup = match config.linux.as_ref().map(|linux| &linux.cgroup_parent) {
        Some(parent) if !parent.is_empty() => cgroup::of_pod(node.config.cgroup_driver, parent)?,
        _ => cgroup::own(&node.config.default_cgroup_parent, &id),
    };
    // Until the pod holds its level itself.
    let (selinux, _level) = match node.selinux.of_pod(&id, &selinux_options(&config))? {
        Some((labels, held)) => (Some(labels), Some(held)),
        None => (None, None),
    };
    let record = Record {
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
    let name = format!("pod {}", record.id);
    let files = {
        let (node, record) = (Arc::clone(&node), record.clone());
        blocking(format!("{name}: make its files"), move || {
            prepare(&node, record, sharing)
        })
    };
    // The address is written to the disk meanwhile.
    let address = async {
        let (told, config) = (super::name(&record.id, &record.config), &record.config);
        if sharing.own_network || !config.port_mappings.is_empty() {
            let network = &node.network;
            let reserved = network.reserve(&record.id, &told, config, sharing.own_network);
            reserved.await?;
        }
        Ok(())
    };
    let (files, address) = tokio::join!(files, slow(format!("{name}: its address"), address));
    let mut sandbox = files.and_then(|sandbox| address.map(|()| sandbox));
    if let Ok(made) = &mut sandbox
        && let Err(error) = connect(&node, made, sharing).await
    {
        sandbox = Err(error);
    }
    let sandbox = match sandbox {
        Ok(sandbox) => Arc::new(sandbox),
        Err(error) => {
            let rest = Sandbox::from_record(&node, left_behind(&node, record));
            if let Err(more) = stop::unmake(&node, &rest).await {
                log::error!("{}: clean up after a failure: {more}", rest.name());
            }
            return Err(error).during(|| format!("run {}", rest.name()));
        }
    };
    sandbox.state().ready = true;
    if let Err(error) = sandbox.write_down(&node) {
        if let Err(more) = stop::unmake(&node, &sandbox).await {
            log::error!("{}: clean up after a failure: {more}", sandbox.name());
        }
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
fn left_behind(node: &Node, record: Record) -> Record {
    files::read_record(&node.sandbox_dir(&record.id).join(RECORD)).unwrap_or(record)
}

/// Directory, files, cgroup and network namespace. Blocks.
fn prepare(node: &Node, mut record: Record, sharing: Sharing) -> Result<Sandbox> {
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

/// Monitor and network, side by side.
async fn connect(node: &Arc<Node>, sandbox: &mut Sandbox, sharing: Sharing) -> Result<()> {
    let name = sandbox.name();
    let monitor = slow(
        format!("{name}: start its monitor"),
        start_monitor(node, sandbox, sharing),
    );
    let network = slow(
        format!("{name}: connect its network"),
        attach(node, sandbox, sharing),
    );
    let (hello, addresses) = if sharing.own_users {
        // Whose root is to rule over the network namespace must be there before it.
        let hello = monitor.await?;
        if let Some(holder) = hello.holder {
            let netns = node.netns(&sandbox.id);
            let of_holder = format!("/proc/{holder}/ns/net");
            blocking(format!("{name}: keep its network namespace"), move || {
                netns::pin(of_holder.as_ref(), &netns)
            })
            .await?;
        }
        (hello, network.await?)
    } else {
        let (monitor, network) = tokio::join!(monitor, network);
        (monitor?, network?)
    };
    let hostname = &sandbox.config.hostname;
    if sharing.own_network {
        let hosts = files::hosts(hostname, &addresses);
        let dir = node.sandbox_dir(&sandbox.id);
        files::write(&dir.join("hosts"), &hosts)?;
        if let Some(users) = users::mappings(&sandbox.config)? {
            files::give_to(&dir, users.root())?;
        }
        if let Some(labels) = &sandbox.selinux {
            files::label(&dir, &labels.files)?;
        }
    }
    let netns = node.netns(&sandbox.id);
    let config = sandbox.config.clone();
    let holder = hello.holder.unwrap_or(hello.pid);
    blocking(format!("{name}: set its sysctls"), move || {
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
    let mut state = sandbox.state();
    state.monitor = hello.pid;
    state.pid1 = hello.pid1;
    state.holder = hello.holder;
    state.passes_after = hello.passes_after;
    state.addresses = addresses;
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
    rrun_monitor_client::spawn(&dir, &pod, &node.config.monitor)
        .await
        .map_err(|error| Error::internal(error.to_string()))?;
    // Its answer means that the namespaces are there.
    match tokio::time::timeout(MONITOR_START, sandbox.monitor.subscribe()).await {
        Ok(Ok((hello, _events))) => Ok(hello),
        Ok(Err(error)) => Err(Error::internal(error.to_string())),
        Err(_) => Err(Error::internal(format!(
            "the monitor {} did not come up within {} s",
            node.config.monitor.display(),
            MONITOR_START.as_secs()
        ))),
    }
}

async fn attach(node: &Node, sandbox: &Sandbox, sharing: Sharing) -> Result<Vec<std::net::IpAddr>> {
    if !sharing.own_network {
        return Ok(Vec::new());
    }
    let netns = node.netns(&sandbox.id);
    node.network.attach(&sandbox.id, &netns).await
}
