//! Tests with podman, which calls the runtime through conmon. The tests use podman's command line
//! as a user does. If podman prints an error in a test, the runtime has a bug.

use std::fs;
use std::path::Path;

use crate::support::bundle::runtime_program;
use crate::support::caller::{
    ARCHIVE, Caller, IMAGE, IMAGE_NAME, Leftovers, cgroup_of, check_life_cycle, check_options,
};
use crate::support::cgroup_use::held_to;
use crate::support::machine::{Directory, Output, Result, Run, command, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

const PODMAN: Need = Need::Program("podman");

pub(crate) const TESTS: &[Test] = &[
    test!(podman_runs_containers, PODMAN, IMAGE),
    test!(podman_applies_the_options_of_podman_run, PODMAN, IMAGE),
    test!(
        podman_controls_a_container_from_start_to_removal,
        PODMAN,
        IMAGE
    ),
    test!(podman_runs_containers_with_id_mappings, PODMAN, IMAGE),
    test!(
        the_containers_of_a_podman_pod_share_namespaces,
        PODMAN,
        IMAGE
    ),
    test!(
        podman_forwards_the_readiness_notification_of_a_container,
        PODMAN,
        IMAGE,
        Need::Program("socat")
    ),
    test!(
        podman_enforces_limits,
        PODMAN,
        IMAGE,
        Need::Controller("cpu"),
        Need::Controller("memory"),
        Need::Controller("pids")
    ),
];

/// A podman instance with a separate directory for its storage, state and configuration.
pub(crate) struct Podman {
    _leftovers: Leftovers,
    directory: Directory,
}

/// The paths that all podman instances on a machine share, and the default state directories of
/// rrun and runc.
const SHARED: &[&str] = &[
    "/dev/shm/libpod_lock",
    "/run/containers",
    "/run/libpod",
    "/run/lock/netavark.lock",
    "/run/netns",
    "/run/podman",
    "/run/rrun",
    "/run/runc",
    "/sys/fs/cgroup/libpod_parent",
    "/sys/fs/cgroup/podman_probe",
    "/var/lib/containers",
    "/var/tmp/intermediate-mountpoint-0.0",
];

impl Podman {
    fn new() -> Result<Podman> {
        let runtime = runtime_program();
        let runtime = program_path(&runtime).ok_or("the runtime under test is not in PATH")?;
        let directory = Directory::new("podman")?;
        let systemd = Need::Systemd.lacking().is_none();
        let manager = if systemd { "systemd" } else { "cgroupfs" };
        // By default, podman sets a pids limit, which fails on a machine without the pids
        // controller. On such a machine, the test disables this limit.
        let limit = match Need::Controller("pids").lacking() {
            Some(_) => "pids_limit = 0",
            None => "",
        };
        fs::write(
            directory.join("containers.conf"),
            format!(
                "[containers]\n{limit}\n[engine]\nruntime = \"rrun\"\ncgroup_manager = \"{manager}\"\n\
                 events_logger = \"file\"\nruntime_supports_json = [\"rrun\"]\n\
                 [engine.runtimes]\nrrun = [\"{}\"]\n",
                runtime.display()
            ),
        )?;
        let podman = Podman {
            _leftovers: Leftovers::of(directory.path(), SHARED),
            directory,
        };
        podman.call(&["load", "-q", "-i", ARCHIVE]).ok()?;
        Ok(podman)
    }

    fn start(&self, name: &str, options: &[&str], program: &[&str]) -> Result<Output> {
        self.call(&["run", "-d", "--network", "none", "--name", name])
            .args(options)
            .arg(IMAGE_NAME)
            .args(program)
            .ok()
    }

    fn end(self) -> Result {
        self.call(&["rm", "-f", "-a", "-t", "0"]).ok()?;
        Ok(())
    }
}

impl Caller for Podman {
    fn program(&self) -> Vec<String> {
        let at = |name: &str| self.directory.join(name).display().to_string();
        vec![
            format!("CONTAINERS_CONF={}", at("containers.conf")),
            "podman".to_owned(),
            format!("--root={}", at("root")),
            format!("--runroot={}", at("runroot")),
            format!("--tmpdir={}", at("tmp")),
            "--storage-driver=overlay".to_owned(),
        ]
    }

    fn run(&self, options: &[&str], program: &[&str]) -> Run {
        self.call(&["run", "--rm", "--network", "none"])
            .args(options)
            .arg(IMAGE_NAME)
            .args(program)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.call(&["rm", "-f", "-a", "-t", "0"]).end();
        let _ = self.call(&["system", "reset", "-f"]).end();
    }
}

fn podman_runs_containers() -> Result {
    let podman = Podman::new()?;
    podman.prints(&[], &["echo", "hello"], "hello")?;
    podman.run(&[], &["sh", "-c", "exit 42"]).exits(42)?;
    // podman derives its exit code and its message from the runtime's message. The exit code is 127
    // for a missing program, and 126 for a program that is not executable.
    let missing = podman.run(&[], &["no-such-program"]).exits(127)?;
    ensure!(
        missing.stderr.contains("no-such-program") && missing.stderr.contains("not found"),
        "the error of `podman run` does not report the missing program:\n{}",
        missing.told()
    );
    podman.run(&[], &["/etc"]).exits(126)?;
    podman.prints(
        &["-w", "/tmp", "-e", "A=b"],
        &["sh", "-c", "pwd; echo $A"],
        "/tmp\nb",
    )?;
    podman.prints(&["--umask", "0077"], &["sh", "-c", "umask"], "0077")?;
    podman.prints(&["--pids-limit", "-1"], &["echo", "no limit"], "no limit")?;
    podman.prints(
        &["--init", "--init-path", "/usr/bin/tini-static"],
        &["cat", "/proc/1/comm"],
        if Path::new("/usr/bin/tini-static").exists() {
            "podman-init"
        } else {
            return Err("/usr/bin/tini-static does not exist on this machine".into());
        },
    )?;
    podman
        .at_terminal(&format!(
            "run --rm --network none -it {IMAGE_NAME} sh -c 'tty && [ -t 0 ]'"
        ))?
        .says("/dev/pts/0")?;
    podman.end()
}

fn podman_applies_the_options_of_podman_run() -> Result {
    let podman = Podman::new()?;
    let status = |field: &'static str| ["grep", field, "/proc/self/status"];
    check_options(&podman)?;
    podman.prints(
        &["--cap-drop", "all", "--cap-add", "SYS_ADMIN,CHOWN"],
        &status("CapEff"),
        "CapEff:\t0000000000200001",
    )?;
    let all = podman.run(&["--privileged"], &status("CapEff")).ok()?;
    let own = fs::read_to_string("/proc/self/status")?;
    ensure!(
        own.contains(all.text()),
        "a privileged container does not have all capabilities:\n{}",
        all.told()
    );
    podman
        .run(&["--privileged"], &["mount", "-t", "tmpfs", "x", "/tmp"])
        .ok()?;

    let refused = podman.run(&["--read-only"], &["touch", "/x"]).exits(1)?;
    ensure!(
        refused.stderr.contains("Read-only"),
        "the write to the read-only root file system does not fail with `Read-only file system`:\n{}",
        refused.told()
    );
    podman
        .run(
            &["--read-only", "--tmpfs", "/x:size=1m"],
            &["sh", "-c", "touch /x/y && df /x"],
        )
        .ok()?
        .says("1024")?;
    let volume = podman.directory.join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("file"), "of the host\n")?;
    let volume = volume.display();
    podman.prints(
        &["-v", &format!("{volume}:/v:ro")],
        &["cat", "/v/file"],
        "of the host",
    )?;
    podman
        .run(&["-v", &format!("{volume}:/v:ro")], &["touch", "/v/new"])
        .exits(1)?;
    podman
        .run(&["-v", &format!("{volume}:/v")], &["touch", "/v/new"])
        .ok()?;
    podman.prints(
        &[
            "--mount",
            &format!("type=bind,src={volume},dst=/v,bind-propagation=rslave"),
        ],
        &["ls", "/v"],
        "file\nnew",
    )?;
    podman.prints(&["--hostname", "elsewhere"], &["hostname"], "elsewhere")?;
    podman
        .run(&["--device-cgroup-rule", "c 10:* rwm"], &["true"])
        .ok()?;
    podman
        .run(&["--shm-size", "1m"], &["df", "/dev/shm"])
        .ok()?
        .says("1024")?;
    podman
        .run(&["--cgroupns", "host"], &["cat", "/proc/self/cgroup"])
        .ok()?
        .says("libpod-")?;
    podman.prints(
        &["--security-opt", "mask=/proc/uptime"],
        &["sh", "-c", "wc -c </proc/uptime"],
        "0",
    )?;
    podman.end()
}

fn podman_controls_a_container_from_start_to_removal() -> Result {
    let podman = Podman::new()?;
    podman.start("life", &[], &["sh", "-c", "echo begun; exec sleep 600"])?;
    let exec = |args: &[&str]| podman.call(&["exec"]).args(args);
    exec(&["life", "/etc/passwd"]).exits(126)?;
    podman.call(&["pause", "life"]).ok()?;
    exec(&["life", "true"]).exits(255)?;
    podman.call(&["unpause", "life"]).ok()?;
    check_life_cycle(&podman, "life")?;

    podman.start(
        "healthy",
        &[
            "--health-cmd",
            "test -e /tmp/ok",
            "--health-interval",
            "disable",
        ],
        &["sleep", "600"],
    )?;
    podman.call(&["healthcheck", "run", "healthy"]).exits(1)?;
    podman.call(&["exec", "healthy", "touch", "/tmp/ok"]).ok()?;
    podman.call(&["healthcheck", "run", "healthy"]).ok()?;
    podman.end()
}

fn podman_runs_containers_with_id_mappings() -> Result {
    let podman = Podman::new()?;
    let output = podman
        .run(
            &["--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"],
            &[
                "sh",
                "-c",
                "id -u; cat /proc/self/uid_map /proc/self/gid_map; touch /x && stat -c %u /x",
            ],
        )
        .ok()?;
    let words: Vec<&str> = output.text().split_whitespace().collect();
    ensure_eq!(
        words,
        ["0", "0", "100000", "65536", "0", "200000", "65536", "0"],
        "the ids in a container with --uidmap and --gidmap"
    );
    let volume = podman.directory.join("volume");
    fs::create_dir(&volume)?;
    let option = format!("{}:/v:U", volume.display());
    podman
        .run(
            &["--uidmap", "0:100000:65536", "-v", &option],
            &["touch", "/v/x"],
        )
        .ok()?;
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(volume.join("x"))?);
    ensure_eq!(
        owner,
        100_000,
        "the owner on the host of the file that the container created in the volume"
    );
    podman.start("mapped", &["--uidmap", "0:100000:65536"], &["sleep", "600"])?;
    podman
        .call(&["exec", "mapped", "id", "-u"])
        .ok()?
        .says("0")?;
    podman.end()
}

fn the_containers_of_a_podman_pod_share_namespaces() -> Result {
    let podman = Podman::new()?;
    podman
        .call(&[
            "pod",
            "create",
            "--name",
            "pod",
            "--network",
            "none",
            "--hostname",
            "of-the-pod",
        ])
        .args(["--infra-image", IMAGE_NAME, "--infra-command", "sleep 600"])
        .ok()?;
    for name in ["one", "two"] {
        podman
            .call(&[
                "run", "-d", "--pod", "pod", "--name", name, IMAGE_NAME, "sleep", "600",
            ])
            .ok()?;
    }
    let seen = |name: &str| -> Result<String> {
        let links = "readlink /proc/self/ns/net /proc/self/ns/ipc /proc/self/ns/uts; hostname";
        let output = podman.call(&["exec", name, "sh", "-c", links]).ok()?;
        Ok(output.text().to_owned())
    };
    let (one, two) = (seen("one")?, seen("two")?);
    ensure_eq!(
        one,
        two,
        "the namespaces and host name of one container, which must equal those of the other container of the pod"
    );
    ensure!(
        one.ends_with("of-the-pod"),
        "the containers do not have the pod's host name; the namespaces and host name of a container: {one}"
    );
    podman.call(&["pod", "pause", "pod"]).ok()?;
    podman.call(&["pod", "unpause", "pod"]).ok()?;
    podman.call(&["pod", "stop", "-t", "0", "pod"]).ok()?;
    podman.call(&["pod", "rm", "-f", "-t", "0", "pod"]).ok()?;
    podman.end()
}

/// The service manager that starts podman receives the notification READY=1 from the container.
fn podman_forwards_the_readiness_notification_of_a_container() -> Result {
    let podman = Podman::new()?;
    let socket = podman.directory.join("notify");
    let listener = std::os::unix::net::UnixDatagram::bind(&socket)?;
    listener.set_nonblocking(true)?;
    let mut words = vec![format!("NOTIFY_SOCKET={}", socket.display())];
    words.extend(podman.program());
    // The image contains no program that writes to datagram sockets. So the test mounts the host's
    // directories that contain socat and its libraries.
    let host_directories = ["/usr", "/lib", "/lib64", "/bin"];
    let mut run = command("env", words).args(["run", "-d", "--network", "none", "--name", "ready"]);
    run = run.args(["--sdnotify", "container"]);
    for directory in host_directories
        .into_iter()
        .filter(|path| Path::new(path).exists())
    {
        run = run.args(["-v", &format!("{directory}:/host{directory}:ro")]);
    }
    let loader = "/host/lib64/ld-linux-x86-64.so.2";
    let script = format!(
        "echo -n READY=1 | {loader} --library-path /host/usr/lib/x86_64-linux-gnu:/host/lib/x86_64-linux-gnu \
         /host/usr/bin/socat - UNIX-SENDTO:$NOTIFY_SOCKET && exec sleep 600"
    );
    run.args([IMAGE_NAME, "sh", "-c", &script]).ok()?;
    let received = wait_for("podman to forward READY=1", || {
        let mut buffer = [0u8; 4096];
        match listener.recv(&mut buffer) {
            Ok(length) => {
                let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
                Ok(text.contains("READY=1").then(|| text.into_owned()))
            }
            Err(_) => Ok(None),
        }
    })?;
    ensure!(
        received.contains("READY=1"),
        "podman did not forward READY=1, but {received:?}"
    );
    podman.end()
}

fn podman_enforces_limits() -> Result {
    let podman = Podman::new()?;
    // The program writes 64 MB to a tmpfs, which exceeds the memory limit of 32 MB.
    podman
        .run(
            &[
                "--memory",
                "32m",
                "--memory-swap",
                "32m",
                "--tmpfs",
                "/x:size=1g",
            ],
            &["dd", "if=/dev/zero", "of=/x/y", "bs=1M", "count=64"],
        )
        .exits(137)?;
    let bomb = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done";
    let output = podman
        .run(&["--pids-limit", "6"], &["sh", "-c", bomb])
        .end()?;
    ensure!(
        output.stderr.contains("can't fork"),
        "the container can start twelve processes despite a pids limit of six:\n{}",
        output.told()
    );
    podman.start(
        "half",
        &["--cpus", "0.5"],
        &["sh", "-c", "while :; do :; done"],
    )?;
    let pid = podman
        .call(&["inspect", "-f", "{{.State.Pid}}", "half"])
        .ok()?;
    let cgroup = cgroup_of(pid.text())?;
    held_to(0.5, &cgroup)?;
    podman
        .call(&["update", "--memory", "64m", "--pids-limit", "50", "half"])
        .ok()?;
    let limit = fs::read_to_string(cgroup.join("pids.max"))?;
    ensure_eq!(
        limit.trim(),
        "50",
        "the content of pids.max after `podman update`"
    );
    podman
        .call(&["stats", "--no-stream", "half"])
        .ok()?
        .says("half")?;
    podman.end()
}
