//! End-to-end tests: the real binaries, on a real kernel, under real clients. As root, on a
//! machine or in a view of one that may be made a mess of: `tests/native/run` or `tests/vm/run`.
//!
//! Each test that passes has left nothing behind: the machine is looked at before and after.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

mod application;
mod attacker;
mod attempts;
mod bundle;
mod caller;
mod cgroup_use;
mod cluster;
mod cluster_application;
mod cluster_eviction;
mod cluster_features;
mod cluster_kubectl;
mod cni_faults;
mod cni_plugins;
mod cni_recorder;
mod cri_apparmor;
mod cri_calls;
mod cri_config;
mod cri_containers;
mod cri_devices;
mod cri_handlers;
mod cri_hangs;
mod cri_hostile_files;
mod cri_images;
mod cri_images_faults;
mod cri_images_looks;
mod cri_images_pace;
mod cri_images_preload;
mod cri_images_registries;
mod cri_limits;
mod cri_logs;
mod cri_metrics;
mod cri_pods;
mod cri_restart;
mod cri_seccomp;
mod cri_selinux;
mod cri_streaming;
mod cri_streaming_attach;
mod cri_streaming_exec;
mod cri_streaming_ports;
mod cri_streaming_server;
mod cri_streaming_spdy;
mod cri_systemd;
mod cri_users;
mod cri_volumes;
mod cri_wedge;
mod crictl_story;
mod critest;
mod inside;
mod inside_traffic;
mod kubelet;
mod kubelet_application;
mod kubelet_disk;
mod kubelet_features;
mod kubelet_limits;
mod kubelet_logs;
mod kubelet_pods;
mod kubelet_shutdown;
mod kubelet_streams;
mod leavings;
mod machine;
mod needs;
mod network_crowds;
mod network_flows;
mod network_host_ports;
mod network_routers;
mod node;
mod reboot;
mod rrun_bad_input;
mod rrun_bad_surroundings;
mod rrun_callers_containerd;
mod rrun_callers_crio;
mod rrun_callers_docker;
mod rrun_callers_podman;
mod rrun_effects;
mod rrun_escapes_dev;
mod rrun_escapes_mounts;
mod rrun_escapes_process;
mod rrun_hooks;
mod rrun_idmapped_mounts;
mod rrun_killed;
mod rrun_labels;
mod rrun_lifecycle;
mod rrun_limits;
mod rrun_mount_options;
mod rrun_mounts;
mod rrun_namespaces;
mod rrun_net_devices;
mod rrun_notify;
mod rrun_output;
mod rrun_process;
mod rrun_races;
mod rrun_rootless;
mod rrun_scheduling;
mod rrun_seccomp;
mod rrun_systemd;
mod rrun_usage;
mod secret;

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
    let trials = [
        rrun_lifecycle::TESTS,
        rrun_output::TESTS,
        rrun_usage::TESTS,
        rrun_namespaces::TESTS,
        rrun_mounts::TESTS,
        rrun_mount_options::TESTS,
        rrun_idmapped_mounts::TESTS,
        rrun_process::TESTS,
        rrun_scheduling::TESTS,
        rrun_labels::TESTS,
        rrun_net_devices::TESTS,
        rrun_notify::TESTS,
        rrun_rootless::TESTS,
        rrun_seccomp::TESTS,
        rrun_hooks::TESTS,
        rrun_bad_input::TESTS,
        rrun_bad_surroundings::TESTS,
        rrun_escapes_process::TESTS,
        rrun_escapes_dev::TESTS,
        rrun_escapes_mounts::TESTS,
        rrun_killed::TESTS,
        rrun_races::TESTS,
        rrun_limits::TESTS,
        rrun_effects::TESTS,
        rrun_systemd::TESTS,
        rrun_callers_podman::TESTS,
        rrun_callers_containerd::TESTS,
        rrun_callers_docker::TESTS,
        rrun_callers_crio::TESTS,
        crictl_story::TESTS,
        cni_plugins::TESTS,
        cni_faults::TESTS,
        cri_pods::TESTS,
        cri_containers::TESTS,
        cri_limits::TESTS,
        cri_logs::TESTS,
        cri_seccomp::TESTS,
        cri_users::TESTS,
        cri_hostile_files::TESTS,
        cri_volumes::TESTS,
        cri_devices::TESTS,
        cri_handlers::TESTS,
        cri_config::TESTS,
        cri_apparmor::TESTS,
        cri_selinux::TESTS,
        cri_calls::TESTS,
        cri_restart::TESTS,
        cri_streaming::TESTS,
        cri_streaming_exec::TESTS,
        cri_streaming_attach::TESTS,
        cri_streaming_ports::TESTS,
        cri_streaming_server::TESTS,
        cri_streaming_spdy::TESTS,
        cri_systemd::TESTS,
        cri_wedge::TESTS,
        cri_hangs::TESTS,
        cri_images::TESTS,
        cri_images_registries::TESTS,
        cri_images_faults::TESTS,
        cri_images_looks::TESTS,
        cri_images_pace::TESTS,
        cri_images_preload::TESTS,
        cri_metrics::TESTS,
        network_host_ports::TESTS,
        network_flows::TESTS,
        network_routers::TESTS,
        network_crowds::TESTS,
        kubelet_pods::TESTS,
        kubelet_application::TESTS,
        cluster_application::TESTS,
        cluster_kubectl::TESTS,
        cluster_features::TESTS,
        cluster_eviction::TESTS,
        kubelet_features::TESTS,
        kubelet_disk::TESTS,
        kubelet_shutdown::TESTS,
        critest::TESTS,
    ]
    .into_iter()
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
    /// RRUN_TEST_SUBJECTS: beginnings of names, separated by commas. RRUN_TEST_ONLY overrides it,
    /// because a test that runs other tests passes this variable on to them.
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
        let subjects = self.subjects.split(',');
        match self.only.as_str() {
            "" => subjects
                .into_iter()
                .any(|subject| name.starts_with(subject)),
            only => only.split(',').any(|only| only == name),
        }
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
