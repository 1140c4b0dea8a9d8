//! Devices by the Container Device Interface (the CNCF's SPEC.md): files on the node say what a
//! container that is given a device gets with it.

mod registry;
mod spec_file;

use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime::{
    Hooks, Linux, LinuxDevice, LinuxDeviceType, LinuxNetDevice, Process, User,
};
use rrun_proto::v1::ContainerConfig;

use super::spec::ConfigJson;
use super::{devices, mounts};
use registry::Registry;
use rrun_calls::error::{Error, Result};
pub(crate) use spec_file::IntelRdt;
use spec_file::{ContainerEdits, DeviceNode, Hook, Mount, NetDevice};

/// What an annotation that names devices begins with.
const ANNOTATION: &str = "cdi.k8s.io/";

/// The edits for a container, in the order in which to make them.
#[derive(Debug, Default)]
pub(crate) struct DeviceEdits(Vec<Arc<ContainerEdits>>);

/// The names in the request and in its annotations, each once.
fn requested(config: &ContainerConfig) -> Vec<&str> {
    let fields = config.cdi_devices.iter().map(|device| device.name.as_str());
    let annotations = config.annotations.iter();
    let annotations = annotations
        .filter(|(name, _)| name.starts_with(ANNOTATION))
        .flat_map(|(_, value)| value.split(','))
        .map(str::trim);
    let mut names: Vec<&str> = Vec::new();
    for name in fields.chain(annotations) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Looks up the devices that the container asks for. Blocks.
pub(crate) fn find(dirs: &[PathBuf], config: &ContainerConfig) -> Result<DeviceEdits> {
    let names = requested(config);
    if names.is_empty() {
        return Ok(DeviceEdits::default());
    }
    let registry = Registry::read(dirs);
    let mut edits = Vec::new();
    let mut files = Vec::new();
    for name in names {
        let device = registry.device(name)?;
        // The edits of a file for all its devices are made once.
        if !files.contains(&device.file) {
            files.push(device.file);
            edits.push(Arc::clone(&device.shared_edits));
        }
        edits.push(Arc::clone(&device.own_edits));
    }
    Ok(DeviceEdits(edits))
}

impl DeviceEdits {
    /// Makes the edits in config.json. Looks at the devices, which blocks.
    pub(crate) fn apply(&self, config: &mut ConfigJson, privileged: bool) -> Result<()> {
        for edits in &self.0 {
            edits.apply(config, privileged)?;
        }
        Ok(())
    }
}

impl ContainerEdits {
    fn apply(&self, config: &mut ConfigJson, privileged: bool) -> Result<()> {
        self.set_environment(&mut config.process.typed);
        for node in &self.device_nodes {
            node.apply(config, privileged)?;
        }
        for device in &self.net_devices {
            device.apply(&mut config.linux.typed);
        }
        for mount in &self.mounts {
            mount.apply(&mut config.mounts);
        }
        for hook in &self.hooks {
            hook.apply(config.hooks.get_or_insert_default())?;
        }
        if let Some(rdt) = &self.intel_rdt {
            config.linux.intel_rdt = Some(rdt.clone());
        }
        let user = config.process.typed.user_mut();
        let groups = user.additional_gids_mut().get_or_insert_default();
        for gid in &self.additional_gids {
            if !groups.contains(gid) {
                groups.push(*gid);
            }
        }
        Ok(())
    }

    fn set_environment(&self, process: &mut Process) {
        let env = process.env_mut().get_or_insert_default();
        for pair in &self.env {
            let name = pair.split('=').next();
            env.retain(|other| other.split('=').next() != name);
            env.push(pair.clone());
        }
    }
}

impl DeviceNode {
    fn apply(&self, config: &mut ConfigJson, privileged: bool) -> Result<()> {
        let node = self.node(config.process.typed.user())?;
        let linux = &mut config.linux.typed;
        if node.typ() != LinuxDeviceType::P && !privileged {
            let access = self.permissions.as_deref().filter(|text| !text.is_empty());
            let rule = devices::allow(&node, access.unwrap_or("rwm"));
            let resources = linux.resources_mut().get_or_insert_default();
            resources.devices_mut().get_or_insert_default().push(rule);
        }
        let nodes = linux.devices_mut().get_or_insert_default();
        nodes.retain(|other| other.path() != node.path());
        nodes.push(node);
        Ok(())
    }

    /// The device, from the file and, for what it leaves out, from the node.
    fn node(&self, user: &User) -> Result<LinuxDevice> {
        let mut node = LinuxDevice::default();
        node.set_path(self.path.clone());
        match (self.r#type.as_deref(), self.major, self.minor) {
            (Some("p"), ..) => {
                node.set_typ(LinuxDeviceType::P);
            }
            (Some(kind), Some(major), Some(minor)) => {
                let kind = kind
                    .parse()
                    .map_err(|_| Error::invalid(format!("{kind:?} is no type of a device")))?;
                node.set_typ(kind)
                    .set_major(major.into())
                    .set_minor(minor.into());
            }
            _ => {
                let host = self.host_path.as_ref().unwrap_or(&self.path);
                node = devices::node_of(host, &self.path)?;
            }
        }
        if let Some(mode) = self.file_mode {
            node.set_file_mode(Some(mode & 0o7777));
        }
        // As the Go implementation has it, a device belongs to who the container runs as.
        let not_root = |id: u32| (id > 0).then_some(id);
        if let Some(uid) = self.uid.or(not_root(user.uid())) {
            node.set_uid(Some(uid));
        }
        if let Some(gid) = self.gid.or(not_root(user.gid())) {
            node.set_gid(Some(gid));
        }
        Ok(node)
    }
}

impl NetDevice {
    fn apply(&self, linux: &mut Linux) {
        let mut device = LinuxNetDevice::default();
        device.set_name(Some(self.name.clone()));
        let devices = linux.net_devices_mut().get_or_insert_default();
        devices.insert(self.host_interface_name.clone(), device);
    }
}

impl Mount {
    fn apply(&self, mounts: &mut Vec<oci_spec::runtime::Mount>) {
        let kind = self.r#type.as_deref().filter(|kind| !kind.is_empty());
        let kind = kind.unwrap_or("bind");
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        let entry = mounts::entry(&self.container_path, kind, &self.host_path, &options);
        mounts.retain(|other| other.destination() != entry.destination());
        mounts.push(entry);
        mounts::sort(mounts);
    }
}

impl Hook {
    fn apply(&self, hooks: &mut Hooks) -> Result<()> {
        let mut entry = oci_spec::runtime::Hook::default();
        entry
            .set_path(self.path.clone())
            .set_args(Some(self.args.clone()))
            .set_env(Some(self.env.clone()))
            .set_timeout(self.timeout);
        let list = match self.hook_name.as_str() {
            "prestart" => hooks.prestart_mut(),
            "createRuntime" => hooks.create_runtime_mut(),
            "createContainer" => hooks.create_container_mut(),
            "startContainer" => hooks.start_container_mut(),
            "poststart" => hooks.poststart_mut(),
            "poststop" => hooks.poststop_mut(),
            other => return Err(Error::invalid(format!("{other:?} is no hook"))),
        };
        list.get_or_insert_default().push(entry);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::CdiDevice;
    use serde_json::json;

    use super::*;

    fn directory(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("rrun-cdi-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        dir
    }

    fn asks(names: &[&str]) -> ContainerConfig {
        let device = |name: &&str| CdiDevice {
            name: (*name).into(),
        };
        ContainerConfig {
            cdi_devices: names.iter().map(device).collect(),
            ..ContainerConfig::default()
        }
    }

    #[test]
    fn a_device_brings_what_its_file_says() -> Result<(), Box<dyn std::error::Error>> {
        let dir = directory("edits");
        std::fs::create_dir_all(&dir)?;
        std::fs::write(
            dir.join("a.yaml"),
            "cdiVersion: 0.6.0\nkind: example.com/net\ncontainerEdits:\n  env: [ALL=1]\n\
             devices:\n- name: one\n  containerEdits:\n    env: [PATH=/x]\n    deviceNodes:\n    \
             - {path: /dev/one, hostPath: /dev/null, permissions: r}\n    mounts:\n    \
             - {hostPath: /etc, containerPath: /etc/one, options: [ro]}\n    hooks:\n    \
             - {hookName: createContainer, path: /bin/true}\n    additionalGids: [7]\n    \
             netDevices: [{hostInterfaceName: eth7, name: net1}]\n- name: two\n  containerEdits: {env: [TWO=2]}\n",
        )?;
        let mut config = asks(&["example.com/net=one"]);
        config.annotations = [(
            "cdi.k8s.io/x".to_owned(),
            "example.com/net=one,example.com/net=two".to_owned(),
        )]
        .into();
        let edits = find(std::slice::from_ref(&dir), &config)?;
        let mut config = ConfigJson::default();
        let process = &mut config.process.typed;
        process.set_env(Some(vec!["PATH=/bin".to_owned()]));
        process.user_mut().set_uid(5);
        config
            .mounts
            .push(mounts::entry("/etc/one/deep", "bind", "/x", &[]));
        edits.apply(&mut config, false)?;
        let spec = json!(config);
        assert_eq!(spec["process"]["env"], json!(["ALL=1", "PATH=/x", "TWO=2"]));
        assert_eq!(spec["process"]["user"]["additionalGids"], json!([7]));
        let node = &spec["linux"]["devices"][0];
        assert_eq!(
            (&node["path"], &node["uid"]),
            (&json!("/dev/one"), &json!(5))
        );
        assert_eq!(
            spec["linux"]["resources"]["devices"],
            json!([{ "allow": true, "type": "c", "major": 1, "minor": 3, "access": "r" }])
        );
        assert_eq!(spec["mounts"][0]["destination"], "/etc/one");
        assert_eq!(spec["hooks"]["createContainer"][0]["path"], "/bin/true");
        assert_eq!(
            spec["linux"]["netDevices"],
            json!({ "eth7": { "name": "net1" } })
        );
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }

    #[test]
    fn a_later_directory_wins_and_two_files_of_one_contradict()
    -> Result<(), Box<dyn std::error::Error>> {
        let (low, high) = (directory("low"), directory("high"));
        let write = |path: PathBuf, value: &str| {
            let text = json!({
                "cdiVersion": "0.5.0", "kind": "example.com/x",
                "devices": [{ "name": "a", "containerEdits": { "env": [value] } }],
            });
            std::fs::write(path, text.to_string())
        };
        for dir in [&low, &high] {
            std::fs::create_dir_all(dir)?;
        }
        write(low.join("1.json"), "FROM=low")?;
        write(high.join("1.json"), "FROM=high")?;
        let dirs = [low.clone(), high.clone()];
        let config = asks(&["example.com/x=a"]);
        let mut written = ConfigJson::default();
        find(&dirs, &config)?.apply(&mut written, false)?;
        let env = written.process.typed.env().clone().unwrap_or_default();
        assert!(env.contains(&"FROM=high".to_owned()), "{env:?}");
        assert!(!env.contains(&"FROM=low".to_owned()), "{env:?}");

        write(high.join("2.json"), "FROM=other")?;
        let said = find(&dirs, &config)
            .expect_err("a conflict was taken")
            .to_string();
        assert!(said.contains("1.json") && said.contains("2.json"), "{said}");

        std::fs::write(high.join("3.yaml"), "kind: [\n")?;
        for wrong in ["example.com/x=none", "no name"] {
            let said = find(&dirs, &asks(&[wrong])).expect_err(wrong).to_string();
            assert!(said.contains(wrong), "{said}");
        }
        let said = find(&dirs, &asks(&["example.com/x=none"]))
            .expect_err("none")
            .to_string();
        assert!(said.contains("3.yaml"), "{said}");
        for dir in [low, high] {
            std::fs::remove_dir_all(dir)?;
        }
        Ok(())
    }
}
