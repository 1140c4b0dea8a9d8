//! Tests with docker, whose daemon dockerd calls the runtime under test. One line in dockerd's
//! configuration adds the runtime.

use std::fs;

use crate::support::bundle::runtime_program;
use crate::support::caller::{
    ARCHIVE, Caller, IMAGE, IMAGE_NAME, Leftovers, cgroup_of, check_life_cycle, check_options,
};
use crate::support::cgroup_use::held_to;
use crate::support::machine::{Directory, Result, Run, Running, command, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

const DOCKER: Need = Need::Program("docker");
const DOCKERD: Need = Need::Program("dockerd");

pub(crate) const TESTS: &[Test] = &[
    test!(
        docker_applies_the_options_of_docker_run,
        DOCKER,
        DOCKERD,
        IMAGE
    ),
    test!(
        docker_controls_a_container_from_start_to_removal,
        DOCKER,
        DOCKERD,
        IMAGE
    ),
    test!(
        docker_enforces_and_updates_limits,
        DOCKER,
        DOCKERD,
        IMAGE,
        Need::Controller("cpu"),
        Need::Controller("memory"),
        Need::Controller("pids")
    ),
];

struct Docker {
    server: Option<Running>,
    _leftovers: Leftovers,
    directory: Directory,
}

const SHARED: &[&str] = &[
    "/run/containerd",
    "/run/docker",
    "/run/xtables.lock",
    "/run/netns",
    "/var/lib/docker",
    "/var/lib/containerd",
    "/sys/fs/cgroup/docker",
];

impl Docker {
    fn start() -> Result<Docker> {
        let runtime =
            program_path(&runtime_program()).ok_or("the runtime under test is not in PATH")?;
        let directory = Directory::new("docker")?;
        let at = |name: &str| directory.join(name).display().to_string();
        let systemd = Need::Systemd.lacking().is_none();
        let driver = if systemd { "systemd" } else { "cgroupfs" };
        let arguments = [
            format!("--data-root={}", at("data")),
            format!("--exec-root={}", at("exec")),
            format!("--pidfile={}", at("pid")),
            format!("--host=unix://{}", at("socket")),
            format!("--add-runtime=tested={}", runtime.display()),
            "--default-runtime=tested".to_owned(),
            format!("--exec-opt=native.cgroupdriver={driver}"),
            "--bridge=none".to_owned(),
            "--iptables=false".to_owned(),
            "--ip6tables=false".to_owned(),
        ];
        let leftovers = Leftovers::of(directory.path(), SHARED);
        let server = command("dockerd", arguments).start()?;
        let mut docker = Docker {
            server: Some(server),
            _leftovers: leftovers,
            directory,
        };
        let answered = wait_for("dockerd to respond to `docker version`", || {
            let output = docker.call(&["version"]).end()?;
            Ok((output.code == 0).then_some(()))
        });
        if let (Err(error), Some(server)) = (answered, docker.server.as_mut()) {
            return Err(format!(
                "{}\n{}",
                error.message().unwrap_or_default(),
                server.stderr()
            )
            .into());
        }
        docker.call(&["load", "-i", ARCHIVE]).ok()?;
        Ok(docker)
    }

    fn start_container(&self, name: &str, options: &[&str], program: &[&str]) -> Result {
        self.call(&["run", "-d", "--network", "none", "--name", name])
            .args(options)
            .arg(IMAGE_NAME)
            .args(program)
            .ok()?;
        Ok(())
    }
}

impl Caller for Docker {
    fn program(&self) -> Vec<String> {
        vec![
            "docker".to_owned(),
            format!("--host=unix://{}", self.directory.join("socket").display()),
        ]
    }

    fn run(&self, options: &[&str], program: &[&str]) -> Run {
        self.call(&["run", "--rm", "--network", "none"])
            .args(options)
            .arg(IMAGE_NAME)
            .args(program)
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Ok(all) = self.call(&["ps", "-aq"]).end() {
            for id in all.stdout.split_whitespace() {
                let _ = self.call(&["rm", "-f", id]).end();
            }
        }
        if let Some(server) = self.server.take() {
            server.signal(nix::sys::signal::Signal::SIGTERM);
            let _ = server.end();
        }
    }
}

fn docker_applies_the_options_of_docker_run() -> Result {
    let docker = Docker::start()?;
    docker.prints(&[], &["echo", "hello"], "hello")?;
    docker.run(&[], &["sh", "-c", "exit 42"]).exits(42)?;
    let missing = docker.run(&[], &["no-such-program"]).exits(127)?;
    ensure!(
        missing.stderr.contains("not found"),
        "the error of `docker run` does not report the missing program:\n{}",
        missing.told()
    );
    docker.run(&[], &["/etc"]).exits(126)?;
    let status = |field: &'static str| ["grep", field, "/proc/self/status"];
    docker.prints(
        &["--cap-drop", "ALL", "--cap-add", "SYS_ADMIN"],
        &status("CapEff"),
        "CapEff:\t0000000000200000",
    )?;
    let all = docker.run(&["--privileged"], &status("CapEff")).ok()?;
    let own = fs::read_to_string("/proc/self/status")?;
    ensure!(
        own.contains(all.text()),
        "a privileged container does not have all capabilities:\n{}",
        all.told()
    );
    let refused = docker
        .run(
            &["--read-only", "--tmpfs", "/x:size=1m"],
            &["sh", "-c", "touch /x/y && touch /y"],
        )
        .exits(1)?;
    ensure!(
        refused.stderr.contains("/y: Read-only"),
        "the write to the read-only root file system does not fail with `Read-only file system`:\n{}",
        refused.told()
    );
    let volume = docker.directory.join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("file"), "of the host\n")?;
    let option = format!("{}:/v:ro", volume.display());
    docker.prints(&["-v", &option], &["cat", "/v/file"], "of the host")?;
    docker.prints(&["--init"], &["cat", "/proc/1/comm"], "docker-init")?;
    check_options(&docker)?;
    docker
        .at_terminal(&format!(
            "run --rm --network none -it {IMAGE_NAME} sh -c 'tty && [ -t 0 ]'"
        ))?
        .says("/dev/pts/0")?;
    Ok(())
}

fn docker_controls_a_container_from_start_to_removal() -> Result {
    let docker = Docker::start()?;
    docker.start_container("life", &[], &["sh", "-c", "echo begun; exec sleep 600"])?;
    check_life_cycle(&docker, "life")?;
    Ok(())
}

fn docker_enforces_and_updates_limits() -> Result {
    let docker = Docker::start()?;
    docker
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
    let output = docker
        .run(&["--pids-limit", "6"], &["sh", "-c", bomb])
        .end()?;
    ensure!(
        output.stderr.contains("can't fork"),
        "the container can start twelve processes despite a pids limit of six:\n{}",
        output.told()
    );
    docker.start_container(
        "half",
        &["--cpus", "0.5"],
        &["sh", "-c", "while :; do :; done"],
    )?;
    let pid = docker
        .call(&["inspect", "-f", "{{.State.Pid}}", "half"])
        .ok()?;
    let cgroup = cgroup_of(pid.text())?;
    held_to(0.5, &cgroup)?;
    docker
        .call(&[
            "update",
            "--memory",
            "64m",
            "--memory-swap",
            "96m",
            "--pids-limit",
            "50",
            "half",
        ])
        .ok()?;
    docker.call(&["update", "--cpus", "0.2", "half"]).ok()?;
    for (file, value) in [
        ("memory.max", "67108864"),
        ("pids.max", "50"),
        ("cpu.max", "20000 100000"),
    ] {
        let text = fs::read_to_string(cgroup.join(file))?;
        ensure_eq!(
            text.trim(),
            value,
            "the content of the cgroup file {file} after `docker update`"
        );
    }
    docker
        .call(&["update", "--memory-swap", "-1", "half"])
        .ok()?;
    Ok(())
}
