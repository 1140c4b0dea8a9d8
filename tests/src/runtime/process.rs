//! The container's process: who it is, what it may, what it holds; terminals.

use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_callers_socket_is_sent_the_processs_descriptor),
    test!(user_group_and_additional_groups_are_set),
    test!(the_working_directory_is_set),
    test!(the_environment_is_what_was_asked_for),
    test!(of_a_variable_that_is_there_twice_the_last_counts),
    test!(what_is_no_variable_is_refused),
    test!(the_program_is_searched_in_the_containers_path),
    test!(capabilities_are_exactly_those_asked_for),
    test!(capabilities_that_can_not_be_had_are_left_out_and_told),
    test!(no_capabilities_are_left_to_a_user),
    test!(ambient_capabilities_reach_a_user),
    test!(no_new_privileges_is_set_and_not_set),
    test!(rlimits_are_set),
    test!(sysctls_are_set),
    test!(oom_score_adj_is_set),
    test!(no_descriptor_leaks_in),
    test!(the_umask_is_set),
    test!(a_terminal_arrives_at_the_console_socket),
    test!(exec_brings_a_terminal_of_its_own),
    test!(run_works_on_its_own_terminal),
    // runc wants a terminal of its own to run one.
    test!(a_terminals_lines_end_as_those_of_a_file, Need::Rrun),
    // runc's Go keeps descriptors of other kinds.
    test!(who_waits_to_be_started_holds_no_cgroup, Need::Rrun),
];

fn user_group_and_additional_groups_are_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set(
        "/process/user",
        json!({ "uid": 1000, "gid": 2000, "additionalGids": [3000, 4000] }),
    );
    let report = bundle.report()?;
    ensure_eq!(
        (&report["uid"], &report["gid"]),
        (&json!(1000), &json!(2000)),
        "user and group"
    );
    ensure_eq!(report["groups"], json!([3000, 4000]), "additional groups");
    Ok(())
}

fn the_working_directory_is_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    ensure_eq!(
        bundle.set("/process/cwd", json!("/data")).report()?["cwd"],
        "/data",
        "directory"
    );
    // runc makes one that is not there, and images count on it.
    bundle
        .set("/root/readonly", json!(false))
        .set("/process/cwd", json!("/made/for/it"));
    ensure_eq!(
        bundle.report()?["cwd"],
        "/made/for/it",
        "directory that was made"
    );
    Ok(())
}

fn the_environment_is_what_was_asked_for() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set(
        "/process/env",
        json!(["PATH=/bin", "A=b=c", "EMPTY=", "HOME=/data"]),
    );
    let report = bundle.report()?;
    ensure_eq!(
        report["env"],
        json!({ "PATH": "/bin", "A": "b=c", "EMPTY": "", "HOME": "/data" }),
        "environment"
    );
    Ok(())
}

/// The environment as the kernel handed it to the program, which of two entries takes the first.
fn of_a_variable_that_is_there_twice_the_last_counts() -> Result {
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
        "environment of run"
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
        "environment of exec"
    );
    bundle.end()?;
    Ok(())
}

fn what_is_no_variable_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    for (entry, words) in [("NAME", "="), ("", "="), ("=value", "name")] {
        bundle.set("/process/env", json!(["PATH=/bin", entry]));
        let refused = bundle.call(&["run"])?.exits(1)?;
        ensure!(refused.stderr.contains(words), "{}", refused.told());
    }
    bundle.set("/process/env", json!(["PATH=/bin"]));
    bundle.args(&["sleep", "600"]).start()?;
    let refused = bundle.exec(&["--env", "NAME"], &["exit", "0"]).exits(255)?;
    ensure!(refused.stderr.contains("="), "{}", refused.told());
    bundle.end()?;
    Ok(())
}

fn the_program_is_searched_in_the_containers_path() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/args", json!(["inside", "echo", "found"]));
    ensure_eq!(bundle.run()?.text(), "found", "output");
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

/// capabilities(7): the numbers of CAP_KILL, CAP_NET_BIND_SERVICE and CAP_AUDIT_WRITE.
const DEFAULT: u64 = 1 << 5 | 1 << 10 | 1 << 29;

fn capabilities_are_exactly_those_asked_for() -> Result {
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
        "capability sets"
    );
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/capabilities", json!({}));
    let sets = capability_sets(&bundle.report()?);
    ensure!(
        sets.iter().all(|(_, set)| *set == 0),
        "with none asked for there are {sets:?}"
    );
    Ok(())
}

/// The specification (config.md, Linux Process) has it so: told, but no failure.
fn capabilities_that_can_not_be_had_are_left_out_and_told() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    for set in ["bounding", "permitted", "effective"] {
        bundle.set(
            &format!("/process/capabilities/{set}"),
            json!(["CAP_FLY", "CAP_KILL"]),
        );
    }
    // Not inheritable, so it can not be ambient.
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
        "capability sets"
    );
    for word in ["level=warning", "CAP_FLY", "CAP_KILL"] {
        ensure!(output.stderr.contains(word), "{}", output.told());
    }
    bundle.args(&["sleep", "600"]).start()?;
    let output = bundle.exec(&["--cap", "CAP_FLY"], &["report"]).ok()?;
    ensure_eq!(
        capability_sets(&output.json()?)[2],
        ("CapEff", kill),
        "exec"
    );
    ensure!(output.stderr.contains("CAP_FLY"), "{}", output.told());
    bundle.end()?;
    Ok(())
}

fn no_capabilities_are_left_to_a_user() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    let sets = capability_sets(&bundle.report()?);
    ensure_eq!(
        (sets[1].1, sets[2].1),
        (0, 0),
        "permitted and effective of a user"
    );
    ensure_eq!(sets[3].1, DEFAULT, "bounding set of a user");
    Ok(())
}

fn ambient_capabilities_reach_a_user() -> Result {
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
        "capability sets are {sets:x?}"
    );
    Ok(())
}

fn no_new_privileges_is_set_and_not_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    ensure_eq!(
        bundle.report()?["status"]["NoNewPrivs"],
        "1",
        "no_new_privs"
    );
    bundle.set("/process/noNewPrivileges", json!(false));
    ensure_eq!(
        bundle.report()?["status"]["NoNewPrivs"],
        "0",
        "no_new_privs"
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
        "RLIMIT_NOFILE"
    );
    ensure_eq!(
        report["limits"]["RLIMIT_CORE"],
        json!([0, 0]),
        "RLIMIT_CORE"
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
    ensure_eq!(bundle.run()?.text(), "1\n77", "the sysctls inside");
    let after = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward")?;
    ensure_eq!(before, after, "the host's own");
    Ok(())
}

fn oom_score_adj_is_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/oomScoreAdj", json!(500));
    ensure_eq!(bundle.report()?["oom_score_adj"], "500", "oom_score_adj");
    Ok(())
}

fn no_descriptor_leaks_in() -> Result {
    let report = Bundle::new(&[])?.report()?;
    let names: Vec<&String> = report["fds"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(n, _)| n)
        .collect();
    ensure_eq!(names, ["0", "1", "2"], "descriptors ({})", report["fds"]);
    Ok(())
}

/// Through it the container's files could be left, if anything of the container's were run in
/// that process (CVE-2024-21626).
fn who_waits_to_be_started_holds_no_cgroup() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    for entry in std::fs::read_dir(format!("/proc/{}/fd", bundle.pid()?))? {
        let held = std::fs::read_link(entry?.path())?;
        ensure!(
            !held.starts_with("/sys/fs/cgroup"),
            "{} is open",
            held.display()
        );
    }
    bundle.end()?;
    Ok(())
}

fn the_umask_is_set() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/process/user/umask", json!(0o027));
    ensure_eq!(bundle.report()?["status"]["Umask"], "0027", "umask");
    Ok(())
}

/// What a console socket was sent: the terminal's master.
fn receive_terminal(listener: &UnixListener) -> Result<std::fs::File> {
    listener.set_nonblocking(true)?;
    let stream = wait_for("a connection to the console socket", || {
        match listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    })?;
    let mut name = [0u8; 4096];
    let mut room = nix::cmsg_space!(std::os::fd::RawFd);
    let mut io = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut io,
        Some(&mut room),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .map_err(|errno| format!("recvmsg on the console socket: {errno}"))?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part
            && let Some(descriptor) = descriptors.first()
        {
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
            return Ok(std::fs::File::from(unsafe {
                OwnedFd::from_raw_fd(*descriptor)
            }));
        }
    }
    Err("the console socket was sent no descriptor".into())
}

/// Reads from a terminal until its other side is closed (EIO).
fn read_to_end(mut terminal: std::fs::File) -> String {
    let mut all = Vec::new();
    let mut part = [0u8; 4096];
    while let Ok(length @ 1..) = terminal.read(&mut part) {
        all.extend_from_slice(part.get(..length).unwrap_or_default());
    }
    String::from_utf8_lossy(&all).into_owned()
}

fn a_terminal_arrives_at_the_console_socket() -> Result {
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
    ensure!(text.contains("\r\n"), "no terminal's line ends in {text:?}");
    let report: Value =
        serde_json::from_str(text.trim()).map_err(|error| format!("{error}: {text:?}"))?;
    ensure_eq!(
        report["tty"],
        json!([true, true, true]),
        "descriptors that are a terminal"
    );
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn exec_brings_a_terminal_of_its_own() -> Result {
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
    // A line and the end of input.
    terminal.write_all(b"hello\n\x04")?;
    let text = read_to_end(terminal);
    ensure_eq!(
        text.matches("hello").count(),
        2,
        "hellos, echoed and given back, in {text:?}"
    );
    bundle.end()?;
    Ok(())
}

fn run_works_on_its_own_terminal() -> Result {
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
    let status = wait_for("run on a terminal to end", || Ok(runtime.try_wait()?));
    if status.is_err() {
        runtime.kill()?;
        runtime.wait()?;
    }
    let text = reader.join().map_err(|_| "the terminal's reader broke")?;
    ensure!(
        status.is_ok_and(|status| status.success()),
        "run failed: {text}"
    );
    // By the caller's terminal alone.
    ensure!(
        text.contains("\r\n") && !text.contains("\r\r\n"),
        "lines end as in {text:?}"
    );
    let report: Value =
        serde_json::from_str(text.trim()).map_err(|error| format!("{error}: {text:?}"))?;
    ensure_eq!(
        report["tty"],
        json!([true, true, true]),
        "descriptors that are a terminal"
    );
    Ok(())
}

fn a_callers_socket_is_sent_the_processs_descriptor() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let path = bundle.join("pidfd.sock");
    let listener = UnixListener::bind(&path)?;
    let option = format!("--pidfd-socket={}", path.display());
    let pid_of = |listener: &UnixListener| -> Result<i32> {
        let descriptor = receive_terminal(listener)?;
        let info = format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd());
        let info = std::fs::read_to_string(info)?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
        Ok(pid.ok_or("no pidfd was sent")?.trim().parse()?)
    };
    bundle.call(&["run", "--detach", &option])?.ok()?;
    ensure_eq!(pid_of(&listener)?, bundle.pid()?, "the first process");
    let pid_file = bundle.join("exec.pid");
    let options = [
        &option,
        "--detach",
        "--pid-file",
        &pid_file.display().to_string(),
    ];
    bundle.exec(&options, &["sleep", "600"]).ok()?;
    let pid: i32 = std::fs::read_to_string(pid_file)?.trim().parse()?;
    ensure_eq!(pid_of(&listener)?, pid, "a further process");
    bundle.end()?;
    Ok(())
}

fn a_terminals_lines_end_as_those_of_a_file() -> Result {
    let mut bundle = Bundle::new(&["echo", "hello"])?;
    bundle.set("/process/terminal", json!(true));
    ensure_eq!(bundle.run()?.stdout, "hello\n", "what came through");
    bundle.set("/process/terminal", json!(false));
    bundle.args(&["sleep", "600"]).start()?;
    let output = bundle.exec(&["--tty"], &["echo", "hello"]).ok()?;
    ensure_eq!(output.stdout, "hello\n", "what came through exec");
    bundle.end()?;
    Ok(())
}
