//! From files and flags to a [`Config`], checked as far as that goes without touching the node; each
//! mistake with the file and line that it stands in.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::{Config, ConfigError, DEFAULT_FILE, Partial};
use crate::streaming::tls;
use rrun_images::position;
use rrun_kernel::errno::describe;
use rrun_network::NetworkConfig;

/// Where a configuration comes from, to read it again.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub file: Option<PathBuf>,
    pub flags: Partial,
}

/// A file and what it says.
type Text = (PathBuf, String);

impl Source {
    /// Reads the file (or the default one, if it is there) and the drop-ins in `config.d` beside
    /// it, lays the command line over them, and refuses what can't be served. Blocks on the disk.
    pub(crate) fn load(&self) -> Result<Config, ConfigError> {
        let texts = self.texts()?;
        let mut all = Partial::default();
        for (file, text) in &texts {
            all = all.overlaid(Partial::parse(file, text)?);
        }
        let served = |all: Partial| {
            let config = all.finished()?;
            let (cert, key) = (&config.stream_tls_cert, &config.stream_tls_key);
            tls::acceptor(cert.as_ref(), key.as_ref())
                .map_err(|(key, reason)| ConfigError::Value { key, reason })?;
            NetworkConfig::of(&config.network)
                .check()
                .map_err(|(key, reason)| ConfigError::Value { key, reason })?;
            Ok(config)
        };
        served(all.overlaid(self.flags.clone())).map_err(|error| {
            // What the command line gets wrong by itself stands in no file.
            if served(self.flags.clone()).is_err_and(|of_flags| of_flags == error) {
                return error;
            }
            located(error, &texts)
        })
    }

    fn texts(&self) -> Result<Vec<Text>, ConfigError> {
        let main = self.file.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
        let mut texts = Vec::new();
        match read(main)? {
            Some(text) => texts.push((main.to_owned(), text)),
            None if self.file.is_some() => {
                return Err(ConfigError::Read {
                    file: main.to_owned(),
                    reason: "no such file".to_owned(),
                });
            }
            None => {}
        }
        let beside = main.parent().unwrap_or(Path::new("/")).join("config.d");
        for file in drop_ins(&beside)? {
            if let Some(text) = read(&file)? {
                texts.push((file, text));
            }
        }
        Ok(texts)
    }
}

/// The same mistake with the place of its key: in the last file that has it, which is the one that
/// counts.
fn located(error: ConfigError, texts: &[Text]) -> ConfigError {
    let ConfigError::Value { key, reason } = &error else {
        return error;
    };
    let found = texts.iter().rev().find_map(|(file, text)| {
        let line = line_of(text, key)?;
        Some(ConfigError::Parse {
            file: file.clone(),
            line,
            key: (*key).to_owned(),
            reason: reason.clone(),
        })
    });
    found.unwrap_or(error)
}

/// The line of a key, with dots between the tables that it is in.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let all = DeTable::parse(text).ok()?;
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
    Some(position::line(text, key.span().start))
}

fn read(file: &Path) -> Result<Option<String>, ConfigError> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ConfigError::Read {
            file: file.to_owned(),
            reason: describe(&error),
        }),
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
    use super::*;

    #[test]
    fn a_key_is_found_in_its_table() {
        let text = "root = \"/r\"\n[network]\nmtu = 1\nrange = \"\"\n[cni]\ntimeout_seconds = 0\n";
        for (key, line) in [
            ("root", Some(1)),
            ("network.range", Some(4)),
            ("cni.timeout_seconds", Some(6)),
            ("range", None),
            ("network.range6", None),
            ("root.range", None),
        ] {
            assert_eq!(line_of(text, key), line, "{key}");
        }
    }

    #[test]
    fn a_mistake_is_in_the_last_file_that_has_its_key() {
        let texts: [Text; 3] = [
            ("/c/a".into(), "default_runtime = \"x\"\n".to_owned()),
            ("/c/b".into(), "\ndefault_runtime = \"y\"\n".to_owned()),
            ("/c/c".into(), "root = \"/r\"\n".to_owned()),
        ];
        let error = |key| ConfigError::Value {
            key,
            reason: "no".to_owned(),
        };
        let told = located(error("default_runtime"), &texts).to_string();
        assert_eq!(told, "/c/b, line 2, default_runtime: no");
        assert_eq!(located(error("listen"), &texts).to_string(), "listen: no");
    }
}
