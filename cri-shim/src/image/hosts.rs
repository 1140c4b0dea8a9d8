//! `hosts.toml`: where a registry's images are really fetched from.
//!
//! The files and keys are those of containerd's `certs.d` convention (its docs/hosts.md):
//! `HOST/hosts.toml` below the configured directory, `HOST_PORT_` if a colon is unwelcome,
//! `_default` for all hosts that have no file of their own. They are read anew at each pull.

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::{ImageError, Kind};

/// The tree of `HOST/hosts.toml` files.
#[derive(Clone, Debug)]
pub struct Registries {
    dir: PathBuf,
}

/// One place that answers for a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// `http` or `https`, host and path up to and with `/v2`.
    pub base: String,
    /// Host and port, for messages.
    pub host: String,
    /// It is a mirror: not the registry that the reference names.
    pub mirror: bool,
    /// May say which digest a tag stands for.
    pub resolve: bool,
    /// May be asked for content.
    pub pull: bool,
    pub skip_verify: bool,
    /// PEM files of authorities to trust beside the system's.
    pub ca: Vec<PathBuf>,
    /// PEM files of a certificate and its key, to prove who is asking.
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
    pub headers: Vec<(String, String)>,
}

impl Registries {
    /// `dir` is usually /etc/rrun/certs.d; it need not exist.
    pub fn new(dir: &Path) -> Self {
        Registries {
            dir: dir.to_owned(),
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether what is configured for `registry` can be understood. Blocks on the disk.
    pub fn check(&self, registry: &str) -> Result<(), ImageError> {
        self.endpoints(registry).map(drop)
    }

    /// Where to ask for images of `registry`, in this order. Blocks on the disk.
    pub(super) fn endpoints(&self, registry: &str) -> Result<Vec<Endpoint>, ImageError> {
        for dir in directories(registry) {
            let path = self.dir.join(&dir).join("hosts.toml");
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(refuse(&path, &error.to_string())),
            };
            return parse(registry, &path, &text);
        }
        Ok(vec![upstream(registry)])
    }
}

fn directories(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':') {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.push("_default".to_owned());
    names
}

fn refuse(path: &Path, why: &str) -> ImageError {
    ImageError::new(
        Kind::InvalidArgument,
        format!("the registry configuration {}: {why}", path.display()),
    )
}

/// The registry itself, when no file says otherwise.
fn upstream(registry: &str) -> Endpoint {
    let host = match registry {
        // Docker Hub's registry has another name than its images.
        "docker.io" => "registry-1.docker.io",
        other => other,
    };
    let scheme = if is_loopback(host) { "http" } else { "https" };
    Endpoint {
        base: format!("{scheme}://{host}/v2"),
        host: host.to_owned(),
        mirror: false,
        resolve: true,
        pull: true,
        skip_verify: false,
        ca: Vec::new(),
        client: Vec::new(),
        headers: Vec::new(),
    }
}

fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[derive(Deserialize)]
struct File {
    server: Option<String>,
    // The settings of the server, not flattened: that would lose the line of a mistake.
    capabilities: Option<Vec<String>>,
    skip_verify: Option<bool>,
    ca: Option<toml::Value>,
    client: Option<toml::Value>,
    header: Option<toml::Table>,
    override_path: Option<bool>,
    #[serde(default)]
    host: toml::Table,
}

#[derive(Default, Deserialize)]
struct Settings {
    capabilities: Option<Vec<String>>,
    skip_verify: Option<bool>,
    ca: Option<toml::Value>,
    client: Option<toml::Value>,
    header: Option<toml::Table>,
    override_path: Option<bool>,
}

/// What is wrong in a file: its line, the key there, and the parser's words.
fn mistake(text: &str, error: &toml::de::Error) -> String {
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else {
        return error.message().to_owned();
    };
    let line = before.matches('\n').count();
    let key = text.lines().nth(line).unwrap_or_default();
    let key = key.split('=').next().unwrap_or_default().trim();
    format!("line {} ({key}): {}", line + 1, error.message())
}

fn parse(registry: &str, path: &Path, text: &str) -> Result<Vec<Endpoint>, ImageError> {
    let file: File = toml::from_str(text).map_err(|error| refuse(path, &mistake(text, &error)))?;
    let of_server = Settings {
        capabilities: file.capabilities,
        skip_verify: file.skip_verify,
        ca: file.ca,
        client: file.client,
        header: file.header,
        override_path: file.override_path,
    };
    let mut endpoints = Vec::new();
    for (url, settings) in file.host {
        let settings: Settings = settings.try_into().map_err(|error: toml::de::Error| {
            refuse(path, &format!("[host.{url:?}]: {}", error.message()))
        })?;
        endpoints.push(endpoint(registry, path, &url, settings)?);
    }
    let server = file.server.unwrap_or_else(|| {
        let upstream = upstream(registry).base;
        upstream
            .strip_suffix("/v2")
            .map_or(upstream.clone(), str::to_owned)
    });
    let last = endpoint(registry, path, &server, of_server)?;
    if endpoints.iter().all(|endpoint| endpoint.base != last.base) {
        endpoints.push(last);
    }
    Ok(endpoints)
}

fn endpoint(
    registry: &str,
    file: &Path,
    url: &str,
    settings: Settings,
) -> Result<Endpoint, ImageError> {
    let refuse = |why: &str| refuse(file, &format!("host {url:?}: {why}"));
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme @ ("http" | "https"), rest)) => (scheme, rest),
        Some(_) => return Err(refuse("is neither http:// nor https://")),
        None if is_loopback(url) => ("http", url),
        None => ("https", url),
    };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() || host.contains('@') {
        return Err(refuse("names no host, or holds credentials"));
    }
    let path = path.trim_end_matches('/');
    let slash = if path.is_empty() { "" } else { "/" };
    let has_v2 = path == "v2" || path.ends_with("/v2");
    let suffix = if settings.override_path.unwrap_or(false) || has_v2 {
        ""
    } else {
        "/v2"
    };
    let capabilities = settings
        .capabilities
        .unwrap_or_else(|| vec!["pull".into(), "resolve".into()]);
    for capability in &capabilities {
        if !matches!(capability.as_str(), "pull" | "resolve" | "push") {
            return Err(refuse(&format!(
                "has the unknown capability {capability:?}"
            )));
        }
    }
    let base = format!("{scheme}://{host}{slash}{path}{suffix}");
    Ok(Endpoint {
        mirror: host != registry && base != upstream(registry).base,
        host: host.to_owned(),
        resolve: capabilities.iter().any(|c| c == "resolve"),
        pull: capabilities.iter().any(|c| c == "pull"),
        skip_verify: settings.skip_verify.unwrap_or(false),
        ca: paths(settings.ca.as_ref(), file)
            .ok_or_else(|| refuse("ca is no path or list of paths"))?,
        client: clients(settings.client.as_ref(), file).ok_or_else(|| {
            refuse("client is no path, list of paths or list of [certificate, key]")
        })?,
        headers: headers(settings.header).ok_or_else(|| refuse("header is no table of texts"))?,
        base,
    })
}

/// A path beside the file, or an absolute one.
fn beside(file: &Path, path: &str) -> PathBuf {
    file.parent().unwrap_or(file).join(path)
}

fn paths(value: Option<&toml::Value>, file: &Path) -> Option<Vec<PathBuf>> {
    match value {
        None => Some(Vec::new()),
        Some(toml::Value::String(path)) => Some(vec![beside(file, path)]),
        Some(toml::Value::Array(paths)) => paths
            .iter()
            .map(|path| path.as_str().map(|path| beside(file, path)))
            .collect(),
        Some(_) => None,
    }
}

fn clients(value: Option<&toml::Value>, file: &Path) -> Option<Vec<(PathBuf, Option<PathBuf>)>> {
    let one = |value: &toml::Value| match value {
        toml::Value::String(path) => Some((beside(file, path), None)),
        toml::Value::Array(pair) => match pair.as_slice() {
            [certificate] => Some((beside(file, certificate.as_str()?), None)),
            [certificate, key] => {
                let key = match key.as_str()? {
                    "" => None,
                    key => Some(beside(file, key)),
                };
                Some((beside(file, certificate.as_str()?), key))
            }
            _ => None,
        },
        _ => None,
    };
    match value {
        None => Some(Vec::new()),
        Some(toml::Value::Array(list)) => list.iter().map(one).collect(),
        Some(other) => Some(vec![one(other)?]),
    }
}

fn headers(table: Option<toml::Table>) -> Option<Vec<(String, String)>> {
    let mut headers = Vec::new();
    for (name, value) in table.unwrap_or_default() {
        match value {
            toml::Value::String(text) => headers.push((name, text)),
            toml::Value::Array(texts) => {
                for text in texts {
                    headers.push((name.clone(), text.as_str()?.to_owned()));
                }
            }
            _ => return None,
        }
    }
    Some(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(registry: &str, text: &str) -> Result<Vec<String>, ImageError> {
        let endpoints = parse(registry, Path::new("/c/x/hosts.toml"), text)?;
        Ok(endpoints.into_iter().map(|e| e.base).collect())
    }

    #[test]
    fn hosts_are_asked_in_the_order_of_the_file_and_the_server_last() {
        let text = r#"
            server = "https://registry-1.docker.io"
            [host."https://z.example"]
            capabilities = ["pull"]
            [host."http://a.example:5000/v2/"]
            [host."https://m.example/v2/hub"]
            override_path = true
            [host."https://p.example/path"]
        "#;
        assert_eq!(
            bases("docker.io", text).ok(),
            Some(vec![
                "https://z.example/v2".to_owned(),
                "http://a.example:5000/v2".to_owned(),
                "https://m.example/v2/hub".to_owned(),
                "https://p.example/path/v2".to_owned(),
                "https://registry-1.docker.io/v2".to_owned(),
            ])
        );
    }

    #[test]
    fn the_registry_itself_is_the_server_if_none_is_named() {
        assert_eq!(
            bases("docker.io", "").ok(),
            Some(vec!["https://registry-1.docker.io/v2".to_owned()])
        );
        assert_eq!(
            bases("127.0.0.1:5000", "").ok(),
            Some(vec!["http://127.0.0.1:5000/v2".to_owned()])
        );
    }

    #[test]
    fn paths_stand_beside_the_file() -> Result<(), ImageError> {
        let text = r#"
            server = "https://r.example"
            ca = "ca.pem"
            client = [["c.pem", "k.pem"], "both.pem"]
            skip_verify = true
            [header]
            x-one = "1"
            x-two = ["2", "3"]
        "#;
        let endpoints = parse("r.example", Path::new("/c/x/hosts.toml"), text)?;
        let last = endpoints.last().cloned();
        assert!(last.is_some_and(|e| e.ca == [PathBuf::from("/c/x/ca.pem")]
            && e.client
                == [
                    (PathBuf::from("/c/x/c.pem"), Some("/c/x/k.pem".into())),
                    (PathBuf::from("/c/x/both.pem"), None)
                ]
            && e.skip_verify
            && !e.mirror
            && e.headers.len() == 3));
        Ok(())
    }

    #[test]
    fn a_bad_file_is_refused_with_its_name_and_key() {
        for (text, word) in [
            ("server = 3", "server"),
            ("[host.\"ftp://x\"]", "ftp://x"),
            ("[host.\"https://x\"]\ncapabilities=[\"fly\"]", "fly"),
            ("[host.\"https://x\"]\nca=1", "ca"),
            ("server =", "hosts.toml"),
        ] {
            let error = bases("r.example", text).err().map(|e| e.to_string());
            assert!(
                error
                    .as_ref()
                    .is_some_and(|e| e.contains(word) && e.contains("/c/x/hosts.toml")),
                "{text}: {error:?}"
            );
        }
    }

    #[test]
    fn directories_go_from_the_host_to_the_default() {
        assert_eq!(
            directories("r.example:5000"),
            ["r.example_5000_", "r.example:5000", "_default"]
        );
    }
}
