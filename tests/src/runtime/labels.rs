//! Tests of AppArmor profiles and SELinux labels, the settings for the kernel's security modules.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::fault_runs::{Subject, not_created, reported, words};
use crate::support::machine::{Result, command};
use crate::support::needs::{APPARMOR, APPARMOR_PROFILES, Need, SELINUX, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        an_apparmor_profile_confines_the_first_process_and_processes_that_exec_starts,
        APPARMOR,
        PARSER
    ),
    test!(
        a_process_that_exec_starts_can_have_a_separate_apparmor_profile,
        APPARMOR,
        PARSER
    ),
    test!(
        a_process_never_runs_without_its_apparmor_profile,
        APPARMOR,
        PARSER,
        Need::Rrun
    ),
    test!(an_apparmor_profile_that_is_not_loaded_is_reported, APPARMOR),
    test!(
        a_false_proc_does_not_disable_apparmor,
        APPARMOR,
        PARSER,
        Need::Rrun
    ),
    test!(
        an_apparmor_profile_is_refused_if_the_kernel_lacks_apparmor,
        Need::Absent(APPARMOR_PROFILES),
        Need::Rrun
    ),
    test!(the_process_has_the_configured_selinux_label, SELINUX),
    test!(
        mounted_file_systems_have_the_configured_selinux_label,
        SELINUX
    ),
    test!(
        selinux_denies_access_to_files_with_other_categories,
        SELINUX
    ),
    test!(
        an_selinux_label_that_the_policy_does_not_contain_is_reported,
        SELINUX,
        Need::Rrun
    ),
];

const PARSER: Need = Need::Program("apparmor_parser");
/// An AppArmor profile that is loaded into the kernel. Dropping the value unloads the profile.
struct Profile(String);

impl Profile {
    fn load(name: &str) -> Result<Profile> {
        let text = format!(
            "profile {name} flags=(attach_disconnected,mediate_deleted) {{\n  file,\n  capability,\n  network,\n  signal,\n  ptrace,\n  deny /data/** w,\n}}\n"
        );
        command("apparmor_parser", ["--replace", "--skip-cache"])
            .stdin(text.clone())
            .ok()?;
        Ok(Profile(text))
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        let _ = command("apparmor_parser", ["--remove"])
            .stdin(self.0.clone())
            .end();
    }
}

fn writable(args: &[&str]) -> Result<Bundle> {
    let mut bundle = Bundle::new(args)?;
    bundle.set("/root/readonly", json!(false));
    Ok(bundle)
}

fn an_apparmor_profile_confines_the_first_process_and_processes_that_exec_starts() -> Result {
    let _profile = Profile::load("rrun-e2e-a")?;
    let mut bundle = writable(&[])?;
    bundle.set("/process/apparmorProfile", json!("rrun-e2e-a"));
    ensure_eq!(
        bundle.report()?["label"],
        "rrun-e2e-a (enforce)",
        "the security label of the first process"
    );
    let denied = bundle
        .args(&["write", "/data/file", "x"])
        .call(&["run"])?
        .exits(1)?;
    ensure!(
        denied.stderr.contains("denied"),
        "the container's write does not fail with a permission error:\n{}",
        denied.told()
    );
    bundle.args(&["write", "/tmp/file", "x"]).run()?;

    bundle.args(&["sleep", "600"]).start()?;
    let report = bundle.exec(&[], &["report"]).ok()?.json()?;
    ensure_eq!(
        report["label"],
        "rrun-e2e-a (enforce)",
        "the security label of the process that `exec` starts"
    );
    bundle.exec(&[], &["write", "/data/file", "x"]).exits(1)?;
    bundle.end()?;
    Ok(())
}

/// In this test, only the system calls that set the label fail.
fn a_process_never_runs_without_its_apparmor_profile() -> Result {
    let _profile = Profile::load("rrun-e2e-d")?;
    let mut bundle = writable(&["report"])?;
    bundle.set("/process/apparmorProfile", json!("rrun-e2e-d"));
    Subject {
        name: "run with an AppArmor profile",
        commands: vec![words(&["run", bundle.id()])],
        sample: 30,
        skips: &|call, _| !(call.object.contains("attr") || call.object.contains("apparmor")),
        effect: &|| reported(&bundle, 0),
        failed: &|_| not_created(&bundle),
        ..Subject::new(&bundle)
    }
    .run()
}

fn a_process_that_exec_starts_can_have_a_separate_apparmor_profile() -> Result {
    let _profile = Profile::load("rrun-e2e-b")?;
    let bundle = writable(&["sleep", "600"])?;
    bundle.start()?;
    bundle.exec(&[], &["write", "/data/file", "x"]).ok()?;
    bundle
        .exec(&["--apparmor", "rrun-e2e-b"], &["write", "/data/file", "x"])
        .exits(1)?;
    bundle.end()?;
    Ok(())
}

fn an_apparmor_profile_that_is_not_loaded_is_reported() -> Result {
    let mut bundle = writable(&["exit", "0"])?;
    bundle.set("/process/apparmorProfile", json!("rrun-e2e-absent"));
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.to_lowercase().contains("apparmor"),
        "the error of `run` does not mention AppArmor:\n{}",
        output.told()
    );
    Ok(())
}

/// In CVE-2019-16884, the runtime wrote the profile to a file in a false /proc. The kernel never
/// received the profile.
fn a_false_proc_does_not_disable_apparmor() -> Result {
    let _profile = Profile::load("rrun-e2e-c")?;
    let mut bundle = writable(&["write", "/data/file", "x"])?;
    bundle.set("/process/apparmorProfile", json!("rrun-e2e-c"));
    let attr = bundle.rootfs().join("proc/self/attr/apparmor");
    fs::create_dir_all(&attr)?;
    fs::write(attr.join("exec"), "")?;
    if let Some(mounts) = bundle.config["mounts"].as_array_mut() {
        mounts.retain(|mount| mount["destination"] != "/proc");
    }
    bundle
        .set("/linux/maskedPaths", json!([]))
        .set("/linux/readonlyPaths", json!([]));
    bundle.call(&["run"])?.exits(1)?;
    ensure_eq!(
        fs::read_to_string(attr.join("exec"))?,
        "",
        "the content of the file in the container's false /proc"
    );
    Ok(())
}

fn an_apparmor_profile_is_refused_if_the_kernel_lacks_apparmor() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/process/apparmorProfile", json!("some-profile"));
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("process.apparmorProfile") && output.stderr.contains("AppArmor"),
        "the error of `run` does not name the field process.apparmorProfile and AppArmor:\n{}",
        output.told()
    );
    Ok(())
}

/// A process label that the SELinux policy in the guest machine of `tests/vm/run --selinux` allows.
const PROCESS: &str = "system_u:system_r:container_t:s0:c1,c2";
const FILES: &str = "system_u:object_r:container_file_t:s0:c1,c2";

/// Returns a bundle with SELinux labels. The process label gives the container access to its root
/// file system.
fn labelled(args: &[&str]) -> Result<Bundle> {
    let mut bundle = writable(args)?;
    label(&bundle.rootfs(), "system_u:object_r:container_file_t:s0")?;
    bundle.set("/process/selinuxLabel", json!(PROCESS));
    bundle.set("/linux/mountLabel", json!(FILES));
    Ok(bundle)
}

fn label(path: &Path, label: &str) -> Result {
    command("chcon", ["--recursive", label])
        .arg(path)
        .ok()
        .map(|_| ())
}

fn the_process_has_the_configured_selinux_label() -> Result {
    let mut bundle = labelled(&[])?;
    ensure_eq!(
        bundle.report()?["label"],
        PROCESS,
        "the security label of the first process"
    );

    bundle.args(&["sleep", "600"]).start()?;
    let report = |options: &[&str]| bundle.exec(options, &["report"]).ok()?.json();
    ensure_eq!(
        report(&[])?["label"],
        PROCESS,
        "the security label of the process that `exec` starts"
    );
    let other = "system_u:system_r:container_other_t:s0:c1,c2";
    let requested = report(&["--process-label", other])?;
    ensure_eq!(
        requested["label"],
        other,
        "the security label of the process that `exec --process-label` starts"
    );
    bundle.end()?;
    Ok(())
}

/// If all files of a file system have the same label, mountinfo shows this label in the option
/// `context`.
fn mounted_file_systems_have_the_configured_selinux_label() -> Result {
    let mut bundle = labelled(&[])?;
    let report = bundle.report()?;
    let mounts = report["mounts"]
        .as_array()
        .ok_or("the report of `inside` contains no mounts")?;
    let labelled: Vec<&str> = mounts
        .iter()
        .filter_map(|line| line.as_str())
        .filter(|line| line.contains(&format!("context=\"{FILES}\"")))
        .filter_map(|line| line.split(' ').nth(4))
        .collect();
    for point in ["/dev", "/dev/pts", "/dev/shm"] {
        ensure!(
            labelled.contains(&point),
            "the mount on {point} has no SELinux label; the mounts with the label: {labelled:?}"
        );
    }
    for own in ["/proc", "/sys"] {
        ensure!(
            !labelled.contains(&own),
            "the mount on {own} has an SELinux label; the mounts with the label: {labelled:?}"
        );
    }
    Ok(())
}

fn selinux_denies_access_to_files_with_other_categories() -> Result {
    let mut bundle = labelled(&["write", "/data/file", "x"])?;
    let data = bundle.rootfs().join("data");
    label(&data, "system_u:object_r:container_file_t:s0:c3,c4")?;
    let denied = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        denied.stderr.contains("denied"),
        "the container's write does not fail with a permission error:\n{}",
        denied.told()
    );
    label(&data, FILES)?;
    bundle.run()?;
    label(&data, "system_u:object_r:file_t:s0")?;
    bundle.call(&["run"])?.exits(1)?;
    bundle.set("/process/selinuxLabel", json!(""));
    bundle.run()?;
    Ok(())
}

fn an_selinux_label_that_the_policy_does_not_contain_is_reported() -> Result {
    let mut bundle = labelled(&["exit", "0"])?;
    bundle.set("/process/selinuxLabel", json!("system_u:system_r:no_t:s0"));
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("process.selinuxLabel") && output.stderr.contains("no_t"),
        "the error of `run` does not name the field process.selinuxLabel and the unknown type no_t:\n{}",
        output.told()
    );
    Ok(())
}
