//! Creates a container's bundle for the runtime's `create`: mounts the root filesystem, creates the
//! volumes and writes config.json. All functions in this module block.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rrun_proto::v1::{LinuxContainerSecurityContext, Mount};

use super::create::must_be_ready;
use super::namespace_owners::NamespaceOwners;
use super::seccomp::{SeccompFilter, SeccompProfile};
use super::spec::{Namespaces, SpecInputs};
use super::user::{Accounts, User};
use super::volumes::Volumes;
use super::{
    ContainerRecord, annotations, apparmor, capabilities, cdi, devices, idmap, image_volume,
    mounts, propagation, resources, rootfs, size, spec, volumes,
};
use crate::cgroup::{self, slice};
use crate::handlers::Features;
use crate::node::Node;
use crate::sandbox::files::{etc, let_through, of_node, private_dir, write_secret};
use crate::sandbox::{Sandbox, namespaces, users};
use crate::selinux::{self, Labels, relabel};
use rrun_calls::error::{During, Result};
use rrun_images::Image;

/// The inputs from which the server creates a container's bundle.
pub(super) struct Inputs<'a> {
    pub node: &'a Node,
    pub sandbox: &'a Sandbox,
    pub record: &'a ContainerRecord,
    /// The bundle's directory.
    pub dir: &'a Path,
    pub image: Arc<Image>,
    /// The directories of the image's layers, uppermost layer first.
    pub layers: Vec<PathBuf>,
    /// The images that the container's mounts request.
    pub image_volumes: Vec<image_volume::ResolvedImage>,
    pub owners: NamespaceOwners,
    /// The features of the pod's runtime handler.
    pub features: Features,
}

/// The security settings of the container.
struct Security {
    context: LinuxContainerSecurityContext,
    capabilities: capabilities::CapabilitySets,
    /// The name of the container's AppArmor profile.
    apparmor: Option<String>,
    /// The value of `linux.seccomp`.
    seccomp: Option<SeccompFilter>,
    selinux: Option<Labels>,
}

/// The pod's user namespace, if the pod has a separate one.
struct UserNamespace {
    mappings: Option<users::Mappings>,
    users: Option<idmap::Users>,
    /// The user id and the group id that the root of the user namespace has on the node.
    root: (u32, u32),
}

/// The values that result from the creation of a bundle.
pub(super) struct Filled {
    /// The user that the container runs as.
    pub user: User,
    /// The size of the configuration that counts for `pod_configuration_bytes`.
    pub configuration_bytes: usize,
}

/// Creates the bundle's contents.
pub(super) fn fill(mut inputs: Inputs<'_>) -> Result<Filled> {
    let security = security(&inputs)?;
    make_log_directory(&inputs)?;
    let writable = inputs.node.writable_layer(&inputs.record.id);
    private_dir(&writable)?;
    let ids = user_namespace(&inputs)?;
    let layers = std::mem::take(&mut inputs.layers);
    let rootfs = mount_rootfs(&inputs, layers, &security, &ids, &writable)?;

    let image = &inputs.image.config;
    let user = Accounts::read(&rootfs, |accounts| {
        accounts.resolve(Some(&security.context), &image.user)
    })?;
    let working_dir = spec::working_dir(&inputs.record.config, image)?;
    rootfs::make_working_dir(&rootfs, working_dir, ids.root)?;
    let mounts = prepare_mounts(&inputs, &security, &ids, &rootfs, &writable)?;
    let configuration_bytes = write_config(inputs, security, ids, &rootfs, &user, &mounts)?;
    Ok(Filled {
        user,
        configuration_bytes,
    })
}

fn security(inputs: &Inputs<'_>) -> Result<Security> {
    let context = spec::context(&inputs.record.config);
    let capabilities = capabilities::sets(
        context.capabilities.as_ref(),
        context.privileged,
        capabilities::bounding_set(),
    )?;
    let apparmor = apparmor::profile(&context)?;
    let config = &inputs.node.config;
    let profile = SeccompProfile::of(&context, &config.unset_seccomp_profile)?;
    let socketcall = config.seccomp_socketcall.is_allowed(apparmor.as_deref());
    let seccomp = profile.profile(capabilities, socketcall)?;
    let selinux = match &inputs.sandbox.selinux {
        Some(pod) => {
            let options = context.selinux_options.clone().unwrap_or_default();
            Some(selinux::of_container(pod, &options)?)
        }
        None => None,
    };
    Ok(Security {
        context,
        capabilities,
        apparmor,
        seccomp,
        selinux,
    })
}

impl Security {
    /// Returns the SELinux label of the container's files.
    fn file_label(&self) -> Option<&selinux::label::Label> {
        self.selinux.as_ref().map(|labels| &labels.files)
    }
}

fn make_log_directory(inputs: &Inputs<'_>) -> Result<()> {
    let directory = &inputs.sandbox.config.log_directory;
    let log = super::log_path(directory, &inputs.record.config.log_path);
    match log.as_deref().and_then(Path::parent) {
        Some(dir) => std::fs::create_dir_all(dir)
            .during(|| format!("create the log directory {}", dir.display())),
        None => Ok(()),
    }
}

fn user_namespace(inputs: &Inputs<'_>) -> Result<UserNamespace> {
    let mappings = users::mappings(&inputs.sandbox.config)?;
    let root = mappings.as_ref().map(|mappings| mappings.root());
    let users = match root {
        Some(root) => {
            let_through(&[], &[inputs.dir], root.1)?;
            Some(idmap::Users::of(inputs.owners.holder, root)?)
        }
        None => None,
    };
    Ok(UserNamespace {
        mappings,
        users,
        root: root.unwrap_or_default(),
    })
}

/// Mounts the writable layer over the image's layers, and returns the path of the mount.
fn mount_rootfs(
    inputs: &Inputs<'_>,
    layers: Vec<PathBuf>,
    security: &Security,
    ids: &UserNamespace,
    writable: &Path,
) -> Result<PathBuf> {
    let target = inputs.dir.join("rootfs");
    let base = &inputs.node.config.root;
    let lower = rootfs::over_mount_points(layers, base);
    rootfs::Overlay {
        lower: &lower,
        writable,
        target: &target,
        base,
        users: ids.users.as_ref(),
        label: security.file_label(),
    }
    .mount()?;
    Ok(target)
}

/// Creates the sources of the container's mounts and mounts the image volumes. Returns the
/// requested mounts, and a mount for each volume that the container's image declares.
fn prepare_mounts(
    inputs: &Inputs<'_>,
    security: &Security,
    ids: &UserNamespace,
    rootfs: &Path,
    writable: &Path,
) -> Result<Vec<Mount>> {
    let label = security.file_label();
    let mut all = inputs.record.config.mounts.clone();
    mounts::make_sources(&all)?;
    propagation::check(&all)?;
    let images = &inputs.image_volumes;
    let users = ids.users.as_ref();
    // The work ends early when the pod is stopped. A removal of the pod waits for this work.
    let go_on = || must_be_ready(inputs.sandbox);
    image_volume::mount(
        inputs.node,
        inputs.dir,
        images,
        users,
        label,
        &mut all,
        go_on,
    )?;
    let settings = &inputs.node.config.image;
    let volumes = Volumes {
        declared: &inputs.image.config.volumes,
        requested: &all,
        rootfs,
        dir: &writable.join("volumes"),
        owner: ids.root,
        limits: volumes::Limits {
            bytes: settings.volume_bytes,
            files: settings.volume_files,
        },
    };
    let volumes = volumes.make(go_on)?;
    all.extend(volumes);
    if let Some(label) = label {
        for mount in all.iter().filter(|mount| mount.selinux_relabel) {
            relabel::relabel(Path::new(&mount.host_path), label, &go_on)?;
        }
    }
    Ok(all)
}

/// Writes config.json, and returns the size of the configuration.
fn write_config(
    inputs: Inputs<'_>,
    security: Security,
    ids: UserNamespace,
    rootfs: &Path,
    user: &User,
    mounts: &[Mount],
) -> Result<usize> {
    let (node, sandbox, record) = (inputs.node, inputs.sandbox, inputs.record);
    let config = &record.config;
    let context = &security.context;
    let privileged = context.privileged;
    let cdi = cdi::find(&node.config.cdi_spec_dirs, config)?;
    let sharing = namespaces::sharing(&sandbox.config)?;
    let pod = node.sandbox_dir(&sandbox.id);
    let mount_inputs = mounts::MountInputs {
        pod: &pod,
        etc: &etc(&pod)?,
        privileged,
        readonly_rootfs: context.readonly_rootfs,
        own_ipc: sharing.own_ipc,
        terminals: node.config.container_terminals,
        features: inputs.features,
    };
    let requested = &record.state.resources;
    let controllers = resources::Controllers::of(&cgroup::directory(&sandbox.cgroup))?;
    let handler = node.config.runtime(&sandbox.handler);
    let mut spec = spec::spec(SpecInputs {
        config,
        image: &inputs.image.config,
        user,
        hostname: &hostname(sandbox, sharing.own_uts),
        rootfs,
        cgroup: &cgroups_path(sandbox, &record.id),
        namespaces: namespaces_to_join(&inputs, sharing, ids.mappings),
        devices: devices::devices(&config.devices, privileged)?,
        mounts: mounts::mounts(mounts, &mount_inputs)?,
        root_propagation: mounts::root_propagation(mounts),
        resources: resources::limits(requested, controllers)?,
        oom_score_adj: resources::oom_score_adj(
            requested.oom_score_adj,
            node.config.restrict_oom_score_adj,
        )?,
        rlimits: &node.config.rlimits,
        annotations: handler.map_or_else(Default::default, |handler| {
            annotations::chosen(handler, &sandbox.config.annotations, &config.annotations)
        }),
        apparmor: security.apparmor,
        capabilities: security.capabilities,
        seccomp: security.seccomp,
        selinux: security.selinux,
    })?;
    cdi.apply(&mut spec, privileged)?;
    let text = spec.text()?;
    let bytes = size::of_container(config, text.len());
    size::check(node, sandbox, bytes)?;
    let path = inputs.dir.join("config.json");
    write_secret(&path, text.as_bytes()).during(|| format!("write {}", path.display()))?;
    Ok(bytes)
}

fn hostname(sandbox: &Sandbox, own_uts: bool) -> String {
    if own_uts {
        return sandbox.config.hostname.clone();
    }
    of_node("/proc/sys/kernel/hostname").trim().to_owned()
}

/// Returns `linux.cgroupsPath` in the form that the cgroup driver requires.
fn cgroups_path(sandbox: &Sandbox, id: &str) -> String {
    if slice::is_slice(&sandbox.cgroup) {
        slice::for_runtime(&sandbox.cgroup, id)
    } else {
        format!("{}/{id}", sandbox.cgroup)
    }
}

fn namespaces_to_join(
    inputs: &Inputs<'_>,
    sharing: namespaces::Sharing,
    mappings: Option<users::Mappings>,
) -> Namespaces {
    let (sandbox, holder) = (inputs.sandbox, inputs.owners.holder);
    let of_holder = |kind: &str| PathBuf::from(format!("/proc/{holder}/ns/{kind}"));
    Namespaces {
        network: sharing.own_network.then(|| inputs.node.netns(&sandbox.id)),
        ipc: sharing.own_ipc.then(|| of_holder("ipc")),
        uts: sharing.own_uts.then(|| of_holder("uts")),
        pid: inputs.owners.pid,
        users: mappings.map(|mappings| (of_holder("user"), mappings)),
    }
}
