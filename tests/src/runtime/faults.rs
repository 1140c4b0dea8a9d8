//! Tests that let each system call of a command fail once. After each failure, the command must
//! report one error sentence, or must have the same effect as without the failure. A success is
//! therefore never a container with fewer protections. After each run, `delete --force` must remove
//! everything that the command has created.
//!
//! If RRUN_TEST_FULL is set, the tests try every system call with every likely error. Otherwise, the
//! tests try a sample, which is different every day.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::errno::Errno;
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::errnos;
use crate::support::fault_runs::{Subject, is_one_of, not_created, reported, words};
use crate::support::inject::{Call, Fault};
use crate::support::machine::{Result, command};
use crate::support::needs::{Need, Test};
use crate::support::observed;
use crate::support::terminal::{read_to_end, receive_terminal};
use crate::test;

pub(crate) const TESTS: &[Test] = &[
    test!(create_and_start_report_each_error, Need::Rrun),
    test!(a_created_container_has_all_its_protections, Need::Rrun),
    test!(
        a_created_container_has_all_its_limits,
        Need::Controller("memory"),
        Need::Controller("cpu"),
        Need::Controller("pids"),
        Need::Rrun
    ),
    test!(create_in_existing_namespaces_reports_each_error, Need::Rrun),
    test!(create_without_root_reports_each_error, Need::Rrun),
    test!(create_with_a_seccomp_agent_reports_each_error, Need::Rrun),
    test!(
        create_by_systemd_reports_each_error,
        Need::Systemd,
        Need::Rrun
    ),
    test!(run_reports_each_error, Need::Rrun),
    test!(run_with_a_terminal_reports_each_error, Need::Rrun),
    test!(exec_reports_each_error, Need::Rrun),
    test!(
        exec_with_a_terminal_in_a_user_namespace_reports_each_error,
        Need::Rrun
    ),
];

/// The id of the user www-data, which exists on every Debian system.
const USER: u32 = 33;

/// Returns a bundle with all protections that every machine supports. Its program reports the
/// protections.
fn protected_bundle() -> Result<Bundle> {
    let mut bundle = Bundle::new(&["report"])?;
    let data = bundle.join("host-data");
    fs::create_dir(&data)?;
    fs::create_dir(bundle.rootfs().join("etc/directory"))?;
    fs::write(bundle.rootfs().join("etc/directory/file"), "a file\n")?;
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    for set in [
        "bounding",
        "effective",
        "permitted",
        "inheritable",
        "ambient",
    ] {
        bundle.set(
            &format!("/process/capabilities/{set}"),
            capabilities.clone(),
        );
    }
    bundle
        .set(
            "/process/user",
            json!({ "uid": 1000, "gid": 1000, "umask": 0o027, "additionalGids": [10, 20] }),
        )
        .set("/process/cwd", json!("/data"))
        .set("/process/oomScoreAdj", json!(500))
        .set(
            "/process/scheduler",
            json!({ "policy": "SCHED_BATCH", "nice": 5 }),
        )
        .set(
            "/process/ioPriority",
            json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 }),
        )
        .add(
            "/process/rlimits",
            json!({ "type": "RLIMIT_CORE", "hard": 4096, "soft": 0 }),
        )
        .set("/domainname", json!("domain"))
        .set(
            "/linux/sysctl",
            json!({ "kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80" }),
        )
        .add(
            "/linux/devices",
            json!({ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "uid": 1000 }),
        )
        .set(
            "/linux/resources/devices",
            json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" },
            ]),
        )
        .set("/linux/rootfsPropagation", json!("rprivate"))
        .set("/linux/personality", json!({ "domain": "LINUX" }))
        .set(
            "/linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["swapon"], "action": "SCMP_ACT_ERRNO" }],
            }),
        )
        .add(
            "/mounts",
            json!({ "destination": "/data", "type": "bind", "source": data,
                    "options": ["rbind", "ro", "nosuid", "nodev"] }),
        )
        .add(
            "/mounts",
            json!({ "destination": "/etc", "type": "tmpfs", "source": "tmpfs",
                    "options": ["tmpcopyup", "ro", "nosuid", "mode=755"] }),
        );
    Ok(bundle)
}

/// Returns a bundle whose container has its own user namespace and enters the network namespace and
/// the user namespace of the container `first`. rrun creates such a container through an
/// intermediate process.
fn namespaced_bundle(first: &Bundle) -> Result<Bundle> {
    let mut bundle = Bundle::new(&["report"])?;
    let source = bundle.join("host-data");
    fs::create_dir(&source)?;
    let net = format!("/proc/{}/ns/net", first.pid()?);
    let user = format!("/proc/{}/ns/user", first.pid()?);
    bundle
        .without_namespace("network")
        .add("/linux/namespaces", json!({ "type": "user", "path": user }))
        .add(
            "/linux/namespaces",
            json!({ "type": "network", "path": net }),
        )
        .add("/linux/namespaces", json!({ "type": "time" }))
        .set("/linux/timeOffsets", json!({ "monotonic": { "secs": 5 } }))
        .add(
            "/mounts",
            json!({
                "destination": "/data", "type": "bind", "source": source,
                "options": ["rbind", "idmap"], "uidMappings": ids(), "gidMappings": ids(),
            }),
        )
        .set(
            "/hooks",
            json!({
                "createRuntime": [{ "path": "/bin/true" }],
                "createContainer": [{ "path": "/bin/true" }],
                "startContainer": [{ "path": "/bin/inside", "args": ["inside", "exit", "0"] }],
                "poststart": [{ "path": "/bin/true" }],
                "poststop": [{ "path": "/bin/true" }],
            }),
        )
        .set("/process/terminal", json!(true))
        .set(
            "/process/consoleSize",
            json!({ "height": 40, "width": 100 }),
        );
    Ok(bundle)
}

/// Returns the id mapping of a container with a user namespace.
fn ids() -> Value {
    json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }])
}

fn add_user_namespace(bundle: &mut Bundle) {
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", ids())
        .set("/linux/gidMappings", ids());
}

/// Returns true if the kernel refuses a new mount. In a user namespace, the kernel can have a reason
/// for the refusal, and rrun then binds a directory of the host.
fn refuses_a_mount(call: &Call, fault: Fault) -> bool {
    let is_refusal = matches!(fault, Fault::Error(Errno::EPERM | Errno::EBUSY));
    is_refusal && errnos::name(call.place.number).starts_with("fs")
}

/// Returns true if Rust's standard library waits for the execution of a hook. The library aborts the
/// program if this call fails, but the kernel has no reason to let the call fail.
fn waits_for_a_hook(call: &Call) -> bool {
    call.place.process == 0 && errnos::name(call.place.number) == "recvfrom"
}

fn create_and_start_report_each_error() -> Result {
    let bundle = protected_bundle()?;
    let (id, pid_file) = (bundle.id(), bundle.join("pid"));
    Subject {
        name: "create and start",
        commands: vec![
            words(&["create", "--pid-file", "pid", id]),
            words(&["start", id]),
        ],
        sample: 60,
        before: &|| {
            // The command also creates the state directory.
            let _ = fs::remove_dir(bundle.root());
            Ok(())
        },
        effect: &|| {
            fs::remove_file(&pid_file)?;
            reported(&bundle, 0)
        },
        failed: &|command| {
            if command == 0 {
                return not_created(&bundle);
            }
            fs::remove_file(&pid_file)?;
            is_one_of(&bundle, &["created", "running", "stopped"])
        },
        ..Subject::new(&bundle)
    }
    .run()
}

fn a_created_container_has_all_its_protections() -> Result {
    let mut bundle = protected_bundle()?;
    bundle.args(&["sleep", "600"]);
    Subject {
        name: "create",
        commands: vec![words(&["create", bundle.id()])],
        sample: 25,
        before: &|| {
            let _ = fs::remove_dir(bundle.root());
            Ok(())
        },
        effect: &|| observed::of_waiting_process(&bundle),
        failed: &|_| not_created(&bundle),
        ..Subject::new(&bundle)
    }
    .run()
}

/// In this test, only the system calls on the files of cgroups fail.
fn a_created_container_has_all_its_limits() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let parent = PathBuf::from(format!("/sys/fs/cgroup/{}-parent", bundle.id()));
    bundle
        .set(
            "/linux/cgroupsPath",
            json!(format!("/{0}-parent/{0}", bundle.id())),
        )
        .set(
            "/linux/resources",
            json!({
                "memory": { "limit": 64 << 20, "reservation": 32 << 20, "swap": 96 << 20 },
                "cpu": { "quota": 20_000, "period": 100_000, "shares": 512 },
                "pids": { "limit": 33 },
                "unified": { "memory.high": "50331648" },
                "devices": [{ "allow": false, "access": "rwm" }],
            }),
        );
    Subject {
        name: "create with limits",
        commands: vec![words(&["create", bundle.id()])],
        sample: 30,
        before: &|| {
            // The command also creates the parent cgroup, and enables controllers in it.
            let _ = fs::remove_dir(&parent);
            Ok(())
        },
        skips: &|call, _| !call.object.starts_with("/sys/fs/cgroup"),
        effect: &|| {
            let limits = [
                "memory.max",
                "memory.low",
                "memory.swap.max",
                "memory.high",
                "cpu.max",
                "cpu.weight",
                "pids.max",
            ];
            let read = |name| Ok((name, bundle.cgroup_file(name)?));
            let limits = limits
                .into_iter()
                .map(read)
                .collect::<Result<BTreeMap<_, _>>>()?;
            Ok(json!({ "limits": limits, "process": observed::of_waiting_process(&bundle)? }))
        },
        failed: &|_| not_created(&bundle),
        ..Subject::new(&bundle)
    }
    .run()?;
    fs::remove_dir(parent)?;
    Ok(())
}

fn create_in_existing_namespaces_reports_each_error() -> Result {
    let mut first = Bundle::new(&["sleep", "600"])?;
    add_user_namespace(&mut first);
    first.start()?;
    let bundle = namespaced_bundle(&first)?;
    let id = bundle.id();
    let console = Console::open(&first)?;
    Subject {
        name: "create in existing namespaces",
        commands: vec![
            words(&["create", "--console-socket", &console.path, id]),
            words(&["start", id]),
        ],
        sample: 50,
        before: &|| console.empty(),
        skips: &refuses_a_mount,
        effect: &|| {
            let text = read_to_end(receive_terminal(&console.listener)?);
            observed::of_report(&text)
        },
        failed: &|command| match command {
            0 => not_created(&bundle),
            _ => is_one_of(&bundle, &["created", "running", "stopped"]),
        },
        ..Subject::new(&bundle)
    }
    .run()?;
    first.end()?;
    Ok(())
}

/// A socket to which the runtime sends descriptors.
struct Console {
    path: String,
    listener: UnixListener,
}

impl Console {
    /// Creates the socket in the directory of a bundle in which the test injects no faults.
    fn open(bundle: &Bundle) -> Result<Console> {
        let path = bundle.join("console");
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        let path = path.to_string_lossy().into_owned();
        Ok(Console { path, listener })
    }

    /// Closes the connections that earlier commands made.
    fn empty(&self) -> Result {
        while self.listener.accept().is_ok() {}
        Ok(())
    }
}

/// The seccomp filter of this container has a listener, which the runtime sends to an agent.
fn create_with_a_seccomp_agent_reports_each_error() -> Result {
    let helper = Bundle::new(&[])?;
    // The agent only accepts connections, because the container makes no system call about which
    // the agent decides.
    let agent = Console::open(&helper)?;
    let mut bundle = Bundle::new(&["report"])?;
    bundle.set(
        "/linux/seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": agent.path,
            "syscalls": [{ "names": ["swapon"], "action": "SCMP_ACT_NOTIFY" }],
        }),
    );
    bundle.set(
        "/hooks",
        json!({ "startContainer": [{ "path": "/bin/inside", "args": ["inside", "exit", "0"] }] }),
    );
    let id = bundle.id();
    Subject {
        name: "create with a seccomp agent",
        commands: vec![words(&["create", id]), words(&["start", id])],
        sample: 25,
        before: &|| agent.empty(),
        effect: &|| reported(&bundle, 0),
        failed: &|command| match command {
            0 => not_created(&bundle),
            _ => is_one_of(&bundle, &["created", "running", "stopped"]),
        },
        ..Subject::new(&bundle)
    }
    .run()
}

fn create_by_systemd_reports_each_error() -> Result {
    let mut bundle = Bundle::in_slice("e2efaults.slice", &["report"])?;
    bundle.set(
        "/linux/resources",
        json!({ "pids": { "limit": 100 }, "memory": { "limit": 64 << 20 } }),
    );
    let id = bundle.id();
    let result = Subject {
        name: "create by systemd",
        commands: vec![words(&["create", id]), words(&["start", id])],
        sample: 15,
        effect: &|| reported(&bundle, 0),
        failed: &|command| match command {
            0 => not_created(&bundle),
            _ => is_one_of(&bundle, &["created", "running", "stopped"]),
        },
        ..Subject::new(&bundle)
    }
    .run();
    // systemd keeps a slice after its last scope has ended.
    command("systemctl", ["stop", "e2efaults.slice"]).ok()?;
    result
}

fn run_reports_each_error() -> Result {
    let mut bundle = protected_bundle()?;
    bundle.set(
        "/hooks",
        json!({ "prestart": [{ "path": "/bin/true" }], "poststop": [{ "path": "/bin/true" }] }),
    );
    run(&bundle, "run", 30)
}

fn run_with_a_terminal_reports_each_error() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    add_user_namespace(&mut bundle);
    bundle
        .set("/process/terminal", json!(true))
        .set("/process/oomScoreAdj", json!(500));
    run(&bundle, "run with a terminal", 40)
}

fn run(bundle: &Bundle, name: &str, sample: usize) -> Result {
    Subject {
        name,
        commands: vec![words(&["run", bundle.id()])],
        sample,
        skips: &|call, fault| {
            let in_user_namespace = bundle.config["linux"]["uidMappings"].is_array();
            waits_for_a_hook(call) || in_user_namespace && refuses_a_mount(call, fault)
        },
        effect: &|| {
            not_created(bundle)?;
            reported(bundle, 0)
        },
        // `run` can fail after the program has been executed. If `run` cannot remove the
        // container's directory, the directory is empty.
        failed: &|_| {
            let directory = bundle.root().join(bundle.id());
            if directory.join("state.json").exists() {
                return is_one_of(bundle, &["running", "stopped"]);
            }
            let _ = fs::remove_dir(directory);
            not_created(bundle)
        },
        ..Subject::new(bundle)
    }
    .run()
}

fn exec_reports_each_error() -> Result {
    let mut bundle = protected_bundle()?;
    bundle.args(&["sleep", "600"]).set(
        "/process/execCPUAffinity",
        json!({ "initial": "0", "final": "0" }),
    );
    let args = [
        "exec",
        "--pid-file",
        "pid",
        bundle.id(),
        "/bin/inside",
        "report",
    ];
    let pid_file = bundle.join("pid");
    Subject {
        name: "exec",
        commands: vec![words(&args)],
        sample: 40,
        before: &|| bundle.start().map(drop),
        effect: &|| {
            fs::remove_file(&pid_file)?;
            reported(&bundle, 0)
        },
        // `exec` can fail after the program has been executed.
        failed: &|_| {
            let _ = fs::remove_file(&pid_file);
            is_one_of(&bundle, &["running"])
        },
        ..Subject::new(&bundle)
    }
    .run()
}

fn exec_with_a_terminal_in_a_user_namespace_reports_each_error() -> Result {
    let helper = Bundle::new(&[])?;
    let console = Console::open(&helper)?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    add_user_namespace(&mut bundle);
    let args = [
        "exec",
        "--tty",
        "--detach",
        "--console-socket",
        &console.path,
        bundle.id(),
        "/bin/inside",
        "report",
    ];
    Subject {
        name: "exec with a terminal",
        commands: vec![words(&args)],
        sample: 40,
        before: &|| {
            console.empty()?;
            bundle.start().map(drop)
        },
        effect: &|| observed::of_report(&read_to_end(receive_terminal(&console.listener)?)),
        failed: &|_| is_one_of(&bundle, &["running"]),
        ..Subject::new(&bundle)
    }
    .run()
}

/// Returns a bundle whose files the user [`USER`] owns. In the container's user namespace, this
/// user is root.
fn rootless_bundle() -> Result<Bundle> {
    let mut bundle = Bundle::new(&["report"])?;
    let own = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
    bundle
        .without("/linux/cgroupsPath")
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", own.clone())
        .set("/linux/gidMappings", own);
    for mount in bundle.mounts() {
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| option != "gid=5");
        }
    }
    fs::create_dir(bundle.root())?;
    let below = fs::read_dir(bundle.rootfs())?
        .flatten()
        .map(|entry| entry.path());
    for path in below.chain([bundle.path().to_owned(), bundle.root(), bundle.rootfs()]) {
        chown(path, Some(USER), Some(USER))?;
    }
    Ok(bundle)
}

fn create_without_root_reports_each_error() -> Result {
    let bundle = rootless_bundle()?;
    let id = bundle.id();
    Subject {
        name: "create without root",
        commands: vec![words(&["create", id]), words(&["start", id])],
        sample: 30,
        user: Some(USER),
        skips: &refuses_a_mount,
        effect: &|| reported(&bundle, 0),
        failed: &|command| match command {
            0 => not_created(&bundle),
            _ => is_one_of(&bundle, &["created", "running", "stopped"]),
        },
        ..Subject::new(&bundle)
    }
    .run()
}
