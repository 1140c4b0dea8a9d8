//! Programs that call the runtime, such as podman. A test implements the trait [`Caller`] for such
//! a program. This module also checks the operations that docker and podman have in common. The
//! type [`Leftovers`] removes the files that a caller leaves behind.

use std::path::{Path, PathBuf};

use crate::support::leak_check::{remove, unmount_below};
use crate::support::machine::{Output, Result, Run, command};
use crate::support::needs::Need;
use crate::{ensure, ensure_eq};

pub(crate) const ARCHIVE: &str = "/images/archives/demo-busybox.docker.tar";
pub(crate) const IMAGE: Need = Need::File(ARCHIVE);
pub(crate) const IMAGE_NAME: &str = "localhost/demo/busybox:latest";

pub(crate) trait Caller {
    /// Returns the arguments for env(1): variables for the program's environment, the program, and
    /// its global options.
    fn program(&self) -> Vec<String>;

    /// Runs `program` in a container. The caller removes the container after the run.
    fn run(&self, options: &[&str], program: &[&str]) -> Run;

    fn call(&self, args: &[&str]) -> Run {
        command("env", self.program()).args(args)
    }

    /// Runs the caller, such as podman, on a terminal. If the container's program exits
    /// immediately, the caller sometimes shows no output, regardless of the runtime. On a busy
    /// machine, podman showed no output in two of 120 calls, both with crun and with rrun. So this
    /// function repeats a call without output at most four times.
    fn at_terminal(&self, args: &str) -> Result<Output> {
        let line = format!("env {} {args}", self.program().join(" "));
        let attempt = || command("script", ["-qec", &line, "/dev/null"]).ok();
        let mut output = attempt()?;
        for _ in 0..4 {
            if !output.stdout.is_empty() {
                break;
            }
            output = attempt()?;
        }
        Ok(output)
    }

    fn prints(&self, options: &[&str], program: &[&str], text: &str) -> Result {
        let output = self.run(options, program).ok()?;
        ensure!(
            output.text() == text,
            "the container's program should print {text:?}:\n{}",
            output.told()
        );
        Ok(())
    }
}

/// Checks the container operations that docker and podman have in common, from the first exec to
/// the removal of the container. The test must already have started the container `name` with the
/// command `sh -c "echo begun; exec sleep 600"`.
pub(crate) fn check_life_cycle(caller: &impl Caller, name: &str) -> Result {
    let exec = |args: &[&str]| caller.call(&["exec"]).args(args);
    exec(&[name, "ps"]).ok()?.says("sleep 600")?;
    exec(&[
        "-u",
        "1000:1000",
        "-w",
        "/tmp",
        "-e",
        "A=b",
        name,
        "sh",
        "-c",
        "id -u; pwd; echo $A",
    ])
    .ok()?
    .says("1000\n/tmp\nb")?;
    exec(&[name, "sh", "-c", "exit 7"]).exits(7)?;
    exec(&[name, "no-such-program"]).exits(127)?;
    caller
        .at_terminal(&format!("exec -it {name} sh -c '[ -t 0 ] && tty'"))?
        .says("/dev/pts/0")?;
    caller.call(&["top", name]).ok()?.says("sleep 600")?;
    caller
        .call(&["stats", "--no-stream", name])
        .ok()?
        .says(name)?;
    caller.call(&["logs", name]).ok()?.says("begun")?;
    let status = || -> Result<String> {
        let output = caller
            .call(&["inspect", "-f", "{{.State.Status}}", name])
            .ok()?;
        Ok(output.text().to_owned())
    };
    caller.call(&["pause", name]).ok()?;
    ensure_eq!(status()?, "paused", "the container's status after `pause`");
    caller.call(&["unpause", name]).ok()?;
    ensure_eq!(
        status()?,
        "running",
        "the container's status after `unpause`"
    );
    caller.call(&["restart", "-t", "0", name]).ok()?;
    ensure_eq!(
        status()?,
        "running",
        "the container's status after `restart`"
    );
    caller.call(&["stop", "-t", "0", name]).ok()?;
    ensure_eq!(status()?, "exited", "the container's status after `stop`");
    caller.call(&["start", name]).ok()?;
    caller.call(&["kill", "-s", "KILL", name]).ok()?;
    caller.call(&["wait", name]).ok()?.says("137")?;
    caller.call(&["rm", name]).ok()?;
    Ok(())
}

/// Checks the container settings for which docker and podman have the same options.
pub(crate) fn check_options(caller: &impl Caller) -> Result {
    let status = |field: &'static str| ["grep", field, "/proc/self/status"];
    caller.prints(&[], &status("Seccomp:"), "Seccomp:\t2")?;
    caller.prints(
        &["--security-opt", "seccomp=unconfined"],
        &status("Seccomp:"),
        "Seccomp:\t0",
    )?;
    caller.prints(
        &["--security-opt", "no-new-privileges"],
        &status("NoNewPrivs"),
        "NoNewPrivs:\t1",
    )?;
    caller.prints(
        &["--user", "1000:1001", "--group-add", "5"],
        &["id", "-G"],
        "1001 5",
    )?;
    caller.prints(
        &["--device", "/dev/null:/dev/mine"],
        &["stat", "-c", "%t:%T", "/dev/mine"],
        "1:3",
    )?;
    caller.prints(
        &[
            "--sysctl",
            "net.ipv4.ip_forward=1",
            "--ulimit",
            "nofile=100:200",
        ],
        &[
            "sh",
            "-c",
            "cat /proc/sys/net/ipv4/ip_forward; ulimit -n; ulimit -Hn",
        ],
        "1\n100\n200",
    )?;
    caller.prints(
        &["--oom-score-adj", "500"],
        &["cat", "/proc/self/oom_score_adj"],
        "500",
    )?;
    let host = nix::unistd::gethostname()?.to_string_lossy().into_owned();
    caller.prints(
        &["--pid", "host", "--ipc", "host", "--uts", "host"],
        &["hostname"],
        &host,
    )?;
    Ok(())
}

/// Returns the directory of the cgroup that contains the process `pid`. `pid` is a process id that
/// docker or podman printed.
pub(crate) fn cgroup_of(pid: &str) -> Result<PathBuf> {
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(Path::new("/sys/fs/cgroup").join(path.ok_or(format!(
        "/proc/{pid}/cgroup contains no line that begins with 0::/ ({cgroup})"
    ))?))
}

/// The files that a caller (such as podman) creates at fixed paths, outside the test's directory.
/// Dropping the value unmounts all mounts below the test's directory. The drop also removes the
/// fixed paths that did not exist before the test.
pub(crate) struct Leftovers {
    directory: PathBuf,
    made: Vec<PathBuf>,
}

impl Leftovers {
    /// Records which of `paths` do not exist. A test calls this function before it starts the
    /// caller.
    pub(crate) fn of(directory: &Path, paths: &[&str]) -> Leftovers {
        Leftovers {
            directory: directory.to_owned(),
            made: paths
                .iter()
                .map(PathBuf::from)
                .filter(|path| !path.exists())
                .collect(),
        }
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        unmount_below(&self.directory);
        for path in &self.made {
            remove(path);
        }
    }
}
