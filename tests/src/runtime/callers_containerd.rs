//! containerd, by ctr: its shim drives the runtime with an event loop of its own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::bundle::runtime_program;
use crate::support::caller::{ARCHIVE, Caller, IMAGE, IMAGE_NAME, Leavings};
use crate::support::critest::{CRITEST, CRITEST_TIMEOUT};
use crate::support::leak_check::PEERS;
use crate::support::machine::{
    Directory, Result, Run, Running, command, deadline, program_path, wait_for,
};
use crate::support::needs::{Need, Test};
use crate::support::node::{CRICTL, IMAGES, REGISTRY};
use crate::{ensure, ensure_eq, test};

const CTR: Need = Need::Program("ctr");
const CONTAINERD: Need = Need::Program("containerd");

pub(crate) const TESTS: &[Test] = &[
    test!(containerd_runs_what_it_is_asked_to, CTR, CONTAINERD, IMAGE),
    test!(containerd_lives_with_a_container, CTR, CONTAINERD, IMAGE),
    test!(
        containerd_limits_hold_and_are_counted,
        CTR,
        CONTAINERD,
        IMAGE,
        Need::Controller("memory"),
        Need::Controller("pids")
    ),
    test!(
        containerd_keeps_pods_as_a_cri_server,
        CONTAINERD,
        CRICTL,
        REGISTRY,
        IMAGES
    ),
    test!(
        containerd_passes_critest,
        Need::Long,
        CONTAINERD,
        CRICTL,
        REGISTRY,
        IMAGES,
        CRITEST
    ),
];

/// Tests of the CRI that containerd passes with runc.
const OF_THE_CRI: &[&str] = &[
    "cri::crictl::a_web_server_from_the_registry_to_its_removal",
    "cri::containers::a_container_gets_what_its_configuration_says",
    "cri::containers::exec_gives_output_exit_code_and_ends_in_time",
    "cri::containers::stop_gives_the_grace_period_and_then_kills",
];

struct Containerd {
    server: Option<Running>,
    _leavings: Leavings,
    directory: Directory,
    runtime: PathBuf,
}

/// Shims keep their sockets at a place of their own; ctr's namespace is a cgroup.
const SHARED: &[&str] = &[
    "/run/containerd",
    "/var/lib/containerd",
    "/sys/fs/cgroup/default",
];

impl Containerd {
    fn start() -> Result<Containerd> {
        let runtime = program_path(&runtime_program()).ok_or("no runtime to test")?;
        let directory = Directory::new("containerd")?;
        let at = |name: &str| directory.join(name).display().to_string();
        std::fs::write(
            directory.join("config.toml"),
            format!(
                "version = 3\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.cri.v1.images\", \
                 \"io.containerd.cri.v1.runtime\", \"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{}\"\n",
                at("root"),
                at("state"),
                at("socket"),
            ),
        )?;
        let leavings = Leavings::of(directory.path(), SHARED);
        let server = command("containerd", ["--config", &at("config.toml")]).start()?;
        let containerd = Containerd {
            server: Some(server),
            _leavings: leavings,
            directory,
            runtime,
        };
        wait_for("containerd's answer", || {
            let output = containerd.call(&["version"]).end()?;
            Ok((output.code == 0).then_some(()))
        })?;
        containerd.call(&["image", "import", ARCHIVE]).ok()?;
        Ok(containerd)
    }

    fn start_container(&self, options: &[&str], id: &str, program: &[&str]) -> Run {
        let runtime = self.runtime.display().to_string();
        self.call(&["run", "--runc-binary", &runtime])
            .args(options)
            .args([IMAGE_NAME, id])
            .args(program)
    }

    fn status(&self, id: &str) -> Result<String> {
        let output = self.call(&["task", "ls"]).ok()?;
        let line = output.stdout.lines().find(|line| line.starts_with(id));
        let status = line.and_then(|line| line.split_whitespace().nth(2));
        Ok(status.unwrap_or("none").to_owned())
    }

    fn remove(&self, id: &str) -> Result {
        self.call(&["task", "kill", "-s", "KILL", id]).end()?;
        wait_for("the task's end", || {
            Ok((self.status(id)? == "STOPPED").then_some(()))
        })?;
        self.call(&["task", "delete", id]).end()?;
        self.call(&["container", "delete", id]).ok()?;
        Ok(())
    }
}

impl Caller for Containerd {
    fn program(&self) -> Vec<String> {
        let socket = self.directory.join("socket").display().to_string();
        vec!["ctr".to_owned(), "--address".to_owned(), socket]
    }

    fn run(&self, options: &[&str], program: &[&str]) -> Run {
        self.start_container(&[&["--rm"], options].concat(), "running", program)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.signal(nix::sys::signal::Signal::SIGTERM);
            let _ = server.end();
        }
    }
}

fn containerd_runs_what_it_is_asked_to() -> Result {
    let containerd = Containerd::start()?;
    containerd.prints(&[], &["echo", "hello"], "hello")?;
    containerd.run(&[], &["sh", "-c", "exit 3"]).exits(3)?;
    let missing = containerd.run(&[], &["no-such-program"]).exits(1)?;
    ensure!(
        missing.stderr.contains("no-such-program") && missing.stderr.contains("not found"),
        "{}",
        missing.told()
    );
    let status = |field: &'static str| ["grep", field, "/proc/self/status"];
    containerd.prints(&["--seccomp"], &status("Seccomp:"), "Seccomp:\t2")?;
    let all = containerd.run(&["--privileged"], &status("CapEff")).ok()?;
    let own = std::fs::read_to_string("/proc/self/status")?;
    ensure!(own.contains(all.text()), "privileged: {}", all.told());
    containerd
        .run(&["--read-only"], &["touch", "/x"])
        .exits(1)?;
    containerd.prints(
        &["--net-host", "--env", "A=b", "--cwd", "/tmp"],
        &["sh", "-c", "pwd; echo $A"],
        "/tmp\nb",
    )?;
    containerd.prints(&["--user", "1000:1001"], &["id", "-u"], "1000")?;
    containerd.prints(&["--hostname", "elsewhere"], &["hostname"], "elsewhere")?;
    containerd.prints(
        &["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"],
        &["sh", "-c", "tr -s ' ' <\"/proc/self/uid_map\""],
        " 0 100000 65536",
    )?;
    containerd.prints(
        &["--mount", "type=tmpfs,dst=/x,options=size=1m"],
        &[
            "sh",
            "-c",
            "df /x | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2",
        ],
        "1024",
    )?;
    containerd.prints(
        &["--device", "/dev/full"],
        &["stat", "-c", "%t:%T", "/dev/full"],
        "1:7",
    )?;
    containerd.prints(&["--rootfs-propagation", "rslave"], &["echo", "x"], "x")?;
    let mut at_terminal = containerd.program();
    at_terminal.extend(
        ["run", "--rm", "-t", "--runc-binary"]
            .into_iter()
            .map(str::to_owned),
    );
    at_terminal.push(format!(
        "{} {IMAGE_NAME} terminal tty",
        containerd.runtime.display()
    ));
    command("script", ["-qec", &at_terminal.join(" "), "/dev/null"])
        .ok()?
        .says("/dev/pts/0")?;
    Ok(())
}

fn containerd_lives_with_a_container() -> Result {
    let containerd = Containerd::start()?;
    containerd
        .start_container(&["-d"], "life", &["sleep", "600"])
        .ok()?;
    ensure_eq!(containerd.status("life")?, "RUNNING", "after run -d");
    let exec = |args: &[&str]| {
        containerd
            .call(&["task", "exec", "--exec-id", "further"])
            .args(args)
    };
    exec(&["life", "ps"]).ok()?.says("sleep 600")?;
    exec(&["life", "sh", "-c", "exit 5"]).exits(5)?;
    let missing = exec(&["life", "no-such-program"]).exits(1)?;
    ensure!(missing.stderr.contains("not found"), "{}", missing.told());
    exec(&[
        "--user",
        "1000:1000",
        "--cwd",
        "/tmp",
        "life",
        "sh",
        "-c",
        "id -u; pwd",
    ])
    .ok()?
    .says("1000\n/tmp")?;
    containerd.call(&["task", "ps", "life"]).ok()?;
    containerd.call(&["task", "metrics", "life"]).ok()?;
    containerd.call(&["task", "pause", "life"]).ok()?;
    ensure_eq!(containerd.status("life")?, "PAUSED", "after pause");
    containerd.call(&["task", "resume", "life"]).ok()?;
    ensure_eq!(containerd.status("life")?, "RUNNING", "after resume");
    if Need::Rrun.lacking().is_none() {
        let refused = containerd.call(&["task", "checkpoint", "life"]).exits(1)?;
        ensure!(
            refused.stderr.contains("rrun does not checkpoint"),
            "{}",
            refused.told()
        );
        ensure_eq!(containerd.status("life")?, "RUNNING", "after the refusal");
    }
    containerd.remove("life")?;
    containerd
        .start_container(&["-d"], "all", &["sh", "-c", "sleep 600 & sleep 600"])
        .ok()?;
    containerd
        .call(&["task", "kill", "-a", "-s", "KILL", "all"])
        .ok()?;
    containerd.remove("all")
}

fn containerd_limits_hold_and_are_counted() -> Result {
    let containerd = Containerd::start()?;
    containerd
        .run(
            &[
                "--memory-limit",
                "33554432",
                "--mount",
                "type=tmpfs,dst=/x,options=size=1g",
            ],
            &["dd", "if=/dev/zero", "of=/x/y", "bs=1M", "count=64"],
        )
        .exits(137)?;
    containerd
        .start_container(&["-d"], "counted", &["sleep", "600"])
        .ok()?;
    let metrics = containerd
        .call(&["task", "metrics", "--format", "json", "counted"])
        .ok()?;
    let metrics = metrics.json()?;
    ensure!(
        metrics.pointer("/pids/current").and_then(|n| n.as_u64()) == Some(1),
        "pids.current in {metrics}"
    );
    ensure!(
        metrics.pointer("/memory/usage").and_then(|n| n.as_u64()) > Some(0),
        "memory.usage in {metrics}"
    );
    ensure!(
        Path::new("/sys/fs/cgroup/default/counted").exists(),
        "its cgroup"
    );
    containerd.remove("counted")
}

/// In a directory that is there already.
const CNI_RESULTS: &[&str] = &["/var/lib/cni/results"];

/// These tests of the CRI, by a process that has containerd in rrun-cri's place and the runtime
/// under test in runc's. It looks for what they leave behind, too, but for containerd's own.
fn passes(tests: &[&str], within: Duration) -> Result {
    let directory = Directory::new("containerd")?;
    let _leavings = Leavings::of(directory.path(), &[PEERS, CNI_RESULTS].concat());
    let runtime = program_path(&runtime_program()).ok_or("no runtime to test")?;
    let own = std::env::current_exe()?;
    let output = command(
        "env",
        [
            "RRUN_TEST_CRI=containerd".to_owned(),
            format!("RUNTIME={}", runtime.display()),
            format!("RRUN_TEST_ONLY={}", tests.join(",")),
            own.display().to_string(),
        ],
    )
    .within(within)
    .ok()?;
    let all = format!("{} passed; 0 failed; 0 ignored", tests.len());
    ensure!(output.stdout.contains(&all), "{}", output.told());
    Ok(())
}

fn containerd_keeps_pods_as_a_cri_server() -> Result {
    passes(OF_THE_CRI, 10 * deadline())
}

fn containerd_passes_critest() -> Result {
    passes(
        &["cri::critest::every_test_passes_on_a_bridge_of_cni_plugins"],
        CRITEST_TIMEOUT,
    )
}
