//! Parses the files of the Container Device Interface (CDI), whose format the CNCF's SPEC.md
//! defines. A file contains YAML or JSON.
//!
//! The reference implementation is the Go library, tags.cncf.io/container-device-interface 1.1. The
//! Go library reads both formats with `yaml.UnmarshalStrict` of go.yaml.in/yaml/v2 into typed
//! fields. A string field therefore contains the text as written, such as `yes` or `0755`. A number
//! can be octal as in YAML 1.1. Unknown and repeated keys are errors, and the text after the first
//! document is ignored.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};
use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::{MessageFormatter, UserMessageFormatter};

/// The maximum size in bytes of a CDI file that the server reads.
pub(super) const FILE_BYTES: usize = 4 << 20;

/// The maximum nesting depth of collections in YAML.
const MAX_DEPTH: usize = 32;

/// The maximum number of YAML values after the aliases are expanded.
const MAX_NODES: usize = 250_000;
/// The maximum size in bytes of all YAML text after the aliases are expanded.
const MAX_TEXT_BYTES: usize = 2 * FILE_BYTES;
/// The maximum number of values that the expansion of aliases can add.
const MAX_ALIASED_NODES: usize = 100_000;

/// The names of the hooks in the runtime specification.
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// The contents of a CDI file, which [`SpecFile::parse`] has checked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct SpecFile {
    pub cdi_version: String,
    pub kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: IgnoredAny,
    #[serde(deserialize_with = "null_is_default")]
    pub devices: Vec<FileDevice>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub container_edits: ContainerEdits,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct FileDevice {
    pub name: String,
    #[serde(default, rename = "annotations")]
    _annotations: IgnoredAny,
    #[serde(deserialize_with = "null_is_default")]
    pub container_edits: ContainerEdits,
}

/// The changes to a container's configuration, with the field names of the CDI specification.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct ContainerEdits {
    #[serde(deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub device_nodes: Vec<DeviceNode>,
    #[serde(deserialize_with = "null_is_default")]
    pub net_devices: Vec<NetDevice>,
    #[serde(deserialize_with = "null_is_default")]
    pub hooks: Vec<Hook>,
    #[serde(deserialize_with = "null_is_default")]
    pub mounts: Vec<Mount>,
    pub intel_rdt: Option<IntelRdt>,
    #[serde(
        rename = "additionalGIDs",
        alias = "additionalGids",
        deserialize_with = "null_is_default"
    )]
    pub additional_gids: Vec<u32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct DeviceNode {
    pub path: PathBuf,
    pub host_path: Option<PathBuf>,
    pub r#type: Option<String>,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub file_mode: Option<u32>,
    pub permissions: Option<String>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct NetDevice {
    pub host_interface_name: String,
    pub name: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Hook {
    pub hook_name: String,
    pub path: PathBuf,
    #[serde(default, deserialize_with = "null_is_default")]
    pub args: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    pub timeout: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Mount {
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    #[serde(default, deserialize_with = "null_is_default")]
    pub options: Vec<String>,
    pub r#type: Option<String>,
}

/// The object `linux.intelRdt` of the runtime specification. The fields `enableCMT` and `enableMBM`
/// are from CDI 0.7 and 1.0, and the field `enableMonitoring` has replaced them.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct IntelRdt {
    #[serde(rename = "closID", skip_serializing_if = "Option::is_none")]
    pub clos_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub l3_cache_schema: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_bw_schema: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schemata: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_monitoring: Option<bool>,
    #[serde(rename = "enableCMT", skip_serializing_if = "Option::is_none")]
    pub enable_cmt: Option<bool>,
    #[serde(rename = "enableMBM", skip_serializing_if = "Option::is_none")]
    pub enable_mbm: Option<bool>,
}

/// Deserializes a field in which `null` means an empty list or no edits, as in Go.
fn null_is_default<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::deserialize(from).map(Option::unwrap_or_default)
}

impl SpecFile {
    /// Parses and checks the text of a CDI file. If the parser reports a line number, the error
    /// contains the number.
    pub(super) fn parse(text: &str, is_json: bool) -> Result<Self, String> {
        let file: SpecFile = if is_json {
            serde_json::from_str(text).map_err(|error| error.to_string())?
        } else {
            from_yaml(text)?
        };
        file.check()?;
        Ok(file)
    }

    fn check(&self) -> Result<(), String> {
        let version = self.cdi_version.trim_start_matches('v');
        if !version.starts_with("0.") && !version.starts_with("1.") {
            return Err(format!("cdiVersion {version:?} is not supported"));
        }
        if !is_kind(&self.kind) {
            return Err(format!(
                "the kind {:?} does not have the form VENDOR/CLASS",
                self.kind
            ));
        }
        self.container_edits.check()?;
        let mut names = BTreeSet::new();
        for FileDevice {
            name,
            container_edits,
            ..
        } in &self.devices
        {
            if !is_name(name) {
                return Err(format!("{name:?} is not a valid device name"));
            }
            if !names.insert(name) {
                return Err(format!("the device {name:?} is defined twice"));
            }
            container_edits
                .check()
                .map_err(|why| format!("the device {name:?}: {why}"))?;
        }
        Ok(())
    }
}

/// Reads the first YAML document of the text.
fn from_yaml(text: &str) -> Result<SpecFile, String> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_total_scalar_bytes: MAX_TEXT_BYTES,
            // The parser must not limit the ratio of aliases to anchors. A valid file can use one
            // anchor for many devices.
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_ALIASED_NODES,
        },
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    let mut first = None;
    let whole = serde_saphyr::with_deserializer_from_str_with_options(text, options, |document| {
        first = Some(SpecFile::deserialize(document)?);
        Ok(())
    });
    match (first, whole) {
        // If the first document is valid, the error is in a later document. Later documents are
        // ignored.
        (Some(file), _) => Ok(file),
        (None, Err(error)) => Err(error.render_with_formatter(&Sentences)),
        (None, Ok(())) => Err("the file contains no YAML document".to_owned()),
    }
}

/// Formats the YAML parser's errors. If a file exceeds a limit that this module sets, a simpler
/// message replaces the parser's message.
struct Sentences;

impl MessageFormatter for Sentences {
    fn format_message<'a>(&self, error: &'a serde_saphyr::Error) -> Cow<'a, str> {
        use serde_saphyr::Error;
        match error {
            Error::AliasError { error, .. } => self.format_message(error),
            Error::Budget {
                breach: BudgetBreach::Depth { .. },
                ..
            } => format!("the values are nested deeper than {MAX_DEPTH} levels").into(),
            Error::AliasReplayLimitExceeded { .. } => {
                format!("the aliases expand to more than {MAX_ALIASED_NODES} values").into()
            }
            Error::Budget { .. } => "the file contains too many or too large values".into(),
            other => UserMessageFormatter.format_message(other),
        }
    }
}

impl ContainerEdits {
    fn check(&self) -> Result<(), String> {
        let absolute = |field: &str, path: &Path| {
            if path.is_absolute() {
                Ok(())
            } else {
                Err(format!(
                    "{field} {} is not an absolute path",
                    path.display()
                ))
            }
        };
        if let Some(pair) = self
            .env
            .iter()
            .find(|pair| !pair.contains('=') || pair.starts_with('='))
        {
            return Err(format!(
                "the env entry {pair:?} does not have the form NAME=value"
            ));
        }
        for node in &self.device_nodes {
            absolute("deviceNodes.path", &node.path)?;
            let kind = node.r#type.as_deref();
            if !matches!(kind, None | Some("b" | "c" | "u" | "p")) {
                return Err(format!("deviceNodes.type {kind:?} is not b, c, u or p"));
            }
            let permissions = node.permissions.as_deref().unwrap_or_default();
            if permissions.chars().any(|c| !"rwm".contains(c)) {
                return Err(format!(
                    "deviceNodes.permissions {permissions:?} contain other letters than r, w and m"
                ));
            }
        }
        for mount in &self.mounts {
            absolute("mounts.containerPath", &mount.container_path)?;
        }
        for hook in &self.hooks {
            absolute("hooks.path", &hook.path)?;
            if !HOOKS.contains(&hook.hook_name.as_str()) {
                return Err(format!(
                    "hooks.hookName {:?} is not the name of a hook",
                    hook.hook_name
                ));
            }
        }
        Ok(())
    }
}

/// Returns whether a name has the form `vendor/class=name`.
pub(super) fn is_qualified(name: &str) -> bool {
    let parts = name.split_once('=');
    parts.is_some_and(|(kind, name)| is_kind(kind) && is_name(name))
}

fn is_kind(kind: &str) -> bool {
    let word = |word: &str, also: &[char]| {
        word.starts_with(|c: char| c.is_ascii_alphabetic())
            && word.ends_with(|c: char| c.is_ascii_alphanumeric())
            && word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || also.contains(&c))
    };
    let parts = kind.split_once('/');
    parts.is_some_and(|(vendor, class)| {
        word(vendor, &['-', '_', '.']) && word(class, &['-', '_', '.'])
    })
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.ends_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.:".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "cdiVersion: \"0.7.0\"\nkind: vendor.com/device\n";

    fn yaml(body: &str) -> Result<SpecFile, String> {
        SpecFile::parse(&format!("{HEAD}{body}"), false)
    }

    /// Parses a file with two devices and returns the edits of the second device. `shared` contains
    /// the file's `containerEdits`, and `second` contains the `containerEdits` of the second
    /// device.
    fn second_device(shared: &str, second: &str) -> Result<ContainerEdits, String> {
        let file = yaml(&format!(
            "containerEdits: {shared}\ndevices:\n- name: one\n  containerEdits: {{}}\n\
             - name: two\n  containerEdits: {second}\n"
        ))?;
        let device = file.devices.into_iter().nth(1);
        device
            .map(|device| device.container_edits)
            .ok_or_else(|| "the file has no second device".to_owned())
    }

    #[test]
    fn null_is_an_empty_list_or_no_edits() -> Result<(), String> {
        let edits = second_device(
            "null",
            "{env: null, mounts: ~, hooks:, additionalGids: null}",
        )?;
        assert!(edits.env.is_empty() && edits.mounts.is_empty() && edits.hooks.is_empty());
        let json = r#"{"cdiVersion": "0.7.0", "kind": "vendor.com/device", "devices": [
            {"name": "one", "containerEdits": {"env": ["A=b"], "hooks": [
                {"hookName": "prestart", "path": "/hook", "args": null, "env": null}]}}],
            "containerEdits": null}"#;
        let file = SpecFile::parse(json, true)?;
        assert!(
            file.devices
                .iter()
                .all(|device| device.container_edits.env == ["A=b"])
        );
        assert!(yaml("devices: null\n").is_ok_and(|file| file.devices.is_empty()));
        Ok(())
    }

    #[test]
    fn a_typical_vendor_file_is_parsed() -> Result<(), String> {
        let text = r##"---
# made by a tool
cdiVersion: "0.6.0"
kind: vendor.com/device   # the class
containerEdits:
  env: [A=1, 'B=it''s', "C=\"#\""]
devices:
- name: first
  containerEdits:
    deviceNodes:
      - path: /dev/a
        hostPath: /dev/null
        fileMode: 0666
        major: 1
      -
        path: "/dev/b: c"
    hooks:
    - {hookName: createContainer, path: /bin/true, args: [true, "-x"], timeout: 3}
    intelRdt: {closID: 7, schemata: [L3:0=f], enableMonitoring: yes}
- name: "2"
  annotations: {any: [thing]}
  containerEdits:
    mounts:
        - hostPath: /a#b
          containerPath: /b:/c
          options:
          - ro
          - bind
"##;
        let file = SpecFile::parse(text, false)?;
        assert_eq!(file.kind, "vendor.com/device");
        assert_eq!(file.container_edits.env, ["A=1", "B=it's", "C=\"#\""]);
        let [first, second] = file.devices.as_slice() else {
            return Err(format!("{} devices", file.devices.len()));
        };
        let [a, b] = first.container_edits.device_nodes.as_slice() else {
            return Err(format!("{first:?}"));
        };
        assert_eq!(
            (a.file_mode, a.major, a.minor),
            (Some(0o666), Some(1), None)
        );
        assert_eq!(b.path, Path::new("/dev/b: c"));
        let hook = &first.container_edits.hooks[0];
        assert_eq!(
            (hook.args.join(" "), hook.timeout),
            ("true -x".into(), Some(3))
        );
        let rdt = serde_json::to_value(&first.container_edits.intel_rdt);
        assert_eq!(
            rdt.map_err(|error| error.to_string())?,
            serde_json::json!({ "closID": "7", "schemata": ["L3:0=f"], "enableMonitoring": true })
        );
        assert_eq!(second.name, "2");
        let mount = &second.container_edits.mounts[0];
        assert_eq!(mount.host_path, Path::new("/a#b"));
        assert_eq!(mount.options, ["ro", "bind"]);
        Ok(())
    }

    /// The CDI library for Go also keeps a string field's text as written. Versions before 1.0 used
    /// another parser, sigs.k8s.io/yaml. That parser reads `yes` as `true` and `0755` as 493.
    #[test]
    fn a_string_field_keeps_its_text_as_written() -> Result<(), String> {
        let edits = second_device(
            "{}",
            "{env: [A=yes, B=0755], hooks: [{hookName: poststop, path: /x, args: [yes, 0755, 1.50, 2001-01-01, !!str 1]}]}",
        )?;
        assert_eq!(
            edits.hooks[0].args,
            ["yes", "0755", "1.50", "2001-01-01", "1"]
        );
        Ok(())
    }

    #[test]
    fn numbers_are_read_as_in_yaml_1_1() -> Result<(), String> {
        for (text, mode) in [
            ("0660", 0o660),
            ("0o660", 0o660),
            ("432", 0o660),
            ("0x1b0", 0o660),
        ] {
            let node = format!("{{deviceNodes: [{{path: /dev/a, fileMode: {text}}}]}}");
            let edits = second_device("{}", &node)?;
            assert_eq!(edits.device_nodes[0].file_mode, Some(mode), "{text}");
        }
        Ok(())
    }

    #[test]
    fn an_alias_has_the_value_of_its_anchor() -> Result<(), String> {
        let edits = second_device("&common {env: [A=1, &b B=2]}", "*common")?;
        assert_eq!(edits.env, ["A=1", "B=2"]);
        let edits = second_device("{env: [&b B=2]}", "{env: [A=1, *b]}")?;
        assert_eq!(edits.env, ["A=1", "B=2"]);
        for unknown in ["*none", "&loop {env: *loop}"] {
            assert!(second_device("{}", unknown).is_err(), "{unknown}");
        }
        Ok(())
    }

    #[test]
    fn a_merge_key_adds_only_missing_keys() -> Result<(), String> {
        let common = "&common {env: [A=1], additionalGids: [5]}";
        for merge in [
            "{<<: *common, env: [B=2]}",
            "{env: [B=2], <<: [*common]}",
            "\n    <<: *common\n    env:\n    - B=2",
        ] {
            let edits = second_device(common, merge)?;
            assert_eq!(edits.env, ["B=2"], "{merge}");
            assert_eq!(edits.additional_gids, [5], "{merge}");
        }
        Ok(())
    }

    #[test]
    fn block_scalars_keep_or_fold_their_lines() -> Result<(), String> {
        let env = "\n    env:\n    - |-\n      A=1\n        2\n    - |\n      B=1\n    - >-\n      C=1\n      2\n    - \"D=1\n      2\"";
        let edits = second_device("{}", env)?;
        assert_eq!(edits.env, ["A=1\n  2", "B=1\n", "C=1 2", "D=1 2"]);
        Ok(())
    }

    #[test]
    fn only_the_first_document_is_read() -> Result<(), String> {
        for more in ["---\nkind: other\n", "---\nkind: [\n", "...\nfoo\n"] {
            let file = yaml(&format!("devices: []\n{more}"))?;
            assert_eq!(file.kind, "vendor.com/device", "{more}");
        }
        for empty in ["", "# a comment\n", "---\n---\nkind: x\n"] {
            assert!(SpecFile::parse(empty, false).is_err(), "{empty:?}");
        }
        SpecFile::parse(&format!("%YAML 1.2\n---\n{HEAD}devices: []\n"), false)?;
        SpecFile::parse(&format!("\u{feff}{HEAD}devices: []\n"), false)?;
        Ok(())
    }

    /// The expected line numbers include the two lines of HEAD, which precede each `body`.
    #[test]
    fn an_error_contains_its_line_number() {
        for (body, line, part) in [
            ("devices: []\nkind: x\n", 4, "duplicate mapping key `kind`"),
            ("devices: []\nKind: x\n", 4, "unknown field `Kind`"),
            ("devices: [\n- a\n", 4, "inside a block"),
            ("devices: 5\n", 3, "expected sequence start"),
            ("devices: []\n\tx: 1\n", 4, "tab"),
            (
                "devices: []\ncontainerEdits: {env: [\"open]}\n",
                4,
                "unclosed quote",
            ),
            (
                "devices:\n- name: a\n  containerEdits: {additionalGids: [-1]}\n",
                5,
                "invalid u32",
            ),
            (
                "devices:\n- name: a\n  containerEdits: *none\n",
                5,
                "unknown",
            ),
        ] {
            let error = yaml(body).expect_err(body);
            assert!(
                error.contains(part),
                "wrong error for the file {body:?}: {error}"
            );
            assert!(
                error.contains(&format!("line {line},")),
                "wrong error for the file {body:?}: {error}"
            );
            assert!(
                !error.contains('\n'),
                "wrong error for the file {body:?}: {error}"
            );
        }
        let json = "{\"cdiVersion\": \"0.5.0\",\n\"kind\": \"a/b\", \"kind\": \"c/d\"}";
        let error = SpecFile::parse(json, true).expect_err(json);
        assert!(
            error.contains("duplicate field `kind` at line 2"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_would_exhaust_memory_or_stack_is_refused() {
        let mut laughs = "devices: []\nannotations:\n  a0: &a0 [x,x,x,x,x,x,x,x,x]\n".to_owned();
        for level in 1..12 {
            let list = vec![format!("*a{}", level - 1); 9].join(",");
            laughs.push_str(&format!("  a{level}: &a{level} [{list}]\n"));
        }
        let long = format!(
            "annotations: &long {}\ndevices: []\ncontainerEdits:\n  env: [{}]\n",
            "x".repeat(1 << 20),
            "*long, ".repeat(1000)
        );
        let block: String = (0..100)
            .map(|level| format!("{}a:\n", " ".repeat(level)))
            .collect();
        let many = format!("annotations: [{}]\n", "a,".repeat(300_000));
        for (name, body, part) in [
            ("laughs", laughs, "the aliases expand to more than"),
            (
                "long",
                long,
                "the file contains too many or too large values",
            ),
            (
                "many",
                many,
                "the file contains too many or too large values",
            ),
            (
                "flow",
                format!("annotations: {}", "[".repeat(100_000)),
                "recursion limit exceeded",
            ),
            (
                "block",
                format!("annotations:\n {}", block.replace('\n', "\n ")),
                "the values are nested deeper than 32 levels",
            ),
            (
                "dashes",
                format!("annotations:\n {}\n", "- ".repeat(100_000)),
                "the values are nested deeper than 32 levels",
            ),
        ] {
            let error = yaml(&body).err().unwrap_or_default();
            assert!(
                error.contains(part),
                "wrong error for the case {name}: {error:?}"
            );
            assert!(
                error.contains("line "),
                "wrong error for the case {name}: {error}"
            );
            assert!(
                error.len() < 200,
                "wrong error for the case {name}: {error}"
            );
        }
    }
}
