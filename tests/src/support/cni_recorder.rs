//! A CNI plugin that is a shell script. The plugin records its calls, and runs the shell commands
//! that a test specifies.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::support::cni::write;
use crate::support::machine::Result;
use crate::support::node::Node;

/// The address that the plugin returns for ADD.
pub(crate) const ADDRESS: &str = "10.77.0.2";

/// One recorded call of the plugin.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) environment: Vec<String>,
    pub(crate) input: Value,
}

impl Call {
    pub(crate) fn variable(&self, name: &str) -> Option<&str> {
        let mut all = self.environment.iter();
        all.find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    }
}

/// Installs the plugin in a separate directory, once for each name in `plugins`. Then restarts the
/// server. The restarted server searches for plugins first in this directory. `settings` are lines
/// for the `[cni]` table of the server's configuration, and `mode` is the value of `network.mode`.
pub(crate) fn install(node: &mut Node, plugins: &[&str], mode: &str, settings: &str) -> Result {
    let bin = node.join("bin");
    for dir in ["bin", "calls", "behave"] {
        fs::create_dir_all(node.join(dir))?;
    }
    let (calls, behave) = (node.join("calls"), node.join("behave"));
    let script = format!(
        "#!/bin/sh\ninput=$(cat)\nname=$(date +%s%N)-$$\n\
         {{ env | grep ^CNI_; echo; echo \"$input\"; }} > {calls}/.$name && mv {calls}/.$name {calls}/$name\n\
         kind=${{0##*/}}\n\
         for file in {behave}/$CNI_COMMAND {behave}/$kind-$CNI_COMMAND; do [ ! -f $file ] || . $file; done\n\
         [ $CNI_COMMAND != ADD ] || echo '{{\"cniVersion\":\"1.1.0\",\"ips\":[{{\"address\":\"{ADDRESS}/24\"}}]}}'\n",
        calls = calls.display(),
        behave = behave.display(),
    );
    for plugin in plugins {
        let path = bin.join(plugin);
        fs::write(&path, &script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    fs::write(
        node.join("config.d/50-cni.toml"),
        format!(
            "cni_bin_dir = \"{}:/usr/lib/cni\"\n[network]\nmode = \"{mode}\"\n[cni]\n{settings}\n",
            bin.display()
        ),
    )?;
    node.terminate_server()?;
    node.start_server()
}

/// Writes a CNI configuration list with the plugins `plugins`. Each plugin requests every
/// capability.
pub(crate) fn configure(node: &Node, file: &str, version: &str, plugins: &[&str]) -> Result {
    let capabilities = json!({
        "portMappings": true, "bandwidth": true, "ipRanges": true, "dns": true, "mac": true,
        "ips": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true,
    });
    let plugins = plugins
        .iter()
        .map(|plugin| json!({ "type": plugin, "marker": file, "capabilities": capabilities }));
    let plugins: Vec<Value> = plugins.collect();
    let list = json!({ "cniVersion": version, "name": "recorded", "plugins": plugins });
    write(node, file, &list.to_string())
}

/// Sets the shell commands that the plugin runs for a CNI command. If `command` is a CNI command
/// such as `DEL`, all plugins run `script`. If `command` is `PLUGIN-DEL`, only the plugin with the
/// name PLUGIN runs `script`. An empty `script` removes the shell commands.
pub(crate) fn behave(node: &Node, command: &str, script: &str) -> Result {
    let path = node.join("behave").join(command);
    if script.is_empty() {
        return Ok(fs::remove_file(path)?);
    }
    let new = node.join("behave").join(format!(".{command}"));
    fs::write(&new, script)?;
    Ok(fs::rename(new, path)?)
}

/// Returns all calls so far with the CNI command `command`, in the order of the calls.
pub(crate) fn calls(node: &Node, command: &str) -> Result<Vec<Call>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(node.join("calls"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    let mut all = Vec::new();
    for name in names {
        let text = fs::read_to_string(node.join("calls").join(&name))?;
        let (environment, input) = text
            .split_once("\n\n")
            .ok_or("the record of a CNI plugin's call contains no input")?;
        let environment: Vec<String> = environment.lines().map(str::to_owned).collect();
        let call = Call {
            environment,
            input: match input.trim() {
                // If the server was killed before it wrote the plugin's input, the recorded input
                // is empty.
                "" => Value::Null,
                input => serde_json::from_str(input).map_err(|error| {
                    format!("cannot parse the CNI plugin's input: {error}; the input: {input}")
                })?,
            },
        };
        if call.variable("CNI_COMMAND") == Some(command) {
            all.push(call);
        }
    }
    Ok(all)
}
