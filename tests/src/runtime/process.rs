//! Tests of the container's process: its user, its privileges, its open files and its terminals.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::terminal::{read_to_end, receive_terminal};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(the_pidfd_socket_receives_the_pidfd_of_the_process),
    test!(the_user_id_and_all_group_ids_are_set),
    test!(the_working_directory_is_set),
    test!(the_environment_is_exactly_the_configured_one),
    test!(the_last_of_two_environment_entries_for_one_variable_is_used),
    test!(the_runtime_refuses_invalid_environment_entries),
    test!(the_runtime_searches_for_the_program_in_the_containers_path),
    test!(the_capabilities_are_exactly_the_configured_ones),
    test!(unavailable_capabilities_are_ignored_and_logged),
    test!(a_user_other_than_root_has_no_capabilities),
    test!(a_user_other_than_root_gets_ambient_capabilities),
    test!(the_no_new_privs_attribute_is_the_configured_one),
    test!(rlimits_are_set),
    test!(sysctls_are_set),
    test!(oom_score_adj_is_set),
    test!(the_container_inherits_no_descriptors_of_the_runtime),
    test!(the_umask_is_set),
    test!(the_console_socket_receives_the_terminal),
    test!(exec_creates_a_separate_terminal),
    test!(run_works_on_the_callers_terminal),
    // This test is only for rrun, because runc requires a terminal of its caller.
    test!(
        a_terminals_output_has_plain_newlines_if_it_is_written_to_a_file,
        Need::Rrun
    ),
    // runc fails this test, because its Go runtime keeps other descriptors open.
    test!(a_created_container_has_no_cgroup_open, Need::Rrun),
];

fn the_user_id_and_all_group_ids_are_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set(
        "/process/user",
        json!({ "uid": 1000, "gid": 2000, "additionalGids": [3000, 4000] }),
    );
    let report = bundle.report()?;
    ensure_eq!(
        (&report["uid"], &report["gid"]),
        (&json!(1000), &json!(2000)),
        "the user id and group id of the process"
    );
    ensure_eq!(
        report["groups"],
        json!([3000, 4000]),
        "the additional groups of the process"
    );
    Ok(())
}

fn the_working_directory_is_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    ensure_eq!(
        bundle.set("/process/cwd", json!("/data")).report()?["cwd"],
        "/data",
        "the working directory"
    );
    // runc creates a missing working directory, and some images depend on this behaviour.
    bundle
        .set("/root/readonly", json!(false))
        .set("/process/cwd", json!("/made/for/it"));
    ensure_eq!(
        bundle.report()?["cwd"],
        "/made/for/it",
        "the working directory that the runtime created"
    );
    bundle
        .set("/root/readonly", json!(true))
        .set("/process/user/umask", json!(0o077))
        .set("/process/cwd", json!("/made/again"));
    let report = bundle.report()?;
    ensure_eq!(
        report["cwd"],
        "/made/again",
        "the working directory that the runtime created in a read-only root"
    );
    let made = std::fs::metadata(bundle.rootfs().join("made/again"))?;
    ensure_eq!(
        std::os::unix::fs::PermissionsExt::mode(&made.permissions()) & 0o7777,
        0o700,
        "the mode of the created directory"
    );
    Ok(())
}

fn the_environment_is_exactly_the_configured_one() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set(
        "/process/env",
        json!(["PATH=/bin", "A=b=c", "EMPTY=", "HOME=/data"]),
    );
    let report = bundle.report()?;
    ensure_eq!(
        report["env"],
        json!({ "PATH": "/bin", "A": "b=c", "EMPTY": "", "HOME": "/data" }),
        "the program's environment"
    );
    Ok(())
}

/// If two entries set the same variable, the last one must take effect. But getenv(3) returns the
/// first one, so the runtime must pass only the last one to the program. The test reads the
/// environment that the kernel passed to the program.
fn the_last_of_two_environment_entries_for_one_variable_is_used() -> Result {
    let environ = ["cat", "/proc/self/environ"];
    let mut bundle = Bundle::new(&environ)?;
    bundle.set(
        "/process/env",
        json!(["A=1", "PATH=/nowhere", "B=2", "A=3", "PATH=/bin", "HOME="]),
    );
    let entries = |text: &str| -> Vec<String> {
        let mut all: Vec<String> = text.split_terminator('\0').map(str::to_owned).collect();
        all.sort_unstable();
        all
    };
    ensure_eq!(
        entries(&bundle.run()?.stdout),
        ["A=3", "B=2", "HOME=/", "PATH=/bin"],
        "the environment of the first process"
    );
    bundle.args(&["sleep", "600"]).start()?;
    let output = bundle
        .exec(
            &["--env", "A=4", "--env", "PATH=/data", "--env", "HOME=/tmp"],
            &environ,
        )
        .ok()?;
    ensure_eq!(
        entries(&output.stdout),
        ["A=4", "B=2", "HOME=/tmp", "PATH=/data"],
        "the environment of the process that `exec` starts"
    );
    bundle.end()?;
    Ok(())
}

fn the_runtime_refuses_invalid_environment_entries() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    for (entry, words) in [("NAME", "="), ("", "="), ("=value", "name")] {
        bundle.set("/process/env", json!(["PATH=/bin", entry]));
        let refused = bundle.call(&["run"])?.exits(1)?;
        ensure!(
            refused.stderr.contains(words),
            "the error about the environment entry {entry:?} does not contain {words:?}:\n{}",
            refused.told()
        );
    }
    bundle.set("/process/env", json!(["PATH=/bin"]));
    bundle.args(&["sleep", "600"]).start()?;
    let refused = bundle.exec(&["--env", "NAME"], &["exit", "0"]).exits(255)?;
    ensure!(
        refused.stderr.contains("="),
        "the error about `--env NAME` does not mention the missing `=`:\n{}",
        refused.told()
    );
    bundle.end()?;
    Ok(())
}

fn the_runtime_searches_for_the_program_in_the_containers_path() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/args", json!(["inside", "echo", "found"]));
    ensure_eq!(bundle.run()?.text(), "found", "the program's output");
    Ok(())
}

fn capability_sets(report: &Value) -> Vec<(&'static str, u64)> {
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]
        .into_iter()
        .map(|set| {
            let text = report["status"][set].as_str().unwrap_or_default();
            (set, u64::from_str_radix(text, 16).unwrap_or(u64::MAX))
        })
        .collect()
}

/// The capabilities CAP_KILL, CAP_NET_BIND_SERVICE and CAP_AUDIT_WRITE, as a bit mask of their
/// numbers (capabilities(7)).
const DEFAULT: u64 = 1 << 5 | 1 << 10 | 1 << 29;

fn the_capabilities_are_exactly_the_configured_ones() -> Result {
    let report = Bundle::new(&[])?.report()?;
    ensure_eq!(
        capability_sets(&report),
        [
            ("CapInh", 0),
            ("CapPrm", DEFAULT),
            ("CapEff", DEFAULT),
            ("CapBnd", DEFAULT),
            ("CapAmb", 0)
        ],
        "the capability sets"
    );
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/capabilities", json!({}));
    let sets = capability_sets(&bundle.report()?);
    ensure!(
        sets.iter().all(|(_, set)| *set == 0),
        "the process has capabilities, although the configuration grants none; the capability sets: {sets:?}"
    );
    Ok(())
}

/// The specification (config.md, Linux Process) requires that the runtime logs unavailable
/// capabilities and does not fail.
fn unavailable_capabilities_are_ignored_and_logged() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    for set in ["bounding", "permitted", "effective"] {
        bundle.set(
            &format!("/process/capabilities/{set}"),
            json!(["CAP_FLY", "CAP_KILL"]),
        );
    }
    // CAP_KILL is not inheritable, so it cannot be ambient.
    bundle.set("/process/capabilities/ambient", json!(["CAP_KILL"]));
    let output = bundle.run()?;
    let kill = 1 << 5;
    ensure_eq!(
        capability_sets(&output.json()?),
        [
            ("CapInh", 0),
            ("CapPrm", kill),
            ("CapEff", kill),
            ("CapBnd", kill),
            ("CapAmb", 0)
        ],
        "the capability sets of the first process"
    );
    for word in ["level=warning", "CAP_FLY", "CAP_KILL"] {
        ensure!(
            output.stderr.contains(word),
            "the log of `run` does not contain {word}:\n{}",
            output.told()
        );
    }
    bundle.args(&["sleep", "600"]).start()?;
    let output = bundle.exec(&["--cap", "CAP_FLY"], &["report"]).ok()?;
    ensure_eq!(
        capability_sets(&output.json()?)[2],
        ("CapEff", kill),
        "the effective capability set of the process that `exec` starts"
    );
    ensure!(
        output.stderr.contains("CAP_FLY"),
        "`exec` does not log the unavailable capability CAP_FLY:\n{}",
        output.told()
    );
    bundle.end()?;
    Ok(())
}

fn a_user_other_than_root_has_no_capabilities() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    let sets = capability_sets(&bundle.report()?);
    ensure_eq!(
        (sets[1].1, sets[2].1),
        (0, 0),
        "the permitted and effective capability sets of a user other than root"
    );
    ensure_eq!(
        sets[3].1,
        DEFAULT,
        "the bounding capability set of a user other than root"
    );
    Ok(())
}

fn a_user_other_than_root_gets_ambient_capabilities() -> Result {
    let mut bundle = Bundle::new(&[])?;
    let one = json!(["CAP_NET_BIND_SERVICE"]);
    bundle.set("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    for set in [
        "bounding",
        "permitted",
        "inheritable",
        "effective",
        "ambient",
    ] {
        bundle.set(&format!("/process/capabilities/{set}"), one.clone());
    }
    let sets = capability_sets(&bundle.report()?);
    ensure!(
        sets.iter().all(|(_, set)| *set == 1 << 10),
        "not all capability sets contain exactly CAP_NET_BIND_SERVICE; the sets in hexadecimal: {sets:x?}"
    );
    Ok(())
}

fn the_no_new_privs_attribute_is_the_configured_one() -> Result {
    let mut bundle = Bundle::new(&[])?;
    ensure_eq!(
        bundle.report()?["status"]["NoNewPrivs"],
        "1",
        "the no_new_privs attribute of a process whose configuration sets noNewPrivileges to true"
    );
    bundle.set("/process/noNewPrivileges", json!(false));
    ensure_eq!(
        bundle.report()?["status"]["NoNewPrivs"],
        "0",
        "the no_new_privs attribute of a process whose configuration sets noNewPrivileges to false"
    );
    Ok(())
}

fn rlimits_are_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set(
        "/process/rlimits",
        json!([
            { "type": "RLIMIT_NOFILE", "soft": 512, "hard": 777 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        ]),
    );
    let report = bundle.report()?;
    ensure_eq!(
        report["limits"]["RLIMIT_NOFILE"],
        json!([512, 777]),
        "the soft and hard limits of RLIMIT_NOFILE"
    );
    ensure_eq!(
        report["limits"]["RLIMIT_CORE"],
        json!([0, 0]),
        "the soft and hard limits of RLIMIT_CORE"
    );
    Ok(())
}

fn sysctls_are_set() -> Result {
    let before = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward")?;
    let mut bundle = Bundle::new(&[
        "cat",
        "/proc/sys/kernel/shm_rmid_forced",
        "/proc/sys/net/ipv4/ip_default_ttl",
    ])?;
    bundle.set(
        "/linux/sysctl",
        json!({
            "kernel.shm_rmid_forced": "1", "net.ipv4.ip_default_ttl": "77",
        }),
    );
    ensure_eq!(
        bundle.run()?.text(),
        "1\n77",
        "the values of the sysctls in the container"
    );
    let after = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward")?;
    ensure_eq!(before, after, "the host's value of net.ipv4.ip_forward");
    Ok(())
}

fn oom_score_adj_is_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/oomScoreAdj", json!(500));
    ensure_eq!(
        bundle.report()?["oom_score_adj"],
        "500",
        "the oom_score_adj of the process"
    );
    // A Process object without the field gets the value of the container.
    bundle.args(&["sleep", "600"]).start()?;
    let mut process = bundle.config["process"].clone();
    process["args"] = json!(["/bin/inside", "report"]);
    if let Some(fields) = process.as_object_mut() {
        fields.remove("oomScoreAdj");
    }
    let file = bundle.join("process.json");
    fs::write(&file, process.to_string())?;
    let exec = bundle.runtime(&["exec", "--process"]);
    let report = exec.arg(&file).arg(bundle.id()).ok()?.json()?;
    ensure_eq!(
        report["oom_score_adj"],
        "500",
        "the oom_score_adj of a process that `exec --process` creates"
    );
    bundle.end()?;
    Ok(())
}

fn the_container_inherits_no_descriptors_of_the_runtime() -> Result {
    let report = Bundle::new(&[])?.report()?;
    let names: Vec<&String> = report["fds"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(n, _)| n)
        .collect();
    ensure_eq!(
        names,
        ["0", "1", "2"],
        "the open descriptors of the container's process (the files of the descriptors: {})",
        report["fds"]
    );
    Ok(())
}

/// An open cgroup directory in the process that waits for `start` would be dangerous
/// (CVE-2024-21626). Through its descriptor, the container's program could leave the container's
/// root file system.
fn a_created_container_has_no_cgroup_open() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    for entry in std::fs::read_dir(format!("/proc/{}/fd", bundle.pid()?))? {
        let target = std::fs::read_link(entry?.path())?;
        ensure!(
            !target.starts_with("/sys/fs/cgroup"),
            "the process that waits for `start` has the file {} of a cgroup open",
            target.display()
        );
    }
    bundle.end()?;
    Ok(())
}

fn the_umask_is_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/user/umask", json!(0o027));
    ensure_eq!(
        bundle.report()?["status"]["Umask"],
        "0027",
        "the umask of the process"
    );
    Ok(())
}

fn the_console_socket_receives_the_terminal() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    bundle.set("/process/terminal", json!(true));
    bundle.set(
        "/process/consoleSize",
        json!({ "height": 40, "width": 100 }),
    );
    let path = bundle.join("console");
    let listener = UnixListener::bind(&path)?;
    bundle
        .call(&["create", "--console-socket", &path.to_string_lossy()])?
        .ok()?;
    let terminal = receive_terminal(&listener)?;
    bundle.call(&["start"])?.ok()?;
    let text = read_to_end(terminal);
    ensure!(
        text.contains("\r\n"),
        "the output does not contain \\r\\n, with which a terminal ends lines; the output: {text:?}"
    );
    let report: Value = serde_json::from_str(text.trim())
        .map_err(|error| format!("cannot parse the report {text:?}: {error}"))?;
    ensure_eq!(
        report["tty"],
        json!([true, true, true]),
        "whether stdin, stdout and stderr are terminals"
    );
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn exec_creates_a_separate_terminal() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let path = bundle.join("console");
    let listener = UnixListener::bind(&path)?;
    bundle
        .exec(
            &[
                "--tty",
                "--detach",
                "--console-socket",
                &path.to_string_lossy(),
            ],
            &["cat"],
        )
        .ok()?;
    let mut terminal = receive_terminal(&listener)?;
    // The input is a line, followed by the end-of-input character (Ctrl-D).
    terminal.write_all(b"hello\n\x04")?;
    let text = read_to_end(terminal);
    ensure_eq!(
        text.matches("hello").count(),
        2,
        "the number of times that the terminal's output contains `hello` (the terminal echoes the input, and cat prints it; the output: {text:?})"
    );
    bundle.end()?;
    Ok(())
}

fn run_works_on_the_callers_terminal() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    bundle.set("/process/terminal", json!(true));
    bundle.write_config()?;
    let pair = nix::pty::openpty(None, None)?;
    let master = std::fs::File::from(pair.master);
    let mut runtime = std::process::Command::new(runtime_program())
        .arg("--root")
        .arg(bundle.root())
        .args(["run", bundle.id()])
        .current_dir(bundle.path())
        .stdin(pair.slave.try_clone()?)
        .stdout(pair.slave.try_clone()?)
        .stderr(pair.slave)
        .spawn()?;
    let reader = std::thread::spawn(move || read_to_end(master));
    let status = wait_for("`run` on a terminal to exit", || Ok(runtime.try_wait()?));
    if status.is_err() {
        runtime.kill()?;
        runtime.wait()?;
    }
    let text = reader
        .join()
        .map_err(|_| "the thread that reads the terminal panicked")?;
    ensure!(
        status.is_ok_and(|status| status.success()),
        "`run` failed; the terminal's output: {text}"
    );
    // Only the caller's terminal must convert \n to \r\n. If the container's terminal also
    // converted newlines, the lines would end with \r\r\n.
    ensure!(
        text.contains("\r\n") && !text.contains("\r\r\n"),
        "the lines of the terminal's output do not end with exactly one \\r\\n; the output: {text:?}"
    );
    let report: Value = serde_json::from_str(text.trim())
        .map_err(|error| format!("cannot parse the report {text:?}: {error}"))?;
    ensure_eq!(
        report["tty"],
        json!([true, true, true]),
        "whether stdin, stdout and stderr are terminals"
    );
    Ok(())
}

fn the_pidfd_socket_receives_the_pidfd_of_the_process() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let path = bundle.join("pidfd.sock");
    let listener = UnixListener::bind(&path)?;
    let option = format!("--pidfd-socket={}", path.display());
    let pid_of = |listener: &UnixListener| -> Result<i32> {
        let descriptor = receive_terminal(listener)?;
        let info = format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd());
        let info = std::fs::read_to_string(info)?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
        Ok(pid
            .ok_or("the received descriptor is not a pidfd")?
            .trim()
            .parse()?)
    };
    bundle.call(&["run", "--detach", &option])?.ok()?;
    ensure_eq!(
        pid_of(&listener)?,
        bundle.pid()?,
        "the id of the process to which the pidfd received from `run` refers"
    );
    let pid_file = bundle.join("exec.pid");
    let options = [
        &option,
        "--detach",
        "--pid-file",
        &pid_file.display().to_string(),
    ];
    bundle.exec(&options, &["sleep", "600"]).ok()?;
    let pid: i32 = std::fs::read_to_string(pid_file)?.trim().parse()?;
    ensure_eq!(
        pid_of(&listener)?,
        pid,
        "the id of the process to which the pidfd received from `exec` refers"
    );
    bundle.end()?;
    Ok(())
}

fn a_terminals_output_has_plain_newlines_if_it_is_written_to_a_file() -> Result {
    let mut bundle = Bundle::new(&["echo", "hello"])?;
    bundle.set("/process/terminal", json!(true));
    ensure_eq!(bundle.run()?.stdout, "hello\n", "the output of `run`");
    bundle.set("/process/terminal", json!(false));
    bundle.args(&["sleep", "600"]).start()?;
    let output = bundle.exec(&["--tty"], &["echo", "hello"]).ok()?;
    ensure_eq!(output.stdout, "hello\n", "the output of `exec --tty`");
    bundle.end()?;
    Ok(())
}
