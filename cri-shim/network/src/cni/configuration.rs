//! Network configurations: the files of `--cni-conf-dir`, CNI specification, section 1.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use rrun_kernel::errno::describe;

/// The most that a configuration file may have, in bytes.
const FILE_BYTES: u64 = 1 << 20;

/// Versions of the specification that plugins are talked to in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Version {
    #[serde(rename = "0.3.0")]
    V0_3_0,
    #[serde(rename = "0.3.1")]
    V0_3_1,
    #[serde(rename = "0.4.0")]
    V0_4_0,
    #[serde(rename = "1.0.0")]
    V1_0_0,
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    const ALL: [Version; 5] = [
        Version::V0_3_0,
        Version::V0_3_1,
        Version::V0_4_0,
        Version::V1_0_0,
        Version::V1_1_0,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Version::V0_3_0 => "0.3.0",
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    fn parse(text: &str) -> Option<Version> {
        Self::ALL
            .into_iter()
            .find(|version| version.as_str() == text)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A network: plugins that run one after another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ConfigurationList {
    pub file: PathBuf,
    pub name: String,
    /// As negotiated: the highest that both sides know.
    pub version: Version,
    #[serde(default)]
    pub disable_check: bool,
    #[serde(default)]
    pub disable_gc: bool,
    /// Each plugin's own configuration, as the file has it.
    pub plugins: Vec<Map<String, Value>>,
}

/// The name of a plugin's binary.
pub(super) fn kind(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or("")
}

impl ConfigurationList {
    /// Whether a plugin of the list takes this capability.
    pub(super) fn takes(&self, capability: &str) -> bool {
        self.plugins.iter().any(|plugin| takes(plugin, capability))
    }

    /// As containerd shows it in the verbose Status.
    pub(super) fn shown(&self, interface: &str) -> Value {
        let plugins = self.plugins.iter().map(|plugin| {
            let source = Value::Object(plugin.clone()).to_string();
            json!({ "Network": plugin, "Source": source })
        });
        let plugins: Vec<Value> = plugins.collect();
        json!({
            "IFName": interface,
            "Config": {
                "Name": self.name,
                "CNIVersion": self.version,
                "File": self.file,
                "Plugins": plugins,
            },
        })
    }
}

/// Whether the plugin's configuration asks for this capability.
pub(super) fn takes(plugin: &Map<String, Value>, capability: &str) -> bool {
    let wanted = plugin.get("capabilities");
    wanted.and_then(|wanted| wanted.get(capability)) == Some(&Value::Bool(true))
}

/// What says that a directory's configurations have changed: name, inode, size and time of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fingerprint(Vec<(PathBuf, u64, u64, i64, i64)>);

/// The configuration files in the order of their names, and their state. A directory that is not
/// there has none.
pub(super) fn look(dir: &Path) -> Result<(Vec<PathBuf>, Fingerprint), String> {
    let mut files = named(dir, &["conf", "conflist", "json"])?;
    files.sort();
    let mut marks = Vec::new();
    marks.extend(files.iter().map(|file| mark(file)));
    // The directories of plugins of their own that lists can have.
    for beside in subdirectories(dir) {
        marks.push(mark(&beside));
        let mut own = named(&beside, &["conf"])?;
        own.sort();
        marks.extend(own.iter().map(|file| mark(file)));
    }
    Ok((files, Fingerprint(marks)))
}

fn mark(path: &Path) -> (PathBuf, u64, u64, i64, i64) {
    match std::fs::metadata(path) {
        Ok(found) => (
            path.to_owned(),
            found.ino(),
            found.size(),
            found.mtime(),
            found.mtime_nsec(),
        ),
        Err(_) => (path.to_owned(), 0, 0, 0, 0),
    }
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut dirs: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    dirs.sort();
    dirs
}

/// The files in a directory with one of these endings.
fn named(dir: &Path, endings: &[&str]) -> Result<Vec<PathBuf>, String> {
    let failed = |error: &std::io::Error| {
        format!(
            "read the directory of CNI configurations {}: {}",
            dir.display(),
            describe(error)
        )
    };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(&error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| failed(&error))?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending.is_some_and(|ending| endings.contains(&ending)) && path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

/// Reads the first `most` files (0: all). One that is broken is an error, as it is to containerd:
/// a later file must not take its place unnoticed.
pub(super) fn load(files: &[PathBuf], most: usize) -> Result<Vec<ConfigurationList>, String> {
    let most = if most == 0 { files.len() } else { most };
    let lists: Vec<ConfigurationList> = files
        .iter()
        .take(most)
        .map(|file| read(file))
        .collect::<Result<_, _>>()?;
    for (at, list) in lists.iter().enumerate() {
        let twin = lists.iter().take(at).find(|other| other.name == list.name);
        if let Some(twin) = twin {
            return Err(format!(
                "{} and {} both configure a network called {:?}",
                twin.file.display(),
                list.file.display(),
                list.name
            ));
        }
    }
    Ok(lists)
}

fn read(file: &Path) -> Result<ConfigurationList, String> {
    let text = text(file)?;
    if file.extension().is_some_and(|ending| ending == "conflist") {
        let list = parse_list(file, &text)?;
        return with_own_plugins(list, file, &text);
    }
    parse_single(file, &text)
}

fn text(file: &Path) -> Result<String, String> {
    let failed =
        |what: &dyn fmt::Display| format!("read the CNI configuration {}: {what}", file.display());
    let opened = File::open(file).map_err(|error| failed(&describe(&error)))?;
    let mut text = String::new();
    opened
        .take(FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|error| failed(&describe(&error)))?;
    if text.len() as u64 > FILE_BYTES {
        return Err(failed(&format!("it has over {FILE_BYTES} bytes")));
    }
    Ok(text)
}

fn object(file: &Path, text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| {
        // serde_json says the place at the end of its sentence.
        let said = error.to_string();
        let what = said.split(" at line ").next().unwrap_or(&said);
        format!(
            "{}, line {}, column {}: {what}",
            file.display(),
            error.line(),
            error.column()
        )
    })
}

/// A file with the configuration of a single plugin: a list of one.
fn parse_single(file: &Path, text: &str) -> Result<ConfigurationList, String> {
    let plugin = object(file, text)?;
    if plugin.contains_key("plugins") {
        return Err(format!(
            "{}: it has \"plugins\", a list: such a file's name ends in .conflist",
            file.display()
        ));
    }
    let list = ConfigurationList {
        file: file.to_owned(),
        name: name(file, &plugin)?,
        version: version(file, &plugin)?,
        disable_check: false,
        disable_gc: false,
        plugins: vec![plugin],
    };
    checked(list)
}

fn parse_list(file: &Path, text: &str) -> Result<ConfigurationList, String> {
    let mut all = object(file, text)?;
    let plugins = match all.remove("plugins") {
        Some(Value::Array(plugins)) => plugins,
        // Its plugins may all be in a directory of their own.
        None => Vec::new(),
        Some(_) => {
            return Err(format!("{}: \"plugins\" is not a list", file.display()));
        }
    };
    let mut objects = Vec::new();
    for (at, plugin) in plugins.into_iter().enumerate() {
        match plugin {
            Value::Object(plugin) => objects.push(plugin),
            _ => {
                return Err(format!(
                    "{}: plugins[{at}] is not an object",
                    file.display()
                ));
            }
        }
    }
    Ok(ConfigurationList {
        file: file.to_owned(),
        name: name(file, &all)?,
        version: version(file, &all)?,
        disable_check: boolean(file, &all, "disableCheck")?,
        disable_gc: boolean(file, &all, "disableGC")?,
        plugins: objects,
    })
}

/// Adds the plugins of `DIR/NAME/*.conf`, unless the list says `loadOnlyInlinedPlugins`.
fn with_own_plugins(
    mut list: ConfigurationList,
    file: &Path,
    text: &str,
) -> Result<ConfigurationList, String> {
    let only = boolean(file, &object(file, text)?, "loadOnlyInlinedPlugins")?;
    if !only && let Some(dir) = file.parent() {
        let mut own = named(&dir.join(&list.name), &["conf"])?;
        own.sort();
        for file in own {
            list.plugins.push(object(&file, &self::text(&file)?)?);
        }
    }
    checked(list)
}

/// What every plugin needs.
fn checked(list: ConfigurationList) -> Result<ConfigurationList, String> {
    let file = list.file.display();
    if list.plugins.is_empty() {
        return Err(format!("{file}: \"plugins\" has no plugin"));
    }
    for (at, plugin) in list.plugins.iter().enumerate() {
        let kind = kind(plugin);
        if kind.is_empty() || kind.contains(['/', '\0']) || kind == "." || kind == ".." {
            return Err(format!(
                "{file}: \"type\" of plugins[{at}] is {}, it has to be the name of a plugin's binary",
                plugin.get("type").unwrap_or(&Value::Null)
            ));
        }
        let capabilities = plugin.get("capabilities");
        if capabilities.is_some_and(|value| !value.is_object()) {
            return Err(format!(
                "{file}: \"capabilities\" of plugins[{at}] ({kind}) is not an object"
            ));
        }
    }
    Ok(list)
}

fn boolean(file: &Path, all: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match all.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        // As libcni, which has met such files.
        Some(Value::String(text)) if text == "true" || text == "false" => Ok(text == "true"),
        Some(other) => Err(format!(
            "{}: {key:?} is {other}, it can be true or false",
            file.display()
        )),
    }
}

fn name(file: &Path, all: &Map<String, Value>) -> Result<String, String> {
    let name = all.get("name").and_then(Value::as_str).unwrap_or("");
    let is_name = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if !is_name {
        return Err(format!(
            "{}: \"name\" is {name:?}, a network's name is letters, digits, _ . and -",
            file.display()
        ));
    }
    Ok(name.to_owned())
}

/// The highest version among `cniVersions`, or else `cniVersion`, that is known here.
fn version(file: &Path, all: &Map<String, Value>) -> Result<Version, String> {
    let several = all.get("cniVersions").and_then(Value::as_array);
    let several = several.into_iter().flatten().filter_map(Value::as_str);
    let single = all.get("cniVersion").and_then(Value::as_str);
    let offered: Vec<&str> = several.chain(single).collect();
    let best = offered.iter().filter_map(|text| Version::parse(text)).max();
    best.ok_or_else(|| {
        let offered = if offered.is_empty() {
            "absent, which means 0.1.0".to_owned()
        } else {
            offered.join(", ")
        };
        format!(
            "{}: \"cniVersion\" is {offered}; rrun-cri speaks 0.3.0, 0.3.1, 0.4.0, 1.0.0 and 1.1.0",
            file.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<ConfigurationList, String> {
        let file = Path::new("/etc/cni/net.d/10-x.conflist");
        parse_list(file, text).and_then(checked)
    }

    #[test]
    fn a_list_is_read_in_the_highest_version_of_both() -> Result<(), String> {
        let text = r#"{"cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.1.0", "9.0.0"],
            "name": "n", "disableCheck": "true",
            "plugins": [{"type": "bridge", "capabilities": {"portMappings": true, "dns": false}}]}"#;
        let list = list(text)?;
        assert_eq!(list.version, Version::V1_1_0);
        assert!(list.disable_check && !list.disable_gc);
        assert!(list.takes("portMappings") && !list.takes("dns"));
        Ok(())
    }

    #[test]
    fn what_is_broken_is_told_with_its_file_and_place() {
        let broken = [
            ("{\n \"name\": \"n\",\n oops }", "10-x.conflist, line 3"),
            (
                r#"{"cniVersion": "1.0.0", "plugins": [{"type": "x"}]}"#,
                "\"name\"",
            ),
            (
                r#"{"cniVersion": "1.0.0", "name": "../x", "plugins": []}"#,
                "\"name\"",
            ),
            (
                r#"{"name": "n", "plugins": [{"type": "x"}]}"#,
                "absent, which means 0.1.0",
            ),
            (
                r#"{"cniVersion": "2.0.0", "name": "n", "plugins": []}"#,
                "is 2.0.0",
            ),
            (
                r#"{"cniVersion": "1.0.0", "name": "n", "plugins": []}"#,
                "has no plugin",
            ),
            (
                r#"{"cniVersion": "1.0.0", "name": "n", "plugins": 3}"#,
                "not a list",
            ),
            (
                r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [3]}"#,
                "plugins[0]",
            ),
            (
                r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "../x"}]}"#,
                "../x",
            ),
            (
                r#"{"cniVersion": "1.0.0", "name": "n", "disableGC": 1, "plugins": []}"#,
                "disableGC",
            ),
        ];
        for (text, wanted) in broken {
            let refused = list(text);
            let said = refused.as_ref().err().map_or("", String::as_str);
            assert!(said.contains(wanted), "{text}: {refused:?}");
            assert!(said.starts_with("/etc/cni/net.d/10-x.conflist"), "{said}");
        }
        let file = Path::new("/etc/cni/net.d/10-x.conf");
        let refused = parse_single(file, r#"{"name": "n", "plugins": []}"#);
        assert!(refused.is_err_and(|said| said.contains(".conflist")));
    }

    #[test]
    fn files_count_in_the_order_of_their_names_with_plugins_of_their_own()
    -> Result<(), Box<dyn std::error::Error>> {
        let dir = std::env::temp_dir().join(format!("rrun-cni-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("a"))?;
        let list = r#"{"cniVersion": "1.1.0", "name": "a", "plugins": [{"type": "x"}]}"#;
        std::fs::write(dir.join("20-a.conflist"), list)?;
        std::fs::write(
            dir.join("a/10.conf"),
            r#"{"cniVersion": "1.1.0", "type": "own"}"#,
        )?;
        std::fs::write(
            dir.join("30-b.json"),
            r#"{"cniVersion": "1.0.0", "name": "b", "type": "y"}"#,
        )?;
        std::fs::write(dir.join("00-other.txt"), "not looked at")?;
        let (files, before) = look(&dir)?;
        let kinds = |most| -> Result<Vec<String>, String> {
            let lists = load(&files, most)?;
            let plugins = lists.iter().flat_map(|list| &list.plugins);
            Ok(plugins.map(|plugin| kind(plugin).to_owned()).collect())
        };
        assert_eq!(kinds(1)?, ["x", "own"]);
        assert_eq!(kinds(0)?, ["x", "own", "y"]);
        // A change there is one of the whole.
        std::fs::write(dir.join("a/20.conf"), r#"{"type": "later"}"#)?;
        let (files, after) = look(&dir)?;
        assert_ne!(before, after);
        let only = list.replace(
            "\"plugins\"",
            "\"loadOnlyInlinedPlugins\": true, \"plugins\"",
        );
        std::fs::write(dir.join("20-a.conflist"), only)?;
        let lists = load(&files, 1)?;
        assert_eq!(lists.first().map(|list| list.plugins.len()), Some(1));
        // Two networks of one name would be mistaken for each other.
        std::fs::write(
            dir.join("30-b.json"),
            r#"{"cniVersion": "1.0.0", "name": "a", "type": "y"}"#,
        )?;
        assert!(load(&files, 0).is_err_and(|said| said.contains("30-b.json")));
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }

    #[test]
    fn a_single_plugin_is_a_list_of_one() -> Result<(), String> {
        let file = Path::new("/etc/cni/net.d/10-x.conf");
        let list = parse_single(
            file,
            r#"{"cniVersion": "0.3.1", "name": "n", "type": "ptp"}"#,
        )?;
        assert_eq!(list.version, Version::V0_3_1);
        assert_eq!(list.plugins.iter().map(kind).collect::<Vec<_>>(), ["ptp"]);
        Ok(())
    }
}
