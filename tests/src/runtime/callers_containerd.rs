//! Tests with containerd. The tests control containerd with ctr. containerd starts a shim process,
//! which calls the runtime.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::bundle::runtime_program;
use crate::support::caller::{ARCHIVE, Caller, IMAGE, IMAGE_NAME, Leftovers};
use crate::support::containerd::{self, CONTAINERD, CTR};
use crate::support::critest::{CRITEST, CRITEST_TIMEOUT};
use crate::support::leak_check::PEERS;
use crate::support::machine::{Directory, Result, Run, command, deadline, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{CRICTL, IMAGES, REGISTRY};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        containerd_applies_the_options_of_ctr_run,
        CTR,
        CONTAINERD,
        IMAGE
    ),
    test!(
        containerd_controls_a_container_from_start_to_removal,
        CTR,
        CONTAINERD,
        IMAGE
    ),
    test!(
        containerd_enforces_limits_and_reports_usage,
        CTR,
        CONTAINERD,
        IMAGE,
        Need::Controller("memory"),
        Need::Controller("pids")
    ),
    test!(
        containerd_runs_pods_as_a_cri_server,
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

/// The CRI tests that containerd must pass with rrun. containerd passes these tests with runc.
const CRI_TESTS: &[&str] = &[
    "cri::crictl::crictl_controls_a_web_server_from_pull_to_removal",
    "cri::containers::a_container_gets_its_configured_settings",
    "cri::containers::exec_returns_the_output_and_the_exit_code_and_obeys_its_timeout",
    "cri::containers::stop_waits_for_the_grace_period_and_then_kills_the_container",
];

/// A containerd that runs containers with the runtime under test.
struct Containerd {
    server: containerd::Containerd,
    runtime: PathBuf,
}

impl Containerd {
    fn start() -> Result<Containerd> {
        let runtime =
            program_path(&runtime_program()).ok_or("the runtime under test is not in PATH")?;
        let server = containerd::Containerd::start()?;
        server.ctr(&["image", "import", ARCHIVE]).ok()?;
        Ok(Containerd { server, runtime })
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
        wait_for("the container's task to stop", || {
            Ok((self.status(id)? == "STOPPED").then_some(()))
        })?;
        self.call(&["task", "delete", id]).end()?;
        self.call(&["container", "delete", id]).ok()?;
        Ok(())
    }
}

impl Caller for Containerd {
    fn program(&self) -> Vec<String> {
        self.server.client()
    }

    fn run(&self, options: &[&str], program: &[&str]) -> Run {
        self.start_container(&[&["--rm"], options].concat(), "running", program)
    }
}

fn containerd_applies_the_options_of_ctr_run() -> Result {
    let containerd = Containerd::start()?;
    containerd.prints(&[], &["echo", "hello"], "hello")?;
    containerd.run(&[], &["sh", "-c", "exit 3"]).exits(3)?;
    let missing = containerd.run(&[], &["no-such-program"]).exits(1)?;
    ensure!(
        missing.stderr.contains("no-such-program") && missing.stderr.contains("not found"),
        "the error of `ctr run` does not report the missing program:\n{}",
        missing.told()
    );
    let status = |field: &'static str| ["grep", field, "/proc/self/status"];
    containerd.prints(&["--seccomp"], &status("Seccomp:"), "Seccomp:\t2")?;
    let all = containerd.run(&["--privileged"], &status("CapEff")).ok()?;
    let own = std::fs::read_to_string("/proc/self/status")?;
    ensure!(
        own.contains(all.text()),
        "a privileged container does not have all capabilities:\n{}",
        all.told()
    );
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

fn containerd_controls_a_container_from_start_to_removal() -> Result {
    let containerd = Containerd::start()?;
    containerd
        .start_container(&["-d"], "life", &["sleep", "600"])
        .ok()?;
    ensure_eq!(
        containerd.status("life")?,
        "RUNNING",
        "the container's status after `ctr run -d`"
    );
    let exec = |args: &[&str]| {
        containerd
            .call(&["task", "exec", "--exec-id", "further"])
            .args(args)
    };
    exec(&["life", "ps"]).ok()?.says("sleep 600")?;
    exec(&["life", "sh", "-c", "exit 5"]).exits(5)?;
    let missing = exec(&["life", "no-such-program"]).exits(1)?;
    ensure!(
        missing.stderr.contains("not found"),
        "the error of `ctr task exec` does not report the missing program:\n{}",
        missing.told()
    );
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
    ensure_eq!(
        containerd.status("life")?,
        "PAUSED",
        "the container's status after `ctr task pause`"
    );
    containerd.call(&["task", "resume", "life"]).ok()?;
    ensure_eq!(
        containerd.status("life")?,
        "RUNNING",
        "the container's status after `ctr task resume`"
    );
    if Need::Rrun.lacking().is_none() {
        let refused = containerd.call(&["task", "checkpoint", "life"]).exits(1)?;
        ensure!(
            refused.stderr.contains("rrun does not support checkpoints"),
            "the error of `ctr task checkpoint` does not report that rrun does not support checkpoints:\n{}",
            refused.told()
        );
        ensure_eq!(
            containerd.status("life")?,
            "RUNNING",
            "the container's status after the refused checkpoint"
        );
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

fn containerd_enforces_limits_and_reports_usage() -> Result {
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
        "the field pids.current is not 1 in the metrics that `ctr` prints: {metrics}"
    );
    ensure!(
        metrics.pointer("/memory/usage").and_then(|n| n.as_u64()) > Some(0),
        "the field memory.usage is not greater than 0 in the metrics that `ctr` prints: {metrics}"
    );
    ensure!(
        Path::new("/sys/fs/cgroup/default/counted").exists(),
        "the container's cgroup does not exist"
    );
    containerd.remove("counted")
}

/// The directory in which the CNI plugins store their results. If this directory exists before the
/// test, the test does not remove it.
const CNI_RESULTS: &[&str] = &["/var/lib/cni/results"];

/// Runs the CRI tests `tests` in a separate process. containerd replaces rrun-cri as the CRI
/// server, and calls the runtime under test. The separate process also checks that the tests leave
/// only containerd's own files behind.
fn passes(tests: &[&str], within: Duration) -> Result {
    let directory = Directory::new("containerd")?;
    let _leftovers = Leftovers::of(directory.path(), &[PEERS, CNI_RESULTS].concat());
    let runtime =
        program_path(&runtime_program()).ok_or("the runtime under test is not in PATH")?;
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
    ensure!(
        output.stdout.contains(&all),
        "not all CRI tests passed with containerd:\n{}",
        output.told()
    );
    Ok(())
}

fn containerd_runs_pods_as_a_cri_server() -> Result {
    passes(CRI_TESTS, 10 * deadline())
}

fn containerd_passes_critest() -> Result {
    passes(
        &["cri::critest::every_critest_test_passes_on_a_bridge_of_cni_plugins"],
        CRITEST_TIMEOUT,
    )
}
