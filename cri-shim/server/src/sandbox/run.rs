//! RunPodSandbox: creates the resources that the containers of a pod share. If a step fails, the
//! resources that were already created are removed.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rrun_proto::v1::{
    ContainerEventType, LinuxSandboxSecurityContext, PodSandboxConfig, PodSandboxMetadata,
    SeLinuxOption,
};

use super::namespaces::{self, Sharing};
use super::{RECORD, Sandbox, SandboxRecord, files, pause, stop, sysctl, users, watch};
use crate::cgroup;
use crate::clock::now;
use crate::container::user;
use crate::id::new_id;
use crate::node::Node;
use crate::selinux::categories::LevelHold;
use crate::selinux::label;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_monitor_client::MonitorError;
use rrun_network::namespace as netns;
use rrun_protocol::{Hello, LOG_NAME, Pod};

/// The maximum length of a host name in bytes, sethostname(2).
const HOST_NAME_MAX: usize = 64;

/// The time limit for the monitor's first response after its start.
const MONITOR_START_TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the key that identifies the requested pod. A retry of a RunPodSandbox call has the same
/// key, so the retry joins the call in progress.
pub(crate) fn key(metadata: &PodSandboxMetadata) -> String {
    let PodSandboxMetadata {
        name,
        uid,
        namespace,
        attempt,
    } = metadata;
    format!("run pod {namespace:?}/{name:?} uid {uid:?} attempt {attempt}")
}

/// The warning for a retry whose configuration differs from that of the existing pod or container.
/// RunPodSandbox and CreateContainer only log this warning. After an error, kubelet would retry
/// forever.
pub(crate) const EXISTS_WITH_OTHER_CONFIG: &str = "it already exists with another configuration, and the new configuration has no effect; \
   remove it first, or create it with another attempt number";

/// Runs a pod and returns its id. If a ready pod with the same metadata exists, returns that pod's
/// id.
pub(crate) async fn run(
    node: Arc<Node>,
    config: PodSandboxConfig,
    handler: String,
) -> Result<String> {
    if let Some(id) = existing(&node, &config) {
        return Ok(id);
    }
    let sharing = check(&node, &config, &handler)?;
    check_network(&node, &config, sharing).await?;
    // The guard `_level` reserves the pod's SELinux level until the `Sandbox` reserves the level
    // itself.
    let (record, _level) = new_record(&node, config, handler)?;
    let sandbox = match create(&node, &record, sharing).await {
        Ok(sandbox) => Arc::new(sandbox),
        Err(error) => {
            let rest = Sandbox::from_record(&node, last_record(&node, record));
            roll_back(&node, &rest).await;
            return Err(error).during(|| format!("run {}", rest.name()));
        }
    };
    sandbox.state().ready = true;
    if let Err(error) = sandbox.write_pod_json(&node) {
        roll_back(&node, &sandbox).await;
        return Err(error);
    }
    node.add_sandbox(Arc::clone(&sandbox));
    sandbox.save_soon(&node);
    watch::begin(&node, &sandbox);
    // In other CRI servers, each pod has an additional container, whose creation and start cause
    // two events. Clients wait for these two events of each pod, so this server publishes the
    // events, too.
    for kind in [
        ContainerEventType::ContainerCreatedEvent,
        ContainerEventType::ContainerStartedEvent,
    ] {
        crate::container::status::publish_sandbox(&node, &sandbox, kind);
    }
    log::info!("{}: ready", sandbox.name());
    Ok(sandbox.id.clone())
}

/// Returns the id of the ready pod with the same metadata, if such a pod exists.
fn existing(node: &Node, config: &PodSandboxConfig) -> Option<String> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let sandbox = node.sandbox_named(&metadata)?;
    if !sandbox.state().ready {
        return None;
    }
    if sandbox.config != *config {
        log::warn!("{}: {}", sandbox.name(), EXISTS_WITH_OTHER_CONFIG);
    }
    Some(sandbox.id.clone())
}

async fn check_network(node: &Node, config: &PodSandboxConfig, sharing: Sharing) -> Result<()> {
    if sharing.own_network {
        return node.network.check(config).await;
    }
    if !config.hostname.is_empty() {
        // Like CRI-O, the server ignores the requested host name of a pod in the node's network.
        // containerd rejects the request.
        let metadata = config.metadata.clone().unwrap_or_default();
        log::warn!(
            "pod {}/{}: the hostname {:?} has no effect: a pod in the node's network has the node's host name",
            metadata.namespace,
            metadata.name,
            config.hostname
        );
    }
    Ok(())
}

/// Returns the record for a new pod, and the reservation of its SELinux level.
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

/// Creates the pod. The creation of the pod's files runs in parallel with the reservation of the
/// pod's addresses on the disk. Afterwards, the pod's monitor is started and the pod's network is
/// connected.
async fn create(node: &Arc<Node>, record: &SandboxRecord, sharing: Sharing) -> Result<Sandbox> {
    let name = format!("pod {}", record.id);
    let files = {
        let (node, record) = (Arc::clone(node), record.clone());
        blocking(format!("{name}: create the pod's files"), move || {
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
    let (files, address) = tokio::join!(
        files,
        slow(format!("{name}: reserve the pod's addresses"), address)
    );
    let sandbox = files?;
    address?;
    connect(node, &sandbox, sharing).await?;
    Ok(sandbox)
}

/// Removes what was created for a pod before its creation failed.
async fn roll_back(node: &Arc<Node>, sandbox: &Sandbox) {
    if let Err(more) = stop::roll_back(node, sandbox).await {
        log::error!(
            "{}: remove the partially created pod: {more}",
            sandbox.name()
        );
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
            "the configuration has no runtime handler {handler:?}"
        )));
    };
    if let Some(missing) = runtime.missing() {
        let name = node.config.handler_name(handler);
        return Err(Error::wrong_state(format!(
            "the runtime handler {name:?} cannot run pods: {missing}"
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
            "the hostname {:?} of pod {name} is invalid or longer than {HOST_NAME_MAX} bytes",
            config.hostname
        )));
    }
    Ok(sharing)
}

/// Rejects ids that no user and no group can have.
fn check_users(context: &LinuxSandboxSecurityContext) -> Result<()> {
    let ids = [
        ("run_as_user", context.run_as_user.as_ref()),
        ("run_as_group", context.run_as_group.as_ref()),
    ];
    let groups = context.supplemental_groups.iter();
    let ids = ids
        .into_iter()
        .filter_map(|(field, id)| Some((field, id?.value)))
        .chain(groups.map(|gid| ("supplemental_groups", *gid)));
    for (field, id) in ids {
        user::number(id, field)?;
    }
    if context.run_as_group.is_some() && context.run_as_user.is_none() {
        return Err(Error::invalid(
            "the pod's security context sets run_as_group without run_as_user",
        ));
    }
    Ok(())
}

/// Rejects contradictory or unsupported fields; the error names the field.
fn check_fields(config: &PodSandboxConfig) -> Result<()> {
    if config.windows.is_some() {
        return Err(Error::invalid(
            "the pod contains a configuration for Windows (windows)",
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
    if let Some(context) = context {
        check_users(context)?;
    }
    label::check(context.and_then(|context| context.selinux_options.as_ref()))
}

/// Returns the pod's record from the file `pod.json`. If the file does not exist or can't be read,
/// the result is `record`.
fn last_record(node: &Node, record: SandboxRecord) -> SandboxRecord {
    match files::read_record(&node.sandbox_dir(&record.id).join(RECORD)) {
        Ok(Some(written)) => written,
        Ok(None) => record,
        Err(error) => {
            log::error!("{error}");
            record
        }
    }
}

/// Creates the pod's directory, files, cgroup and network namespace. This call blocks on disk I/O.
fn prepare(node: &Node, mut record: SandboxRecord, sharing: Sharing) -> Result<Sandbox> {
    let dir = node.sandbox_dir(&record.id);
    files::private_dir(&dir.join("containers"))?;
    // If the server is killed later, it finds the pod's directory at its next start. It then
    // removes the resources that the record lists.
    let intent = dir.join(RECORD);
    let owns_cgroup = !cgroup::slice::is_slice(&record.cgroup);
    if owns_cgroup {
        record.cgroups_made = cgroup::missing(&record.cgroup);
    }
    files::write_record(&intent, &record)?;
    if owns_cgroup {
        let made = cgroup::create(&record.cgroup)?;
        // Another program may have created one of the missing directories in the meantime.
        if made != record.cgroups_made {
            record.cgroups_made = made;
            files::write_record(&intent, &record)?;
        }
    }
    cgroup::limit_descendants(&record.cgroup, node.config.pod_cgroups.get())?;

    let config = &record.config;
    if !config.log_directory.is_empty() {
        std::fs::create_dir_all(&config.log_directory)
            .during(|| format!("create the pod's log directory {}", config.log_directory))?;
    }
    write_etc(&dir, config, sharing)?;
    let root = users::mappings(config)?.map(|users| users.root());
    if let Some(root) = root {
        files::set_owner(&dir, root)?;
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
        files::mount_shm(&dir, root, label)?;
    }
    if sharing.own_network && !sharing.own_users {
        netns::create(&node.netns(&record.id))?;
    }
    Ok(Sandbox::from_record(node, record))
}

/// Mounts the pod's etc directory, and writes the files that do not depend on the pod's addresses.
fn write_etc(dir: &Path, config: &PodSandboxConfig, sharing: Sharing) -> Result<()> {
    let hostname = if config.hostname.is_empty() || !sharing.own_network {
        files::of_node("/etc/hostname")
    } else {
        format!("{}\n", config.hostname)
    };
    let etc = files::mount_etc(dir)?;
    files::write(&etc.join("hostname"), &hostname)?;
    files::write(
        &etc.join("resolv.conf"),
        &files::resolv_conf(config.dns_config.as_ref()),
    )?;
    if !sharing.own_network {
        files::write(&etc.join("hosts"), &files::of_node("/etc/hosts"))?;
    }
    Ok(())
}

/// Starts the monitor and connects the network in parallel. Then applies the settings that need
/// both.
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
    state.relays = hello.relays;
    state.relays_terminals = hello.relays_terminals;
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
        format!("{name}: start the pod's monitor"),
        start_monitor(node, sandbox, sharing),
    );
    let network = slow(
        format!("{name}: connect the pod's network"),
        attach(node, sandbox, sharing),
    );
    if !sharing.own_users {
        let (monitor, network) = tokio::join!(monitor, network);
        return Ok((monitor?, network?));
    }
    // The pod's user namespace must own the pod's network namespace. The monitor therefore creates
    // both namespaces before the network is connected.
    let hello = monitor.await?;
    if let Some(holder) = hello.holder {
        let netns = node.netns(&sandbox.id);
        let of_holder = format!("/proc/{holder}/ns/net");
        blocking(
            format!("{name}: pin the pod's network namespace"),
            move || netns::pin(of_holder.as_ref(), &netns),
        )
        .await?;
    }
    Ok((hello, network.await?))
}

fn write_hosts(node: &Node, sandbox: &Sandbox, addresses: &[IpAddr]) -> Result<()> {
    let hosts = files::hosts(&sandbox.config.hostname, addresses);
    let dir = node.sandbox_dir(&sandbox.id);
    files::write(&files::etc(&dir)?.join("hosts"), &hosts)?;
    if let Some(users) = users::mappings(&sandbox.config)? {
        files::set_owner(&dir, users.root())?;
    }
    if let Some(labels) = &sandbox.selinux {
        files::label(&dir, &labels.files)?;
    }
    Ok(())
}

async fn set_sysctls(node: &Node, sandbox: &Sandbox, sharing: Sharing, holder: i32) -> Result<()> {
    let (config, netns) = (sandbox.config.clone(), node.netns(&sandbox.id));
    blocking(
        format!("{}: set the pod's sysctls", sandbox.name()),
        move || sysctl::write_sysctls(&config, sharing, &netns, holder),
    )
    .await?;
    let config = &sandbox.config;
    if sharing.own_network
        && sysctl::switches_forwarding(config)
        && !sysctl::sets_router_acceptance(config)
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
        pause: pause::prepare(node, sandbox).await?,
    };
    let dir = node.sandbox_dir(&sandbox.id);
    rrun_monitor_client::spawn(&dir, &pod, &node.config.monitor).await?;
    // The monitor responds after it has created the pod's namespaces.
    match tokio::time::timeout(MONITOR_START_TIMEOUT, sandbox.monitor.subscribe()).await {
        Ok(Ok((hello, _events))) if sandbox.lacks_pause_process(hello.pid1, hello.holder) => {
            Err(Error::internal(format!(
                "the pause process of the monitor {} has exited",
                node.config.monitor.display()
            )))
        }
        Ok(Ok((hello, _events))) => Ok(hello),
        Ok(Err(error @ MonitorError::Gone { .. })) => Err(Error::internal(format!(
            "start the monitor {}: {}",
            node.config.monitor.display(),
            last_line(&dir.join(LOG_NAME)).unwrap_or_else(|| error.to_string())
        ))),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Error::internal(format!(
            "the monitor {} did not answer within {} s after its start",
            node.config.monitor.display(),
            MONITOR_START_TIMEOUT.as_secs()
        ))),
    }
}

/// Returns the last line of the monitor's own log without its time, or `None` if the log does not
/// exist or is empty. A monitor that cannot start writes the reason to its log.
fn last_line(log: &Path) -> Option<String> {
    // Ours: only the monitor writes to this file.
    let text = std::fs::read_to_string(log).ok()?;
    let (_time, line) = text.lines().next_back()?.split_once(' ')?;
    Some(line.to_owned())
}

async fn attach(node: &Node, sandbox: &Sandbox, sharing: Sharing) -> Result<Vec<IpAddr>> {
    if !sharing.own_network {
        return Ok(Vec::new());
    }
    let netns = node.netns(&sandbox.id);
    node.network.attach(&sandbox.id, &netns).await
}
