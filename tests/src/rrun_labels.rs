//! What the kernel's security modules are told: AppArmor profiles, SELinux labels.

use std::fs;

use serde_json::json;

use crate::bundle::Bundle;
use crate::machine::{Result, command};
use crate::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[
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
    test!(a_profile_without_apparmor_is_refused, Need::Rrun),
    test!(an_selinux_label_reaches_the_process, SELINUX),
];

const APPARMOR: Need = Need::File("/sys/kernel/security/apparmor/profiles");
const PARSER: Need = Need::Program("apparmor_parser");
const SELINUX: Need = Need::File("/sys/fs/selinux/enforce");

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
    if fs::exists("/sys/kernel/security/apparmor/profiles")? {
        return Ok(());
    }
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

/// Without a policy the kernel knows the labels of its own initial processes only.
fn an_selinux_label_reaches_the_process() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/selinuxLabel", json!("kernel"));
    ensure_eq!(bundle.report()?["label"], "kernel", "label");
    Ok(())
}
