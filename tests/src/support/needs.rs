//! A test, and what it needs of the machine: what lacks is told, and counted as skipped.

use std::path::Path;

use crate::support::bundle::runtime_program;
use crate::support::machine::{Result, command, full, program_path};
use crate::support::node::{is_rrun, server_program};

/// One test. Its name reads as a sentence of the specification.
pub(crate) struct Test {
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [Need],
    pub(crate) run: fn() -> Result,
}

/// A test by its function: `test!(name)` or `test!(name, Need, Need)`.
#[macro_export]
macro_rules! test {
    ($function:ident $(, $need:expr)* $(,)?) => {
        $crate::support::needs::Test {
            name: concat!(module_path!(), "::", stringify!($function)),
            needs: &[$($need),*],
            run: $function,
        }
    };
}

/// The socket that systemd has where it is PID 1.
pub(crate) const SYSTEMD: &str = "/run/systemd/private";

/// The profiles that the kernel has, if it has AppArmor.
pub(crate) const APPARMOR_PROFILES: &str = "/sys/kernel/security/apparmor/profiles";
pub(crate) const APPARMOR: Need = Need::File(APPARMOR_PROFILES);

/// Only the guest of `tests/vm/run --selinux` has it.
pub(crate) const SELINUX: Need = Need::File("/sys/fs/selinux/enforce");

/// Something that not every machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Need {
    /// A cgroup v2 controller, handed down to the root's children or ready to be.
    Controller(&'static str),
    /// A program in PATH.
    Program(&'static str),
    /// A file or directory.
    File(&'static str),
    /// Nothing at this path: what is asked for is how its lack is told.
    Absent(&'static str),
    /// A machine of its own, whoever keeps its cgroups.
    OwnMachine,
    /// This machine's own kernel, not the guest's.
    Native,
    /// What takes long, for `make test-full` (RRUN_TEST_FULL).
    Long,
    /// What takes long only under emulation.
    NativeOrLong,
    /// systemd as PID 1 (`tests/vm/run --systemd`).
    Systemd,
    /// The CRI server under test, and what it runs.
    CriServer,
    /// The runtime under test must be rrun itself: what is asserted goes beyond what runc does.
    Rrun,
    /// The CRI server under test must be rrun-cri itself, for the same reason.
    RrunCri,
    /// What a machine lacks on which this shell command fails.
    Works(&'static str, &'static str),
    /// All of these.
    All(&'static [Need]),
}

impl Need {
    /// Why this is not to be had here; `None` if it is.
    pub(crate) fn lacking(self) -> Option<String> {
        match self {
            Need::Controller(name) => {
                let there = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
                let there = there.unwrap_or_default();
                (!there
                    .split_whitespace()
                    .any(|controller| controller == name))
                .then(|| format!("no cgroup v2 controller {name} here"))
            }
            Need::Program(name) => no_program(name),
            Need::File(path) => (!Path::new(path).exists()).then(|| format!("no {path} here")),
            Need::Absent(path) => Path::new(path)
                .exists()
                .then(|| format!("there is {path} here")),
            Need::OwnMachine => {
                let view = std::env::var("RRUN_TEST_VIEW").unwrap_or_default();
                (!view.starts_with("vm")).then(|| "wants the guest machine".to_owned())
            }
            Need::Native => Need::OwnMachine
                .lacking()
                .is_none()
                .then(|| "wants the native view: the guest has more than this".to_owned()),
            Need::Long => (!full())
                .then(|| "takes long: `make test-full` runs it (RRUN_TEST_FULL)".to_owned()),
            Need::NativeOrLong => Need::OwnMachine
                .lacking()
                .is_none()
                .then(|| Need::Long.lacking())
                .flatten(),
            Need::Systemd => {
                (!Path::new(SYSTEMD).exists()).then(|| "no systemd is PID 1 here".to_owned())
            }
            Need::CriServer => {
                let server = server_program();
                let programs = match server.as_str() {
                    "rrun-cri" => vec!["rrun-cri", "rrun-monitor", "rrun"],
                    other => vec![other],
                };
                programs.into_iter().find_map(no_program)
            }
            Need::RrunCri => (!is_rrun()).then(|| {
                let server = server_program();
                format!("goes beyond what {server} does")
            }),
            Need::Works(what, script) => {
                let works = command("sh", ["-c", script]).ok();
                works.is_err().then(|| format!("no {what} here"))
            }
            Need::All(needs) => needs.iter().find_map(|need| need.lacking()),
            Need::Rrun => {
                let runtime = runtime_program();
                (!runtime.ends_with("rrun")).then(|| format!("goes beyond what {runtime} does"))
            }
        }
    }
}

fn no_program(name: &str) -> Option<String> {
    program_path(name)
        .is_none()
        .then(|| format!("no program {name} in PATH"))
}
