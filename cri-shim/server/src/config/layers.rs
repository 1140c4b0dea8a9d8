//! Builds a [`Config`] from layers: the configuration files and the command line flags. The values
//! of a layer replace the values of earlier layers. A mistake is reported with its file and line.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

use super::check;
use super::error::ConfigError;
use super::flags::Flags;
use super::table::Config;
use rrun_images::position;
use rrun_kernel::errno::describe;

/// The default value of `--config`, the path of the configuration file. The default file does not
/// need to exist.
const DEFAULT_FILE: &str = "/etc/rrun/config.toml";

/// The source of a configuration, from which a reload reads the configuration again.
#[derive(Clone, Debug)]
pub(crate) struct ConfigSource {
    pub file: Option<PathBuf>,
    pub flags: Flags,
}

impl ConfigSource {
    /// Reads the configuration file and the drop-ins in `config.d` next to it, and merges them with
    /// the command line. Unusable values are rejected. A missing default configuration file is not
    /// an error. This call blocks on disk I/O.
    pub(crate) fn load(&self) -> Result<Config, ConfigError> {
        let mut layers = self.files()?;
        layers.push(Layer::from_flags(&self.flags)?);
        merge(&layers)
    }

    /// Returns the main file and the drop-ins, in the order in which they are merged.
    fn files(&self) -> Result<Vec<Layer>, ConfigError> {
        let main = self.file.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
        let main_layer = Layer::read(main)?;
        if main_layer.is_none() && self.file.is_some() {
            return Err(ConfigError::Read {
                file: main.to_owned(),
                reason: "no such file".to_owned(),
            });
        }
        let mut layers: Vec<Layer> = main_layer.into_iter().collect();
        let beside = main.parent().unwrap_or(Path::new("/")).join("config.d");
        for file in drop_ins(&beside)? {
            layers.extend(Layer::read(&file)?);
        }
        Ok(layers)
    }
}

/// The settings of one file, or of the command line.
pub(super) struct Layer {
    /// The path of the file, or `None` for the command line.
    file: Option<PathBuf>,
    text: String,
}

impl Layer {
    /// Reads a configuration file. Returns `None` if the file does not exist.
    fn read(file: &Path) -> Result<Option<Self>, ConfigError> {
        match std::fs::read_to_string(file) {
            Ok(text) => Ok(Some(Layer {
                file: Some(file.to_owned()),
                text,
            })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ConfigError::Read {
                file: file.to_owned(),
                reason: describe(&error),
            }),
        }
    }

    fn from_flags(flags: &Flags) -> Result<Self, ConfigError> {
        match toml::to_string(flags) {
            Ok(text) => Ok(Layer { file: None, text }),
            // Serialisation fails only for a path that is not UTF-8.
            Err(error) => Err(ConfigError::Value {
                key: "the command line",
                reason: error.to_string(),
            }),
        }
    }

    /// Parses the layer and checks its keys and types. The server checks each layer before the
    /// merge. In the merged configuration, a later file can hide a mistake in an earlier file.
    fn table(&self) -> Result<DeTable<'_>, ConfigError> {
        let parsed = DeTable::parse(&self.text).and_then(|table| {
            Config::deserialize(Deserializer::from(table.clone()))?;
            Ok(table.into_inner())
        });
        parsed.map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            let (line, key) = position::of(&self.text, at);
            ConfigError::Parse {
                file: self.file.clone().unwrap_or_default(),
                line,
                key,
                reason: error.message().replace('\n', ", "),
            }
        })
    }

    /// Returns the number of the line that sets a key. `key` is a full name such as
    /// `network.range`.
    fn line_of(&self, key: &str) -> Option<usize> {
        let all = DeTable::parse(&self.text).ok()?;
        let (tables, last) = match key.rsplit_once('.') {
            Some((tables, last)) => (Some(tables), last),
            None => (None, key),
        };
        let mut table = all.get_ref();
        for name in tables.into_iter().flat_map(|tables| tables.split('.')) {
            let DeValue::Table(inner) = table.get(name)?.get_ref() else {
                return None;
            };
            table = inner;
        }
        let (key, _) = table.get_key_value(last)?;
        Some(position::line(&self.text, key.span().start))
    }
}

/// Merges the layers into a configuration; later layers override earlier ones.
pub(super) fn merge(layers: &[Layer]) -> Result<Config, ConfigError> {
    let mut merged = DeTable::new();
    for layer in layers {
        lay_over(&mut merged, layer.table()?);
    }
    let merged = Deserializer::from(Spanned::new(0..0, merged));
    // No error is expected: each layer has already been deserialised, so every value has the right
    // type.
    let config = Config::deserialize(merged).map_err(|error| ConfigError::Value {
        key: "the configuration",
        reason: error.message().to_owned(),
    })?;
    check::checked(config).map_err(|error| located(error, layers))
}

/// Merges `over` into `under`. Top-level tables such as `[network]` and `[runtime]` are merged key
/// by key. Every other value in `over` replaces the whole value of the same key in `under`. This
/// rule also applies to tables in tables, such as `[runtime.NAME]`.
fn lay_over<'i>(under: &mut DeTable<'i>, over: DeTable<'i>) {
    for (key, value) in over {
        if let DeValue::Table(over) = value.get_ref()
            && let Some(DeValue::Table(under)) =
                under.get_mut(&**key.get_ref()).map(Spanned::get_mut)
        {
            under.extend(over.clone());
        } else {
            under.insert(key, value);
        }
    }
}

/// Adds the file and the line of the key to the error. If several layers set the key, the last of
/// these layers contains the mistake, because its value is used. If a flag sets the key, the error
/// is not changed.
fn located(error: ConfigError, layers: &[Layer]) -> ConfigError {
    let ConfigError::Value { key, reason } = &error else {
        return error;
    };
    let mut latest = layers.iter().rev();
    match latest.find_map(|layer| Some((&layer.file, layer.line_of(key)?))) {
        Some((Some(file), line)) => ConfigError::Parse {
            file: file.clone(),
            line,
            key: (*key).to_owned(),
            reason: reason.clone(),
        },
        _ => error,
    }
}

fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |error: std::io::Error| ConfigError::Read {
        file: dir.to_owned(),
        reason: describe(&error),
    };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension() == Some(OsStr::new("toml")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::super::DEFAULT_TEXT;
    use super::super::changes::changed_keys;
    use super::*;

    fn layer(file: &str, text: &str) -> Layer {
        Layer {
            file: Some(file.into()),
            text: text.to_owned(),
        }
    }

    fn flags(text: &str) -> Layer {
        Layer {
            file: None,
            text: text.to_owned(),
        }
    }

    /// Builds the configuration from the text of one file.
    fn load(text: &str) -> Result<Config, ConfigError> {
        merge(&[layer("/etc/rrun/config.toml", text)])
    }

    fn sentence(result: Result<Config, ConfigError>) -> String {
        result.map_or_else(
            |error| error.to_string(),
            |_| "the configuration contains no mistake".to_owned(),
        )
    }

    #[test]
    fn the_printed_defaults_equal_the_built_in_defaults() -> Result<(), ConfigError> {
        // The printed configuration contains the defaults as comments such as `# key = value`. If
        // these lines are uncommented, the configuration must not change.
        let uncommented: String = DEFAULT_TEXT
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if rest.starts_with('[') || rest.contains(" = ") => rest,
                _ if line.starts_with('#') => "",
                _ => line,
            })
            .collect::<Vec<_>>()
            .join("\n");
        let mut from_text = load(&uncommented)?;
        let default = load(DEFAULT_TEXT)?;
        // The defaults of cgroup_driver and default_cgroup_parent depend on the machine.
        from_text.cgroup_driver = default.cgroup_driver;
        from_text
            .default_cgroup_parent
            .clone_from(&default.default_cgroup_parent);
        assert_eq!(changed_keys(&default, &from_text), Vec::<String>::new());
        assert_eq!(changed_keys(&default, &merge(&[])?), Vec::<String>::new());
        Ok(())
    }

    #[test]
    fn an_unknown_key_is_reported_with_its_file_and_its_line() {
        let error = sentence(load("root = \"/r\"\n\nrooot = 1\n"));
        let begin = "/etc/rrun/config.toml, line 3, rooot: unknown field `rooot`, expected one of \
                     `root`, `state`, `listen`, ";
        assert!(error.starts_with(begin), "{error}");
    }

    #[test]
    fn an_invalid_value_is_reported_with_its_file_its_line_and_its_key() {
        let error = load("debug = true\ncgroup_driver = \"none\"\n");
        assert!(
            matches!(error, Err(ConfigError::Parse { line: 2, ref key, .. }) if key == "cgroup_driver"),
            "{error:?}"
        );
        // A later file does not hide the invalid value of an earlier file.
        let early = layer("/c/a", "[network]\nmtu = \"x\"\n");
        let error = sentence(merge(&[early, layer("/c/b", "network.mtu = 1500\n")]));
        assert!(
            error.starts_with("/c/a, line 2, mtu: invalid type"),
            "{error}"
        );
        for (text, why) in [
            ("\ncni = 3\n", "invalid type: integer `3`, expected a table"),
            ("\ncni = []\n", "invalid type: sequence, expected a table"),
        ] {
            let expected = format!("/etc/rrun/config.toml, line 2, cni: {why}");
            assert_eq!(sentence(load(text)), expected);
        }
    }

    #[test]
    fn a_later_layer_overrides_an_earlier_one_and_handlers_are_merged() -> Result<(), ConfigError> {
        let config = merge(&[
            layer(
                "/c/a",
                "root = \"/a\"\nstate = \"/s\"\n[runtime.runc]\npath = \"/bin/runc\"\n\
                 [runtime.kata]\npath = \"/bin/kata\"\nnative = false\n\
                 [network]\nmtu = 1400\nmasquerade = false\n",
            ),
            layer(
                "/c/b",
                "root = \"/b\"\n[runtime.crun]\npath = \"/bin/crun\"\n\
                 [runtime.kata]\npath = \"/opt/kata\"\n[network]\nmtu = 1300\n",
            ),
            flags("cni_conf_dir = \"/flag\"\n"),
        ])?;
        assert_eq!(config.root, Path::new("/b"));
        assert_eq!(config.state, Path::new("/s"));
        assert_eq!(config.cni_conf_dir, Path::new("/flag"));
        assert_eq!(
            (config.network.mtu, config.network.masquerade),
            (Some(1300), false)
        );
        assert_eq!(
            config.runtimes.keys().collect::<Vec<_>>(),
            ["crun", "kata", "rrun", "runc"]
        );
        // A handler section in a later file replaces the whole section with the same name in an
        // earlier file.
        let kata = config.runtime("kata");
        assert!(kata.is_some_and(|kata| kata.native && kata.path == Path::new("/opt/kata")));
        assert_eq!(
            config
                .runtime_command("runc", "/rrun/p")
                .map(|command| command.join(" ")),
            Some("/bin/runc --root /s/runtime/runc".to_owned())
        );
        assert_eq!(config.runtime_command("none", ""), None);
        let in_slice = config
            .runtime_command("runc", "/a.slice")
            .unwrap_or_default();
        assert_eq!(
            in_slice.last().map(String::as_str),
            Some("--systemd-cgroup")
        );
        Ok(())
    }

    #[test]
    fn each_flag_sets_the_key_with_the_same_name() -> Result<(), ConfigError> {
        let given = Flags {
            root: Some("/r".into()),
            listen: Some("unix:///s".to_owned()),
            stream_listen: Some(([127, 0, 0, 1], 7).into()),
            debug: Some(true),
            ..Flags::default()
        };
        let config = merge(&[layer("/c", "debug = false\n"), Layer::from_flags(&given)?])?;
        assert_eq!(config.root, Path::new("/r"));
        assert_eq!(config.socket(), Path::new("/s"));
        assert_eq!(config.stream_listen.port(), 7);
        assert!(config.debug);
        Ok(())
    }

    #[test]
    fn line_of_returns_the_line_of_a_key_in_its_table() {
        let layer =
            flags("root = \"/r\"\n[network]\nmtu = 1\nrange = \"\"\n[cni]\ntimeout_seconds = 0\n");
        for (key, line) in [
            ("root", Some(1)),
            ("network.range", Some(4)),
            ("cni.timeout_seconds", Some(6)),
            ("range", None),
            ("network.range6", None),
            ("root.range", None),
        ] {
            assert_eq!(layer.line_of(key), line, "{key}");
        }
    }

    #[test]
    fn a_mistake_is_reported_for_the_last_layer_that_sets_the_key() {
        let layers = |last| {
            [
                layer("/c/a", "default_runtime = \"x\"\n"),
                layer("/c/b", "\ndefault_runtime = \"y\"\n"),
                layer("/c/c", "root = \"/r\"\n"),
                flags(last),
            ]
        };
        assert_eq!(
            sentence(merge(&layers(""))),
            "/c/b, line 2, default_runtime: the section [runtime.y] does not exist"
        );
        assert_eq!(
            sentence(merge(&layers("default_runtime = \"z\"\n"))),
            "default_runtime: the section [runtime.z] does not exist"
        );
        assert_eq!(
            sentence(merge(&layers("default_runtime = \"rrun\"\nroot = \"r\""))),
            "root: r is not an absolute path"
        );
    }
}
