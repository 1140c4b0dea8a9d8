//! End-to-end tests. The tests run the real binaries on a real kernel with real clients. The tests
//! run as root. `tests/vm/run` runs the tests in a guest machine. `tests/native/run` runs the tests
//! on this machine in separate namespaces. The tests are allowed to change either environment
//! freely.
//!
//! A test passes only if it leaves nothing behind. The harness compares the state of the machine
//! before and after each test.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

mod support;

use support::{attempts, bundle, inside, machine, needs};

/// Declares one module for each test subject, for example the module `runtime::limits` for the file
/// runtime/limits.rs. `SUITES` lists the tests of all modules in the order of the declarations.
/// rustfmt does not find modules that a macro declares. Therefore, tests/lint/format passes the
/// file names of these modules to rustfmt.
macro_rules! suites {
    ($($kind:ident: [$($subject:ident),* $(,)?],)*) => {
        $(mod $kind {
            $(pub(crate) mod $subject;)*
        })*

        const SUITES: &[&[needs::Test]] = &[$($($kind::$subject::TESTS),*),*];
    };
}

suites! {
    // Tests of the runtime's command line, and of the programs that call the runtime.
    runtime: [
        lifecycle,
        output,
        usage,
        namespaces,
        mounts,
        mount_options,
        idmapped_mounts,
        keyrings,
        foreground,
        terminals,
        process,
        scheduling,
        labels,
        net_devices,
        notify,
        rootless,
        seccomp,
        seccomp_agent,
        creating,
        hooks,
        bad_input,
        bad_surroundings,
        escapes_process,
        escapes_dev,
        escapes_mounts,
        advisories,
        escapes_ptrace,
        numbers,
        random_configs,
        long_lists,
        killed,
        faults,
        faults_commands,
        races,
        deep_cgroups,
        main_threads,
        limits,
        shared_limits,
        state_owners,
        left_namespaces,
        effects,
        systemd,
        callers_podman,
        callers_containerd,
        callers_docker,
        callers_crio,
    ],
    // Tests of the CRI server with crictl, with gRPC calls and with the CRI's own test suite.
    cri: [
        crictl,
        pods,
        containers,
        limits,
        logs,
        seccomp,
        users,
        hostile_files,
        file_access,
        long_lists,
        report_sizes,
        advisories_images,
        advisories_processes,
        advisories_node,
        volumes,
        devices,
        handlers,
        config,
        apparmor,
        pause,
        selinux,
        calls,
        restart,
        faults,
        streaming,
        streaming_exec,
        exec_leftovers,
        main_threads,
        parents,
        streaming_attach,
        streaming_ports,
        streaming_server,
        streaming_crowds,
        streaming_spdy,
        systemd,
        wedge,
        hangs,
        stalls,
        tracers,
        kernel_locks,
        directory_locks,
        images,
        images_registries,
        images_faults,
        images_looks,
        images_pace,
        images_preload,
        random_layers,
        images_redirects,
        metrics,
        documents,
        critest,
    ],
    // Tests of pod networks: rrun's built-in network and networks of CNI plugins.
    network: [
        cni_plugins,
        cni_faults,
        host_ports,
        flows,
        multicast,
        routers,
        crowds,
        advisories,
        spoofing,
        neighbours,
        guards,
    ],
    // Tests of the CRI server with kubelet.
    kubelet: [
        pods,
        application,
        features,
        disk,
        shutdown,
    ],
    // Tests of a whole cluster with kubectl.
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
        || name.ends_with("/rrun-e2e-inside")
        || name == "inside"
        || std::env::var_os("RRUN_E2E_INSIDE").is_some()
    {
        let code = inside::main(&args.collect::<Vec<_>>());
        return ExitCode::from(u8::try_from(code).unwrap_or(99));
    }
    let mut arguments = Arguments::from_args();
    // The tests share one machine, and each test checks that it left nothing on the machine. So the
    // tests must not run in parallel.
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

/// The tests that the environment variables select. An unset variable selects all tests.
struct Selection {
    /// The full names of the tests to run, separated by commas, from RRUN_TEST_ONLY.
    only: String,
    /// Prefixes of the names of the tests to run, separated by commas, from RRUN_TEST_SUBJECTS. A
    /// prefix with a leading `-` excludes tests. RRUN_TEST_ONLY overrides RRUN_TEST_SUBJECTS. Some
    /// tests set RRUN_TEST_ONLY to run other tests in a child process, which inherits
    /// RRUN_TEST_SUBJECTS.
    subjects: String,
    /// True if RRUN_TEST_PLAN is set. In this case, no test runs. The harness reports a test that
    /// cannot run on this machine as ignored, and every other test as passed.
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
