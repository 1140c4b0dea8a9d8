//! Tests of published container escapes through the processes that the runtime starts in a
//! container. The attacks use the open files, the executable or the privileges of these processes.
//! Each test runs a published attack without changes, and checks that the attack fails.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{
    Directory, Output, Result, Run, command, note, program_path, wait_for,
};
use crate::support::needs::{Need, Test};
use crate::support::secret::Secret;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(cve_2024_21626_a_leaked_descriptor_is_refused_as_working_directory),
    test!(cve_2024_21626_the_container_inherits_no_descriptor_of_the_runtimes_caller),
    test!(the_runtime_neither_writes_to_nor_executes_from_a_leaked_directory),
    test!(exec_does_not_use_a_leaked_directory),
    test!(
        the_runtime_does_not_read_a_users_home_from_a_leaked_file,
        Need::Rrun
    ),
    test!(
        the_runtime_creates_no_working_directory_through_a_descriptor_or_process,
        Need::Rrun
    ),
    test!(only_the_program_receives_a_preserved_descriptor, Need::Rrun),
    test!(
        a_process_that_waits_for_start_has_no_host_file_open,
        Need::Rrun
    ),
    test!(
        hooks_inherit_no_descriptor_of_the_runtimes_caller,
        Need::Rrun
    ),
    test!(
        cve_2019_5736_a_container_can_not_overwrite_the_runtimes_executable,
        Need::Rrun
    ),
    test!(cve_2016_9962_a_container_can_not_inspect_a_process_that_enters_it),
    test!(
        a_container_sees_no_process_of_exec_in_the_hosts_namespaces,
        Need::Rrun
    ),
    test!(a_container_sees_no_process_of_create_in_the_hosts_network),
    test!(cve_2022_29162_no_capability_is_inheritable),
];

/// Returns a call of the runtime, as `bundle.runtime` does. In this call, the runtime inherits
/// descriptor 9, which refers to the host's directory `/`.
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

fn cve_2024_21626_a_leaked_descriptor_is_refused_as_working_directory() -> Result {
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
        ensure!(
            output.code != 0,
            "`run` accepts {place} as the working directory:\n{}",
            output.told()
        );
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
        ensure!(
            output.code != 0,
            "`exec` accepts {place} as the working directory:\n{}",
            output.told()
        );
    }
    bundle.end()?;
    Ok(())
}

fn cve_2024_21626_the_container_inherits_no_descriptor_of_the_runtimes_caller() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    bundle.write_config()?;
    let report = leaking(&bundle, &["run", bundle.id()]).ok()?.json()?;
    let only_standard = |report: &Value| -> Result {
        let all: Vec<String> = report["fds"]
            .as_object()
            .map(|all| all.keys().cloned().collect())
            .unwrap_or_default();
        ensure_eq!(
            all,
            ["0", "1", "2"],
            "the open descriptors of the container's process"
        );
        Ok(())
    };
    only_standard(&report)?;
    bundle.args(&["sleep", "600"]).start()?;
    let args = ["exec", bundle.id(), "/bin/inside", "report"];
    only_standard(&leaking(&bundle, &args).ok()?.json()?)?;
    bundle.end()?;
    Ok(())
}

/// A directory on the host that contains a copy of the program `inside`.
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

    /// Returns a call of the runtime, as `bundle.runtime` does. In this call, the runtime inherits
    /// the descriptors that the shell redirections in `redirections` open. The function replaces
    /// `DIR` in a redirection with the path of the host directory.
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

    fn unchanged(&self, attack: &str) -> Result {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.0.path())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        ensure_eq!(
            names,
            ["bin", "passwd"],
            "the file names in the leaked directory of the host after the attack with {attack}"
        );
        Ok(())
    }
}

/// Paths in the container that lead to a leaked descriptor. The paths in /tmp use the links that
/// [`link_to_leaks`] creates.
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

fn the_runtime_neither_writes_to_nor_executes_from_a_leaked_directory() -> Result {
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
            "variable PATH",
            std::mem::replace(&mut bundle.config, original.clone()),
        ));
        for (field, config) in cases {
            bundle.config = config;
            bundle.write_config()?;
            let case = format!("a {field} in the leaked directory {place}");
            let output = host.leaked(&bundle, &["run", bundle.id()]).end()?;
            ensure!(output.code != 0, "`run` accepts {case}:\n{}", output.told());
            ensure_eq!(
                output.stdout,
                "",
                "the standard output of `run` with {case}"
            );
            // crun searches for the program only in `start`, so `create` can succeed.
            let mut output = host.leaked(&bundle, &["create", bundle.id()]).end()?;
            if output.code == 0 {
                output = bundle.runtime(&["start", bundle.id()]).end()?;
            }
            ensure!(
                output.code != 0,
                "`create` and `start` accept {case}:\n{}",
                output.told()
            );
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
    ensure!(
        output.code != 0,
        "`run` accepts a leaked descriptor as the source of a mount:\n{}",
        output.told()
    );
    Ok(())
}

fn exec_does_not_use_a_leaked_directory() -> Result {
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
            ensure!(
                output.code != 0,
                "the call of the runtime with the arguments {args:?} does not fail:\n{}",
                output.told()
            );
            ensure_eq!(
                output.stdout,
                "",
                "the standard output of the runtime with the arguments {args:?}"
            );
            host.unchanged(&format!("the arguments {args:?}"))?;
        }
    }
    bundle.end()?;
    Ok(())
}

fn the_runtime_does_not_read_a_users_home_from_a_leaked_file() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    let host = HostDirectory::new(&bundle)?;
    symlink("/proc/self/fd/8/passwd", bundle.join("rootfs/etc/passwd"))?;
    bundle
        .set("/process/env", json!(["PATH=/bin"]))
        .write_config()?;
    let report = host.leaked(&bundle, &["run", bundle.id()]).ok()?.json()?;
    ensure_eq!(
        report["env"]["HOME"],
        "/",
        "the variable HOME of the first process"
    );
    bundle.args(&["sleep", "600"]).start()?;
    let args = ["exec", bundle.id(), "/bin/inside", "report"];
    let report = host.leaked(&bundle, &args).ok()?.json()?;
    ensure_eq!(
        report["env"]["HOME"],
        "/",
        "the variable HOME of the process that `exec` starts"
    );
    bundle.end()?;
    Ok(())
}

/// In this test, the runtime's caller allows the container to inherit descriptors and to see the
/// host's processes. But rrun has more privileges than the container's program. Therefore, rrun
/// must not create the working directory through a descriptor or through a process in /proc.
fn the_runtime_creates_no_working_directory_through_a_descriptor_or_process() -> Result {
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
        ensure!(
            output.code != 0,
            "`run` accepts {cwd} as the working directory:\n{}",
            output.told()
        );
        host.unchanged(&cwd)?;
    }
    // The runtime still creates a missing working directory. The path can contain symbolic links in
    // the image.
    symlink("../made", bundle.join("rootfs/tmp/link"))?;
    bundle
        .args(&["report"])
        .set("/process/cwd", json!("/tmp/link/a/../b/c"))
        .set("/root/readonly", json!(false));
    ensure_eq!(
        bundle.run()?.json()?["cwd"],
        "/made/b/c",
        "the working directory that the runtime created"
    );
    Ok(())
}

fn only_the_program_receives_a_preserved_descriptor() -> Result {
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
    ensure_eq!(
        numbers(&report.json()?),
        ["0", "1", "2", "3", "4"],
        "the open descriptors of the process that `run` starts"
    );
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
    ensure_eq!(
        numbers(&report.json()?),
        ["0", "1", "2", "3", "4"],
        "the open descriptors of the process that `exec` starts"
    );
    let output = host.open_in_caller("4<DIR", &bundle, &args).end()?;
    ensure!(
        output.stderr.contains("descriptor 3") && output.stderr.contains("not open"),
        "the error of `exec` does not report that descriptor 3 is not open:\n{}",
        output.told()
    );
    bundle.end()?;
    Ok(())
}

/// Returns the targets of the links in /proc/PID/fd, except those of stdin, stdout and stderr.
fn open_files_of(pid: i32) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        if !matches!(entry.file_name().to_str(), Some("0" | "1" | "2")) {
            files.push(fs::read_link(entry.path())?.to_string_lossy().into_owned());
        }
    }
    Ok(files)
}

fn a_process_that_waits_for_start_has_no_host_file_open() -> Result {
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
    // The process can have three files open. These files are the socket for `start`, another socket
    // without a peer, and the shared memory page for the process's reports.
    for link in open_files_of(bundle.pid()?)? {
        let own = link.starts_with("socket:") || link.starts_with("/memfd:rrun ");
        ensure!(
            own,
            "the process that waits for `start` has the file {link} open"
        );
    }
    bundle.runtime(&["start", bundle.id()]).ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn hooks_inherit_no_descriptor_of_the_runtimes_caller() -> Result {
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
        "the number of hooks that wrote a list of their descriptors (all lists: {lists})"
    );
    let directory = host.0.path().to_string_lossy();
    ensure!(
        !lists.contains(&*directory),
        "a hook has inherited the directory {directory} that the runtime's caller had open; the hooks' lists of descriptors:\n{lists}"
    );
    Ok(())
}

fn cve_2019_5736_a_container_can_not_overwrite_the_runtimes_executable() -> Result {
    // The attack targets a copy of the runtime. Therefore, a successful attack does not destroy the
    // installed runtime.
    let copies = Directory::new("runtime")?;
    let copy = copies.join("rrun");
    let original =
        program_path(&runtime_program()).ok_or("the runtime under test is not in PATH")?;
    fs::copy(&original, &copy)?;
    let copy = copy.to_string_lossy().into_owned();

    let mut bundle = Bundle::new(&["attack", "overwrite", "6"])?;
    bundle.set("/root/readonly", json!(false));
    fs::write(bundle.join("rootfs/bin/script"), "#!/proc/self/exe\n")?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bundle.join("rootfs/bin/script"), mode)?;
    symlink("/proc/self/exe", bundle.join("rootfs/bin/link"))?;
    let mut attacker = bundle.run_in_background()?;
    wait_for("the attacker to start", || {
        Ok(attacker.stdout().contains("ready").then_some(()))
    })?;
    for program in ["/bin/script", "/bin/link", "/proc/self/exe"] {
        for _ in 0..10 {
            // `exec` tries to execute rrun itself in the container. The result of `exec` does not
            // matter.
            let root = bundle.root();
            let root = root.to_string_lossy();
            let args = ["--root", &*root, "exec", bundle.id(), program, "list"];
            command(&copy, args).end()?;
        }
        // The attack must not prevent other programs from executing the runtime. If the container
        // could open the executable's inode, each attempt to write would briefly make the
        // executable busy. About one in fifty executions of the runtime would then fail with
        // ETXTBSY.
        for _ in 0..100 {
            command(&copy, ["--version"]).ok()?;
        }
    }
    let output = attacker.end()?;
    ensure!(
        !output.stdout.contains("overwrote"),
        "the attack overwrote the runtime's executable:\n{}",
        output.told()
    );
    ensure!(
        output.stdout.contains("done"),
        "the attacker exited before the attack was complete:\n{}",
        output.told()
    );
    ensure!(
        fs::read(&copy)? == fs::read(&original)?,
        "the runtime's executable has changed"
    );
    note(format!(
        "CVE-2019-5736: the output of the attacker: {}",
        output.stdout.replace('\n', "; ")
    ));

    // The test repeats the attack with the runtime as the container's first process.
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
            "the runtime's executable has changed"
        );
    }
    Ok(())
}

/// Runs the attack in a container, and adds processes to the container until the attack is complete.
/// Returns the output of the attacker.
fn attack_on_execs(attack: &str) -> Result<Output> {
    attack_during(attack, |bundle| {
        bundle.exec(&[], &["exit", "0"]).ok()?;
        // The test repeats `exec` until the container exits. The last `exec` then fails.
        while bundle.exec(&[], &["exit", "0"]).end()?.code == 0 {}
        Ok(())
    })
}

/// Runs the attack in a container, and calls `during` after the attack has started. Returns the output
/// of the attacker.
fn attack_during(attack: &str, during: impl FnOnce(&Bundle) -> Result) -> Result<Output> {
    let bundle = Bundle::new(&["attack", attack, "4"])?;
    let mut attacker = bundle.run_in_background()?;
    wait_for("the attacker to start", || {
        Ok(attacker.stdout().contains("ready").then_some(()))
    })?;
    during(&bundle)?;
    let output = attacker.end()?;
    ensure!(
        output.stdout.contains("done"),
        "the attacker exited before the attack was complete:\n{}",
        output.told()
    );
    Ok(output)
}

fn cve_2016_9962_a_container_can_not_inspect_a_process_that_enters_it() -> Result {
    let output = attack_on_execs("pry")?;
    for (line, object) in [
        ("followed the link to the executable", "the executable"),
        ("opened the memory", "the memory"),
    ] {
        ensure!(
            !output.stdout.contains(line),
            "the attacker accessed {object} of a process that entered the container:\n{}",
            output.told()
        );
    }
    Ok(())
}

/// Through a process of `exec` that is still in the host's namespaces, a container could read and
/// change the host's network.
fn a_container_sees_no_process_of_exec_in_the_hosts_namespaces() -> Result {
    let output = attack_on_execs("peek")?;
    ensure!(
        !output.stdout.contains("another namespace"),
        "a process of `exec` showed another namespace:\n{}",
        output.told()
    );
    Ok(())
}

/// Through the first process of a container that is still in the host's network namespace, another
/// container with the same PID namespace could read and change the host's network.
fn a_container_sees_no_process_of_create_in_the_hosts_network() -> Result {
    let output = attack_during("peek-network", |attacker| {
        let pid = attacker.pid()?;
        let mut bundle = Bundle::new(&["exit", "0"])?;
        for (kind, file) in [("pid", "pid"), ("network", "net"), ("ipc", "ipc")] {
            bundle.without_namespace(kind);
            let path = format!("/proc/{pid}/ns/{file}");
            bundle.add("/linux/namespaces", json!({ "type": kind, "path": path }));
        }
        bundle.run()?;
        // The test repeats `run` until the attacker exits. The last `run` then fails.
        while bundle.call(&["run"])?.end()?.code == 0 {}
        Ok(())
    })?;
    ensure!(
        !output.stdout.contains("another namespace"),
        "a process of `run` showed another network namespace:\n{}",
        output.told()
    );
    Ok(())
}

fn cve_2022_29162_no_capability_is_inheritable() -> Result {
    let mut bundle = Bundle::new(&[])?;
    let empty = "0000000000000000";
    ensure_eq!(
        bundle.report()?["status"]["CapInh"],
        empty,
        "the inheritable capabilities of the process that `run` starts"
    );
    bundle.args(&["sleep", "600"]).start()?;
    let cases: [&[&str]; 3] = [&[], &["--cap", "CAP_NET_ADMIN"], &["--user", "1000"]];
    for options in cases {
        let report = bundle.exec(options, &["report"]).ok()?.json()?;
        ensure_eq!(
            report["status"]["CapInh"],
            empty,
            "the inheritable capabilities of the process that `exec` starts with the options {options:?}"
        );
    }
    bundle.end()?;
    Ok(())
}
