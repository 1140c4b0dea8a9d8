//! Parses one hosts.toml, and reports each mistake with its line and key.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::position::{self, Lines};

/// The keys that are allowed at the top of the file and in each `[host]` section.
const KEYS: &str = "capabilities, ca, client, skip_verify, header, override_path, dial_timeout";

/// The maximum `dial_timeout`.
const MAX_DIAL_TIMEOUT: Duration = Duration::from_secs(3600);

/// The settings for one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HostSettings {
    /// The capabilities of the host. `None` and an empty list both mean all capabilities.
    pub capabilities: Option<Vec<String>>,
    pub skip_verify: bool,
    pub ca: Vec<PathBuf>,
    /// The files of the client certificates, each with the file of its private key. The private
    /// key's file is `None` if the private key is in the certificate's file.
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
    pub headers: Vec<(String, String)>,
    pub override_path: bool,
    pub dial_timeout: Option<Duration>,
}

/// One `[host]` section: its address, its line in the file, and its settings.
pub(super) struct HostSection {
    pub url: String,
    pub line: usize,
    pub settings: HostSettings,
}

#[derive(Default)]
pub(super) struct HostsFile {
    /// The `[host]` sections, in the order of the file.
    pub hosts: Vec<HostSection>,
    /// The value and the line number of the key `server`, if the file contains this key.
    pub server: Option<(String, usize)>,
    /// The settings at the top of the file, which apply to the host in `server`.
    pub server_settings: HostSettings,
    /// The texts of the warnings about unknown keys, one text for each key. Unknown keys are
    /// ignored as in containerd, but they are logged.
    pub unknown: Vec<String>,
}

/// Prefixes the message `why` with the line and the key to which the message applies. Only the first
/// 100 characters of a long key are shown.
fn at(line: usize, key: &str, why: &str) -> String {
    match key.char_indices().nth(100) {
        Some((end, _)) => format!("line {line}, {}…: {why}", &key[..end]),
        None => format!("line {line}, {key}: {why}"),
    }
}

/// Parses `text`, the content of the file `path`. Relative paths in `text` are relative to the
/// directory of `path`.
pub(super) fn parse(path: &Path, text: &str) -> Result<HostsFile, String> {
    let table = DeTable::parse(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let (line, key) = position::of(text, start);
        at(line, &key, error.message())
    })?;
    let lines = Lines::new(text);
    let mut file = HostsFile::default();
    for (key, value) in table.get_ref() {
        let line = lines.at(key.span().start);
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("server", DeValue::String(url)) => {
                file.server = Some((url.clone().into_owned(), line));
            }
            ("server", _) => return Err(at(line, "server", "the value is not a string")),
            ("host", DeValue::Table(hosts)) => {
                for (url, value) in hosts {
                    let line = lines.at(url.span().start);
                    let url = url.get_ref();
                    let DeValue::Table(table) = value.get_ref() else {
                        let why = "the value is not a table; the format is [host.\"https://…\"]";
                        return Err(at(line, &format!("host.{url}"), why));
                    };
                    let mut settings = HostSettings::default();
                    for (key, value) in table {
                        settings.take(path, &lines, key, value, &mut file.unknown)?;
                    }
                    file.hosts.push(HostSection {
                        url: url.clone().into_owned(),
                        line,
                        settings,
                    });
                }
            }
            ("host", _) => {
                return Err(at(
                    line,
                    "host",
                    "the value is not a table; the format is [host.\"https://…\"]",
                ));
            }
            _ => {
                file.server_settings
                    .take(path, &lines, key, value, &mut file.unknown)?;
            }
        }
    }
    Ok(file)
}

impl HostSettings {
    fn take(
        &mut self,
        path: &Path,
        lines: &Lines,
        key: &Spanned<std::borrow::Cow<'_, str>>,
        value: &Spanned<DeValue<'_>>,
        unknown: &mut Vec<String>,
    ) -> Result<(), String> {
        let line = lines.at(key.span().start);
        let key = key.get_ref().as_ref();
        let refuse = |why: &str| at(line, key, why);
        let value = value.get_ref();
        match key {
            "capabilities" => {
                self.capabilities = Some(capabilities(value).map_err(|why| refuse(&why))?);
            }
            "skip_verify" | "override_path" => {
                let DeValue::Boolean(value) = value else {
                    return Err(refuse("the value is neither true nor false"));
                };
                match key {
                    "skip_verify" => self.skip_verify = *value,
                    _ => self.override_path = *value,
                }
            }
            "ca" => {
                let paths = strings(value).ok_or_else(|| refuse("the value is neither a path nor a list of paths"))?;
                self.ca = paths.iter().map(|ca| relative_to(path, ca)).collect();
            }
            "client" => {
                self.client = clients(value, path).ok_or_else(|| {
                    refuse("the value is neither a path, nor a list of paths, nor a list of [certificate, key] pairs")
                })?;
            }
            "header" => {
                self.headers = headers(value)
                    .ok_or_else(|| refuse("the value is not a table of strings or lists of strings"))?;
            }
            "dial_timeout" => {
                let DeValue::String(text) = value else {
                    return Err(refuse("the value is not a string like \"5s\""));
                };
                self.dial_timeout = duration(text).map_err(|why| refuse(&why))?;
            }
            _ => unknown.push(at(
                line,
                key,
                &format!("this key is unknown and ignored; the known keys are {KEYS} (and server and host at the top of the file)"),
            )),
        }
        Ok(())
    }
}

/// Returns `path` itself if it is absolute. If `path` is relative, joins `path` to the directory of
/// `file`.
fn relative_to(file: &Path, path: &str) -> PathBuf {
    file.parent().unwrap_or(file).join(path)
}

fn text(value: &DeValue) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.clone().into_owned()),
        _ => None,
    }
}

/// Returns the strings of a value that is a string or a list of strings.
fn strings(value: &DeValue) -> Option<Vec<String>> {
    match value {
        DeValue::Array(list) => list.iter().map(|one| text(one.get_ref())).collect(),
        one => Some(vec![text(one)?]),
    }
}

fn capabilities(value: &DeValue) -> Result<Vec<String>, String> {
    let all = strings(value).filter(|_| matches!(value, DeValue::Array(_)));
    let all = all.ok_or("the value is not a list of strings")?;
    let all: Vec<String> = all.iter().map(|one| one.to_lowercase()).collect();
    for one in &all {
        if !matches!(one.as_str(), "pull" | "resolve" | "push") {
            return Err(format!(
                "{one:?} is unknown; the known capabilities are \"pull\", \"resolve\" and \"push\""
            ));
        }
    }
    Ok(all)
}

fn clients(value: &DeValue, file: &Path) -> Option<Vec<(PathBuf, Option<PathBuf>)>> {
    let one = |value: &DeValue| {
        let pair = strings(value)?;
        match pair.as_slice() {
            [certificate] => Some((relative_to(file, certificate), None)),
            [certificate, key] => {
                let key = (!key.is_empty()).then(|| relative_to(file, key));
                Some((relative_to(file, certificate), key))
            }
            _ => None,
        }
    };
    match value {
        DeValue::Array(list) => list.iter().map(|value| one(value.get_ref())).collect(),
        other => Some(vec![one(other)?]),
    }
}

fn headers(value: &DeValue) -> Option<Vec<(String, String)>> {
    let DeValue::Table(table) = value else {
        return None;
    };
    let mut headers = Vec::new();
    for (name, value) in table {
        for text in strings(value.get_ref())? {
            headers.push((name.get_ref().clone().into_owned(), text));
        }
    }
    Some(headers)
}

/// Parses a duration in the format of Go's `time.ParseDuration`, for example `300ms`, `1m30s` or
/// `1.5h`. Returns `None` for 0, which selects the default timeout.
fn duration(text: &str) -> Result<Option<Duration>, String> {
    let wrong = || format!("{text:?} is not a duration like \"5s\", \"300ms\" or \"1m30s\"");
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(None);
    }
    if rest.is_empty() {
        return Err(wrong());
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let end = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        seconds += number
            * match unit {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(wrong()),
            };
        rest = after;
    }
    if seconds == 0.0 {
        return Ok(None);
    }
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if duration <= MAX_DIAL_TIMEOUT => Ok(Some(duration)),
        _ => Err(format!("{text:?} is longer than the limit of one hour")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_parsed_as_in_go() {
        for (text, milliseconds) in [
            ("5s", 5000),
            ("300ms", 300),
            ("1m30s", 90_000),
            ("1.5s", 1500),
            ("+2s", 2000),
            ("1h", 3_600_000),
        ] {
            let expected = Ok(Some(Duration::from_millis(milliseconds)));
            assert_eq!(duration(text), expected, "{text}");
        }
        for text in ["0", "0s"] {
            assert_eq!(duration(text), Ok(None), "{text}");
        }
        for text in [
            "",
            "5",
            "s",
            "-1s",
            "5 s",
            "1d",
            "1..5s",
            "1e3s",
            "9999999999h",
            "2h",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_unknown_key_is_reported_with_its_line_and_ignored() -> Result<(), String> {
        let text = "server = \"https://r\"\nskip_verfy = true\n\n[host.\"https://m\"]\n  ca = \"a\"\n  \
                    cleint = \"b\"\n[host.\"https://m\".header]\nanything = \"goes\"\n[hosts]\n";
        let file = parse(Path::new("/c/x/hosts.toml"), text)?;
        let begin: Vec<_> = file
            .unknown
            .iter()
            .filter_map(|message| message.split(": ").next())
            .collect();
        assert_eq!(
            begin,
            ["line 2, skip_verfy", "line 6, cleint", "line 9, hosts"]
        );
        assert_eq!(file.server_settings, HostSettings::default());
        Ok(())
    }

    #[test]
    fn a_mistake_is_reported_with_its_line_and_key() {
        for (text, expected) in [
            ("\nserver = 3", "line 2, server"),
            ("host = 3", "line 1, host"),
            (
                "[host]\ncapabilities = [\"pull\"]",
                "line 2, host.capabilities",
            ),
            (
                "[host.\"https://x\"]\n\ncapabilities=[\"fly\"]",
                "line 3, capabilities: \"fly\"",
            ),
            ("[host.\"https://x\"]\nca=1", "line 2, ca"),
            (
                "[host.\"https://x\"]\nskip_verify = \"no\"",
                "line 2, skip_verify",
            ),
            (
                "[host.\"https://x\"]\nclient=[[\"a\",\"b\",\"c\"]]",
                "line 2, client",
            ),
            (
                "[host.\"https://x\"]\ndial_timeout = 5",
                "line 2, dial_timeout",
            ),
            ("dial_timeout = \"5\"", "line 1, dial_timeout"),
            ("header = 1", "line 1, header"),
            ("server =", "line 1, server"),
            ("ca = \"a\"\nca = \"b\"", "line 2, ca"),
        ] {
            let error = parse(Path::new("/c/x/hosts.toml"), text).err();
            assert!(
                error
                    .as_ref()
                    .is_some_and(|error| error.starts_with(expected)),
                "wrong error for the hosts.toml {text:?}: {error:?}"
            );
        }
    }
}
