//! A program that calls the runtime: how it is called itself, the image it runs, what it leaves.

use std::path::{Path, PathBuf};

use crate::support::leak_check::{remove, unmount_below};
use crate::support::machine::{Output, Result, Run, command};
use crate::support::needs::Need;
use crate::{ensure, ensure_eq};

pub(crate) const ARCHIVE: &str = "/images/archives/demo-busybox.docker.tar";
pub(crate) const IMAGE: Need = Need::File(ARCHIVE);
pub(crate) const IMAGE_NAME: &str = "localhost/demo/busybox:latest";

pub(crate) trait Caller {
    /// The program and its global options, after variables of its environment.
    fn program(&self) -> Vec<String>;

    /// Runs a program in a container that is removed afterwards.
    fn run(&self, options: &[&str], program: &[&str]) -> Run;

    fn call(&self, args: &[&str]) -> Run {
        command("env", self.program()).args(args)
    }

    /// The same at a terminal. Of a program that ends at once the client may show nothing, with
    /// whatever runtime (podman on a busy machine: two of 120, with crun as with rrun): then it is
    /// asked again.
    fn at_terminal(&self, args: &str) -> Result<Output> {
        let line = format!("env {} {args}", self.program().join(" "));
        let ask = || command("script", ["-qec", &line, "/dev/null"]).ok();
        let mut output = ask()?;
        for _ in 0..4 {
            if !output.stdout.is_empty() {
                break;
            }
            output = ask()?;
        }
        Ok(output)
    }

    fn prints(&self, options: &[&str], program: &[&str], text: &str) -> Result {
        let output = self.run(options, program).ok()?;
        ensure!(
            output.text() == text,
            "should print {text:?}:\n{}",
            output.told()
        );
        Ok(())
    }
}

/// What docker and podman have a container do from its first exec to its removal. It runs, under this
/// name, `sh -c "echo begun; exec sleep 600"`.
pub(crate) fn lives(caller: &impl Caller, name: &str) -> Result {
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
    ensure_eq!(status()?, "paused", "after pause");
    caller.call(&["unpause", name]).ok()?;
    ensure_eq!(status()?, "running", "after unpause");
    caller.call(&["restart", "-t", "0", name]).ok()?;
    ensure_eq!(status()?, "running", "after restart");
    caller.call(&["stop", "-t", "0", name]).ok()?;
    ensure_eq!(status()?, "exited", "after stop");
    caller.call(&["start", name]).ok()?;
    caller.call(&["kill", "-s", "KILL", name]).ok()?;
    caller.call(&["wait", name]).ok()?.says("137")?;
    caller.call(&["rm", name]).ok()?;
    Ok(())
}

/// What docker and podman make of a container's world by the same options.
pub(crate) fn shapes(caller: &impl Caller) -> Result {
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

/// The directory of the cgroup that a process is in, by its id as a caller prints it.
pub(crate) fn cgroup_of(pid: &str) -> Result<PathBuf> {
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(Path::new("/sys/fs/cgroup").join(path.ok_or("no cgroup")?))
}

/// What a caller makes beside its own directory, at places that it shares with others of its kind.
/// Dropped, mounts below its directory go, and of those places the ones that were not there before.
pub(crate) struct Leavings {
    directory: PathBuf,
    made: Vec<PathBuf>,
}

impl Leavings {
    /// To be called before it is started.
    pub(crate) fn of(directory: &Path, places: &[&str]) -> Leavings {
        Leavings {
            directory: directory.to_owned(),
            made: places
                .iter()
                .map(PathBuf::from)
                .filter(|path| !path.exists())
                .collect(),
        }
    }
}

impl Drop for Leavings {
    fn drop(&mut self) {
        unmount_below(&self.directory);
        for path in &self.made {
            remove(path);
        }
    }
}
