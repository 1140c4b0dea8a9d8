//! Tests, and their requirements on the machine. If the machine does not satisfy a requirement, the
//! harness skips the test and reports the reason.

use std::path::Path;

use crate::support::bundle::runtime_program;
use crate::support::machine::{Result, command, full, program_path};
use crate::support::node::{is_rrun, server_program};

/// A test. The test's name is a sentence about the expected behaviour.
pub(crate) struct Test {
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [Need],
    pub(crate) run: fn() -> Result,
}

/// Creates a [`Test`](crate::support::needs::Test) from the function that runs the test. The
/// further arguments are the test's requirements, as in `test!(function, Need, Need)`.
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

/// A socket of systemd. The socket exists only if systemd is PID 1.
pub(crate) const SYSTEMD: &str = "/run/systemd/private";

/// The file that lists the loaded AppArmor profiles. The file exists only if the kernel supports
/// AppArmor.
pub(crate) const APPARMOR_PROFILES: &str = "/sys/kernel/security/apparmor/profiles";
pub(crate) const APPARMOR: Need = Need::File(APPARMOR_PROFILES);

/// The file that contains SELinux's mode. Only the guest machine that `tests/vm/run --selinux`
/// starts has SELinux.
pub(crate) const SELINUX: Need = Need::File("/sys/fs/selinux/enforce");

/// A requirement that not every machine satisfies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Need {
    /// A cgroup v2 controller that must be available in the root cgroup.
    Controller(&'static str),
    /// A program that must be in PATH.
    Program(&'static str),
    /// A file or directory that must exist.
    File(&'static str),
    /// A path that must not exist on the machine. If the path is missing, rrun reports an error,
    /// and the test checks this error.
    Absent(&'static str),
    /// A separate machine (`tests/vm/run`) on which no other program manages cgroups.
    OwnMachine,
    /// The native view (`tests/native/run`), which uses this machine's kernel instead of the guest
    /// machine's kernel.
    Native,
    /// A run of `make test-full` (RRUN_TEST_FULL). Tests that take a long time have this
    /// requirement.
    Long,
    /// The native view (`tests/native/run`) or a run of `make test-full`. Tests that take a long
    /// time in the emulated guest machine have this requirement.
    NativeOrLong,
    /// systemd as PID 1 (`tests/vm/run --systemd`).
    Systemd,
    /// The CRI server under test, and the programs that it starts.
    CriServer,
    /// rrun as the runtime under test. The test requires behaviour that runc does not have.
    Rrun,
    /// rrun-cri as the CRI server under test. The test requires behaviour that other servers do not
    /// have.
    RrunCri,
    /// A feature of the machine. The first string is the feature's name. The second string is a
    /// shell command that succeeds if the machine has the feature.
    Works(&'static str, &'static str),
    /// Several requirements. The machine must satisfy all of them.
    All(&'static [Need]),
}

impl Need {
    /// Returns why this machine does not satisfy the requirement, or `None` if the machine
    /// satisfies the requirement.
    pub(crate) fn lacking(self) -> Option<String> {
        match self {
            Need::Controller(name) => {
                let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
                let controllers = controllers.unwrap_or_default();
                (!controllers
                    .split_whitespace()
                    .any(|controller| controller == name))
                .then(|| format!("this machine has no cgroup v2 controller {name}"))
            }
            Need::Program(name) => no_program(name),
            Need::File(path) => (!Path::new(path).exists())
                .then(|| format!("{path} does not exist on this machine")),
            Need::Absent(path) => Path::new(path)
                .exists()
                .then(|| format!("{path} exists on this machine")),
            Need::OwnMachine => {
                let view = std::env::var("RRUN_TEST_VIEW").unwrap_or_default();
                (!view.starts_with("vm")).then(|| "the test needs the guest machine (tests/vm/run)".to_owned())
            }
            Need::Native => Need::OwnMachine.lacking().is_none().then(|| {
                "the test needs the native view (tests/native/run), which has fewer features than the guest machine".to_owned()
            }),
            Need::Long => (!full()).then(|| {
                "the test takes a long time, so only `make test-full` runs the test (RRUN_TEST_FULL)".to_owned()
            }),
            Need::NativeOrLong => Need::OwnMachine
                .lacking()
                .is_none()
                .then(|| Need::Long.lacking())
                .flatten(),
            Need::Systemd => (!Path::new(SYSTEMD).exists())
                .then(|| "PID 1 of this machine is not systemd".to_owned()),
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
                format!("the test requires behaviour that the CRI server {server} does not have")
            }),
            Need::Works(feature, script) => {
                let works = command("sh", ["-c", script]).ok();
                works
                    .is_err()
                    .then(|| format!("this machine has no {feature}"))
            }
            Need::All(needs) => needs.iter().find_map(|need| need.lacking()),
            Need::Rrun => {
                let runtime = runtime_program();
                (!runtime.ends_with("rrun"))
                    .then(|| format!("the test requires behaviour that the runtime {runtime} does not have"))
            }
        }
    }
}

fn no_program(name: &str) -> Option<String> {
    program_path(name)
        .is_none()
        .then(|| format!("there is no program {name} in PATH"))
}
