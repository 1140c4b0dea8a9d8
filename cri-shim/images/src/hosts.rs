//! Reads `hosts.toml` files. Each file lists the endpoints that provide a registry's images.
//!
//! The files and keys follow containerd's `certs.d` convention (containerd's docs/hosts.md). The
//! file for a host is `HOST/hosts.toml` below the configured directory, where HOST can contain a
//! port (`HOST:PORT`). On file systems that allow no colon in a name, the file can be
//! `HOST_PORT_/hosts.toml`. `_default/hosts.toml` applies to all hosts without their own file. The
//! files are read again at each pull.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::file::HostSettings;
use crate::error::{ImageError, Kind};
use rrun_calls::lock::lock;
use rrun_kernel::errno::{describe, is_of_the_machine};

/// The time limit for opening a connection if no `dial_timeout` is set.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The maximum number of bytes of a hosts.toml that [`Registries::files`] reads.
const FILE_BYTES: u64 = 1 << 20;

/// The maximum number of warnings in the set [`Registries::warned`].
const MAX_WARNINGS: usize = 1000;

/// The directory that contains the `HOST/hosts.toml` files. Clones share the set `warned`, which
/// contains the logged warnings. Each warning is therefore logged only once.
#[derive(Clone, Debug)]
pub struct Registries {
    dir: PathBuf,
    warned: Arc<Mutex<BTreeSet<String>>>,
}

/// One endpoint that serves the images of a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// The base URL of the registry API, for example `https://registry-1.docker.io/v2`.
    pub base: String,
    /// The host, with its port if the URL contains one.
    pub host: String,
    /// True if this endpoint is a mirror. False if it is the registry in the image reference.
    pub mirror: bool,
    /// True if requests to this endpoint may resolve a tag to a digest.
    pub resolve: bool,
    /// True if manifests and blobs may be fetched by digest from this endpoint.
    pub pull: bool,
    pub skip_verify: bool,
    /// The PEM files of authorities to trust in addition to the system's authorities.
    pub ca: Vec<PathBuf>,
    /// The PEM files of client certificates and their keys.
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
    pub headers: Vec<(String, String)>,
    /// The time limit for opening a connection, including the TLS handshake.
    pub dial_timeout: Duration,
}

impl Registries {
    /// Creates an object that reads the registry configuration from the directory `dir`, usually
    /// /etc/rrun/certs.d. The directory need not exist.
    pub fn new(dir: &Path) -> Self {
        Registries {
            dir: dir.to_owned(),
            warned: Arc::default(),
        }
    }

    /// Returns the paths of all hosts.toml files and the contents of the files. Contents of more
    /// than `FILE_BYTES` bytes are truncated. This call blocks on disk I/O.
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut all = BTreeMap::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path().join("hosts.toml");
            if let Ok(file) = std::fs::File::open(&path) {
                let mut text = Vec::new();
                let _ = file.take(FILE_BYTES).read_to_end(&mut text);
                all.insert(path, text);
            }
        }
        all
    }

    /// Checks whether a hosts.toml file can be parsed, and logs its unknown keys. This call blocks
    /// on disk I/O.
    pub fn check(&self, file: &Path) -> Result<(), ImageError> {
        lock(&self.warned).clear();
        self.endpoints(&registry_of(file)).map(drop)
    }

    /// Returns the endpoints for images of `registry`, in the order in which they are tried. This
    /// call blocks on disk I/O.
    pub(super) fn endpoints(&self, registry: &str) -> Result<Vec<Endpoint>, ImageError> {
        for dir in directories(registry) {
            let dir = self.dir.join(&dir);
            let path = dir.join("hosts.toml");
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error) if is_missing(&error) => String::new(),
                Err(error) => return Err(unreadable(&path, &error)),
            };
            if !text.is_empty() {
                let (endpoints, unknown) = parse(registry, &path, &text)?;
                self.warn(&path, unknown);
                return Ok(endpoints);
            }
            if let Some(endpoint) = certificates(registry, &dir)? {
                return Ok(vec![endpoint]);
            }
        }
        Ok(vec![upstream(registry)])
    }

    /// Logs each text in `unknown` as a warning. Does not log the same warning again at each pull.
    fn warn(&self, path: &Path, unknown: Vec<String>) {
        for what in unknown {
            let what = format!("{}, {what}", path.display());
            let mut warned = lock(&self.warned);
            if warned.len() > MAX_WARNINGS {
                warned.clear();
            }
            if warned.insert(what.clone()) {
                drop(warned);
                log::warn!("registry configuration {what}");
            }
        }
    }
}

/// Returns the registry to which a hosts.toml file applies. The directory name `HOST_PORT_` means
/// `HOST:PORT`.
fn registry_of(path: &Path) -> String {
    let dir = path.parent().and_then(Path::file_name).unwrap_or_default();
    let dir = dir.to_string_lossy();
    match dir.strip_suffix('_').and_then(|name| name.rsplit_once('_')) {
        Some((host, port)) => format!("{host}:{port}"),
        None => dir.into_owned(),
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
        format!("registry configuration {}, {why}", path.display()),
    )
}

/// Returns the error for a file or directory that cannot be read. The configuration is wrong, except
/// if this node lacks a resource or has a broken device.
fn unreadable(path: &Path, error: &std::io::Error) -> ImageError {
    let kind = if error.raw_os_error().is_some_and(is_of_the_machine) {
        Kind::Internal
    } else {
        Kind::InvalidArgument
    };
    let (path, reason) = (path.display(), describe(error));
    ImageError::new(
        kind,
        format!("read the registry configuration {path}: {reason}"),
    )
}

/// Returns the registry itself as an endpoint, for registries without a hosts.toml file.
fn upstream(registry: &str) -> Endpoint {
    let host = match registry {
        // The host name of Docker Hub's registry differs from the host name in image references.
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
        dial_timeout: CONNECT_TIMEOUT,
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

/// Parses a hosts.toml file. Returns the file's endpoints in the order in which they are tried.
/// Also returns a warning text for each unknown key.
fn parse(
    registry: &str,
    path: &Path,
    text: &str,
) -> Result<(Vec<Endpoint>, Vec<String>), ImageError> {
    let file = file::parse(path, text).map_err(|why| refuse(path, &why))?;
    let mut endpoints = Vec::new();
    for host in file.hosts {
        let endpoint = endpoint(registry, &host.url, host.settings).map_err(|why| {
            refuse(
                path,
                &format!("line {}, host.{:?}: {why}", host.line, shown(&host.url)),
            )
        })?;
        endpoints.push(endpoint);
    }
    let last = match &file.server {
        Some((url, line)) => endpoint(registry, url, file.server_settings).map_err(|why| {
            refuse(
                path,
                &format!("line {line}, server: {:?}: {why}", shown(url)),
            )
        })?,
        None => {
            let upstream = upstream(registry).base;
            let server = upstream.strip_suffix("/v2").unwrap_or(&upstream);
            endpoint(registry, server, file.server_settings).map_err(|why| refuse(path, &why))?
        }
    };
    if endpoints.iter().all(|endpoint| endpoint.base != last.base) {
        endpoints.push(last);
    }
    Ok((endpoints, file.unknown))
}

fn endpoint(registry: &str, url: &str, settings: HostSettings) -> Result<Endpoint, String> {
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme @ ("http" | "https"), rest)) => (scheme, rest),
        Some(_) => return Err("the address does not begin with http:// or https://".to_owned()),
        None if is_loopback(url) => ("http", url),
        None => ("https", url),
    };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() || host.contains('@') {
        return Err("the address has no host, or contains credentials".to_owned());
    }
    let path = path.trim_end_matches('/');
    let slash = if path.is_empty() { "" } else { "/" };
    let has_v2 = path == "v2" || path.ends_with("/v2");
    let suffix = if settings.override_path || has_v2 {
        ""
    } else {
        "/v2"
    };
    // An empty list of capabilities counts as a missing list, as in containerd.
    let capabilities = settings.capabilities.filter(|list| !list.is_empty());
    let can = |what: &str| {
        let list = capabilities.as_ref();
        list.is_none_or(|list| list.iter().any(|one| one == what))
    };
    let base = format!("{scheme}://{host}{slash}{path}{suffix}");
    Ok(Endpoint {
        mirror: host != registry && base != upstream(registry).base,
        host: host.to_owned(),
        resolve: can("resolve"),
        pull: can("pull"),
        skip_verify: settings.skip_verify,
        ca: settings.ca,
        client: settings.client,
        headers: settings.headers,
        dial_timeout: settings.dial_timeout.unwrap_or(CONNECT_TIMEOUT),
        base,
    })
}

/// Removes the credentials from an address. The result can be used in a message.
fn shown(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => {
            format!(
                "{}://…{}",
                url.get(..scheme).unwrap_or_default(),
                url.get(at..).unwrap_or_default()
            )
        }
        (None, Some(at)) => format!("…{}", url.get(at..).unwrap_or_default()),
        _ => url.to_owned(),
    }
}

/// Returns the endpoint for a directory that contains certificates in Docker's layout, but no
/// hosts.toml. In this layout, each `*.crt` file contains authorities to trust. Each `*.cert` file
/// contains a client certificate, and the `*.key` file with the same name contains the private key.
fn certificates(registry: &str, dir: &Path) -> Result<Option<Endpoint>, ImageError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(unreadable(dir, &error)),
    };
    let mut endpoint = upstream(registry);
    for entry in entries {
        let path = entry.map_err(|error| unreadable(dir, &error))?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => endpoint.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                let exists = key.try_exists();
                let exists = exists.map_err(|error| unreadable(&key, &error))?;
                let key = exists.then_some(key);
                endpoint.client.push((path, key));
            }
            _ => {}
        }
    }
    if endpoint.ca.is_empty() && endpoint.client.is_empty() {
        return Ok(None);
    }
    endpoint.ca.sort();
    endpoint.client.sort();
    // The directory contains certificates for this registry. The registry therefore uses TLS, even
    // if it has a loopback address.
    if let Some(rest) = endpoint.base.strip_prefix("http://") {
        endpoint.base = format!("https://{rest}");
    }
    Ok(Some(endpoint))
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(registry: &str, text: &str) -> Result<Vec<String>, ImageError> {
        let (endpoints, _) = parse(registry, Path::new("/c/x/hosts.toml"), text)?;
        Ok(endpoints.into_iter().map(|e| e.base).collect())
    }

    #[test]
    fn hosts_are_tried_in_the_order_of_the_file_and_the_server_is_tried_last() {
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
    fn the_registry_itself_is_the_default_server() {
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
    fn paths_are_relative_to_the_directory_of_the_file() -> Result<(), ImageError> {
        let text = r#"
            server = "https://r.example"
            ca = "ca.pem"
            client = [["c.pem", "k.pem"], "both.pem"]
            skip_verify = true
            dial_timeout = "1m"
            capabilities = []
            [header]
            x-one = "1"
            x-two = ["2", "3"]
        "#;
        let (endpoints, _) = parse("r.example", Path::new("/c/x/hosts.toml"), text)?;
        let last = endpoints.last().cloned();
        assert!(last.is_some_and(|e| e.ca == [PathBuf::from("/c/x/ca.pem")]
            && e.client
                == [
                    (PathBuf::from("/c/x/c.pem"), Some("/c/x/k.pem".into())),
                    (PathBuf::from("/c/x/both.pem"), None)
                ]
            && e.skip_verify
            && e.dial_timeout == Duration::from_secs(60)
            && e.resolve
            && e.pull
            && !e.mirror
            && e.headers.len() == 3));
        Ok(())
    }

    #[test]
    fn an_error_in_a_file_is_reported_with_the_file_the_line_and_the_key() {
        for (text, word) in [
            ("server = 3", "line 1, server"),
            ("\n[host.\"ftp://x\"]", "line 2, host.\"ftp://x\""),
            (
                "\n\nserver = \"https://me:secret@x\"",
                "line 3, server: \"https://…@x\"",
            ),
            ("[host.\"me:secret@x\"]", "host.\"…@x\""),
        ] {
            let error = bases("r.example", text).err().map(|e| e.to_string());
            assert!(
                !error.as_ref().is_some_and(|e| e.contains("secret")),
                "{error:?}"
            );
            assert!(
                error
                    .as_ref()
                    .is_some_and(|e| e.contains(word) && e.contains("/c/x/hosts.toml")),
                "wrong error for the hosts.toml {text:?}: {error:?}"
            );
        }
    }

    #[test]
    fn directories_are_tried_from_the_host_to_the_default() {
        assert_eq!(
            directories("r.example:5000"),
            ["r.example_5000_", "r.example:5000", "_default"]
        );
    }

    #[test]
    fn the_directory_name_determines_the_registry() {
        for (path, registry) in [
            ("/certs.d/docker.io/hosts.toml", "docker.io"),
            ("/certs.d/127.0.0.1:5000/hosts.toml", "127.0.0.1:5000"),
            ("/certs.d/my_host_5000_/hosts.toml", "my_host:5000"),
        ] {
            assert_eq!(registry_of(Path::new(path)), registry);
        }
    }
}
