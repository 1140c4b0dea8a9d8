//! After a start: the store and what the kernel has, brought together.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::join_all;

use crate::clock::now;
use crate::container::{self, Container, Phase, remove};
use crate::node::Node;
use crate::sandbox::{self, Sandbox, files, namespaces, stop, sysctl, watch};
use rrun_calls::error::{During, Result};
use rrun_monitor_client::MonitorError;
use rrun_network::namespace as netns;
use rrun_store::Table;

/// Loads what the store has, asks every monitor how its containers are, and removes what belongs
/// to nobody.
pub(crate) async fn run(node: &Arc<Node>) -> Result<()> {
    let sandboxes: Vec<(String, sandbox::SandboxRecord)> = node.store.load(Table::SANDBOXES)?;
    for (_, record) in sandboxes {
        node.add_sandbox(Arc::new(Sandbox::from_record(node, record)));
    }
    adopt_sandboxes(node)?;
    let containers: Vec<(String, container::ContainerRecord)> =
        node.store.load(Table::CONTAINERS)?;
    let mut homeless = Vec::new();
    for (id, record) in containers {
        match node.sandbox(&record.sandbox) {
            Ok(sandbox) => node.add_container(Arc::new(Container::from_record(sandbox, record))),
            Err(_) => homeless.push(id),
        }
    }
    adopt_containers(node)?;
    lease_again(node);
    join_all(node.sandboxes().iter().map(|pod| meet(node, pod))).await;
    for id in homeless {
        let change = rrun_store::Change::delete(Table::CONTAINERS, &id);
        node.store.commit(vec![change]).await?;
    }
    remove_orphans(node).await?;
    node.trash.empty_soon();
    let live: HashSet<String> = node
        .sandboxes()
        .iter()
        .filter(|sandbox| sandbox.state().ready)
        .map(|sandbox| sandbox.id.clone())
        .collect();
    let network = node.network.reconcile(&live).await;
    if let Err(error) = network {
        log::error!("bring the pods' network and the store together: {error}");
    }
    refuse_routers(node).await;
    Ok(())
}

/// Makes running pods refuse router advertisements, since an earlier version of rrun did not.
async fn refuse_routers(node: &Node) {
    let connected = |sandbox: &Sandbox| {
        let sharing = namespaces::sharing(&sandbox.config);
        sandbox.state().ready
            && sharing.is_ok_and(|sharing| sharing.own_network)
            && !sysctl::chooses_routers(&sandbox.config)
    };
    let pods: Vec<String> = node
        .sandboxes()
        .iter()
        .filter(|sandbox| connected(sandbox))
        .map(|sandbox| sandbox.id.clone())
        .collect();
    if let Err(error) = node.network.refuse_routers(&pods).await {
        log::error!("make the pods' interfaces refuse router advertisements: {error}");
    }
}

/// Pods that were made, and written down, when a kill came before the store had them.
fn adopt_sandboxes(node: &Arc<Node>) -> Result<()> {
    for id in entries(&node.config.state.join("pods"))? {
        let path = node.sandbox_dir(&id).join(sandbox::RECORD);
        if node.sandbox(&id).is_err()
            && let Some(record) = files::read_record::<sandbox::SandboxRecord>(&path)
            && record.ready
        {
            let sandbox = Arc::new(Sandbox::from_record(node, record));
            node.add_sandbox(Arc::clone(&sandbox));
            sandbox.save_soon(node);
        }
    }
    Ok(())
}

/// Containers likewise, and starts that the store did not come to know of.
fn adopt_containers(node: &Arc<Node>) -> Result<()> {
    for sandbox in node.sandboxes() {
        for id in entries(&node.sandbox_dir(&sandbox.id).join("containers"))? {
            let path = node.bundle(&sandbox.id, &id).join(container::RECORD);
            let Some(record) = files::read_record::<container::ContainerRecord>(&path) else {
                continue;
            };
            match node.container(&id) {
                Ok(known) => known.change(|state| {
                    if state.started_at == 0 && record.state.started_at != 0 {
                        state.started_at = record.state.started_at;
                        if state.phase == Phase::Created {
                            state.phase = Phase::Running;
                        }
                    }
                }),
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

/// Leases that a kill kept from the store: it has the removal of an image only after them.
fn lease_again(node: &Node) {
    for container in node.containers() {
        if let Err(error) = node.images.lease_soon(&container.id, &container.image_id) {
            log::warn!("{}: keep its image: {error}", container.name());
        }
    }
}

/// Brings one pod of the store and its monitor together. What fails is logged: one bad pod must
/// not keep the others from being served.
async fn meet(node: &Arc<Node>, sandbox: &Arc<Sandbox>) {
    if !sandbox.state().ready {
        sandbox.state().retired = true;
    }
    let result = match sandbox.monitor.subscribe().await {
        Ok((hello, _)) => {
            let known: HashSet<String> =
                hello.containers.iter().map(|one| one.id.clone()).collect();
            watch::apply(node, sandbox, hello);
            if !sandbox.state().retired {
                watch::begin(node, sandbox);
            }
            forget_half_made(node, sandbox, &known).await
        }
        Err(error) => lost(node, sandbox, &error).await,
    };
    if let Err(error) = result {
        log::error!("{}: {error}", sandbox.name());
    }
}

/// A record was written and a kill came before the runtime's create: nobody has its id.
async fn forget_half_made(
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
            container.ended(node, 137, now(), "Unknown", "its monitor does not know it");
        }
    }
    Ok(())
}

/// No monitor answers: a reboot, or it died while there was no server.
async fn lost(node: &Arc<Node>, sandbox: &Arc<Sandbox>, error: &MonitorError) -> Result<()> {
    let containers = node.containers_of(&sandbox.id);
    let live = containers.iter().any(|one| one.state().in_runtime);
    if sandbox.state().ready || live {
        watch::lost(node, sandbox, error).await?;
    }
    Ok(())
}

/// What no record names: of calls that a kill cut short. What can't be removed is told and left
/// for the next start.
async fn remove_orphans(node: &Arc<Node>) -> Result<()> {
    let state = &node.config.state;
    for id in entries(&state.join("pods"))? {
        let known = node.sandbox(&id).ok().filter(|sandbox| sandbox.id == id);
        let pod = match known {
            Some(pod) => pod,
            None => match half_made_sandbox(node, &id) {
                Some(pod) => Arc::new(pod),
                None => continue,
            },
        };
        for bundle in entries(&node.sandbox_dir(&id).join("containers"))? {
            if node.container(&bundle).is_ok_and(|one| one.id == bundle) {
                continue;
            }
            log::info!("{}: remove the half-made container {bundle}", pod.name());
            let container = half_made_container(node, &pod, &bundle);
            if let Err(error) = remove::unmake(node, &Arc::new(container)).await {
                log::error!("{}: {error}", pod.name());
            }
        }
        if node.sandbox(&id).is_err() {
            log::info!("{}: remove it, it was half made", pod.name());
            if let Err(error) = stop::unmake(node, &pod).await {
                log::error!("{}: {error}", pod.name());
            }
        }
    }
    let namespaces = &node.namespaces;
    let pinned = namespaces.pods();
    for id in pinned.during(|| format!("read {}", namespaces.dir().display()))? {
        if node.sandbox(&id).is_err()
            && !node.network.keeps(&id)
            && let Err(error) = netns::remove(&node.netns(&id))
        {
            log::error!("{error}");
        }
    }
    let mut owners = entries(&node.config.root.join("containers"))?;
    owners.extend(node.images.leases());
    for id in owners {
        // An image volume's is the container's with a number.
        let (container, _) = id.split_once(':').unwrap_or((&id, ""));
        if node.container(container).is_err() {
            if let Err(error) = node.trash.put(&node.writable_layer(container), container) {
                log::error!("{error}");
            }
            if let Err(error) = node.images.release(&id).await {
                log::error!("let go of the image of {id}: {error}");
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

/// The pod as its directory tells of it; without a record there, nothing but the directory was
/// made.
fn half_made_sandbox(node: &Node, id: &str) -> Option<Sandbox> {
    let dir = node.sandbox_dir(id);
    match files::read_record(&dir.join(sandbox::RECORD)) {
        Some(record) => Some(Sandbox::from_record(node, record)),
        None => {
            if let Err(error) = files::remove_tree(&dir) {
                log::error!("{error}");
            }
            None
        }
    }
}

/// The container as its bundle tells of it, or with nothing but its id.
fn half_made_container(node: &Node, sandbox: &Arc<Sandbox>, id: &str) -> Container {
    let path = node.bundle(&sandbox.id, id).join(container::RECORD);
    let record = files::read_record(&path).unwrap_or_else(|| container::ContainerRecord {
        id: id.to_owned(),
        sandbox: sandbox.id.clone(),
        config: Default::default(),
        image_id: String::new(),
        image_ref: String::new(),
        image_name: String::new(),
        created_at: 0,
        user: Default::default(),
        stop_signal: libc::SIGTERM,
        state: container::ContainerState::new(Default::default()),
        made: false,
    });
    Container::from_record(Arc::clone(sandbox), record)
}
