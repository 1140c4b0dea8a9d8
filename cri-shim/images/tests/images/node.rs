//! What a node has: a root directory, a store, images; and a real registry beside it.

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

/// A directory of one test, gone at its end.
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
    // The writer of a store that has just been dropped may hold the file for a moment.
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

    /// The same node after rrun-cri has been started again.
    pub(crate) fn restart(self) -> Result<Self, Failure> {
        let Node { images, dir } = self;
        drop(images);
        let images = open(&dir.0, ImageSettings::default())?;
        Ok(Node { images, dir })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.dir.0
    }

    /// What lies in `layers/` beside the empty layer, and in `ingest/`.
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

    /// Waits until nothing is left: other layers of a failed pull end in threads of their own, and
    /// what is removed goes with nobody waiting.
    pub(crate) async fn becomes_clean(&self) -> Result<(), Failure> {
        self.comes_down_to(0).await
    }

    /// Waits until this much is left.
    pub(crate) async fn comes_down_to(&self, count: usize) -> Result<(), Failure> {
        for _ in 0..1000 {
            if self.leavings()?.len() == count {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(format!("left: {:?}", self.leavings()?).into())
    }

    pub(crate) fn hosts(&self, registry: &str, text: &str) -> Result<(), Failure> {
        let dir = self.root().join("certs.d").join(registry);
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("hosts.toml"), text)?;
        Ok(())
    }
}

/// Debian's docker-registry on a loopback port.
pub(crate) struct Registry {
    child: Child,
    pub port: u16,
    _dir: Dir,
}

/// What a test needs and this machine lacks.
pub(crate) fn missing(programs: &[&str]) -> Option<String> {
    let found = |program: &&str| {
        std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
    };
    let lacking = programs.iter().find(|program| !found(program))?;
    Some(format!("{lacking} is not installed"))
}

/// Busybox's tar writes one dialect, and no sparse files.
pub(crate) fn no_gnu_tar() -> Option<String> {
    let version = Command::new("tar").arg("--version").output();
    let is_gnu = version.is_ok_and(|out| out.stdout.starts_with(b"tar (GNU tar)"));
    (!is_gnu).then(|| "tar is not GNU tar".to_owned())
}

pub(crate) fn free_port() -> Result<u16, Failure> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Registry {
    /// `http` is added to the section of that name.
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

    /// Pushes with skopeo; returns the reference.
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
