//! The network configurations, which are files in the directory `--cni-conf-dir`. See the CNI
//! specification, section 1.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use rrun_kernel::errno::describe;

/// The maximum size of a configuration file in bytes.
const FILE_BYTES: u64 = 1 << 20;

/// The versions of the CNI specification that rrun-cri supports.
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

/// The number of characters of a value that an error shows.
const SHOWN_CHARACTERS: usize = 100;

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

/// The configuration of a network. It is a list of plugins that run one after another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ConfigurationList {
    pub file: PathBuf,
    pub name: String,
    /// The version of the CNI specification that is used with the plugins. If the configuration
    /// supports several versions, the field contains the highest version that rrun-cri also
    /// supports.
    pub version: Version,
    #[serde(default)]
    pub disable_check: bool,
    #[serde(default)]
    pub disable_gc: bool,
    /// The JSON object of each plugin from the configuration file, without changes.
    pub plugins: Vec<Map<String, Value>>,
}

/// Returns the name of a plugin's binary, which is in the key `type`.
pub(super) fn kind(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or("")
}

impl ConfigurationList {
    /// Returns whether a plugin of the list requests `capability`.
    pub(super) fn requests(&self, capability: &str) -> bool {
        self.plugins
            .iter()
            .any(|plugin| requests(plugin, capability))
    }

    /// Returns the description of the network for the response to a verbose Status request, in the
    /// format of containerd.
    pub(super) fn status_info(&self, interface: &str) -> Value {
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

/// Returns whether the plugin's configuration requests `capability`.
pub(super) fn requests(plugin: &Map<String, Value>, capability: &str) -> bool {
    let requested = plugin.get("capabilities");
    requested.and_then(|requested| requested.get(capability)) == Some(&Value::Bool(true))
}

/// The path, inode, size and modification time of each configuration file in a directory. When a
/// configuration file changes, the fingerprint of its directory changes, too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fingerprint(Vec<(PathBuf, u64, u64, i64, i64)>);

/// Returns the configuration files in `dir`, sorted by their names, and a fingerprint of all
/// configurations. The fingerprint also covers the plugin files in subdirectories. A directory that
/// does not exist counts as empty.
pub(super) fn scan(dir: &Path) -> Result<(Vec<PathBuf>, Fingerprint), String> {
    let mut files = named(dir, &["conf", "conflist", "json"])?;
    files.sort();
    let mut marks = Vec::new();
    marks.extend(files.iter().map(|file| mark(file)));
    // The subdirectory of a configuration list can contain the configurations of further plugins of
    // the list.
    for subdirectory in subdirectories(dir)? {
        marks.push(mark(&subdirectory));
        let mut own = named(&subdirectory, &["conf"])?;
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

fn subdirectories(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let mut dirs = Vec::new();
    for path in entries(dir)? {
        if is(&path, std::fs::Metadata::is_dir)? {
            dirs.push(path);
        }
    }
    dirs.sort();
    Ok(dirs)
}

/// Returns the files in `dir` that have a file name extension in `endings`.
fn named(dir: &Path, endings: &[&str]) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for path in entries(dir)? {
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending.is_some_and(|ending| endings.contains(&ending))
            && is(&path, std::fs::Metadata::is_file)?
        {
            files.push(path);
        }
    }
    Ok(files)
}

/// Returns the paths of the entries in `dir`. A directory that does not exist counts as empty. Any
/// other error must not, because pods would then get another network.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, String> {
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
    entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(|error| failed(&error))
}

/// Returns whether `path` exists and has the given kind.
fn is(path: &Path, kind: fn(&std::fs::Metadata) -> bool) -> Result<bool, String> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(kind(&metadata)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(format!(
            "read the CNI configuration {}: {}",
            path.display(),
            describe(&error)
        )),
    }
}

/// Reads the first `limit` files, or all files if `limit` is 0. As in containerd, an invalid file
/// is an error. If the server ignored the invalid file, pods would get the network of a later file
/// instead.
pub(super) fn load(files: &[PathBuf], limit: usize) -> Result<Vec<ConfigurationList>, String> {
    let limit = if limit == 0 { files.len() } else { limit };
    let lists: Vec<ConfigurationList> = files
        .iter()
        .take(limit)
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
        return with_plugin_files(list, file, &text);
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
        return Err(failed(&format!(
            "the file has more than {FILE_BYTES} bytes"
        )));
    }
    Ok(text)
}

fn object(file: &Path, text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| {
        // The display text of a serde_json error ends with the position of the error. In the
        // returned message, the position is at the beginning, directly after the file's name. The
        // display text can contain a long value of the file.
        let sentence = error.to_string();
        let what = shown(sentence.split(" at line ").next().unwrap_or(&sentence));
        format!(
            "{}, line {}, column {}: {what}",
            file.display(),
            error.line(),
            error.column()
        )
    })
}

/// Parses a file with the configuration of a single plugin. Returns a configuration list that
/// contains only this plugin.
pub(super) fn parse_single(file: &Path, text: &str) -> Result<ConfigurationList, String> {
    let plugin = object(file, text)?;
    if plugin.contains_key("plugins") {
        return Err(format!(
            "{}: the file has a list \"plugins\", so its name must end in .conflist",
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

pub(super) fn parse_list(file: &Path, text: &str) -> Result<ConfigurationList, String> {
    let mut all = object(file, text)?;
    let plugins = match all.remove("plugins") {
        Some(Value::Array(plugins)) => plugins,
        // The key `plugins` may be missing, because all plugins of a list can be in the list's
        // subdirectory.
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

/// Adds the plugins in the files `DIR/NAME/*.conf`, unless the list sets `loadOnlyInlinedPlugins`.
/// `DIR` is the directory of the list, and `NAME` is the name of the network.
fn with_plugin_files(
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

/// Returns the list if it contains at least one plugin and the configuration of every plugin is
/// valid.
fn checked(list: ConfigurationList) -> Result<ConfigurationList, String> {
    let file = list.file.display();
    if list.plugins.is_empty() {
        return Err(format!("{file}: \"plugins\" has no plugin"));
    }
    for (at, plugin) in list.plugins.iter().enumerate() {
        let kind = kind(plugin);
        if kind.is_empty() || kind.contains(['/', '\0']) || kind == "." || kind == ".." {
            return Err(format!(
                "{file}: \"type\" of plugins[{at}] is {}; it has to be the name of a plugin's binary",
                shown(plugin.get("type").unwrap_or(&Value::Null))
            ));
        }
        let capabilities = plugin.get("capabilities");
        if capabilities.is_some_and(|value| !value.is_object()) {
            return Err(format!(
                "{file}: \"capabilities\" of plugins[{at}] ({}) is not an object",
                shown(kind)
            ));
        }
    }
    Ok(list)
}

fn boolean(file: &Path, all: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match all.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        // As in libcni, a boolean can also be a string, because some existing configuration files
        // contain `"true"` or `"false"`.
        Some(Value::String(text)) if text == "true" || text == "false" => Ok(text == "true"),
        Some(other) => Err(format!(
            "{}: {key:?} is {}; it has to be true or false",
            file.display(),
            shown(other)
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
            "{}: \"name\" is \"{}\"; it has to consist of letters, digits, _ . and -, and to begin with a letter or digit",
            file.display(),
            shown(name.escape_debug())
        ));
    }
    Ok(name.to_owned())
}

/// Returns the text of a value for an error. Only the first 100 characters of a long text are shown.
pub(super) fn shown(value: impl fmt::Display) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Returns the highest CNI version in `cniVersions` and `cniVersion` that rrun-cri supports.
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
            shown(offered.join(", "))
        };
        format!(
            "{}: \"cniVersion\" is {offered}; rrun-cri supports 0.3.0, 0.3.1, 0.4.0, 1.0.0 and 1.1.0",
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
    fn a_list_uses_the_highest_version_that_the_file_and_rrun_cri_support() -> Result<(), String> {
        let text = r#"{"cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.1.0", "9.0.0"],
            "name": "n", "disableCheck": "true",
            "plugins": [{"type": "bridge", "capabilities": {"portMappings": true, "dns": false}}]}"#;
        let list = list(text)?;
        assert_eq!(list.version, Version::V1_1_0);
        assert!(list.disable_check && !list.disable_gc);
        assert!(list.requests("portMappings") && !list.requests("dns"));
        Ok(())
    }

    #[test]
    fn an_invalid_configuration_is_reported_with_its_file_and_position() {
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
        for (text, expected) in broken {
            let refused = list(text);
            let sentence = refused.as_ref().err().map_or("", String::as_str);
            assert!(
                sentence.contains(expected),
                "wrong result for the list {text}: {refused:?}"
            );
            assert!(
                sentence.starts_with("/etc/cni/net.d/10-x.conflist"),
                "{sentence}"
            );
        }
        let file = Path::new("/etc/cni/net.d/10-x.conf");
        let refused = parse_single(file, r#"{"name": "n", "plugins": []}"#);
        assert!(refused.is_err_and(|sentence| sentence.contains(".conflist")));
    }

    #[test]
    fn files_are_read_in_the_order_of_their_names_with_their_subdirectories()
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
        std::fs::write(dir.join("00-other.txt"), "this file is not read")?;
        let (files, before) = scan(&dir)?;
        let kinds = |limit| -> Result<Vec<String>, String> {
            let lists = load(&files, limit)?;
            let plugins = lists.iter().flat_map(|list| &list.plugins);
            Ok(plugins.map(|plugin| kind(plugin).to_owned()).collect())
        };
        assert_eq!(kinds(1)?, ["x", "own"]);
        assert_eq!(kinds(0)?, ["x", "own", "y"]);
        // A new file in the list's subdirectory changes the fingerprint.
        std::fs::write(dir.join("a/20.conf"), r#"{"type": "later"}"#)?;
        let (files, after) = scan(&dir)?;
        assert_ne!(before, after);
        let only = list.replace(
            "\"plugins\"",
            "\"loadOnlyInlinedPlugins\": true, \"plugins\"",
        );
        std::fs::write(dir.join("20-a.conflist"), only)?;
        let lists = load(&files, 1)?;
        assert_eq!(lists.first().map(|list| list.plugins.len()), Some(1));
        // Two configuration files with the same network name are refused.
        std::fs::write(
            dir.join("30-b.json"),
            r#"{"cniVersion": "1.0.0", "name": "a", "type": "y"}"#,
        )?;
        assert!(load(&files, 0).is_err_and(|sentence| sentence.contains("30-b.json")));
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }

    #[test]
    fn a_single_plugin_becomes_a_list_with_one_plugin() -> Result<(), String> {
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
