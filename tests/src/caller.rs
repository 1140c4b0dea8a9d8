//! A program that calls the runtime: how it is called itself, the image it runs, what it leaves.

use std::path::{Path, PathBuf};

use crate::ensure;
use crate::leavings::{remove, unmount_below};
use crate::machine::{Output, Result, Run, command};
use crate::needs::Need;

pub const ARCHIVE: &str = "/images/archives/demo-busybox.docker.tar";
pub const IMAGE: Need = Need::File(ARCHIVE);
pub const IMAGE_NAME: &str = "localhost/demo/busybox:latest";

pub trait Caller {
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

/// The directory of the cgroup that a process is in, by its id as a caller prints it.
pub fn cgroup_of(pid: &str) -> Result<PathBuf> {
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(Path::new("/sys/fs/cgroup").join(path.ok_or("no cgroup")?))
}

/// What a caller makes beside its own directory, at places that it shares with others of its kind.
/// Dropped, mounts below its directory go, and of those places the ones that were not there before.
pub struct Leavings {
    directory: PathBuf,
    made: Vec<PathBuf>,
}

impl Leavings {
    /// To be called before it is started.
    pub fn of(directory: &Path, places: &[&str]) -> Leavings {
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
