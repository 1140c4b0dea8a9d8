//! The operations of a network: its plugins one after another; CNI specification, section 4.

use serde_json::{Map, Value, json};
use tokio::time::{Duration, Instant};

use super::configuration::{ConfigurationList, Version, kind, takes};
use super::plugin::{PluginCall, PluginDirs, PluginError, parse};
use super::result;

/// What the plugins of a network get to know of a pod.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub pod: &'a str,
    /// The namespace's path; empty: it is gone.
    pub netns: &'a str,
    pub interface: &'a str,
    /// CNI_ARGS.
    pub arguments: &'a str,
    /// What plugins get of it by the capabilities that they ask for.
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

/// One plugin's input, by the specification's section 3.
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
    let wanted = capabilities.into_iter().flatten();
    let wanted: Map<String, Value> = wanted
        .filter(|(name, _)| takes(plugin, name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !wanted.is_empty() {
        input.insert("runtimeConfig".to_owned(), Value::Object(wanted));
    }
    if let Some(previous) = previous {
        input.insert("prevResult".to_owned(), previous.clone());
    }
    input
}

/// ADD by all plugins: the last one's result.
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
        let answer = directories
            .run(PluginCall {
                command: "ADD",
                plugin: kind(plugin),
                environment: &environment,
                container: Some(target.pod),
                input: Value::Object(input).to_string().into_bytes(),
                deadline,
            })
            .await?;
        let answer = parse("ADD", kind(plugin), &answer)?;
        previous = Some(result::in_version(answer, list.version));
    }
    Ok(previous.unwrap_or_default())
}

/// DEL by all plugins, the last one first. One that fails keeps none of the others from theirs;
/// the first error is returned. One that hangs gets no more than its share of the time.
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

/// CHECK by all plugins, unless the list forbids it.
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

/// CNI_COMMAND is none that the plugin knows.
const UNKNOWN_COMMAND: u64 = 4;

/// What a plugin answers to a command that is about no single pod.
async fn of_no_pod(
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

/// STATUS by all plugins: whether ADD would do.
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
        let answer = of_no_pod(directories, "STATUS", plugin, input, timeout).await;
        match answer {
            // Written before 1.1.0, though the list says otherwise: no word against it.
            Err(PluginError::Failed {
                code: UNKNOWN_COMMAND,
                ..
            }) => {}
            answer => drop(answer?),
        }
    }
    Ok(())
}

/// GC by all plugins: what is of none of the attachments, pod and interface, is removed. Every
/// plugin is run; the first error is returned.
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
        // What the specification of 1.1.0 called it first.
        input.insert("cni.dev/attachments".to_owned(), valid.clone());
        let done = of_no_pod(directories, "GC", plugin, input, timeout).await;
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
    fn a_plugin_is_told_what_it_asks_for_and_nothing_else() {
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
