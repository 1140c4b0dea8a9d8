//! The bundle's config.json. rrun reads and checks the whole file before it changes the system.

pub(crate) mod hooks;
pub(crate) mod spec;

use std::collections::HashMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hooks, LinuxNamespaceType as Type, LinuxResources};

use crate::cgroup;
use crate::config::spec::{Linux, Spec};
use crate::error::{Context, Error, Result, refuse};
use crate::mounts::devices::{self, Device};
use crate::mounts::options::{self, SLAVE};
use crate::mounts::{Mount, MountSources};
use crate::namespaces::idmap::IdMaps;
use crate::namespaces::net_devices::{self, NetDevice};
use crate::namespaces::resctrl::Resctrl;
use crate::namespaces::{Namespaces, sysctl};
use crate::process::{Process, lsm};
use crate::seccomp::Filter;
use crate::sys::files::read_file;
use crate::sys::path::cleaned;
use rrun_kernel::regular_file;
use rustix::fs::{FileType, OFlags};

/// The checked content of config.json, in the form in which rrun uses it.
pub(crate) struct Config {
    /// The bundle's directory, as an absolute path without symbolic links.
    pub(crate) bundle: PathBuf,
    /// The root file system on the host, as an absolute path.
    pub(crate) rootfs: PathBuf,
    pub(crate) root_readonly: bool,
    /// The mount propagation of the container's root. The bool is true if the propagation also
    /// applies to all mounts below the root. This field is `None` if config.json specifies no
    /// propagation.
    root_propagation: Option<(u64, bool)>,
    pub(crate) oci_version: String,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    pub(crate) annotations: HashMap<String, String>,
    pub(crate) namespaces: Namespaces,
    /// The id mappings of the container's new user namespace.
    pub(crate) id_maps: IdMaps,
    /// The content that rrun writes to /proc/self/timens_offsets. See time_namespaces(7).
    pub(crate) time_offsets: String,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) devices: Vec<Device>,
    pub(crate) masked_paths: Vec<String>,
    pub(crate) readonly_paths: Vec<String>,
    pub(crate) sysctl: HashMap<String, String>,
    pub(crate) cgroups_path: PathBuf,
    pub(crate) resources: LinuxResources,
    pub(crate) hooks: Hooks,
    pub(crate) seccomp: Option<Filter>,
    pub(crate) process: Process,
    /// The field `process` of config.json. Its values are the default values for processes that
    /// `exec` creates.
    pub(crate) process_spec: spec::ProcessSpec,
    /// The SELinux label of the container's mounts.
    pub(crate) mount_label: Option<String>,
    pub(crate) net_devices: Vec<NetDevice>,
    pub(crate) resctrl: Option<Resctrl>,
    pub(crate) personality: Option<spec::PersonalitySpec>,
    pub(crate) memory_policy: Option<spec::MemoryPolicySpec>,
}

impl Config {
    /// Reads and checks the config.json of a bundle.
    pub(crate) fn load(bundle: &Path) -> Result<Config> {
        let bundle = bundle
            .canonicalize()
            .doing(|| format!("open bundle {}", bundle.display()))?;
        let path = bundle.join("config.json");
        let file = regular_file::open(&path, OFlags::RDONLY)
            .doing(|| format!("read {}", path.display()))?;
        let bytes = read_file(file, &path)?;
        let spec: Spec = serde_json::from_slice(&bytes)
            .map_err(|error| Error::new(format!("parse {}: {error}", path.display())))?;
        Config::from_spec(bundle, spec).map_err(|error| error.while_doing("config.json"))
    }

    pub(crate) fn from_spec(bundle: PathBuf, mut spec: Spec) -> Result<Config> {
        check_version(&spec.oci_version)?;
        let Some(mut linux) = spec.linux.take() else {
            refuse!("linux: is missing");
        };
        if spec.vm.is_some() {
            refuse!("vm: rrun does not create virtual machines");
        }
        let Some(process_spec) = spec.process.take() else {
            refuse!("process: is missing");
        };
        let Some(root) = spec.root.as_ref() else {
            refuse!("root: is missing");
        };
        let rootfs = rootfs(&bundle, root)?;
        let mut process = Process::from_spec(&process_spec)?;
        process.inherit(linux.personality.as_ref(), linux.memory_policy.as_ref())?;
        let namespaces = Namespaces::from_spec(linux.namespaces.as_deref().unwrap_or_default())?;
        let mount_label = mount_label(&linux)?;
        let rdt = linux.intel_rdt.take();
        let config = Config {
            rootfs,
            root_readonly: root.readonly.unwrap_or(false),
            root_propagation: root_propagation(&linux)?,
            oci_version: spec.oci_version.clone(),
            hostname: spec.hostname.clone().filter(|name| !name.is_empty()),
            domainname: spec.domainname.clone().filter(|name| !name.is_empty()),
            annotations: spec.annotations.take().unwrap_or_default(),
            id_maps: IdMaps::from_spec(
                "linux.",
                linux.uid_mappings.as_deref(),
                linux.gid_mappings.as_deref(),
            )?,
            time_offsets: time_offsets(&linux),
            mounts: mounts(&spec, &bundle, mount_label.as_ref())?,
            devices: devices::from_spec(linux.devices.as_deref().unwrap_or_default())?,
            masked_paths: linux.masked_paths.take().unwrap_or_default(),
            readonly_paths: linux.readonly_paths.take().unwrap_or_default(),
            sysctl: linux.sysctl.take().unwrap_or_default(),
            cgroups_path: linux.cgroups_path.clone().unwrap_or_default(),
            resources: linux.resources.take().unwrap_or_default(),
            hooks: spec.hooks.take().unwrap_or_default(),
            seccomp: linux
                .seccomp
                .as_ref()
                .map_or(Ok(None), Filter::from_profile)?,
            process,
            process_spec,
            mount_label,
            net_devices: net_devices::from_spec(&linux.net_devices.take().unwrap_or_default())?,
            resctrl: rdt.as_ref().map(Resctrl::from_spec).transpose()?,
            personality: linux.personality.take(),
            memory_policy: linux.memory_policy.take(),
            namespaces,
            bundle,
        };
        config.check_together()?;
        Ok(config)
    }

    /// Adds a mount that config.json does not specify, and an environment variable with a path in
    /// this mount. Processes that `exec` creates also get this variable.
    pub(crate) fn add_mount(&mut self, mount: Mount, variable: String) {
        self.mounts.push(mount);
        self.process
            .env
            .extend(CString::new(variable.as_str()).ok());
        let env = &mut self.process_spec.env;
        env.get_or_insert_default().push(variable);
    }

    /// Checks the rules that involve several fields of config.json.
    fn check_together(&self) -> Result<()> {
        let namespaces = &self.namespaces;
        if !namespaces.own(Type::Mount) {
            refuse!(
                "linux.namespaces: a mount namespace is needed, because the container's file systems would otherwise be mounted on the host"
            );
        }
        let hostname = self.hostname.as_deref();
        if hostname.is_some_and(|name| !namespaces.can_have_hostname(name)) {
            refuse!(
                "hostname: rrun would change the host's name, because linux.namespaces contains no UTS namespace other than the host's"
            );
        }
        if self.domainname.is_some() && !namespaces.own(Type::Uts) {
            refuse!(
                "domainname: rrun would change the host's NIS domain name, because linux.namespaces contains no UTS namespace other than the host's"
            );
        }
        if namespaces.is_new(Type::User) && !self.id_maps.is_complete() {
            refuse!(
                "linux.uidMappings, linux.gidMappings: a new user namespace needs both mappings"
            );
        }
        if !self.id_maps.is_empty() && !namespaces.own(Type::User) {
            refuse!("linux.uidMappings: the mappings need a user namespace in linux.namespaces");
        }
        for mount in &self.mounts {
            mount.check_idmap(namespaces.own(Type::User))?;
        }
        if !self.time_offsets.is_empty() && !namespaces.is_new(Type::Time) {
            refuse!("linux.timeOffsets: the offsets need a new time namespace in linux.namespaces");
        }
        if !self.net_devices.is_empty() && !namespaces.own(Type::Network) {
            refuse!("linux.netDevices: the devices need a network namespace in linux.namespaces");
        }
        sysctl::validate(&self.sysctl, namespaces)?;
        hooks::validate(&self.hooks)?;
        if !rustix::process::geteuid().is_root() {
            self.check_unprivileged()?;
        }
        cgroup::validate(&self.cgroups_path, &self.resources)
    }

    /// Checks the rules that apply if rrun's caller is not root.
    ///
    /// # Errors
    /// Fails if the configuration requires root's privileges. The error names the invalid field.
    fn check_unprivileged(&self) -> Result<()> {
        if !self.namespaces.own(Type::User) {
            refuse!(
                "linux.namespaces: without root's rights, a container needs a user namespace; `rrun spec --rootless` writes a config.json with a user namespace"
            );
        }
        if !self.net_devices.is_empty() {
            refuse!("linux.netDevices: only root can move the host's network devices");
        }
        Ok(())
    }

    /// Returns whether rrun can create the container without a separate cgroup. The container needs
    /// a separate cgroup if the configuration requests a cgroup path or a resource limit. Device
    /// rules do not count as resource limits.
    pub(crate) fn can_do_without_cgroup(&self) -> bool {
        let mut limits = self.resources.clone();
        limits.set_devices(None);
        self.cgroups_path.as_os_str().is_empty() && limits == LinuxResources::default()
    }

    /// Returns whether rrun creates the files in the container's /dev. If /dev is the host's /dev,
    /// rrun does not create these files.
    pub(crate) fn fills_dev(&self) -> bool {
        !self.mounts.iter().any(Mount::is_hosts_dev)
    }

    /// Returns whether rrun creates the files of /dev in the root file system's own directory /dev,
    /// or mounts a file system below this directory.
    pub(crate) fn uses_dev_of_rootfs(&self) -> bool {
        let first = self
            .mounts
            .iter()
            .find(|mount| mount.destination.starts_with("/dev"));
        self.fills_dev() && !first.is_some_and(Mount::is_new_dev)
    }

    /// Returns whether the first process must wait for its parent. The parent on the host does the
    /// steps that the first process has no right to do. These steps write id mappings, set limits,
    /// move network devices, and create resctrl groups.
    pub(crate) fn needs_parent(&self) -> bool {
        self.namespaces.own(Type::User) || !self.net_devices.is_empty() || self.resctrl.is_some()
    }

    /// Returns whether the first process sets up the container without opening a device that a
    /// device rule could deny. Only two steps can open such a device: a mount of a file system that
    /// is stored on a block device, and a createContainer hook.
    pub(crate) fn opens_no_devices(&self) -> bool {
        let hooks = self.hooks.create_container().as_deref();
        hooks.unwrap_or_default().is_empty() && self.mounts.iter().all(Mount::opens_no_device)
    }

    /// Returns the parts of the configuration that refer to files on the host. rrun opens these
    /// files before the host's file system becomes unreachable.
    pub(crate) fn mount_sources(&self) -> MountSources<'_> {
        MountSources {
            rootfs: &self.rootfs,
            mounts: &self.mounts,
            root_is_shared: self.root_is_shared(),
            root_is_slave: self.root_is_slave(),
            namespaces: &self.namespaces,
            id_maps: &self.id_maps,
        }
    }

    /// Returns whether new mounts in the container's root propagate to the host.
    pub(crate) fn root_is_shared(&self) -> bool {
        matches!(self.root_propagation, Some((kind, _)) if kind == options::SHARED)
    }

    /// Returns whether new mounts of the host propagate to the container's root. If config.json
    /// specifies no propagation, they do not.
    pub(crate) fn root_is_slave(&self) -> bool {
        self.root_propagation.is_some()
    }

    /// Returns the propagation that the first process sets on the container's root after it has
    /// entered the root. Returns `None` if the root already has the requested propagation, or if
    /// config.json specifies no propagation.
    pub(crate) fn final_propagation(&self) -> Option<(u64, bool)> {
        self.root_propagation.filter(|(kind, _)| *kind != SLAVE)
    }
}

/// Checks that `ociVersion` is 1.x.y, with or without a suffix such as `-dev`.
fn check_version(version: &str) -> Result<()> {
    let mut parts = version.split(['.', '-', '+']);
    let number = |part: Option<&str>| part.and_then(|part| part.parse::<u32>().ok());
    match (
        number(parts.next()),
        number(parts.next()),
        number(parts.next()),
    ) {
        (Some(1), Some(_), Some(_)) => Ok(()),
        (Some(_), Some(_), Some(_)) => {
            refuse!(
                "ociVersion: {version} is not supported, because rrun supports only version 1 of the specification"
            )
        }
        _ if version.is_empty() => refuse!("ociVersion: is missing"),
        _ => refuse!("ociVersion: {version} is not a version number"),
    }
}

/// Returns the path of the root file system. Fails if root.path contains a symbolic link.
fn rootfs(bundle: &Path, root: &spec::Root) -> Result<PathBuf> {
    let rootfs = bundle.join(&root.path);
    let rootfs = rootfs
        .canonicalize()
        .doing(|| format!("root.path {}", rootfs.display()))?;
    let stat = rustix::fs::stat(&rootfs).doing(|| format!("root.path {}", rootfs.display()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        refuse!("root.path: {} is not a directory", rootfs.display());
    }
    // Like runc, rrun refuses symbolic links in root.path. A user with write access to such a link
    // could choose the container's root.
    if rootfs != cleaned(&bundle.join(&root.path)) {
        refuse!(
            "root.path: {} contains a symbolic link; specify the directory {} instead",
            root.path.display(),
            rootfs.display()
        );
    }
    if rootfs == Path::new("/") {
        refuse!("root.path: the host's root directory cannot be a container's root");
    }
    Ok(rootfs)
}

fn root_propagation(linux: &Linux) -> Result<Option<(u64, bool)>> {
    match linux.rootfs_propagation.as_deref() {
        None | Some("") => Ok(None),
        Some(name) => options::propagation(name).map(Some).ok_or_else(|| {
            Error::new(format!(
                "linux.rootfsPropagation: the propagation {name} is unknown"
            ))
        }),
    }
}

fn mounts(spec: &Spec, bundle: &Path, label: Option<&String>) -> Result<Vec<Mount>> {
    let entries = spec.mounts.iter().flatten().enumerate();
    entries
        .map(|(index, mount)| Ok(Mount::from_spec(index, mount, bundle)?.with_label(label)))
        .collect()
}

/// Returns the SELinux label of the container's mounts, if config.json specifies one.
///
/// # Errors
/// Fails if the label is malformed, or if SELinux is not enabled in the kernel.
fn mount_label(linux: &Linux) -> Result<Option<String>> {
    let label = linux.mount_label.clone().filter(|label| !label.is_empty());
    if let Some(label) = &label {
        if label.contains(['\0', '\n']) {
            refuse!("linux.mountLabel: {label:?} is not a valid SELinux label");
        }
        if !lsm::has_selinux()? {
            refuse!(
                "linux.mountLabel: {label} cannot be used, because SELinux is not enabled in this kernel"
            );
        }
    }
    Ok(label)
}

fn time_offsets(linux: &Linux) -> String {
    let mut text = String::new();
    for (clock, offset) in linux.time_offsets.iter().flatten() {
        let (secs, nanos) = (offset.secs.unwrap_or(0), offset.nanosecs.unwrap_or(0));
        text.push_str(&format!("{clock} {secs} {nanos}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_version_1_is_accepted() {
        for version in ["1.0.0", "1.0.2-dev", "1.3.0", "1.2.1+dev"] {
            assert!(check_version(version).is_ok(), "{version}");
        }
        for version in ["", "2.0.0", "0.9.9", "1.0", "x.y.z", "one"] {
            let error = check_version(version).unwrap_err().to_string();
            assert!(error.starts_with("ociVersion"), "{error}");
        }
    }

    #[test]
    fn an_error_names_the_missing_contradictory_or_unsupported_field() {
        let directory = std::env::temp_dir().join(format!("rrun-config-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("rootfs")).unwrap();
        let process = r#""process":{"user":{"uid":0,"gid":0},"args":["a"],"cwd":"/"}"#;
        for (rest, words) in [
            (r#""linux":{"namespaces":[]}"#.to_owned(), "process"),
            (
                format!(r#"{process},"linux":{{"namespaces":[]}}"#),
                "linux.namespaces",
            ),
            (
                format!(
                    r#"{process},"hostname":"x","linux":{{"namespaces":[{{"type":"mount"}}]}}"#
                ),
                "hostname",
            ),
            (
                format!(
                    r#"{process},"linux":{{"namespaces":[{{"type":"mount"}}],"seccomp":{{"defaultAction":"SCMP_ACT_NO"}}}}"#
                ),
                "linux.seccomp",
            ),
            (process.to_owned(), "linux"),
        ] {
            let json = format!(r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},{rest}}}"#);
            std::fs::write(directory.join("config.json"), json).unwrap();
            let error = Config::load(&directory).err().unwrap().to_string();
            assert!(error.contains(&format!("config.json: {words}")), "{error}");
        }
        std::fs::remove_dir_all(directory).unwrap();
    }
}
