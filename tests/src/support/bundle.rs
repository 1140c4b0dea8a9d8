//! OCI bundles, and the runtime under test. The environment variable `RRUN_TEST_RUNTIME` contains
//! the name of the runtime. Without this variable, the tests run `rrun`. The same tests also run
//! against runc and crun. If a test fails with these runtimes, the test may expect more than the
//! OCI runtime specification requires.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::support::machine::{Directory, Output, Result, Run, Running, command, wait_for};

pub(crate) fn runtime_program() -> String {
    std::env::var("RRUN_TEST_RUNTIME").unwrap_or_else(|_| "rrun".to_owned())
}

/// A bundle on the disk. Dropping the value deletes the bundle and the container that the runtime
/// created from the bundle.
pub(crate) struct Bundle {
    directory: Directory,
    /// The content of config.json. [`Bundle::call`] writes the file before it runs the runtime.
    pub(crate) config: Value,
    id: String,
    /// The runtime's global options, which precede every command.
    flags: Vec<&'static str>,
}

/// Returns the path of the program `inside`. Each root file system contains a hard link to this
/// file. Hard links need no additional disk space.
fn program() -> Result<&'static Path> {
    static PROGRAM: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let made = PROGRAM.get_or_init(|| {
        let bytes = fs::read("/proc/self/exe").map_err(|error| error.to_string())?;
        if needs_a_loader(&bytes) {
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

/// Returns whether a program needs a dynamic loader. The ELF file of such a program has a PT_INTERP
/// program header, which names the loader (elf(5)). The tests' containers contain no loader, so
/// such a program cannot run in them.
fn needs_a_loader(elf: &[u8]) -> bool {
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

/// Creates the file of the program `inside`, which all tests share. The leak check reports a new
/// file as a leak of the current test. The harness therefore calls this function before it runs the
/// tests.
pub(crate) fn prepare() {
    let _ = program();
}

/// Creates a root file system at `path`. The root file system contains the program `/bin/inside`
/// and a few directories.
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
    /// Creates a bundle whose container runs `inside` with the arguments `args`. The rest of the
    /// configuration is like the output of `runc spec`, but `process.terminal` is false.
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

    /// Like [`Bundle::new`], but for the systemd cgroup driver, which creates a scope for the
    /// container in `slice`.
    pub(crate) fn in_slice(slice: &str, args: &[&str]) -> Result<Self> {
        let mut bundle = Bundle::new(args)?;
        let path = format!("{slice}:e2e:{}", bundle.id);
        bundle.set("/linux/cgroupsPath", json!(path));
        bundle.flags = vec!["--systemd-cgroup"];
        Ok(bundle)
    }

    /// Gives the container a user namespace that maps `size` ids to the ids from 100,000.
    pub(crate) fn map_users(&mut self, size: u32) -> &mut Self {
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": size }]);
        self.add("/linux/namespaces", json!({ "type": "user" }))
            .set("/linux/uidMappings", map.clone())
            .set("/linux/gidMappings", map)
    }

    /// Returns the name of the container's systemd unit, for a bundle that [`Bundle::in_slice`]
    /// created.
    pub(crate) fn unit(&self) -> String {
        format!("e2e-{}.scope", self.id)
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the path of the file `name` in the bundle's directory.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    /// Returns the runtime's state directory. The state directory is inside the bundle's directory.
    /// There a test can check which files the runtime leaves behind.
    pub(crate) fn root(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Returns the container's cgroup directory.
    pub(crate) fn cgroup(&self) -> PathBuf {
        let path = self.config["linux"]["cgroupsPath"]
            .as_str()
            .unwrap_or_default();
        let root = PathBuf::from("/sys/fs/cgroup");
        match path.split_once(':') {
            // The directory a-b.slice is in the directory a.slice (systemd.slice(5)).
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
        let text = fs::read_to_string(&path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        Ok(text.trim_end().to_owned())
    }

    /// Returns the number after `key` in a cgroup file that consists of lines such as `oom_kill 1`.
    pub(crate) fn cgroup_count(&self, file: &str, key: &str) -> Result<u64> {
        let text = self.cgroup_file(file)?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        Ok(line
            .ok_or(format!(
                "the cgroup file {file} contains no line for the key `{key}`; the file's content:\n{text}"
            ))?
            .parse()?)
    }

    /// Sets the arguments of `inside`.
    pub(crate) fn args(&mut self, args: &[&str]) -> &mut Self {
        let mut all = vec!["/bin/inside"];
        all.extend(args);
        self.config["process"]["args"] = json!(all);
        self
    }

    /// Sets the value at the JSON pointer `pointer`, and creates missing objects on the path to the
    /// value.
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

    /// Appends `value` to the array at the JSON pointer `pointer`, and creates the array if it does
    /// not exist.
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

    /// Returns mutable references to the entries of `mounts`.
    pub(crate) fn mounts(&mut self) -> impl Iterator<Item = &mut Value> {
        let mounts = self.config["mounts"].as_array_mut();
        mounts.into_iter().flatten()
    }

    /// Removes the key at the JSON pointer `pointer`.
    pub(crate) fn without(&mut self, pointer: &str) -> &mut Self {
        if let Some((parent, key)) = pointer.rsplit_once('/')
            && let Some(Value::Object(map)) = self.config.pointer_mut(parent)
        {
            map.remove(key);
        }
        self
    }

    /// Removes the namespace of the type `kind` from the configuration. The container then shares
    /// the runtime's namespace.
    pub(crate) fn without_namespace(&mut self, kind: &str) -> &mut Self {
        if let Some(Value::Array(all)) = self.config.pointer_mut("/linux/namespaces") {
            all.retain(|namespace| namespace["type"] != kind);
        }
        self
    }

    /// Makes `user` the owner of the bundle and of the --root directory, for a container that this user
    /// creates. The container's user namespace maps only this user. It does not map the group 5, so the
    /// mounts must not have the option gid=5.
    pub(crate) fn give_to(&mut self, user: u32) -> Result {
        self.without("/linux/cgroupsPath");
        for mount in self.mounts() {
            if let Some(options) = mount["options"].as_array_mut() {
                options.retain(|option| option != "gid=5");
            }
        }
        fs::create_dir(self.root())?;
        for path in [self.path(), &self.root(), &self.rootfs()] {
            chown(path, Some(user), Some(user))?;
        }
        for entry in fs::read_dir(self.rootfs())?.flatten() {
            chown(entry.path(), Some(user), Some(user))?;
        }
        Ok(())
    }

    pub(crate) fn write_config(&self) -> Result {
        Ok(fs::write(
            self.join("config.json"),
            serde_json::to_vec_pretty(&self.config)?,
        )?)
    }

    /// Returns the runtime's global options, which precede every command.
    pub(crate) fn flags(&self) -> Vec<OsString> {
        let root = ["--root".into(), self.root().into()];
        root.into_iter()
            .chain(self.flags.iter().map(OsString::from))
            .collect()
    }

    /// Returns a command that calls the runtime with the global options and the arguments `args`.
    pub(crate) fn runtime(&self, args: &[&str]) -> Run {
        command(&runtime_program(), self.flags())
            .args(args)
            .dir(self.path())
    }

    /// Writes config.json, and returns a command that calls the runtime. The arguments of this
    /// command are `args` (a command and its options) and the container's id.
    pub(crate) fn call(&self, args: &[&str]) -> Result<Run> {
        self.write_config()?;
        Ok(self.runtime(args).arg(&self.id))
    }

    /// Calls `run`, which must succeed.
    pub(crate) fn run(&self) -> Result<Output> {
        self.call(&["run"])?.ok()
    }

    /// Calls `run` for a container whose program is `inside report`, and returns the report.
    pub(crate) fn report(&mut self) -> Result<Value> {
        self.args(&["report"]).run()?.json()
    }

    /// Calls `create` and `start`, and returns the output of `create`.
    pub(crate) fn start(&self) -> Result<Output> {
        let created = self.call(&["create"])?.ok()?;
        self.call(&["start"])?.ok()?;
        Ok(created)
    }

    /// Calls `run` in the background. A test can then read the container's output while the
    /// container runs.
    pub(crate) fn run_in_background(&self) -> Result<Running> {
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
        wait_for(&format!("the container {} to be {status}", self.id), || {
            Ok((self.status()? == status).then_some(()))
        })
    }

    pub(crate) fn delete(&self) -> Result<Output> {
        self.runtime(&["delete", &self.id]).ok()
    }

    /// Deletes the container with `delete --force`, which works in any state.
    pub(crate) fn end(&self) -> Result<Output> {
        self.forced_deletion().ok()
    }

    /// Returns the command that deletes the container in any state. The container can belong to
    /// another user than root.
    fn forced_deletion(&self) -> Run {
        let by_rrun = runtime_program().ends_with("rrun");
        let foreign = fs::metadata(self.root()).is_ok_and(|root| root.uid() != 0);
        let option: &[&str] = if by_rrun && foreign {
            &["--any-owner"]
        } else {
            &[]
        };
        self.runtime(option).args(["delete", "--force", &self.id])
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // A test that failed can leave its container behind.
        if self.root().join(&self.id).exists() {
            let _ = self.forced_deletion().end();
        }
    }
}

/// Returns a configuration like the output of `runc spec`, but `process.terminal` is false.
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
