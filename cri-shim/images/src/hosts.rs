//! `hosts.toml`: where a registry's images are really fetched from.
//!
//! The files and keys are those of containerd's `certs.d` convention (its docs/hosts.md):
//! `HOST/hosts.toml` below the configured directory, `HOST_PORT_` if a colon is unwelcome,
//! `_default` for all hosts that have no file of their own. They are read anew at each pull.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::file::HostSettings;
use crate::error::{ImageError, Kind};
use rrun_calls::lock::lock;
use rrun_kernel::errno::describe;

/// How long a connection may take to come about where no `dial_timeout` says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The most that is looked at of one hosts.toml.
const FILE_BYTES: u64 = 1 << 20;

/// The most warnings that are remembered, not to be given twice.
const MAX_WARNINGS: usize = 1000;

/// The tree of `HOST/hosts.toml` files. Clones share what they have warned of.
#[derive(Clone, Debug)]
pub struct Registries {
    dir: PathBuf,
    warned: Arc<Mutex<BTreeSet<String>>>,
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
    /// How long a connection may take to come about, TLS included.
    pub dial_timeout: Duration,
}

impl Registries {
    /// `dir` is usually /etc/rrun/certs.d; it need not exist.
    pub fn new(dir: &Path) -> Self {
        Registries {
            dir: dir.to_owned(),
            warned: Arc::default(),
        }
    }

    /// All hosts.toml files and what they say, each as far as is looked at. Blocks on the disk.
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

    /// Whether a file of those can be understood; the log tells what of it is not known. Blocks
    /// on the disk.
    pub fn check(&self, file: &Path) -> Result<(), ImageError> {
        lock(&self.warned).clear();
        self.endpoints(&registry_of(file)).map(drop)
    }

    /// Where to ask for images of `registry`, in this order. Blocks on the disk.
    pub(super) fn endpoints(&self, registry: &str) -> Result<Vec<Endpoint>, ImageError> {
        for dir in directories(registry) {
            let dir = self.dir.join(&dir);
            let path = dir.join("hosts.toml");
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error) if is_missing(&error) => String::new(),
                Err(error) => return Err(refuse(&path, &describe(&error))),
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

    /// Each warning once, not at each pull.
    fn warn(&self, path: &Path, unknown: Vec<String>) {
        for what in unknown {
            let what = format!("{}, {what}", path.display());
            let mut warned = lock(&self.warned);
            if warned.len() > MAX_WARNINGS {
                warned.clear();
            }
            if warned.insert(what.clone()) {
                drop(warned);
                log::warn!("the registry configuration {what}");
            }
        }
    }
}

/// The registry whose file this is: `HOST_PORT_` stands for `HOST:PORT`.
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
        format!("the registry configuration {}, {why}", path.display()),
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

/// A file's endpoints, in the order in which they are asked, and what it says that nobody knows.
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
        Some((url, line)) => endpoint(registry, url, file.of_server).map_err(|why| {
            refuse(
                path,
                &format!("line {line}, server: {:?} {why}", shown(url)),
            )
        })?,
        None => {
            let upstream = upstream(registry).base;
            let server = upstream.strip_suffix("/v2").unwrap_or(&upstream);
            endpoint(registry, server, file.of_server).map_err(|why| refuse(path, &why))?
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
        Some(_) => return Err("is neither http:// nor https://".to_owned()),
        None if is_loopback(url) => ("http", url),
        None => ("https", url),
    };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() || host.contains('@') {
        return Err("names no host, or holds credentials".to_owned());
    }
    let path = path.trim_end_matches('/');
    let slash = if path.is_empty() { "" } else { "/" };
    let has_v2 = path == "v2" || path.ends_with("/v2");
    let suffix = if settings.override_path || has_v2 {
        ""
    } else {
        "/v2"
    };
    // An empty list is none, as containerd has it.
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

/// An address without the credentials that do not belong there.
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

/// A directory without hosts.toml may hold certificates by Docker's pattern: `*.crt` to trust,
/// `*.cert` with a `*.key` of the same name to show.
fn certificates(registry: &str, dir: &Path) -> Result<Option<Endpoint>, ImageError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(refuse(dir, &describe(&error))),
    };
    let mut endpoint = upstream(registry);
    for entry in entries {
        let path = entry
            .map_err(|error| refuse(dir, &describe(&error)))?
            .path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => endpoint.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                let key = key.exists().then_some(key);
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
    // Who has certificates for it speaks TLS with it, on loopback, too.
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
    fn a_bad_file_is_refused_with_its_name_and_key() {
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

    #[test]
    fn a_directory_names_its_registry() {
        for (path, registry) in [
            ("/certs.d/docker.io/hosts.toml", "docker.io"),
            ("/certs.d/127.0.0.1:5000/hosts.toml", "127.0.0.1:5000"),
            ("/certs.d/my_host_5000_/hosts.toml", "my_host:5000"),
        ] {
            assert_eq!(registry_of(Path::new(path)), registry);
        }
    }
}
