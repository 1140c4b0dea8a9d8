//! Published ways out of a container by the process that the runtime brings into it: what it holds
//! open, executes, may do. Each as it was published, and its failure.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Directory, Result, Run, command, note, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::secret::Secret;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(cve_2024_21626_a_leaked_descriptor_is_no_working_directory),
    test!(cve_2024_21626_no_descriptor_of_the_callers_leaks),
    test!(a_leaked_directory_is_neither_written_to_nor_executed_from),
    test!(a_leaked_directory_does_nothing_for_exec),
    test!(a_users_home_is_not_read_from_a_leaked_file, Need::Rrun),
    test!(
        a_working_directory_is_not_made_through_a_process,
        Need::Rrun
    ),
    test!(a_preserved_descriptor_reaches_the_program_alone, Need::Rrun),
    test!(a_created_process_holds_no_file_of_the_hosts, Need::Rrun),
    test!(hooks_get_no_descriptor_of_the_callers, Need::Rrun),
    test!(
        cve_2019_5736_the_runtimes_file_is_not_overwritten,
        Need::Rrun
    ),
    test!(cve_2016_9962_a_process_on_its_way_in_is_closed_to_the_container),
    test!(cve_2022_29162_no_capability_is_inheritable),
];

/// `bundle.runtime`, by a caller that has left / open as descriptor 9.
fn leaking(bundle: &Bundle, args: &[&str]) -> Run {
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

/// A directory of the host, with a copy of the tests' program in it.
struct HostDirectory(Directory);

impl HostDirectory {
    fn new(bundle: &Bundle) -> Result<Self> {
        let directory = Directory::new("host")?;
        fs::create_dir(directory.join("bin"))?;
        fs::copy(
            bundle.join("rootfs/bin/inside"),
            directory.join("bin/inside"),
        )?;
        fs::write(directory.join("passwd"), "root:x:0:0::/leaked:/bin/sh\n")?;
        Ok(HostDirectory(directory))
    }

    /// As `bundle.runtime`, but the caller has these redirections. `DIR` stands for the directory.
    fn open_in_caller(&self, redirections: &str, bundle: &Bundle, args: &[&str]) -> Run {
        let directory = self.0.path().to_string_lossy();
        let line = format!(
            "exec {} && exec \"$@\"",
            redirections.replace("DIR", &directory)
        );
        let program = runtime_program();
        command("/bin/bash", ["-c", &line, "bash", &program, "--root"])
            .arg(bundle.root())
            .args(args)
            .dir(bundle.path())
    }

    fn leaked(&self, bundle: &Bundle, args: &[&str]) -> Run {
        self.open_in_caller("8<DIR 40<DIR", bundle, args)
    }

    fn unchanged(&self, case: &str) -> Result {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.0.path())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        ensure_eq!(names, ["bin", "passwd"], "the host's directory, {case}");
        Ok(())
    }
}

/// Paths in the container that lead to a leaked descriptor, after [`link_to_leaks`].
const LEAKED: [&str; 8] = [
    "/proc/self/fd/8",
    "/proc/self/fd/40",
    "/proc/thread-self/fd/8",
    "/proc/self/task/../fd/8",
    "/dev/fd/8",
    "/tmp/eight",
    "/tmp/process/fd/8",
    "/tmp/bin/..",
];

fn link_to_leaks(bundle: &Bundle) -> Result {
    for (name, target) in [
        ("eight", "/proc/self/fd/8"),
        ("process", "../../proc/thread-self"),
        ("bin", "/proc/self/fd/40/bin"),
    ] {
        symlink(target, bundle.join("rootfs/tmp").join(name))?;
    }
    Ok(())
}

fn a_leaked_directory_is_neither_written_to_nor_executed_from() -> Result {
    let mut bundle = Bundle::new(&["echo", "executed"])?;
    let host = HostDirectory::new(&bundle)?;
    link_to_leaks(&bundle)?;
    let original = bundle.config.clone();
    for place in LEAKED {
        let mut cases = Vec::new();
        bundle.set("/process/cwd", json!(format!("{place}/new/deep")));
        cases.push((
            "working directory",
            std::mem::replace(&mut bundle.config, original.clone()),
        ));
        bundle.set("/process/args/0", json!(format!("{place}/bin/inside")));
        cases.push((
            "program",
            std::mem::replace(&mut bundle.config, original.clone()),
        ));
        bundle
            .set("/process/args/0", json!("inside"))
            .set("/process/env", json!([format!("PATH={place}/bin")]));
        cases.push((
            "PATH",
            std::mem::replace(&mut bundle.config, original.clone()),
        ));
        for (what, config) in cases {
            bundle.config = config;
            bundle.write_config()?;
            let case = format!("{what} in {place}");
            let output = host.leaked(&bundle, &["run", bundle.id()]).end()?;
            ensure!(output.code != 0, "run, {case}: {}", output.told());
            ensure_eq!(output.stdout, "", "output of run, {case}");
            // crun looks for the program only in `start`.
            let mut output = host.leaked(&bundle, &["create", bundle.id()]).end()?;
            if output.code == 0 {
                output = bundle.runtime(&["start", bundle.id()]).end()?;
            }
            ensure!(output.code != 0, "create, {case}: {}", output.told());
            bundle.end()?;
            host.unchanged(&case)?;
        }
        bundle.config = original.clone();
    }
    bundle.add(
        "/mounts",
        json!({ "destination": "/data", "type": "bind", "source": "/proc/self/fd/40", "options": ["rbind"] }),
    );
    bundle.write_config()?;
    let output = host.leaked(&bundle, &["run", bundle.id()]).end()?;
    ensure!(output.code != 0, "mount source: {}", output.told());
    Ok(())
}

fn a_leaked_directory_does_nothing_for_exec() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let host = HostDirectory::new(&bundle)?;
    link_to_leaks(&bundle)?;
    bundle.start()?;
    for place in LEAKED {
        let cwd = format!("{place}/new");
        let program = format!("{place}/bin/inside");
        let path = format!("PATH={place}/bin");
        let file = bundle.join("process.json");
        let mut process = bundle.config["process"].clone();
        process["cwd"] = json!(cwd);
        fs::write(&file, serde_json::to_vec(&process)?)?;
        let file = file.to_string_lossy();
        let cases: [&[&str]; 4] = [
            &[
                "--cwd",
                &cwd,
                bundle.id(),
                "/bin/inside",
                "echo",
                "executed",
            ],
            &["--process", &file, bundle.id()],
            &[bundle.id(), &program, "echo", "executed"],
            &["--env", &path, bundle.id(), "inside", "echo", "executed"],
        ];
        for case in cases {
            let args = [&["exec"], case].concat();
            let output = host.leaked(&bundle, &args).end()?;
            ensure!(output.code != 0, "{args:?}: {}", output.told());
            ensure_eq!(output.stdout, "", "output of {args:?}");
            host.unchanged(&format!("{args:?}"))?;
        }
    }
    bundle.end()?;
    Ok(())
}

fn a_users_home_is_not_read_from_a_leaked_file() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    let host = HostDirectory::new(&bundle)?;
    symlink("/proc/self/fd/8/passwd", bundle.join("rootfs/etc/passwd"))?;
    bundle
        .set("/process/env", json!(["PATH=/bin"]))
        .write_config()?;
    let report = host.leaked(&bundle, &["run", bundle.id()]).ok()?.json()?;
    ensure_eq!(report["env"]["HOME"], "/", "HOME");
    bundle.args(&["sleep", "600"]).start()?;
    let args = ["exec", bundle.id(), "/bin/inside", "report"];
    let report = host.leaked(&bundle, &args).ok()?.json()?;
    ensure_eq!(report["env"]["HOME"], "/", "HOME of exec");
    bundle.end()?;
    Ok(())
}

/// The container may have these descriptors and see these processes. But rrun has more rights than
/// the program, and must not make directories through them.
fn a_working_directory_is_not_made_through_a_process() -> Result {
    let mut bundle = Bundle::new(&["echo", "executed"])?;
    let host = HostDirectory::new(&bundle)?;
    let directory = host.0.path().to_string_lossy().into_owned();
    symlink("/proc/1/root", bundle.join("rootfs/tmp/root"))?;
    bundle.without_namespace("pid");
    for (redirections, flags, cwd) in [
        ("<DIR", &[][..], "/proc/self/fd/0/new".to_owned()),
        (
            "3<DIR",
            &["--preserve-fds", "1"],
            "/proc/self/fd/3/new".to_owned(),
        ),
        (
            "3<DIR",
            &["--preserve-fds", "1"],
            "/dev/fd/3/new".to_owned(),
        ),
        ("</dev/null", &[], format!("/proc/1/root{directory}/new")),
        ("</dev/null", &[], format!("/tmp/root{directory}/new")),
    ] {
        bundle.set("/process/cwd", json!(cwd)).write_config()?;
        let args = [&["run"], flags, &[bundle.id()]].concat();
        let output = host.open_in_caller(redirections, &bundle, &args).end()?;
        ensure!(output.code != 0, "{cwd}: {}", output.told());
        host.unchanged(&cwd)?;
    }
    // A directory that is missing in the image is still made, also through links of the image.
    symlink("../made", bundle.join("rootfs/tmp/link"))?;
    bundle
        .args(&["report"])
        .set("/process/cwd", json!("/tmp/link/a/../b/c"))
        .set("/root/readonly", json!(false));
    ensure_eq!(
        bundle.run()?.json()?["cwd"],
        "/made/b/c",
        "working directory"
    );
    Ok(())
}

fn a_preserved_descriptor_reaches_the_program_alone() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    let host = HostDirectory::new(&bundle)?;
    let numbers = |report: &Value| -> Vec<String> {
        let all = report["fds"].as_object();
        all.map(|all| all.keys().cloned().collect())
            .unwrap_or_default()
    };
    let redirections = "3<DIR 4<DIR/passwd 5<DIR 40<DIR";
    let flags = ["--preserve-fds", "2"];
    bundle.write_config()?;
    let args = ["run", flags[0], flags[1], bundle.id()];
    let report = host.open_in_caller(redirections, &bundle, &args).ok()?;
    ensure_eq!(numbers(&report.json()?), ["0", "1", "2", "3", "4"], "run");
    bundle.args(&["sleep", "600"]).start()?;
    let args = [
        "exec",
        flags[0],
        flags[1],
        bundle.id(),
        "/bin/inside",
        "report",
    ];
    let report = host.open_in_caller(redirections, &bundle, &args).ok()?;
    ensure_eq!(numbers(&report.json()?), ["0", "1", "2", "3", "4"], "exec");
    let output = host.open_in_caller("4<DIR", &bundle, &args).end()?;
    ensure!(
        output.stderr.contains("descriptor 3") && output.stderr.contains("not open"),
        "{}",
        output.told()
    );
    bundle.end()?;
    Ok(())
}

/// The targets of the links in /proc/PID/fd, without the standard three.
fn held_by(pid: i32) -> Result<Vec<String>> {
    let mut held = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        if !matches!(entry.file_name().to_str(), Some("0" | "1" | "2")) {
            held.push(fs::read_link(entry.path())?.to_string_lossy().into_owned());
        }
    }
    Ok(held)
}

fn a_created_process_holds_no_file_of_the_hosts() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let host = HostDirectory::new(&bundle)?;
    bundle
        .without_namespace("network")
        .add(
            "/linux/namespaces",
            json!({ "type": "network", "path": "/proc/self/ns/net" }),
        )
        .set(
            "/linux/seccomp",
            json!({ "defaultAction": "SCMP_ACT_ALLOW" }),
        );
    bundle.write_config()?;
    let log = bundle.join("rrun.log").to_string_lossy().into_owned();
    let args = ["--debug", "--log", &log, "create", bundle.id()];
    host.leaked(&bundle, &args).ok()?;
    // The process may hold a socket whose other end is closed, the socket to which `start` will
    // connect, and the shared page for reports.
    for link in held_by(bundle.pid()?)? {
        let own = link.starts_with("socket:") || link.starts_with("/memfd:rrun ");
        ensure!(own, "the process holds {link}");
    }
    bundle.runtime(&["start", bundle.id()]).ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn hooks_get_no_descriptor_of_the_callers() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let host = HostDirectory::new(&bundle)?;
    let list = bundle.join("list");
    let line = format!("ls -l /proc/self/fd >> {}", list.display());
    let kinds = ["createRuntime", "createContainer", "poststart", "poststop"];
    for kind in kinds {
        let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", line], "env": ["PATH=/bin:/usr/bin"] }]);
        bundle.set(&format!("/hooks/{kind}"), hook);
    }
    bundle.write_config()?;
    let redirections = "3<DIR 4<DIR 40<DIR";
    for args in [
        &["create", "--preserve-fds", "1", bundle.id()][..],
        &["start", bundle.id()],
    ] {
        host.open_in_caller(redirections, &bundle, args).ok()?;
    }
    bundle.wait_status("stopped")?;
    let args = ["delete", bundle.id()];
    host.open_in_caller(redirections, &bundle, &args).ok()?;
    let lists = fs::read_to_string(&list)?;
    ensure_eq!(
        lists.matches("total").count(),
        kinds.len(),
        "hooks: {lists}"
    );
    let directory = host.0.path().to_string_lossy();
    ensure!(
        !lists.contains(&*directory),
        "a hook was given {directory}:\n{lists}"
    );
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
