//! CreateContainer: the container as the runtime's `create` leaves it, or nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rrun_proto::v1::{
    ContainerConfig, ContainerEventType, LinuxContainerSecurityContext, NamespaceMode,
};

use rustix::pipe::{PipeFlags, pipe_with};

use super::seccomp::SeccompProfile;
use super::spec::{Namespaces, Parts, PidNamespace};
use super::user::{Accounts, User};
use super::{
    Container, Phase, RECORD, Record, State, annotations, apparmor, capabilities, cdi, devices,
    idmap, image_volume, mounts, propagation, remove, resources, rootfs, signal, spec, status,
    volumes,
};
use crate::cgroup::slice;
use crate::clock::now;
use crate::handlers::Features;
use crate::id::new_id;
use crate::node::Node;
use crate::sandbox::files::{let_through, private_dir, write, write_record};
use crate::sandbox::{Sandbox, namespaces, users};
use crate::selinux::{self, relabel};
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_images::Image;
use rrun_protocol::Create;

/// What two calls for the same container have in common.
pub(crate) fn key(sandbox: &str, config: &ContainerConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    let (name, attempt) = (metadata.name, metadata.attempt);
    format!("create container {name:?} attempt {attempt} in pod {sandbox}")
}

/// Makes the container and returns its id; of one that was made for the same metadata and has not
/// ended, that one's. (kubelet counts `attempt` up before it asks for another one; peers answer
/// that the name is reserved.)
pub(crate) async fn create(
    node: Arc<Node>,
    sandbox: Arc<Sandbox>,
    config: ContainerConfig,
) -> Result<String> {
    let same = |container: &Arc<Container>| {
        container.config.metadata == config.metadata && container.phase() != Phase::Exited
    };
    if let Some(there) = node.containers_of(&sandbox.id).into_iter().find(same) {
        if there.config != config {
            log::warn!("{}: {}", there.name(), crate::sandbox::run::MADE_ALREADY);
        }
        return Ok(there.id.clone());
    }
    check(&config, &sandbox)?;
    // Counted first: who finds the pod ready afterwards is waited for by its removal.
    let _creating = sandbox.begin_create();
    must_be_ready(&sandbox)?;
    let name = config.image.as_ref().map(|image| image.image.as_str());
    let name = name.unwrap_or_default();
    let image = node
        .images
        .find(name)
        .ok_or_else(|| Error::not_found(format!("the image {name:?} is not on this node")))?;
    let resources = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.clone());
    let record = Record {
        id: new_id()?,
        sandbox: sandbox.id.clone(),
        image_id: image.id.clone(),
        image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
        image_name: status::image_name(config.image.as_ref(), &image),
        created_at: now(),
        user: User::default(),
        stop_signal: signal::stop_signal(
            config.stop_signal(),
            image.config.stop_signal.as_deref(),
        )?,
        state: State {
            phase: Phase::Created,
            pid: 0,
            started_at: 0,
            finished_at: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            in_runtime: true,
            resources: resources.unwrap_or_default(),
        },
        config,
        made: false,
    };
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

fn check(config: &ContainerConfig, sandbox: &Sandbox) -> Result<()> {
    let metadata = config.metadata.as_ref();
    if metadata.is_none_or(|metadata| metadata.name.is_empty()) {
        return Err(Error::invalid(
            "the container's configuration has no metadata",
        ));
    }
    if config.log_path.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!(
            "the log path {:?} leaves the pod's log directory",
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
            "the container is privileged (linux.security_context.privileged), and its pod is not",
        ));
    }
    check_namespaces(&context, sandbox)?;
    spec::check(config)
}

/// What the container says of namespaces that are the pod's must be what the pod has.
fn check_namespaces(context: &LinuxContainerSecurityContext, sandbox: &Sandbox) -> Result<()> {
    let Some(options) = &context.namespace_options else {
        return Ok(());
    };
    let users = users::mappings(&sandbox.config)?;
    if let Some(asked) = &options.userns_options
        && users::read(asked)? != users
    {
        return Err(Error::invalid(
            "the container's user namespace (userns_options) is not that of its pod",
        ));
    }
    if users.is_some() && options.pid() == NamespaceMode::Node {
        return Err(Error::invalid(
            "the container is in its pod's user namespace and in the node's PID namespace, which do not go together",
        ));
    }
    Ok(())
}

fn must_be_ready(sandbox: &Sandbox) -> Result<()> {
    if sandbox.state().ready {
        return Ok(());
    }
    Err(Error::wrong_state(format!(
        "{} is not ready: no container can be made in it",
        sandbox.name()
    )))
}

async fn make(
    node: &Arc<Node>,
    sandbox: &Arc<Sandbox>,
    record: Record,
    image: &Arc<Image>,
) -> Result<Arc<Container>> {
    let bundle = node.bundle(&sandbox.id, &record.id);
    // A kill at any later instruction finds the container by its bundle, and what it owns in
    // there.
    private_dir(&bundle)?;
    write_record(&bundle.join(RECORD), &record)?;

    let container = assemble(node, sandbox, record, image, bundle).await?;
    must_be_ready(sandbox)?;
    container.write_down(node)?;
    Ok(container)
}

async fn assemble(
    node: &Arc<Node>,
    sandbox: &Arc<Sandbox>,
    mut record: Record,
    image: &Arc<Image>,
    bundle: PathBuf,
) -> Result<Arc<Container>> {
    let pod = sandbox.name();
    let lower = node.images.lease_soon(&record.id, &image.id)?;
    let images = image_volume::lease(node, &record.id, &mut record.config.mounts).await?;
    let pid = pid_namespace(node, sandbox, &record.config)?;
    let features = node.handlers.features(&node.config, &sandbox.handler).await;
    // The runtime starts while the bundle is written, and waits for that. Its time counts from
    // then on: not beside what has no bound.
    let relabels = record.config.mounts.iter().any(|it| it.selinux_relabel);
    let early = features.after && sandbox.state().passes_after && !relabels;
    let (after, written) = match early {
        true => pipe_with(PipeFlags::CLOEXEC)
            .map(|(after, written)| (Some(after), Some(written)))
            .during(|| "make a pipe".to_owned())?,
        false => (None, None),
    };
    let mut container = Container::from_record(Arc::clone(sandbox), record.clone());
    let runtime = container
        .runtime_command(node)
        .ok_or_else(|| Error::internal(format!("no runtime handler {:?}", sandbox.handler)))?;
    let config = &container.config;
    let request = Create {
        id: container.id.clone(),
        bundle: bundle.clone(),
        runtime,
        cgroup: container.cgroup_dir(),
        log: container.log_path(),
        terminal: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        native: node.config.is_native(&sandbox.handler),
    };
    let job = {
        let (node, sandbox, image) = (Arc::clone(node), Arc::clone(sandbox), Arc::clone(image));
        let from = From {
            image,
            lower,
            images,
            pid,
            features,
        };
        move || {
            let user = prepare(&node, &sandbox, &record, &bundle, from)?;
            if let Some(written) = written {
                // If nobody reads there any more, the runtime's answer says why.
                let _ = rustix::io::write(written, b"1");
            }
            Ok::<User, Error>(user)
        }
    };
    let what = format!("{pod}: mount the root filesystem and look at the volumes of a container");
    let prepared = blocking(what, job);
    let created = async {
        let asked = sandbox.monitor.create(request, after);
        let created = slow(format!("{pod}: the runtime's create"), asked);
        created
            .await
            .map_err(|error| Error::internal(error.to_string()))
    };
    let (user, pid) = match early {
        true => {
            let (prepared, created) = tokio::join!(prepared, created);
            (prepared?, created?)
        }
        false => (prepared.await?, created.await?),
    };
    container.user = user;
    container.change(|state| state.pid = pid);
    Ok(Arc::new(container))
}

fn pid_namespace(node: &Node, sandbox: &Sandbox, config: &ContainerConfig) -> Result<PidNamespace> {
    let of = |pid: i32| PidNamespace::Join(format!("/proc/{pid}/ns/pid").into());
    match spec::pid_mode(config) {
        (NamespaceMode::Pod, _) => {
            let pid1 = sandbox.state().pid1;
            Ok(pid1.map_or(PidNamespace::New, of))
        }
        (NamespaceMode::Container, _) => Ok(PidNamespace::New),
        (NamespaceMode::Node, _) => Ok(PidNamespace::Node),
        (NamespaceMode::Target, target) => {
            let target = node.container(&target)?;
            if target.sandbox.id != sandbox.id {
                return Err(Error::invalid(format!(
                    "the container's PID namespace target {} is in another pod",
                    target.id
                )));
            }
            let state = target.state();
            match state.phase {
                Phase::Running => Ok(of(state.pid)),
                _ => Err(Error::wrong_state(format!(
                    "the container's PID namespace target {} is not running",
                    target.id
                ))),
            }
        }
    }
}

/// What a container is made from, beside its request.
struct From {
    image: Arc<Image>,
    /// The image's layers, uppermost first.
    lower: Vec<PathBuf>,
    /// Images among the mounts.
    images: Vec<image_volume::Found>,
    pid: PidNamespace,
    features: Features,
}

/// Mounts the root filesystem and writes config.json. Blocks.
fn prepare(
    node: &Node,
    sandbox: &Sandbox,
    record: &Record,
    bundle: &Path,
    from: From,
) -> Result<User> {
    let image = from.image;
    let config = &record.config;
    let context = spec::context(config);
    let capabilities = capabilities::sets(
        context.capabilities.as_ref(),
        context.privileged,
        capabilities::ours(),
    )?;
    let seccomp = SeccompProfile::of(&context, &node.config.unset_seccomp_profile)?;
    let seccomp = seccomp.profile(&capabilities)?;
    let log = super::log_path(&sandbox.config.log_directory, &config.log_path);
    if let Some(dir) = log.as_deref().and_then(Path::parent) {
        std::fs::create_dir_all(dir)
            .during(|| format!("make the log directory {}", dir.display()))?;
    }
    let target = bundle.join("rootfs");
    let writable = node.writable_layer(&record.id);
    private_dir(&writable)?;
    let mappings = users::mappings(&sandbox.config)?;
    let root = mappings.as_ref().map(|users| users.root());
    let holder = sandbox.namespaces();
    let users = match root {
        Some(root) => {
            let_through(&[], &[bundle], root.1)?;
            Some(idmap::Users::of(holder, root)?)
        }
        None => None,
    };
    let selinux = match &sandbox.selinux {
        Some(pod) => {
            let asked = context.selinux_options.clone().unwrap_or_default();
            Some(selinux::of_container(pod, &asked)?)
        }
        None => None,
    };
    let files = selinux.as_ref().map(|labels| &labels.files);
    let lower = rootfs::over_mount_points(from.lower, &node.config.root);
    rootfs::Overlay {
        lower: &lower,
        writable: &writable,
        target: &target,
        base: &node.config.root,
        users: users.as_ref(),
        label: files,
    }
    .mount()?;
    let root = root.unwrap_or_default();

    let user = Accounts::read(&target)?.resolve(Some(&context), &image.config.user)?;
    rootfs::make_working_dir(&target, spec::working_dir(config, &image.config)?, root)?;
    let mut asked_mounts = config.mounts.clone();
    mounts::make_sources(&asked_mounts)?;
    propagation::check(&asked_mounts)?;
    image_volume::mount(
        node,
        bundle,
        &from.images,
        users.as_ref(),
        files,
        &mut asked_mounts,
    )?;
    let volumes = writable.join("volumes");
    let volumes = volumes::make(
        &image.config.volumes,
        &asked_mounts,
        &target,
        &volumes,
        root,
    )?;
    asked_mounts.extend(volumes);
    if let Some(label) = files {
        for mount in asked_mounts.iter().filter(|mount| mount.selinux_relabel) {
            relabel::relabel(Path::new(&mount.host_path), label)?;
        }
    }
    let devices = cdi::find(&node.config.cdi_spec_dirs, config)?;

    let sharing = namespaces::sharing(&sandbox.config)?;
    let of_holder = |kind: &str| PathBuf::from(format!("/proc/{holder}/ns/{kind}"));
    let own_uts = sharing.own_uts;
    let hostname = match own_uts {
        true => sandbox.config.hostname.clone(),
        false => crate::sandbox::files::of_node("/proc/sys/kernel/hostname")
            .trim()
            .to_owned(),
    };
    let pod_dir = node.sandbox_dir(&sandbox.id);
    let around = mounts::Surroundings {
        pod: &pod_dir,
        privileged: context.privileged,
        readonly_rootfs: context.readonly_rootfs,
        own_ipc: sharing.own_ipc,
        features: from.features,
    };
    let pod_cgroup = crate::cgroup::directory(&sandbox.cgroup);
    let cgroup = match slice::is_slice(&sandbox.cgroup) {
        true => slice::for_runtime(&sandbox.cgroup, &record.id),
        false => format!("{}/{}", sandbox.cgroup, record.id),
    };
    let asked = &record.state.resources;
    let handler = node.config.runtime(&sandbox.handler);
    let mut spec = spec::spec(Parts {
        config,
        image: &image.config,
        user: &user,
        hostname: &hostname,
        rootfs: &target,
        cgroup: &cgroup,
        namespaces: Namespaces {
            network: sharing.own_network.then(|| node.netns(&sandbox.id)),
            ipc: sharing.own_ipc.then(|| of_holder("ipc")),
            uts: own_uts.then(|| of_holder("uts")),
            pid: from.pid,
            users: mappings.map(|users| (of_holder("user"), users)),
        },
        capabilities,
        devices: devices::devices(&config.devices, context.privileged)?,
        mounts: mounts::mounts(&asked_mounts, &around)?,
        root_propagation: mounts::root_propagation(&asked_mounts),
        resources: resources::to_json(asked, resources::Controllers::of(&pod_cgroup))?,
        oom_score_adj: oom_score_adj(asked.oom_score_adj, node.config.restrict_oom_score_adj),
        seccomp,
        rlimits: &node.config.rlimits,
        annotations: handler.map_or_else(Default::default, |handler| {
            annotations::chosen(handler, &sandbox.config.annotations, &config.annotations)
        }),
        apparmor: apparmor::profile(&context)?,
        selinux,
    })?;
    devices.apply(&mut spec, context.privileged)?;
    write(&bundle.join("config.json"), &spec.to_string())?;
    Ok(user)
}

/// Where the server may not lower it, no lower than its own.
fn oom_score_adj(asked: i64, restrict: bool) -> i64 {
    if !restrict {
        return asked;
    }
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    asked.max(own.trim().parse().unwrap_or_default())
}
