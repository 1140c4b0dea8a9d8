//! End-to-end tests: the real binaries, on a real kernel, under real clients. As root, on a
//! machine or in a view of one that may be made a mess of: `tests/native/run` or `tests/vm/run`.
//!
//! Each test that passes has left nothing behind: the machine is looked at before and after.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

mod support;

use support::{attempts, bundle, inside, machine, needs};

/// Declares a module for each subject, in the folder of its kind, and lists their tests in this
/// order. rustfmt does not find files that a macro declares; tests/lint/run names them to it.
macro_rules! suites {
    ($($kind:ident: [$($subject:ident),* $(,)?],)*) => {
        $(mod $kind {
            $(pub(crate) mod $subject;)*
        })*

        const SUITES: &[&[needs::Test]] = &[$($($kind::$subject::TESTS),*),*];
    };
}

suites! {
    // The runtime's command line, and the programs that call it.
    runtime: [
        lifecycle,
        output,
        usage,
        namespaces,
        mounts,
        mount_options,
        idmapped_mounts,
        process,
        scheduling,
        labels,
        net_devices,
        notify,
        rootless,
        seccomp,
        seccomp_agent,
        hooks,
        bad_input,
        bad_surroundings,
        escapes_process,
        escapes_dev,
        escapes_mounts,
        killed,
        races,
        limits,
        effects,
        systemd,
        callers_podman,
        callers_containerd,
        callers_docker,
        callers_crio,
    ],
    // The CRI server, by crictl, by gRPC and by the CRI's own suite.
    cri: [
        crictl,
        pods,
        containers,
        limits,
        logs,
        seccomp,
        users,
        hostile_files,
        volumes,
        devices,
        handlers,
        config,
        apparmor,
        selinux,
        calls,
        restart,
        streaming,
        streaming_exec,
        streaming_attach,
        streaming_ports,
        streaming_server,
        streaming_spdy,
        systemd,
        wedge,
        hangs,
        images,
        images_registries,
        images_faults,
        images_looks,
        images_pace,
        images_preload,
        metrics,
        critest,
    ],
    // The networks of pods: the embedded one, and those of CNI plugins.
    network: [
        cni_plugins,
        cni_faults,
        host_ports,
        flows,
        routers,
        crowds,
    ],
    // The CRI server under kubelet.
    kubelet: [
        pods,
        application,
        features,
        disk,
        shutdown,
    ],
    // A whole cluster, by kubectl.
    cluster: [
        application,
        kubectl,
        features,
        eviction,
    ],
}

fn main() -> ExitCode {
    let mut args = std::env::args();
    let name = args.next().unwrap_or_default();
    if name.ends_with("/inside")
        || name == "inside"
        || std::env::var_os("RRUN_E2E_INSIDE").is_some()
    {
        let code = inside::main(&args.collect::<Vec<_>>());
        return ExitCode::from(u8::try_from(code).unwrap_or(99));
    }
    let mut arguments = Arguments::from_args();
    // The tests share a machine, and each looks for what it left on it.
    arguments.test_threads = Some(1);

    if !arguments.list {
        bundle::prepare();
    }

    let selection = Selection::from_environment();
    let trials = SUITES
        .iter()
        .copied()
        .flatten()
        .filter(|test| selection.has(name_of(test)))
        .map(|test| trial(test, selection.plan))
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    attempts::report();
    for note in machine::notes() {
        println!("note: {note}");
    }
    conclusion.exit_code()
}

fn name_of(test: &needs::Test) -> &'static str {
    test.name.trim_start_matches("rrun_e2e::")
}

/// The tests that the environment selects; an unset variable selects all.
struct Selection {
    /// RRUN_TEST_ONLY: whole names, separated by commas.
    only: String,
    /// RRUN_TEST_SUBJECTS: beginnings of names, separated by commas. A name that begins with a word
    /// after a `-` is left out. RRUN_TEST_ONLY overrides it, because a test that runs other tests
    /// passes this variable on to them.
    subjects: String,
    /// RRUN_TEST_PLAN: no test is run. Tests that cannot run on this machine are reported as
    /// ignored, the others as passed.
    plan: bool,
}

impl Selection {
    fn from_environment() -> Self {
        let variable = |name| std::env::var(name).unwrap_or_default();
        Selection {
            only: variable("RRUN_TEST_ONLY"),
            subjects: variable("RRUN_TEST_SUBJECTS"),
            plan: !variable("RRUN_TEST_PLAN").is_empty(),
        }
    }

    fn has(&self, name: &str) -> bool {
        if !self.only.is_empty() {
            return self.only.split(',').any(|only| only == name);
        }
        let (left_out, subjects): (Vec<&str>, Vec<&str>) = self
            .subjects
            .split(',')
            .partition(|subject| subject.starts_with('-'));
        let begins_with = |subject: &&str| name.starts_with(subject.trim_start_matches('-'));
        subjects.iter().any(begins_with) && !left_out.iter().any(begins_with)
    }
}

fn trial(test: &'static needs::Test, plan: bool) -> Trial {
    let name = name_of(test);
    Trial::ignorable_test(name, move || {
        if plan {
            let lacking = test.needs.iter().find_map(|need| need.lacking());
            return Ok(lacking.map_or(Completion::Completed, Completion::ignored_with));
        }
        attempts::run(name, test)
    })
}
