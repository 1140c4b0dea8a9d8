//! CreateContainer: prepares a container's bundle, runs the runtime's `create`, and cleans up after
//! a failure.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rrun_proto::v1::{
    ContainerConfig, ContainerEventType, LinuxContainerSecurityContext, NamespaceMode,
};
use rustix::pipe::{PipeFlags, pipe_with};

use super::namespace_owners::NamespaceOwners;
use super::user::User;
use super::{
    Container, ContainerRecord, ContainerState, Phase, RECORD, bundle, image_volume, remove,
    signal, size, spec, status,
};
use crate::clock::now;
use crate::id::new_id;
use crate::node::Node;
use crate::sandbox::files::{private_dir, write_record};
use crate::sandbox::{Sandbox, users};
use rrun_calls::error::{Code, During, Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_images::Image;
use rrun_protocol::Create;

/// Returns the key that identifies the requested container. A retry of a CreateContainer call has
/// the same key.
pub(crate) fn key(sandbox: &str, config: &ContainerConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    let (name, attempt) = (metadata.name, metadata.attempt);
    format!("create container {name:?} attempt {attempt} in pod {sandbox}")
}

/// Creates the container and returns its id. If a container with the same metadata exists and has
/// not exited, that container's id is returned instead. A call with the same metadata is a retry:
/// kubelet increments the metadata's field `attempt` before it requests another container. (Other
/// CRI servers return the error that the name is reserved.)
pub(crate) async fn create(
    node: Arc<Node>,
    sandbox: Arc<Sandbox>,
    config: ContainerConfig,
) -> Result<String> {
    let same = |container: &Arc<Container>| {
        container.config.metadata == config.metadata && container.phase() != Phase::Exited
    };
    if let Some(existing) = node.containers_of(&sandbox.id).into_iter().find(same) {
        if existing.config != config {
            log::warn!(
                "{}: {}",
                existing.name(),
                crate::sandbox::run::EXISTS_WITH_OTHER_CONFIG
            );
        }
        return Ok(existing.id.clone());
    }
    check(&config, &sandbox)?;
    check_count(&node, &sandbox)?;
    check_mounts(&node, &config)?;
    size::check(&node, &sandbox, size::of_request(&config))?;
    // Count this call before the pod's state is checked. A removal of the pod can then wait for
    // every CreateContainer call that found the pod ready.
    let _creating = sandbox.begin_create();
    must_be_ready(&sandbox)?;
    let name = config.image.as_ref().map(|image| image.image.as_str());
    let name = name.unwrap_or_default();
    let image = node
        .images
        .find(name)
        .ok_or_else(|| Error::not_found(format!("the image {name:?} is not on this node")))?;
    let image = complete(&node, image).await?;
    let record = new_record(&sandbox, &image, config)?;
    let made = make(&node, &sandbox, record.clone(), &image).await;
    match made {
        Ok(container) => {
            node.add_container(Arc::clone(&container));
            container.save_soon(&node);
            status::publish(&node, &container, ContainerEventType::ContainerCreatedEvent);
            log::info!("{}: created", container.name());
            Ok(container.id.clone())
        }
        Err(error) => {
            let rest = Arc::new(Container::from_record(Arc::clone(&sandbox), record));
            if let Err(more) = remove::unmake(&node, &rest).await {
                log::error!("{}: clean up after a failure: {more}", rest.name());
            }
            Err(error).during(|| format!("create {}", rest.name()))
        }
    }
}

/// Returns the image with its whole configuration, which can be too large to be kept in memory.
async fn complete(node: &Node, image: Arc<Image>) -> Result<Arc<Image>> {
    if !image.large_config {
        return Ok(image);
    }
    let what = format!("read the configuration of the image {}", image.id);
    let images = node.images.clone();
    Ok(blocking(what, move || images.complete(image)).await?)
}

/// Returns the record of a container that is about to be created.
fn new_record(
    sandbox: &Sandbox,
    image: &Image,
    config: ContainerConfig,
) -> Result<ContainerRecord> {
    let resources = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.clone());
    let image_signal = image.config.stop_signal.as_deref();
    Ok(ContainerRecord {
        id: new_id()?,
        sandbox: sandbox.id.clone(),
        image_id: image.id.clone(),
        image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
        image_name: status::image_name(config.image.as_ref(), image),
        created_at: now(),
        user: User::default(),
        stop_signal: signal::stop_signal(config.stop_signal(), image_signal)?,
        configuration_bytes: 0,
        state: ContainerState::new(resources.unwrap_or_default()),
        config,
        made: false,
    })
}

fn check(config: &ContainerConfig, sandbox: &Sandbox) -> Result<()> {
    let metadata = config.metadata.as_ref();
    if metadata.is_none_or(|metadata| metadata.name.is_empty()) {
        return Err(Error::invalid(
            "the container's configuration has no metadata",
        ));
    }
    if config.log_path.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!(
            "the log path {:?} points outside the pod's log directory",
            config.log_path
        )));
    }
    let context = spec::context(config);
    let pod = sandbox
        .config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    if context.privileged && !pod.is_some_and(|pod| pod.privileged) {
        return Err(Error::invalid(
            "the container is privileged (linux.security_context.privileged), but its pod is not",
        ));
    }
    check_namespaces(&context, sandbox)?;
    spec::check(config)
}

/// Refuses a container if its pod has too many containers. Each container needs files until it is
/// removed, also after its exit, and most answers to kubelet contain it.
fn check_count(node: &Node, sandbox: &Sandbox) -> Result<()> {
    let limit = node.config.pod_containers.get();
    if node.containers_of(&sandbox.id).len() >= limit {
        return Err(Error::new(
            Code::ResourceExhausted,
            format!(
                "{} has {limit} containers already, which is the limit (pod_containers)",
                sandbox.name()
            ),
        ));
    }
    Ok(())
}

/// Refuses a container with too many mounts. The kernel limits the number of mounts in a mount
/// namespace, and the removal of very many mounts delays other mounts on the node.
fn check_mounts(node: &Node, config: &ContainerConfig) -> Result<()> {
    let (count, limit) = (config.mounts.len(), node.config.container_mounts.get());
    if count > limit {
        return Err(Error::invalid(format!(
            "the container has {count} mounts, and the limit is {limit} mounts (container_mounts)"
        )));
    }
    Ok(())
}

/// Checks that the container requests its pod's user namespace. If the pod has its own user
/// namespace, also checks that the container does not request the node's PID namespace.
fn check_namespaces(context: &LinuxContainerSecurityContext, sandbox: &Sandbox) -> Result<()> {
    let Some(options) = &context.namespace_options else {
        return Ok(());
    };
    let users = users::mappings(&sandbox.config)?;
    if let Some(requested) = &options.userns_options
        && users::read(requested)? != users
    {
        return Err(Error::invalid(
            "the container's user namespace (userns_options) differs from its pod's user namespace",
        ));
    }
    if users.is_some() && options.pid() == NamespaceMode::Node {
        return Err(Error::invalid(
            "the container would be in its pod's user namespace and in the node's PID namespace, which is not supported",
        ));
    }
    Ok(())
}

pub(super) fn must_be_ready(sandbox: &Sandbox) -> Result<()> {
    if sandbox.state().ready {
        return Ok(());
    }
    Err(Error::wrong_state(format!(
        "{} is not ready: cannot create a container in it",
        sandbox.name()
    )))
}

async fn make(
    node: &Arc<Node>,
    sandbox: &Arc<Sandbox>,
    record: ContainerRecord,
    image: &Arc<Image>,
) -> Result<Arc<Container>> {
    let bundle = node.bundle(&sandbox.id, &record.id);
    // If the server is killed after this point, it finds the container's bundle at its next start.
    // From the bundle's record, the server then learns which resources belong to the container, and
    // removes them.
    private_dir(&bundle)?;
    write_record(&bundle.join(RECORD), &record)?;

    let container = assemble(node, sandbox, record, image, bundle).await?;
    must_be_ready(sandbox)?;
    container.write_container_json(node)?;
    Ok(container)
}

async fn assemble(
    node: &Arc<Node>,
    sandbox: &Arc<Sandbox>,
    mut record: ContainerRecord,
    image: &Arc<Image>,
    dir: PathBuf,
) -> Result<Arc<Container>> {
    let pod = sandbox.name();
    let layers = node.images.lease_soon(&record.id, &image.id)?;
    let image_volumes = image_volume::lease(node, sandbox, &mut record).await?;
    let owners = NamespaceOwners::find(node, sandbox, &record.config)?;
    let features = node.handlers.features(&node.config, &sandbox.handler).await;
    // To save time, the server starts the runtime before the bundle is complete, and the runtime
    // waits for the bundle. If volumes must be relabelled, the server first completes the bundle
    // and then starts the runtime. Relabelling has no time limit and would use up the runtime's
    // deadline.
    let relabels = record.config.mounts.iter().any(|it| it.selinux_relabel);
    let early = features.after && sandbox.state().passes_after && !relabels;
    let (after, written) = if early { start_pipe()? } else { (None, None) };
    let mut container = Container::from_record(Arc::clone(sandbox), record.clone());
    let request = request(node, &container, dir.clone(), owners)?;
    let job = {
        let (node, sandbox, image) = (Arc::clone(node), Arc::clone(sandbox), Arc::clone(image));
        move || {
            let filled = bundle::fill(bundle::Inputs {
                node: &node,
                sandbox: &sandbox,
                record: &record,
                dir: &dir,
                image,
                layers,
                image_volumes,
                owners,
                features,
            })?;
            if let Some(written) = written {
                // The write fails if the runtime no longer reads from the pipe. This error is
                // ignored, because the result of the runtime's `create` contains the reason.
                let _ = rustix::io::write(written, b"1");
            }
            Ok::<bundle::Filled, Error>(filled)
        }
    };
    let what = format!("{pod}: mount a container's root filesystem and prepare its volumes");
    let filled = blocking(what, job);
    let created = async {
        let created = sandbox.monitor.create(request, after);
        let created = slow(format!("{pod}: wait for the runtime's `create`"), created);
        created.await.map_err(Error::from)
    };
    let (filled, pid) = if early {
        let (filled, created) = tokio::join!(filled, created);
        (filled?, created?)
    } else {
        (filled.await?, created.await?)
    };
    (container.user, container.configuration_bytes) = (filled.user, filled.configuration_bytes);
    container.change(|state| state.pid = pid);
    Ok(Arc::new(container))
}

/// Creates the pipe for the server's notification to the runtime that the bundle is complete.
/// Returns the runtime's read end and the server's write end.
fn start_pipe() -> Result<(Option<OwnedFd>, Option<OwnedFd>)> {
    let (after, written) = pipe_with(PipeFlags::CLOEXEC).during(|| "create a pipe".to_owned())?;
    Ok((Some(after), Some(written)))
}

/// Returns the `Create` request that the server sends to the pod's monitor.
fn request(
    node: &Node,
    container: &Container,
    bundle: PathBuf,
    owners: NamespaceOwners,
) -> Result<Create> {
    let handler = &container.sandbox.handler;
    let runtime = container.runtime_command(node).ok_or_else(|| {
        Error::internal(format!(
            "the configuration has no runtime handler {handler:?}"
        ))
    })?;
    let config = &container.config;
    Ok(Create {
        id: container.id.clone(),
        bundle,
        runtime,
        cgroup: container.cgroup_dir(),
        log: container.log_path(),
        terminal: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        native: node.config.is_native(handler),
        namespaces_of: owners.children_of_monitor(),
    })
}
