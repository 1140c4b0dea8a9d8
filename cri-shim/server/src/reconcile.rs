//! Reconciliation of the store with the running containers after the server has started.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::join_all;

use crate::clock::now;
use crate::container::{self, Container, Phase, UNKNOWN_TO_MONITOR, remove};
use crate::node::Node;
use crate::sandbox::{self, Sandbox, files, namespaces, stop, sysctl, watch};
use rrun_calls::error::{During, Result};
use rrun_monitor_client::MonitorError;
use rrun_network::namespace as netns;
use rrun_store::Table;

/// The owner of the layers of containers that were removed before the server started. Their pods are
/// not known any more.
const LEFTOVERS: &str = "leftovers";

/// Loads the store's records, and queries every monitor about its containers. Pods and containers
/// without a record in the store are then removed.
pub(crate) async fn run(node: &Arc<Node>) -> Result<()> {
    let sandboxes: Vec<(String, sandbox::SandboxRecord)> = node.store.load(Table::SANDBOXES)?;
    for (_, record) in sandboxes {
        node.add_sandbox(Arc::new(Sandbox::from_record(node, record)));
    }
    adopt_sandboxes(node)?;
    let containers: Vec<(String, container::ContainerRecord)> =
        node.store.load(Table::CONTAINERS)?;
    let mut without_pod = Vec::new();
    for (id, record) in containers {
        match node.sandbox(&record.sandbox) {
            Ok(sandbox) => node.add_container(Arc::new(Container::from_record(sandbox, record))),
            Err(_) => without_pod.push(id),
        }
    }
    adopt_containers(node)?;
    renew_leases(node);
    join_all(node.sandboxes().iter().map(|pod| reconcile_pod(node, pod))).await;
    for id in without_pod {
        let change = rrun_store::Change::delete(Table::CONTAINERS, &id);
        node.store.commit(vec![change]).await?;
    }
    let mut live = HashSet::new();
    for sandbox in node.sandboxes() {
        if sandbox.state().ready {
            node.network.adopt(&sandbox.id, &sandbox.config);
            live.insert(sandbox.id.clone());
        }
    }
    node.network.free_ports_except(&live);
    remove_orphans(node).await?;
    // Earlier versions moved the writable layers of removed containers to this directory.
    let earlier = node.config.root.join("trash");
    node.removals.begin_counted(LEFTOVERS, vec![earlier]);
    let network = node.network.reconcile(&live).await;
    if let Err(error) = network {
        log::error!("reconcile the pods' networks with the store: {error}");
    }
    refuse_routers(node).await;
    Ok(())
}

/// Configures running pods to refuse router advertisements, because earlier versions of rrun
/// created pods without this setting.
async fn refuse_routers(node: &Node) {
    let connected = |sandbox: &Sandbox| {
        let sharing = namespaces::sharing(&sandbox.config);
        sandbox.state().ready
            && sharing.is_ok_and(|sharing| sharing.own_network)
            && !sysctl::sets_router_acceptance(&sandbox.config)
    };
    let pods: Vec<String> = node
        .sandboxes()
        .iter()
        .filter(|sandbox| connected(sandbox))
        .map(|sandbox| sandbox.id.clone())
        .collect();
    if let Err(error) = node.network.refuse_routers(&pods).await {
        log::error!("configure the pods' interfaces to refuse router advertisements: {error}");
    }
}

/// Adds completely created pods that are missing in the store. The server was killed before it
/// wrote these pods to the store. Each of these pods has a record in its directory, and `ready` is
/// true in this record.
fn adopt_sandboxes(node: &Arc<Node>) -> Result<()> {
    for id in entries(&node.config.state.join("pods"))? {
        if node.sandbox(&id).is_ok() {
            continue;
        }
        let path = node.sandbox_dir(&id).join(sandbox::RECORD);
        if let Some(record) = record::<sandbox::SandboxRecord>(&path).flatten()
            && record.ready
        {
            let sandbox = Arc::new(Sandbox::from_record(node, record));
            node.add_sandbox(Arc::clone(&sandbox));
            sandbox.save_soon(node);
        }
    }
    Ok(())
}

/// Reads a record, like [`files::read_record`]. If the record can't be read, logs the error and
/// returns `None`. The server then leaves the object alone until its next start.
fn record<T: serde::de::DeserializeOwned>(path: &Path) -> Option<Option<T>> {
    let read = files::read_record(path);
    read.inspect_err(|error| log::error!("{error}")).ok()
}

/// Adds containers that are missing in the store. The server was killed before it wrote these
/// containers to the store. If the store contains a container without its start time, adds the
/// start time.
fn adopt_containers(node: &Arc<Node>) -> Result<()> {
    for sandbox in node.sandboxes() {
        for id in entries(&node.sandbox_dir(&sandbox.id).join("containers"))? {
            let path = node.bundle(&sandbox.id, &id).join(container::RECORD);
            let Some(record) = record::<container::ContainerRecord>(&path).flatten() else {
                continue;
            };
            match node.container(&id) {
                Ok(known) => {
                    let mut changed = false;
                    known.change(|state| {
                        changed = state.started_at == 0 && record.state.started_at != 0;
                        if changed {
                            state.started_at = record.state.started_at;
                            if state.phase == Phase::Created {
                                state.phase = Phase::Running;
                            }
                        }
                    });
                    if changed {
                        known.save_soon(node);
                    }
                }
                Err(_) if record.made => {
                    let made = Arc::new(Container::from_record(Arc::clone(&sandbox), record));
                    node.add_container(Arc::clone(&made));
                    made.save_soon(node);
                }
                Err(_) => {}
            }
        }
    }
    Ok(())
}

/// Renews the containers' leases on their images. The server may have been killed before the store
/// wrote the leases to disk. This function does not wait for the disk. The store writes changes in
/// their order, so a lease is on disk before any later removal of the image.
fn renew_leases(node: &Node) {
    for container in node.containers() {
        if let Err(error) = node.images.lease_soon(&container.id, &container.image_id) {
            log::warn!(
                "{}: renew the lease on the container's image: {error}",
                container.name()
            );
        }
    }
}

/// Updates one pod of the store with the state that the pod's monitor reports. A failure is only
/// logged: one broken pod must not prevent the service for other pods.
async fn reconcile_pod(node: &Arc<Node>, sandbox: &Arc<Sandbox>) {
    let result = match watch::first_hello(sandbox).await {
        Ok(hello) => {
            let known: HashSet<String> =
                hello.containers.iter().map(|one| one.id.clone()).collect();
            watch::apply(node, sandbox, hello);
            // A pod that is not ready can also have running containers, if its pause process has
            // exited.
            watch::begin(node, sandbox);
            remove_partial_containers(node, sandbox, &known).await
        }
        Err(error) => {
            if !sandbox.state().ready {
                sandbox.state().retired = true;
            }
            lost(node, sandbox, &error).await
        }
    };
    let unmounted = unmount_unused(node, sandbox).await;
    for error in [result, unmounted].into_iter().filter_map(Result::err) {
        log::error!("{}: {error}", sandbox.name());
    }
}

/// Unmounts the file systems of a stopped pod, or of the exited containers of another pod. An earlier
/// version of the server kept these mounts until the pod's removal. The server may also have been killed
/// while it stopped the pod.
async fn unmount_unused(node: &Node, sandbox: &Sandbox) -> Result<()> {
    let containers = node.containers_of(&sandbox.id);
    let live = containers.iter().any(|one| one.state().in_runtime);
    if sandbox.state().ready || live {
        let exited = containers.iter().filter(|one| one.phase() == Phase::Exited);
        for one in exited {
            container::unmount::soon(&one.name(), node.bundle(&sandbox.id, &one.id));
        }
        return Ok(());
    }
    stop::unmount(node, sandbox, &containers).await
}

/// Removes containers that the server recorded but the runtime did not create. These containers
/// remain if the server is killed during CreateContainer. No client has received the ids of these
/// containers, so they can be removed. If the monitor has no record of a container that was
/// started, this function records the container as exited.
async fn remove_partial_containers(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    known: &HashSet<String>,
) -> Result<()> {
    for container in node.containers_of(&sandbox.id) {
        if known.contains(&container.id) || !container.state().in_runtime {
            continue;
        }
        if container.phase() == Phase::Created {
            remove::remove(node, &container).await?;
        } else {
            container.record_end(node, 137, now(), "Unknown", UNKNOWN_TO_MONITOR);
        }
    }
    Ok(())
}

/// Handles a pod whose monitor does not answer. Either the host was rebooted, or the monitor died
/// at a time when no server was running.
async fn lost(node: &Arc<Node>, sandbox: &Arc<Sandbox>, error: &MonitorError) -> Result<()> {
    let containers = node.containers_of(&sandbox.id);
    let live = containers.iter().any(|one| one.state().in_runtime);
    if sandbox.state().ready || live {
        watch::lost(node, sandbox, error).await?;
    }
    Ok(())
}

/// Removes pods and containers without a record in the store. These pods and containers remain if
/// the server is killed during a CRI request. A failed removal is logged, and the server retries it
/// at its next start.
async fn remove_orphans(node: &Arc<Node>) -> Result<()> {
    let state = &node.config.state;
    for id in entries(&state.join("pods"))? {
        let known = node.sandbox(&id).ok().filter(|sandbox| sandbox.id == id);
        let pod = match known {
            Some(pod) => pod,
            None => match partial_sandbox(node, &id) {
                Some(pod) => Arc::new(pod),
                None => continue,
            },
        };
        let name = pod.name();
        for bundle in entries(&node.sandbox_dir(&id).join("containers"))? {
            if node.container(&bundle).is_ok_and(|one| one.id == bundle) {
                continue;
            }
            log::info!("{name}: the server removes the partially created container {bundle}");
            let Some(container) = partial_container(node, &pod, &bundle) else {
                continue;
            };
            if let Err(error) = remove::unmake(node, &Arc::new(container)).await {
                log::error!("{name}: {error}");
            }
        }
        if node.sandbox(&id).is_err() {
            log::info!("{name}: the server removes the partially created pod");
            if let Err(error) = stop::roll_back(node, &pod).await {
                log::error!("{name}: {error}");
            }
        }
    }
    let namespaces = &node.namespaces;
    let pinned = namespaces.pods();
    for id in pinned.during(|| format!("read {}", namespaces.dir().display()))? {
        if node.sandbox(&id).is_err()
            && !node.network.uses_cni(&id)
            && let Err(error) = netns::remove(&node.netns(&id))
        {
            log::error!("{error}");
        }
    }
    let mut owners = entries(&node.config.root.join("containers"))?;
    owners.extend(node.images.leases());
    for id in owners {
        // The owner of a lease is a container. The owner's name is the container's id. If the lease
        // is for an image volume, a colon and a number follow the id.
        let (container, _) = id.split_once(':').unwrap_or((&id, ""));
        if node.container(container).is_err() {
            let writable = node.writable_layer(container);
            node.removals.begin_counted(LEFTOVERS, vec![writable]);
            if let Err(error) = node.images.release(&id).await {
                log::error!("release the lease on the image of {id}: {error}");
            }
        }
    }
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<String>> {
    let what = || format!("read the directory {}", dir.display());
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).during(what),
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry.during(what)?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

/// Returns the pod that the record in its directory describes. If the directory contains no record,
/// nothing else was created for the pod, so the directory is removed. If the record can't be read,
/// the directory is kept.
fn partial_sandbox(node: &Node, id: &str) -> Option<Sandbox> {
    let dir = node.sandbox_dir(id);
    match record(&dir.join(sandbox::RECORD))? {
        Some(record) => Some(Sandbox::from_record(node, record)),
        None => {
            if let Err(error) = files::remove_tree(&dir) {
                log::error!("{error}");
            }
            None
        }
    }
}

/// Returns the container that the record in its bundle describes. If the bundle contains no record,
/// the result contains only the ids of the container and of its pod. Returns `None` if the record
/// can't be read.
fn partial_container(node: &Node, sandbox: &Arc<Sandbox>, id: &str) -> Option<Container> {
    let path = node.bundle(&sandbox.id, id).join(container::RECORD);
    let record = record(&path)?.unwrap_or_else(|| container::ContainerRecord {
        id: id.to_owned(),
        sandbox: sandbox.id.clone(),
        config: Default::default(),
        image_id: String::new(),
        image_ref: String::new(),
        image_name: String::new(),
        created_at: 0,
        user: Default::default(),
        stop_signal: libc::SIGTERM,
        configuration_bytes: 0,
        state: container::ContainerState::new(Default::default()),
        made: false,
    });
    Some(Container::from_record(Arc::clone(sandbox), record))
}
