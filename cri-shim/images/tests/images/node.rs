//! Helpers that set up a node for tests (a root directory, a store and images). Other helpers start
//! a real registry.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rrun_images::{ImageSettings, Images, Registries};
use rrun_store::Store;

use crate::build::{Failure, Image};

static COUNT: AtomicUsize = AtomicUsize::new(0);

/// The directory of one test. Dropping this value removes the directory.
pub(crate) struct Dir(pub PathBuf);

impl Dir {
    pub(crate) fn new() -> Result<Self, Failure> {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let base = std::env::var_os("RRUN_TEST_DIR").map_or("/var/tmp".into(), PathBuf::from);
        let path = base.join(format!("rrun-images-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Dir(path))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = rrun_images::layer::remove_path(&self.0);
    }
}

pub(crate) struct Node {
    pub images: Images,
    pub dir: Dir,
}

pub(crate) fn open(dir: &Path, limits: ImageSettings) -> Result<Images, Failure> {
    // The writer thread of a store that was just dropped can keep the file open for a moment.
    let mut tries = 0;
    let store = loop {
        match Store::open(&dir.join("meta.redb")) {
            Ok(store) => break store,
            Err(error) if tries == 200 => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
        tries += 1;
    };
    Ok(Images::open(
        dir,
        store,
        Registries::new(&dir.join("certs.d")),
        limits,
    )?)
}

impl Node {
    pub(crate) fn new() -> Result<Self, Failure> {
        Self::with(ImageSettings::default())
    }

    pub(crate) fn with(limits: ImageSettings) -> Result<Self, Failure> {
        let dir = Dir::new()?;
        let images = open(&dir.0, limits)?;
        Ok(Node { images, dir })
    }

    /// Closes the node's images and opens them again, as a restart of rrun-cri does.
    pub(crate) fn restart(self) -> Result<Self, Failure> {
        let Node { images, dir } = self;
        drop(images);
        let images = open(&dir.0, ImageSettings::default())?;
        Ok(Node { images, dir })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.dir.0
    }

    /// Returns the paths of the files and directories in `layers/` (except the empty layer) and in
    /// `ingest/`.
    pub(crate) fn leavings(&self) -> Result<Vec<PathBuf>, Failure> {
        let mut found = Vec::new();
        for dir in ["layers", "ingest"] {
            for entry in std::fs::read_dir(self.root().join(dir))? {
                let path = entry?.path();
                if path.file_name().is_some_and(|name| name != "0") {
                    found.push(path);
                }
            }
        }
        Ok(found)
    }

    /// Waits until all layers and downloads are removed. The wait is necessary for two reasons.
    /// After a pull has failed, its other fetches can still run in their own threads. The server
    /// also removes layers in the background.
    pub(crate) async fn becomes_clean(&self) -> Result<(), Failure> {
        self.comes_down_to(0).await
    }

    /// Waits until `layers/` (without the empty layer) and `ingest/` together contain `count` files
    /// or directories.
    pub(crate) async fn comes_down_to(&self, count: usize) -> Result<(), Failure> {
        for _ in 0..1000 {
            if self.leavings()?.len() == count {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(format!(
            "layers/ and ingest/ must contain {count} files, but they contain {:?}",
            self.leavings()?
        )
        .into())
    }

    pub(crate) fn hosts(&self, registry: &str, text: &str) -> Result<(), Failure> {
        let dir = self.root().join("certs.d").join(registry);
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("hosts.toml"), text)?;
        Ok(())
    }
}

/// A process of Debian's docker-registry that listens on a loopback port.
pub(crate) struct Registry {
    child: Child,
    pub port: u16,
    _dir: Dir,
}

/// Returns a message if a program in `programs` is not installed.
pub(crate) fn missing(programs: &[&str]) -> Option<String> {
    let found = |program: &&str| {
        std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
    };
    let missing = programs.iter().find(|program| !found(program))?;
    Some(format!("the program {missing} is not installed"))
}

/// Returns a message if tar is not GNU tar. Busybox's tar can't create the archives of the tests,
/// because it supports only one archive format and no sparse files.
pub(crate) fn no_gnu_tar() -> Option<String> {
    let version = Command::new("tar").arg("--version").output();
    let is_gnu = version.is_ok_and(|out| out.stdout.starts_with(b"tar (GNU tar)"));
    (!is_gnu).then(|| "tar is not GNU tar".to_owned())
}

pub(crate) fn free_port() -> Result<u16, Failure> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Registry {
    /// Starts the registry. The parameter `http` is a text that is added to the section `http` of
    /// the registry's configuration.
    pub(crate) fn start(http: &str) -> Result<Self, Failure> {
        let dir = Dir::new()?;
        let port = free_port()?;
        let config = dir.0.join("config.yml");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp: {{addr: \"127.0.0.1:{port}\", secret: x{http}}}\n",
                dir.0.join("data").display()
            ),
        )?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let registry = Registry {
            child,
            port,
            _dir: dir,
        };
        for _ in 0..500 {
            if registry.answers(!http.is_empty()) {
                return Ok(registry);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err("docker-registry does not answer".into())
    }

    fn answers(&self, tls: bool) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else {
            return false;
        };
        if tls {
            return true;
        }
        let mut answer = [0; 8];
        stream
            .write_all(b"GET /v2/ HTTP/1.0\r\n\r\n")
            .and_then(|()| stream.read_exact(&mut answer))
            .is_ok()
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Pushes an image with skopeo and returns its reference.
    pub(crate) fn push(
        &self,
        image: &Image,
        name: &str,
        options: &[&str],
    ) -> Result<String, Failure> {
        let dir = Dir::new()?;
        image.write_layout(&dir.0)?;
        self.push_layout(&dir.0, name, options)
    }

    pub(crate) fn push_layout(
        &self,
        dir: &Path,
        name: &str,
        options: &[&str],
    ) -> Result<String, Failure> {
        let reference = format!("{}/{name}", self.host());
        let output = Command::new("skopeo")
            .args([
                "copy",
                "--quiet",
                "--insecure-policy",
                "--dest-tls-verify=false",
            ])
            .args(options)
            .arg(format!("oci:{}:latest", dir.display()))
            .arg(format!("docker://{reference}"))
            .output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        Ok(reference)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a script in a read-only overlay mount of `lowers` (uppermost first) at `dir`/merged, and
/// returns the script's output. The script sees the layers as a container would.
pub(crate) fn in_overlay(
    dir: &Path,
    lowers: &[impl AsRef<Path>],
    script: &str,
) -> Result<String, Failure> {
    let merged = dir.join("merged");
    std::fs::create_dir_all(&merged)?;
    let lowers: Vec<_> = lowers
        .iter()
        .map(|lower| lower.as_ref().display().to_string())
        .collect();
    let out = Command::new("unshare")
        .args(["--mount", "sh", "-ec"])
        .arg(format!(
            "mount -t overlay -o ro,lowerdir={} none {m}; cd {m}; {script}",
            lowers.join(":"),
            m = merged.display()
        ))
        .output()?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into());
    }
    Ok(String::from_utf8(out.stdout)?)
}
