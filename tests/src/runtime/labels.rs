//! What the kernel's security modules are told: AppArmor profiles, SELinux labels.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::machine::{Result, command};
use crate::support::needs::{APPARMOR, APPARMOR_PROFILES, Need, SELINUX, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        an_apparmor_profile_confines_the_first_process_and_exec,
        APPARMOR,
        PARSER
    ),
    test!(exec_takes_an_apparmor_profile_of_its_own, APPARMOR, PARSER),
    test!(a_profile_that_is_not_loaded_is_told_by_its_name, APPARMOR),
    test!(
        apparmor_is_not_fooled_by_a_proc_of_the_containers,
        APPARMOR,
        PARSER,
        Need::Rrun
    ),
    test!(
        a_profile_without_apparmor_is_refused,
        Need::Absent(APPARMOR_PROFILES),
        Need::Rrun
    ),
    test!(an_selinux_label_reaches_the_process, SELINUX),
    test!(an_selinux_label_is_on_what_is_mounted, SELINUX),
    test!(
        selinux_keeps_a_container_from_what_has_other_categories,
        SELINUX
    ),
    test!(
        an_selinux_label_that_the_policy_does_not_know_is_told,
        SELINUX,
        Need::Rrun
    ),
];

const PARSER: Need = Need::Program("apparmor_parser");
/// A profile in the kernel; dropped, it is taken out again.
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

fn an_apparmor_profile_confines_the_first_process_and_exec() -> Result {
    let _profile = Profile::load("rrun-e2e-a")?;
    let mut bundle = writable(&[])?;
    bundle.set("/process/apparmorProfile", json!("rrun-e2e-a"));
    ensure_eq!(bundle.report()?["label"], "rrun-e2e-a (enforce)", "label");
    let denied = bundle
        .args(&["write", "/data/file", "x"])
        .call(&["run"])?
        .exits(1)?;
    ensure!(denied.stderr.contains("denied"), "{}", denied.told());
    bundle.args(&["write", "/tmp/file", "x"]).run()?;

    bundle.args(&["sleep", "600"]).start()?;
    let report = bundle.exec(&[], &["report"]).ok()?.json()?;
    ensure_eq!(report["label"], "rrun-e2e-a (enforce)", "label of exec");
    bundle.exec(&[], &["write", "/data/file", "x"]).exits(1)?;
    bundle.end()?;
    Ok(())
}

fn exec_takes_an_apparmor_profile_of_its_own() -> Result {
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

fn a_profile_that_is_not_loaded_is_told_by_its_name() -> Result {
    let mut bundle = writable(&["exit", "0"])?;
    bundle.set("/process/apparmorProfile", json!("rrun-e2e-absent"));
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.to_lowercase().contains("apparmor"),
        "{}",
        output.told()
    );
    Ok(())
}

/// CVE-2019-16884: a /proc that takes what is written to it, and tells nobody.
fn apparmor_is_not_fooled_by_a_proc_of_the_containers() -> Result {
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
        "the container's file"
    );
    Ok(())
}

fn a_profile_without_apparmor_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/process/apparmorProfile", json!("some-profile"));
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("process.apparmorProfile") && output.stderr.contains("AppArmor"),
        "{}",
        output.told()
    );
    Ok(())
}

/// Of the policy of `tests/vm/run --selinux`.
const PROCESS: &str = "system_u:system_r:container_t:s0:c1,c2";
const FILES: &str = "system_u:object_r:container_file_t:s0:c1,c2";

/// A container with SELinux labels, whose root filesystem it may use.
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

fn an_selinux_label_reaches_the_process() -> Result {
    let mut bundle = labelled(&[])?;
    ensure_eq!(bundle.report()?["label"], PROCESS, "label");

    bundle.args(&["sleep", "600"]).start()?;
    let report = |options: &[&str]| bundle.exec(options, &["report"]).ok()?.json();
    ensure_eq!(report(&[])?["label"], PROCESS, "label of exec");
    let other = "system_u:system_r:container_other_t:s0:c1,c2";
    let asked = report(&["--process-label", other])?;
    ensure_eq!(asked["label"], other, "label that exec asks for");
    bundle.end()?;
    Ok(())
}

/// What the kernel labels as a whole says so in mountinfo.
fn an_selinux_label_is_on_what_is_mounted() -> Result {
    let mut bundle = labelled(&[])?;
    let report = bundle.report()?;
    let mounts = report["mounts"].as_array().ok_or("no mounts")?;
    let labelled: Vec<&str> = mounts
        .iter()
        .filter_map(|line| line.as_str())
        .filter(|line| line.contains(&format!("context=\"{FILES}\"")))
        .filter_map(|line| line.split(' ').nth(4))
        .collect();
    for there in ["/dev", "/dev/pts", "/dev/shm"] {
        ensure!(labelled.contains(&there), "{there} is not in {labelled:?}");
    }
    for own in ["/proc", "/sys"] {
        ensure!(!labelled.contains(&own), "{own} is in {labelled:?}");
    }
    Ok(())
}

fn selinux_keeps_a_container_from_what_has_other_categories() -> Result {
    let mut bundle = labelled(&["write", "/data/file", "x"])?;
    let data = bundle.rootfs().join("data");
    label(&data, "system_u:object_r:container_file_t:s0:c3,c4")?;
    let denied = bundle.call(&["run"])?.exits(1)?;
    ensure!(denied.stderr.contains("denied"), "{}", denied.told());
    label(&data, FILES)?;
    bundle.run()?;
    label(&data, "system_u:object_r:file_t:s0")?;
    bundle.call(&["run"])?.exits(1)?;
    bundle.set("/process/selinuxLabel", json!(""));
    bundle.run()?;
    Ok(())
}

fn an_selinux_label_that_the_policy_does_not_know_is_told() -> Result {
    let mut bundle = labelled(&["exit", "0"])?;
    bundle.set("/process/selinuxLabel", json!("system_u:system_r:no_t:s0"));
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("process.selinuxLabel") && output.stderr.contains("no_t"),
        "{}",
        output.told()
    );
    Ok(())
}
