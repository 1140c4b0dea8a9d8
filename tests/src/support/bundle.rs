//! OCI bundles, and the runtime under test: `RRUN_TEST_RUNTIME`, `rrun` if unset. The same tests
//! run against runc and crun, which keeps them honest.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::support::machine::{Directory, Output, Result, Run, Running, command, wait_for};

pub(crate) fn runtime_program() -> String {
    std::env::var("RRUN_TEST_RUNTIME").unwrap_or_else(|_| "rrun".to_owned())
}

/// A bundle on disk and the containers made from it. Dropped, all of it goes.
pub(crate) struct Bundle {
    directory: Directory,
    /// What config.json will say; written by each [`Bundle::call`].
    pub(crate) config: Value,
    id: String,
    /// Given before every command.
    flags: Vec<&'static str>,
}

/// The program of `inside`: hard-linked into each root file system, so that each costs nothing.
fn program() -> Result<&'static Path> {
    static PROGRAM: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let made = PROGRAM.get_or_init(|| {
        let bytes = fs::read("/proc/self/exe").map_err(|error| error.to_string())?;
        if wants_a_loader(&bytes) {
            return Err(
                "rrun-e2e must be linked statically (-C target-feature=+crt-static)".to_owned(),
            );
        }
        let path = std::env::temp_dir().join("rrun-e2e-inside");
        let _ = fs::remove_file(&path);
        fs::copy("/proc/self/exe", &path).map_err(|error| error.to_string())?;
        Ok(path)
    });
    Ok(made.as_deref().map_err(|error| error.clone())?)
}

/// elf(5): a PT_INTERP program header names a dynamic loader, and a container here has none.
fn wants_a_loader(elf: &[u8]) -> bool {
    const PT_INTERP: [u8; 4] = 3u32.to_le_bytes();
    let number = |at: usize| {
        elf.get(at..at + 2)
            .map_or(0, |b| usize::from(b[0]) | usize::from(b[1]) << 8)
    };
    let (first, size, count) = (number(32), number(54), number(56));
    (0..count).any(|header| {
        elf.get(first + header * size..)
            .is_some_and(|h| h.starts_with(&PT_INTERP))
    })
}

/// Makes what tests share, so that no test is blamed for it.
pub(crate) fn prepare() {
    let _ = program();
}

/// Puts a root file system there that holds the program `/bin/inside` and little else.
pub(crate) fn make_rootfs(path: &Path) -> Result {
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp", "data"] {
        fs::create_dir_all(path.join(dir))?;
    }
    let inside = path.join("bin/inside");
    if fs::hard_link(program()?, &inside).is_err() {
        fs::copy(program()?, &inside)?;
    }
    fs::write(
        path.join("bin/no-program"),
        "neither a program nor executable\n",
    )?;
    Ok(())
}

impl Bundle {
    /// A bundle whose container runs `inside` with these arguments; everything else is as `runc
    /// spec` has it, but for the terminal.
    pub(crate) fn new(args: &[&str]) -> Result<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let id = format!("e2e-{}-{number}", std::process::id());
        let directory = Directory::new("bundle")?;
        make_rootfs(&directory.join("rootfs"))?;
        let config = config(&format!("/{id}"));
        let mut bundle = Bundle {
            directory,
            config,
            id,
            flags: Vec::new(),
        };
        bundle.args(args);
        Ok(bundle)
    }

    /// The same under the systemd cgroup driver, as a scope in this slice.
    pub(crate) fn in_slice(slice: &str, args: &[&str]) -> Result<Self> {
        let mut bundle = Bundle::new(args)?;
        let path = format!("{slice}:e2e:{}", bundle.id);
        bundle.set("/linux/cgroupsPath", json!(path));
        bundle.flags = vec!["--systemd-cgroup"];
        Ok(bundle)
    }

    /// The unit of systemd that a container of [`Bundle::in_slice`] is.
    pub(crate) fn unit(&self) -> String {
        format!("e2e-{}.scope", self.id)
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A path below the bundle's directory.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    /// Where the runtime keeps its state: with the bundle, so that it shows what it leaves.
    pub(crate) fn root(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The container's cgroup directory.
    pub(crate) fn cgroup(&self) -> PathBuf {
        let path = self.config["linux"]["cgroupsPath"]
            .as_str()
            .unwrap_or_default();
        let root = PathBuf::from("/sys/fs/cgroup");
        match path.split_once(':') {
            // a-b.slice is in a.slice.
            Some((slice, _)) => {
                let name = slice.trim_end_matches(".slice");
                let ends = name.match_indices('-').map(|(at, _)| at);
                let slices = ends
                    .chain([name.len()])
                    .map(|end| format!("{}.slice", &name[..end]));
                root.join(slices.collect::<PathBuf>()).join(self.unit())
            }
            None => root.join(path.trim_start_matches('/')),
        }
    }

    pub(crate) fn cgroup_file(&self, name: &str) -> Result<String> {
        let path = self.cgroup().join(name);
        let text =
            fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(text.trim_end().to_owned())
    }

    /// A number of a file of lines such as `oom_kill 1`.
    pub(crate) fn cgroup_count(&self, file: &str, key: &str) -> Result<u64> {
        let text = self.cgroup_file(file)?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        Ok(line
            .ok_or(format!("{file} has no {key}: {text}"))?
            .parse()?)
    }

    /// The arguments of `inside`.
    pub(crate) fn args(&mut self, args: &[&str]) -> &mut Self {
        let mut all = vec!["/bin/inside"];
        all.extend(args);
        self.config["process"]["args"] = json!(all);
        self
    }

    /// Sets the value at this JSON pointer; objects on the way are made.
    pub(crate) fn set(&mut self, pointer: &str, value: Value) -> &mut Self {
        let mut place = &mut self.config;
        for key in pointer.split('/').skip(1) {
            place = match key.parse::<usize>() {
                Ok(index) if place.is_array() => &mut place[index],
                _ => &mut place[key],
            };
        }
        *place = value;
        self
    }

    /// Adds to the array at this JSON pointer; it is made if it is not there.
    pub(crate) fn add(&mut self, pointer: &str, value: Value) -> &mut Self {
        let mut all = self
            .config
            .pointer(pointer)
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        all.push(value);
        self.set(pointer, Value::Array(all))
    }

    /// The entries of `mounts`, to be changed.
    pub(crate) fn mounts(&mut self) -> impl Iterator<Item = &mut Value> {
        let mounts = self.config["mounts"].as_array_mut();
        mounts.into_iter().flatten()
    }

    /// Takes the key out.
    pub(crate) fn without(&mut self, pointer: &str) -> &mut Self {
        if let Some((parent, key)) = pointer.rsplit_once('/')
            && let Some(Value::Object(map)) = self.config.pointer_mut(parent)
        {
            map.remove(key);
        }
        self
    }

    /// Takes the namespace of this type out: the container shares the runtime's.
    pub(crate) fn without_namespace(&mut self, kind: &str) -> &mut Self {
        if let Some(Value::Array(all)) = self.config.pointer_mut("/linux/namespaces") {
            all.retain(|namespace| namespace["type"] != kind);
        }
        self
    }

    pub(crate) fn write_config(&self) -> Result {
        Ok(fs::write(
            self.join("config.json"),
            serde_json::to_vec_pretty(&self.config)?,
        )?)
    }

    /// The runtime with these arguments, as they are.
    pub(crate) fn runtime(&self, args: &[&str]) -> Run {
        command(&runtime_program(), ["--root"])
            .arg(self.root())
            .args(&self.flags)
            .args(args)
            .dir(self.path())
    }

    /// `RUNTIME COMMAND OPTION… ID`.
    pub(crate) fn call(&self, args: &[&str]) -> Result<Run> {
        self.write_config()?;
        Ok(self.runtime(args).arg(&self.id))
    }

    /// `run`, which must end well.
    pub(crate) fn run(&self) -> Result<Output> {
        self.call(&["run"])?.ok()
    }

    /// `run` of a container that reports on itself.
    pub(crate) fn report(&mut self) -> Result<Value> {
        self.args(&["report"]).run()?.json()
    }

    /// `create` and `start`. Gives what tells of the container's output.
    pub(crate) fn start(&self) -> Result<Output> {
        let created = self.call(&["create"])?.ok()?;
        self.call(&["start"])?.ok()?;
        Ok(created)
    }

    /// Runs it in the background: its output can be read while it runs.
    pub(crate) fn run_beside(&self) -> Result<Running> {
        let running = self.call(&["run"])?.start()?;
        self.wait_status("running")?;
        Ok(running)
    }

    pub(crate) fn exec(&self, options: &[&str], args: &[&str]) -> Run {
        self.runtime(&["exec"])
            .args(options)
            .arg(&self.id)
            .arg("/bin/inside")
            .args(args)
    }

    pub(crate) fn state(&self) -> Result<Value> {
        self.runtime(&["state", &self.id]).ok()?.json()
    }

    pub(crate) fn status(&self) -> Result<String> {
        Ok(self.state()?["status"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }

    pub(crate) fn pid(&self) -> Result<i32> {
        Ok(self.state()?["pid"]
            .as_i64()
            .unwrap_or_default()
            .try_into()?)
    }

    pub(crate) fn wait_status(&self, status: &str) -> Result {
        wait_for(&format!("{} to be {status}", self.id), || {
            Ok((self.status()? == status).then_some(()))
        })
    }

    pub(crate) fn delete(&self) -> Result<Output> {
        self.runtime(&["delete", &self.id]).ok()
    }

    /// Ends it in whatever state it is.
    pub(crate) fn end(&self) -> Result<Output> {
        self.runtime(&["delete", "--force", &self.id]).ok()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // After a test that went well there is nothing to delete.
        if self.root().join(&self.id).exists() {
            let _ = self.runtime(&["delete", "--force", &self.id]).end();
        }
    }
}

/// A configuration as `runc spec` writes it, without a terminal.
fn config(cgroup: &str) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": [],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "rrun-e2e",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
              "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs",
              "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" },
                { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" },
            ],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
                "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                "/proc/sysrq-trigger"],
        },
    })
}
