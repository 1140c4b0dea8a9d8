//! Devices by the Container Device Interface (the CNCF's SPEC.md): files on the node say what a
//! container that is given a device gets with it.

mod registry;
mod spec_file;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rrun_proto::v1::ContainerConfig;
use serde_json::{Map, Value, json};

use super::devices;
use registry::Registry;
use rrun_calls::error::{Error, Result};
use spec_file::{ContainerEdits, DeviceNode, Mount};

/// What an annotation that names devices begins with.
const ANNOTATION: &str = "cdi.k8s.io/";

/// The edits for a container, in the order in which to make them.
#[derive(Debug, Default)]
pub(crate) struct DeviceEdits(Vec<Arc<ContainerEdits>>);

/// The names in the request and in its annotations, each once.
fn asked(config: &ContainerConfig) -> Vec<&str> {
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
    let names = asked(config);
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
    pub(crate) fn apply(&self, spec: &mut Value, privileged: bool) -> Result<()> {
        for edits in &self.0 {
            edits.apply(spec, privileged)?;
        }
        Ok(())
    }
}

/// The list at this place, made if it is not there.
fn list<'a>(spec: &'a mut Value, path: &[&str]) -> Result<&'a mut Vec<Value>> {
    let mut at = spec;
    for part in path {
        if at.is_null() {
            *at = Value::Object(Map::new());
        }
        at = &mut at[*part];
    }
    if at.is_null() {
        *at = Value::Array(Vec::new());
    }
    at.as_array_mut()
        .ok_or_else(|| Error::internal(format!("{} of config.json is no list", path.join("."))))
}

impl ContainerEdits {
    fn apply(&self, spec: &mut Value, privileged: bool) -> Result<()> {
        let env = list(spec, &["process", "env"])?;
        for pair in &self.env {
            let name = |pair: &str| pair.split('=').next().unwrap_or_default().to_owned();
            env.retain(|there| there.as_str().map(name) != Some(name(pair)));
            env.push(json!(pair));
        }
        for node in &self.device_nodes {
            node.apply(spec, privileged)?;
        }
        for device in &self.net_devices {
            if spec["linux"].get("netDevices").is_none() {
                spec["linux"]["netDevices"] = json!({});
            }
            spec["linux"]["netDevices"][&device.host_interface_name] =
                json!({ "name": device.name });
        }
        for mount in &self.mounts {
            mount.apply(spec)?;
        }
        for hook in &self.hooks {
            let mut value = json!({ "path": hook.path, "args": hook.args, "env": hook.env });
            if let Some(timeout) = hook.timeout {
                value["timeout"] = json!(timeout);
            }
            list(spec, &["hooks", &hook.hook_name])?.push(value);
        }
        if let Some(rdt) = &self.intel_rdt {
            spec["linux"]["intelRdt"] = json!(rdt);
        }
        let groups = list(spec, &["process", "user", "additionalGids"])?;
        for gid in &self.additional_gids {
            let gid = json!(gid);
            if !groups.contains(&gid) {
                groups.push(gid);
            }
        }
        Ok(())
    }
}

impl DeviceNode {
    fn apply(&self, spec: &mut Value, privileged: bool) -> Result<()> {
        let host = self.host_path.as_ref().unwrap_or(&self.path);
        let mut node = json!({ "path": self.path });
        let known = self
            .r#type
            .as_deref()
            .map(|kind| (kind, self.major, self.minor));
        match known {
            Some(("p", ..)) => node["type"] = json!("p"),
            Some((kind, Some(major), Some(minor))) => {
                node["type"] = json!(kind);
                node["major"] = json!(major);
                node["minor"] = json!(minor);
            }
            // What the file leaves out is the node's own.
            _ => node = devices::node_of(host, &self.path)?,
        }
        if let Some(mode) = self.file_mode {
            node["fileMode"] = json!(mode & 0o7777);
        }
        // As the Go implementation has it, a device belongs to who the container runs as.
        let process = |field: &str| {
            let id = spec.pointer(&format!("/process/user/{field}"));
            id.and_then(Value::as_u64).filter(|id| *id > 0)
        };
        for (field, own) in [("uid", self.uid), ("gid", self.gid)] {
            match (own, process(field)) {
                (Some(id), _) => node[field] = json!(id),
                (None, Some(id)) => node[field] = json!(id),
                (None, None) => {}
            }
        }
        let rule = json!({
            "allow": true, "type": node["type"], "major": node["major"], "minor": node["minor"],
            "access": self.permissions.as_deref().filter(|p| !p.is_empty()).unwrap_or("rwm"),
        });
        let is_device = node["type"] != "p";
        let nodes = list(spec, &["linux", "devices"])?;
        nodes.retain(|there| there["path"] != node["path"]);
        nodes.push(node);
        if is_device && !privileged {
            list(spec, &["linux", "resources", "devices"])?.push(rule);
        }
        Ok(())
    }
}

impl Mount {
    fn apply(&self, spec: &mut Value) -> Result<()> {
        let kind = self.r#type.as_deref().filter(|kind| !kind.is_empty());
        let mount = json!({
            "destination": self.container_path, "source": self.host_path,
            "type": kind.unwrap_or("bind"), "options": self.options,
        });
        let mounts = list(spec, &["mounts"])?;
        mounts.retain(|there| there["destination"] != mount["destination"]);
        mounts.push(mount);
        // A parent before what is mounted in it.
        mounts.sort_by_key(|mount| {
            let destination = mount["destination"].as_str().unwrap_or_default();
            Path::new(destination).components().count()
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::CdiDevice;

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
        let found = find(std::slice::from_ref(&dir), &config)?;
        let mut spec = json!({
            "process": { "env": ["PATH=/bin"], "user": { "uid": 5, "gid": 0 } },
            "mounts": [{ "destination": "/etc/one/deep" }],
            "linux": { "resources": {} },
        });
        found.apply(&mut spec, false)?;
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
        let mut spec = json!({ "process": { "env": [], "user": {} } });
        find(&dirs, &config)?.apply(&mut spec, false)?;
        assert_eq!(spec["process"]["env"], json!(["FROM=high"]));

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
