//! Published ways out of a container by the process that the runtime brings into it: what it holds
//! open, executes, may do. Each as it was published, and its failure.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};

use crate::bundle::{Bundle, runtime_program};
use crate::machine::{Directory, Result, command, note, program_path, wait_for};
use crate::needs::{Need, Test};
use crate::secret::Secret;
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[
    test!(cve_2024_21626_a_leaked_descriptor_is_no_working_directory),
    test!(cve_2024_21626_no_descriptor_of_the_callers_leaks),
    test!(
        cve_2019_5736_the_runtimes_file_is_not_overwritten,
        Need::Rrun
    ),
    test!(cve_2016_9962_a_process_on_its_way_in_is_closed_to_the_container),
    test!(cve_2022_29162_no_capability_is_inheritable),
];

/// `bundle.runtime`, by a caller that has left / open as descriptor 9.
fn leaking(bundle: &Bundle, args: &[&str]) -> crate::machine::Run {
    let program = runtime_program();
    command(
        "/bin/sh",
        ["-c", "exec 9</ && exec \"$@\"", "sh", &program, "--root"],
    )
    .arg(bundle.root())
    .args(args)
    .dir(bundle.path())
}

fn cve_2024_21626_a_leaked_descriptor_is_no_working_directory() -> Result {
    let secret = Secret::new()?;
    let mut bundle = Bundle::new(&["cat", &secret.upwards()])?;
    symlink("/proc/self/fd/9", bundle.join("rootfs/tmp/nine"))?;
    symlink("/proc/self/fd/9/../..", bundle.join("rootfs/tmp/up"))?;
    let mut places: Vec<String> = (3..=14).map(|n| format!("/proc/self/fd/{n}")).collect();
    places.extend(["/tmp/nine", "/tmp/up", "/proc/1/cwd", "/proc/self/root/.."].map(str::to_owned));
    for place in &places {
        bundle.set("/process/cwd", json!(place)).write_config()?;
        let output = leaking(&bundle, &["run", bundle.id()]).end()?;
        secret.unseen(&output)?;
        ensure!(output.code != 0, "cwd {place}: {}", output.told());
    }

    let bundle = Bundle::new(&["sleep", "600"])?;
    symlink("/proc/self/fd/9", bundle.join("rootfs/tmp/nine"))?;
    bundle.start()?;
    for place in &places {
        let args = [
            "exec",
            "--cwd",
            place,
            bundle.id(),
            "/bin/inside",
            "cat",
            &secret.upwards(),
        ];
        let output = leaking(&bundle, &args).end()?;
        secret.unseen(&output)?;
        ensure!(output.code != 0, "exec --cwd {place}: {}", output.told());
    }
    bundle.end()?;
    Ok(())
}

fn cve_2024_21626_no_descriptor_of_the_callers_leaks() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    bundle.write_config()?;
    let report = leaking(&bundle, &["run", bundle.id()]).ok()?.json()?;
    let only_standard = |report: &Value| -> Result {
        let all: Vec<String> = report["fds"]
            .as_object()
            .map(|all| all.keys().cloned().collect())
            .unwrap_or_default();
        ensure_eq!(all, ["0", "1", "2"], "descriptors");
        Ok(())
    };
    only_standard(&report)?;
    bundle.args(&["sleep", "600"]).start()?;
    let args = ["exec", bundle.id(), "/bin/inside", "report"];
    only_standard(&leaking(&bundle, &args).ok()?.json()?)?;
    bundle.end()?;
    Ok(())
}

fn cve_2019_5736_the_runtimes_file_is_not_overwritten() -> Result {
    // A copy, in case it does not hold.
    let copies = Directory::new("runtime")?;
    let copy = copies.join("rrun");
    let original = program_path(&runtime_program()).ok_or("no runtime in PATH")?;
    fs::copy(&original, &copy)?;
    let copy = copy.to_string_lossy().into_owned();

    let mut bundle = Bundle::new(&["attack", "overwrite", "6"])?;
    bundle.set("/root/readonly", json!(false));
    fs::write(bundle.join("rootfs/bin/script"), "#!/proc/self/exe\n")?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bundle.join("rootfs/bin/script"), mode)?;
    symlink("/proc/self/exe", bundle.join("rootfs/bin/link"))?;
    let mut attacker = bundle.run_beside()?;
    wait_for("the attacker", || {
        Ok(attacker.stdout().contains("ready").then_some(()))
    })?;
    for program in ["/bin/script", "/bin/link", "/proc/self/exe"] {
        for _ in 0..10 {
            // rrun, executed in the container, with whatever it makes of its arguments.
            let root = bundle.root();
            let root = root.to_string_lossy();
            let args = ["--root", &*root, "exec", bundle.id(), program, "list"];
            command(&copy, args).end()?;
        }
        // Nor do the attempts keep others from executing it: where the container holds the
        // file's own inode, each counts as a writer for a moment, and one of fifty of these
        // fails with ETXTBSY.
        for _ in 0..100 {
            command(&copy, ["--version"]).ok()?;
        }
    }
    let output = attacker.end()?;
    ensure!(!output.stdout.contains("overwrote"), "{}", output.told());
    ensure!(output.stdout.contains("done"), "{}", output.told());
    ensure!(
        fs::read(&copy)? == fs::read(&original)?,
        "the runtime's file has changed"
    );
    note(format!(
        "CVE-2019-5736: {}",
        output.stdout.replace('\n', "; ")
    ));

    // And as the container's own first process.
    for program in ["/bin/script", "/bin/link"] {
        bundle
            .set("/process/args", json!([program, "list"]))
            .write_config()?;
        let root = bundle.root();
        let root = root.to_string_lossy();
        command(&copy, ["--root", &*root, "run", bundle.id()])
            .dir(bundle.path())
            .end()?;
        ensure!(
            fs::read(&copy)? == fs::read(&original)?,
            "the runtime's file has changed"
        );
    }
    Ok(())
}

fn cve_2016_9962_a_process_on_its_way_in_is_closed_to_the_container() -> Result {
    let bundle = Bundle::new(&["attack", "pry", "4"])?;
    let mut attacker = bundle.run_beside()?;
    wait_for("the attacker", || {
        Ok(attacker.stdout().contains("ready").then_some(()))
    })?;
    bundle.exec(&[], &["exit", "0"]).ok()?;
    // Until it ends, and nobody can come in any more.
    while bundle.exec(&[], &["exit", "0"]).end()?.code == 0 {}
    let output = attacker.end()?;
    ensure!(output.stdout.contains("done"), "{}", output.told());
    for word in ["looked into", "opened the memory"] {
        ensure!(!output.stdout.contains(word), "{}", output.told());
    }
    Ok(())
}

fn cve_2022_29162_no_capability_is_inheritable() -> Result {
    let mut bundle = Bundle::new(&[])?;
    let none = "0000000000000000";
    ensure_eq!(bundle.report()?["status"]["CapInh"], none, "run");
    bundle.args(&["sleep", "600"]).start()?;
    let cases: [&[&str]; 3] = [&[], &["--cap", "CAP_NET_ADMIN"], &["--user", "1000"]];
    for options in cases {
        let report = bundle.exec(options, &["report"]).ok()?.json()?;
        ensure_eq!(report["status"]["CapInh"], none, "exec {options:?}");
    }
    bundle.end()?;
    Ok(())
}
