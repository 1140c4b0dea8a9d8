//! The CNI operations of a network. Each operation runs the plugins of the network one after
//! another. See the CNI specification, section 4.

use serde_json::{Map, Value, json};
use tokio::time::{Duration, Instant};

use super::configuration::{ConfigurationList, Version, kind, requests};
use super::plugin::{PluginCall, PluginDirs, PluginError, parse};
use super::result;

/// The data that the plugins of a network receive about a pod.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub pod: &'a str,
    /// The path of the pod's network namespace, or an empty string if the namespace no longer
    /// exists.
    pub netns: &'a str,
    pub interface: &'a str,
    /// The value of CNI_ARGS.
    pub arguments: &'a str,
    /// The capability arguments of the pod. Each plugin gets only the arguments that its
    /// configuration requests.
    pub capabilities: &'a Map<String, Value>,
}

impl Target<'_> {
    fn environment(&self) -> [(&'static str, String); 4] {
        [
            ("CNI_CONTAINERID", self.pod.to_owned()),
            ("CNI_NETNS", self.netns.to_owned()),
            ("CNI_IFNAME", self.interface.to_owned()),
            ("CNI_ARGS", self.arguments.to_owned()),
        ]
    }
}

/// Returns the JSON input of one plugin. See the CNI specification, section 3.
fn input(
    list: &ConfigurationList,
    plugin: &Map<String, Value>,
    capabilities: Option<&Map<String, Value>>,
    previous: Option<&Value>,
) -> Map<String, Value> {
    let mut input = plugin.clone();
    input.remove("capabilities");
    input.remove("cniVersions");
    input.insert("name".to_owned(), list.name.as_str().into());
    input.insert("cniVersion".to_owned(), list.version.as_str().into());
    let requested = capabilities.into_iter().flatten();
    let requested: Map<String, Value> = requested
        .filter(|(name, _)| requests(plugin, name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !requested.is_empty() {
        input.insert("runtimeConfig".to_owned(), Value::Object(requested));
    }
    if let Some(previous) = previous {
        input.insert("prevResult".to_owned(), previous.clone());
    }
    input
}

/// Runs ADD of all plugins, and returns the result of the last plugin.
pub(super) async fn add(
    directories: &PluginDirs,
    list: &ConfigurationList,
    target: Target<'_>,
    deadline: Instant,
) -> Result<Value, PluginError> {
    let environment = target.environment();
    let mut previous = None;
    for plugin in &list.plugins {
        let input = input(list, plugin, Some(target.capabilities), previous.as_ref());
        let output = directories
            .run(PluginCall {
                command: "ADD",
                plugin: kind(plugin),
                environment: &environment,
                container: Some(target.pod),
                input: Value::Object(input).to_string().into_bytes(),
                deadline,
            })
            .await?;
        let result = parse("ADD", kind(plugin), &output)?;
        previous = Some(result::in_version(result, list.version));
    }
    Ok(previous.unwrap_or_default())
}

/// Runs DEL of all plugins in reverse order. If a plugin fails, this function still runs the other
/// plugins, and returns the first error. Each plugin gets an equal share of the remaining time. A
/// hanging plugin therefore can't use up the time of the other plugins.
pub(super) async fn del(
    directories: &PluginDirs,
    list: &ConfigurationList,
    target: Target<'_>,
    previous: Option<&Value>,
    deadline: Instant,
) -> Result<(), PluginError> {
    let environment = target.environment();
    let previous = previous.filter(|_| list.version >= Version::V0_4_0);
    let mut first = Ok(());
    let mut left = u32::try_from(list.plugins.len()).unwrap_or(u32::MAX);
    for plugin in list.plugins.iter().rev() {
        let now = Instant::now();
        let share = deadline.saturating_duration_since(now) / left.max(1);
        left = left.saturating_sub(1);
        let input = input(list, plugin, Some(target.capabilities), previous);
        let done = directories
            .run(PluginCall {
                command: "DEL",
                plugin: kind(plugin),
                environment: &environment,
                container: Some(target.pod),
                input: Value::Object(input).to_string().into_bytes(),
                deadline: now + share,
            })
            .await;
        first = first.and(done.map(drop));
    }
    first
}

/// Runs CHECK of all plugins, unless the configuration list disables CHECK.
pub(super) async fn check(
    directories: &PluginDirs,
    list: &ConfigurationList,
    target: Target<'_>,
    previous: &Value,
    deadline: Instant,
) -> Result<(), PluginError> {
    if list.version < Version::V0_4_0 || list.disable_check {
        return Ok(());
    }
    let environment = target.environment();
    for plugin in &list.plugins {
        let input = input(list, plugin, Some(target.capabilities), Some(previous));
        directories
            .run(PluginCall {
                command: "CHECK",
                plugin: kind(plugin),
                environment: &environment,
                container: Some(target.pod),
                input: Value::Object(input).to_string().into_bytes(),
                deadline,
            })
            .await?;
    }
    Ok(())
}

/// The error code of a plugin for an unsupported command in CNI_COMMAND.
const UNKNOWN_COMMAND: u64 = 4;

/// Runs a plugin with a command that is not for a specific pod, and returns the plugin's output.
async fn run_without_pod(
    directories: &PluginDirs,
    command: &'static str,
    plugin: &Map<String, Value>,
    input: Map<String, Value>,
    timeout: Duration,
) -> Result<Vec<u8>, PluginError> {
    directories
        .run(PluginCall {
            command,
            plugin: kind(plugin),
            environment: &[],
            container: None,
            input: Value::Object(input).to_string().into_bytes(),
            deadline: Instant::now() + timeout,
        })
        .await
}

/// Runs STATUS of all plugins. Returns an error if a plugin reports that it cannot run ADD.
pub(super) async fn status(
    directories: &PluginDirs,
    list: &ConfigurationList,
    timeout: Duration,
) -> Result<(), PluginError> {
    if list.version < Version::V1_1_0 {
        return Ok(());
    }
    for plugin in &list.plugins {
        let input = input(list, plugin, None, None);
        let answer = run_without_pod(directories, "STATUS", plugin, input, timeout).await;
        match answer {
            // A plugin without support for STATUS counts as ready. A configuration list with the
            // version 1.1.0 can contain plugins for an earlier version of the CNI specification.
            Err(PluginError::Failed {
                code: UNKNOWN_COMMAND,
                ..
            }) => {}
            answer => drop(answer?),
        }
    }
    Ok(())
}

/// Runs the GC command of all plugins. The plugins remove the resources of all attachments that are
/// not in `valid`. An attachment is identified by a pod id and an interface name. If a plugin
/// fails, this function still runs the other plugins, and returns the first error.
pub(super) async fn gc(
    directories: &PluginDirs,
    list: &ConfigurationList,
    valid: &[(String, String)],
    timeout: Duration,
) -> Result<(), PluginError> {
    if list.version < Version::V1_1_0 || list.disable_gc {
        return Ok(());
    }
    let valid = valid
        .iter()
        .map(|(pod, interface)| json!({ "containerID": pod, "ifname": interface }));
    let valid: Value = valid.collect();
    let mut first = Ok(());
    for plugin in &list.plugins {
        let mut input = input(list, plugin, None, None);
        input.insert("cni.dev/valid-attachments".to_owned(), valid.clone());
        // The first published text of the CNI specification 1.1.0 called this key
        // `cni.dev/attachments`. Some plugins may expect the old name, so the input contains both.
        input.insert("cni.dev/attachments".to_owned(), valid.clone());
        let done = run_without_pod(directories, "GC", plugin, input, timeout).await;
        first = first.and(done.map(drop));
    }
    first
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn a_plugin_gets_only_the_capability_arguments_that_it_requests() {
        let plugin = object(json!({
            "type": "portmap", "snat": true,
            "capabilities": {"portMappings": true, "dns": false},
        }));
        let list = ConfigurationList {
            file: PathBuf::new(),
            name: "net".to_owned(),
            version: Version::V1_0_0,
            disable_check: false,
            disable_gc: false,
            plugins: vec![plugin.clone()],
        };
        let capabilities = object(json!({"portMappings": [], "dns": {}, "mac": "x"}));
        let previous = json!({"ips": []});
        assert_eq!(
            Value::Object(input(&list, &plugin, Some(&capabilities), Some(&previous))),
            json!({
                "type": "portmap", "snat": true, "name": "net", "cniVersion": "1.0.0",
                "runtimeConfig": {"portMappings": []}, "prevResult": {"ips": []},
            })
        );
    }
}
