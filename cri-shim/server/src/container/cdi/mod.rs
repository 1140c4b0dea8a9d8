//! Devices of the Container Device Interface (CDI), which the CNCF's SPEC.md defines. Files on the
//! node define how a container's configuration changes when the container gets a device.

mod registry;
mod spec_file;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime::{Hooks, Linux, LinuxDevice, LinuxDeviceType, LinuxNetDevice, User};
use rrun_proto::v1::ContainerConfig;

use super::devices;
use super::mounts::{self, keep_last};
use super::spec::{ConfigJson, name_of};
use registry::Registry;
use rrun_calls::error::{Error, Result};
pub(crate) use spec_file::IntelRdt;
use spec_file::{ContainerEdits, DeviceNode, Hook, Mount, NetDevice};

/// The prefix of the annotations that request devices.
const ANNOTATION: &str = "cdi.k8s.io/";

/// The CDI edits for a container, in the order in which they are applied.
#[derive(Debug, Default)]
pub(crate) struct DeviceEdits(Vec<Arc<ContainerEdits>>);

/// Parses and checks the text of a CDI file.
#[cfg(feature = "fuzz")]
pub(crate) fn check_file(text: &str, is_json: bool) -> std::result::Result<(), String> {
    spec_file::SpecFile::parse(text, is_json).map(drop)
}

/// Returns the device names in the request and in its annotations, without duplicates.
fn requested(config: &ContainerConfig) -> Vec<&str> {
    let fields = config.cdi_devices.iter().map(|device| device.name.as_str());
    let annotations = config.annotations.iter();
    let annotations = annotations
        .filter(|(name, _)| name.starts_with(ANNOTATION))
        .flat_map(|(_, value)| value.split(','))
        .map(str::trim);
    let mut seen = HashSet::new();
    fields
        .chain(annotations)
        .filter(|name| seen.insert(*name))
        .collect()
}

/// Returns the edits of the devices that the container requests. This call blocks.
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
        // The edits that a file defines for all its devices are applied once per container.
        if !files.contains(&device.file) {
            files.push(device.file);
            edits.push(Arc::clone(&device.shared_edits));
        }
        edits.push(Arc::clone(&device.own_edits));
    }
    Ok(DeviceEdits(edits))
}

impl DeviceEdits {
    /// Applies the edits to config.json. Blocks while it reads the devices' attributes.
    pub(crate) fn apply(&self, config: &mut ConfigJson, privileged: bool) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        for edits in &self.0 {
            edits.apply(config, privileged)?;
        }
        // A later edit replaces what an earlier edit or the request sets.
        let env = config.process.typed.env_mut().get_or_insert_default();
        keep_last(env, |pair| name_of(pair).to_owned());
        if let Some(nodes) = config.linux.typed.devices_mut() {
            keep_last(nodes, |node| node.path().clone());
        }
        mounts::arrange(&mut config.mounts);
        Ok(())
    }
}

impl ContainerEdits {
    fn apply(&self, config: &mut ConfigJson, privileged: bool) -> Result<()> {
        let env = config.process.typed.env_mut().get_or_insert_default();
        env.extend(self.env.iter().cloned());
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
        linux.devices_mut().get_or_insert_default().push(node);
        Ok(())
    }

    /// Returns the device as the CDI file defines it. If the type, the major number or the minor
    /// number is missing, the server reads these values from the node's device.
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
                    .map_err(|_| Error::invalid(format!("{kind:?} is not a device type")))?;
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
        // If the CDI file does not set the device's owner, the device belongs to the container's
        // user. The CDI library for Go has the same rule.
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
        mounts.push(entry);
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
            other => {
                return Err(Error::invalid(format!(
                    "{other:?} is not the name of a hook"
                )));
            }
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

    fn config_with(names: &[&str]) -> ContainerConfig {
        let device = |name: &&str| CdiDevice {
            name: (*name).into(),
        };
        ContainerConfig {
            cdi_devices: names.iter().map(device).collect(),
            ..ContainerConfig::default()
        }
    }

    #[test]
    fn a_device_applies_the_edits_of_its_file() -> Result<(), Box<dyn std::error::Error>> {
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
        let mut config = config_with(&["example.com/net=one"]);
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
    fn a_later_directory_wins_and_two_files_of_one_directory_conflict()
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
        let config = config_with(&["example.com/x=a"]);
        let mut written = ConfigJson::default();
        find(&dirs, &config)?.apply(&mut written, false)?;
        let env = written.process.typed.env().clone().unwrap_or_default();
        assert!(env.contains(&"FROM=high".to_owned()), "{env:?}");
        assert!(!env.contains(&"FROM=low".to_owned()), "{env:?}");

        write(high.join("2.json"), "FROM=other")?;
        let message = find(&dirs, &config)
            .expect_err("a conflict between two files was accepted")
            .to_string();
        assert!(
            message.contains("1.json") && message.contains("2.json"),
            "{message}"
        );

        std::fs::write(high.join("3.yaml"), "kind: [\n")?;
        for wrong in ["example.com/x=none", "no name"] {
            let message = find(&dirs, &config_with(&[wrong]))
                .expect_err(wrong)
                .to_string();
            assert!(message.contains(wrong), "{message}");
        }
        let message = find(&dirs, &config_with(&["example.com/x=none"]))
            .expect_err("a device that does not exist was found")
            .to_string();
        assert!(message.contains("3.yaml"), "{message}");
        for dir in [low, high] {
            std::fs::remove_dir_all(dir)?;
        }
        Ok(())
    }
}
