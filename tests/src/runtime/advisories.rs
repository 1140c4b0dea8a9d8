//! Tests of published vulnerabilities of other runtimes that the files about escapes do not cover.
//! docs/security.md lists the vulnerabilities. A test whose name begins with the number of a
//! vulnerability runs the published attack, and checks that the attack fails.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Directory, Result};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(cve_2026_41579_links_at_dev_change_nothing_on_the_host),
    test!(
        cve_2026_88264_a_link_at_dev_console_creates_nothing_on_the_host,
        Need::Rrun
    ),
    test!(
        cve_2026_88265_a_link_at_dev_null_changes_no_mounted_file,
        Need::Rrun
    ),
    test!(cve_2026_30892_exec_runs_as_the_requested_user),
    test!(cve_2021_43784_a_large_configuration_disables_no_namespace),
    test!(ghsa_g54h_m393_cpwq_devices_without_a_rule_are_denied),
    test!(
        cve_2026_119101_the_runtime_restores_no_checkpoint,
        Need::Rrun
    ),
    test!(
        cve_2026_135844_a_huge_passwd_file_is_not_read,
        Need::Rrun,
        Need::Program("strace")
    ),
];

/// A directory of the host with one file, which the runtime must not change.
struct Victim(Directory);

impl Victim {
    /// The name and the content of the file. `ptmx` is a name that runtimes remove from /dev.
    const FILE: &str = "ptmx";
    const CONTENT: &str = "the host's file\n";

    fn new() -> Result<Self> {
        let directory = Directory::new("victim")?;
        fs::write(directory.join(Self::FILE), Self::CONTENT)?;
        Ok(Victim(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn unchanged(&self, attack: &str) -> Result {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        ensure_eq!(
            names,
            [Self::FILE],
            "the names of the files in the host's directory after the attack with {attack}"
        );
        let file = self.0.join(Self::FILE);
        ensure_eq!(
            fs::read_to_string(&file)?,
            Self::CONTENT,
            "the content of the host's file after the attack with {attack}"
        );
        let metadata = fs::metadata(&file)?;
        ensure_eq!(
            (metadata.uid(), metadata.gid()),
            (0, 0),
            "the owner and the group of the host's file after the attack with {attack}"
        );
        Ok(())
    }
}

/// Removes the mounts at and below /dev. The runtime then creates devices in the image's /dev.
fn remove_dev_mounts(bundle: &mut Bundle) {
    let is_below_dev = |mount: &Value| {
        let destination = mount["destination"].as_str().unwrap_or_default();
        destination.starts_with("/dev")
    };
    if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
        all.retain(|mount| !is_below_dev(mount));
    }
    bundle.set("/root/readonly", json!(false));
}

/// In CVE-2026-41579 (runc), CVE-2026-47766 (crun) and CVE-2019-18837 (crun), the image's /dev was
/// a link. The runtime followed the link on the host, removed `ptmx` and created devices.
fn cve_2026_41579_links_at_dev_change_nothing_on_the_host() -> Result {
    let victim = Victim::new()?;
    let path = victim.path().display();
    for target in [
        format!("{path}"),
        format!("../../../../../../../..{path}"),
        format!("/proc/self/root/{path}"),
        format!("/proc/1/root/{path}"),
    ] {
        for (mounts, exists) in [(true, false), (true, true), (false, false), (false, true)] {
            let mut bundle = Bundle::new(&["exit", "0"])?;
            fs::remove_dir(bundle.join("rootfs/dev"))?;
            symlink(&target, bundle.join("rootfs/dev"))?;
            if exists {
                fs::create_dir_all(bundle.join(&format!("rootfs{path}")))?;
            }
            if !mounts {
                remove_dev_mounts(&mut bundle);
            }
            bundle.set("/root/readonly", json!(false));
            bundle.call(&["run"])?.end()?;
            victim.unchanged(&format!(
                "the link /dev -> {target} (mounts below /dev: {mounts}, the target exists in the image: {exists})"
            ))?;
        }
    }
    Ok(())
}

fn cve_2026_88264_a_link_at_dev_console_creates_nothing_on_the_host() -> Result {
    let victim = Victim::new()?;
    let path = victim.path().display();
    for name in ["new", Victim::FILE] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        remove_dev_mounts(&mut bundle);
        fs::create_dir(bundle.join("rootfs/dev/pts"))?;
        symlink(format!("{path}/{name}"), bundle.join("rootfs/dev/console"))?;
        bundle
            .add(
                "/mounts",
                json!({
                    "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                    "options": ["newinstance", "ptmxmode=0666", "mode=0620"],
                }),
            )
            .set("/process/terminal", json!(true));
        bundle.call(&["run"])?.end()?;
        victim.unchanged(&format!("the link /dev/console -> {path}/{name}"))?;
    }
    Ok(())
}

/// In CVE-2026-88265, crun opened the image's /dev/null for the program's output and gave the file
/// to the program's user. The attacker's /dev/null is a link to a mounted file of the host.
fn cve_2026_88265_a_link_at_dev_null_changes_no_mounted_file() -> Result {
    let victim = Victim::new()?;
    let mut bundle = Bundle::new(&["echo", "written"])?;
    remove_dev_mounts(&mut bundle);
    symlink("/data/file", bundle.join("rootfs/dev/null"))?;
    fs::write(bundle.join("rootfs/data/file"), "")?;
    bundle
        .add(
            "/mounts",
            json!({
                "destination": "/data/file", "type": "bind", "options": ["bind"],
                "source": victim.path().join(Victim::FILE),
            }),
        )
        .set("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    let output = bundle.call(&["run"])?.end()?;
    victim.unchanged("the link /dev/null -> /data/file")?;
    output.fails_with("/dev/null")
}

/// In CVE-2026-30892, `crun exec --user 1` started the program as root.
fn cve_2026_30892_exec_runs_as_the_requested_user() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    for (user, uid, gid) in [("1", 1, 0), ("1:2", 1, 2), ("1000000", 1_000_000, 0)] {
        let report = bundle.exec(&["--user", user], &["report"]).ok()?.json()?;
        ensure_eq!(
            (&report["uid"], &report["gid"]),
            (&json!(uid), &json!(gid)),
            "the ids of a program that `exec --user {user}` starts"
        );
    }
    for user in ["", "root", ":1", "1:", "-1", "1 2", "0x1", "99999999999"] {
        let output = bundle.exec(&["--user", user], &["report"]).end()?;
        ensure!(
            output.code != 0,
            "`exec --user {user:?}` is not refused:\n{}",
            output.told()
        );
    }
    bundle.end()?;
    Ok(())
}

/// In CVE-2021-43784, the length of a part of runc's configuration was stored in 16 bits. The
/// sources of many mounts made this part longer than 64 KiB, and the rest of the part was then
/// interpreted as the flags of the namespaces.
fn cve_2021_43784_a_large_configuration_disables_no_namespace() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    let source = format!(
        "{}{}",
        "/.".repeat(1900),
        bundle.join("rootfs/data").display()
    );
    for number in 0..20 {
        let destination = format!("/data/{number}");
        fs::create_dir(bundle.join(&format!("rootfs{destination}")))?;
        bundle.add(
            "/mounts",
            json!({ "destination": destination, "type": "bind", "source": source, "options": ["bind"] }),
        );
    }
    let long = format!("LONG={}", "x".repeat(100_000));
    bundle.add("/process/env", json!(long));
    let report = bundle.report()?;
    for kind in ["pid", "net", "ipc", "uts", "mnt", "cgroup"] {
        let of_host = fs::read_link(format!("/proc/self/ns/{kind}"))?;
        let of_container = report["namespaces"][kind].as_str().unwrap_or_default();
        ensure!(
            !of_container.is_empty() && Path::new(of_container) != of_host,
            "the container's {kind} namespace is {of_container:?}, and the host's is {of_host:?}"
        );
    }
    Ok(())
}

/// The advisory GHSA-g54h-m393-cpwq of runc has no CVE number: runc interpreted a list of device
/// rules that does not begin with a rule for all devices as a list of exceptions.
fn ghsa_g54h_m393_cpwq_devices_without_a_rule_are_denied() -> Result {
    for rules in [
        None,
        Some(json!([])),
        Some(json!([{ "allow": false, "type": "c", "major": 1, "minor": 9, "access": "rwm" }])),
        Some(json!([{ "allow": true, "type": "c", "major": 1, "minor": 9, "access": "rwm" }])),
    ] {
        let mut bundle = Bundle::new(&["cat", "/data/tun"])?;
        let mode = Mode::from_bits_truncate(0o666);
        mknod(
            &bundle.join("rootfs/data/tun"),
            SFlag::S_IFCHR,
            mode,
            makedev(10, 200),
        )?;
        if let Some(rules) = &rules {
            bundle.set("/linux/resources/devices", rules.clone());
        }
        let output = bundle.call(&["run"])?.end()?;
        ensure!(
            output.code != 0 && output.told().contains("Operation not permitted"),
            "the container can open a device for which it has no rule (the rules: {rules:?}):\n{}",
            output.told()
        );
    }
    Ok(())
}

/// Several vulnerabilities are in the restoration of a container from a checkpoint, for example
/// CVE-2026-119101 (runc) and CVE-2026-115520 (crun).
fn cve_2026_119101_the_runtime_restores_no_checkpoint() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    for command in ["checkpoint", "restore"] {
        let output = bundle.runtime(&[command, bundle.id()]).end()?;
        ensure!(
            output.code != 0 && output.told().contains(command),
            "`{command}` is not refused:\n{}",
            output.told()
        );
    }
    bundle.end()?;
    Ok(())
}

/// In CVE-2026-135844, runc read the whole /etc/passwd of an image to find the value of HOME.
fn cve_2026_135844_a_huge_passwd_file_is_not_read() -> Result {
    const MEGABYTE: u64 = 1 << 20;
    let mut bundle = Bundle::new(&["exit", "0"])?;
    // The file is sparse, so it needs no space on the disk.
    fs::File::create(bundle.join("rootfs/etc/passwd"))?.set_len(64 * MEGABYTE)?;
    bundle
        .set("/process/env", json!(["PATH=/bin"]))
        .write_config()?;
    let trace = bundle.join("trace");
    let program = crate::support::bundle::runtime_program();
    crate::support::machine::command("strace", ["-f", "-y", "-e", "trace=read,pread64", "-o"])
        .arg(&trace)
        .arg(program)
        .arg("--root")
        .arg(bundle.root())
        .args(["run", bundle.id()])
        .dir(bundle.path())
        .end()?;
    let trace = fs::read_to_string(&trace)?;
    let of_passwd = trace.lines().filter(|line| line.contains("/etc/passwd>"));
    let bytes: u64 = of_passwd
        .filter_map(|line| line.rsplit_once("= ")?.1.parse::<u64>().ok())
        .sum();
    ensure!(
        (1..=8 * MEGABYTE).contains(&bytes),
        "the runtime read {bytes} bytes of the container's /etc/passwd"
    );
    Ok(())
}
