//! Tests of the monitor and its client, over the real protocol and with real processes. The runtime
//! is a shell script that accepts the command line of an OCI runtime. With this script, the tests
//! need neither root nor cgroups. The end-to-end tests cover real runtimes and cgroups.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rrun_monitor_client::{Events, MonitorClient, MonitorError};
use rrun_protocol::{Create, Event, Exec, ExitRecord, FailureKind, Hello, Phase, Pod};

/// A shell script that acts as the runtime. Its `create` starts a process, which waits for the
/// runtime's `start` and then runs BUNDLE/program. Its `exec` runs the shell script whose path is
/// the value of the option `--process`. If the file BUNDLE/refuse exists, `create` fails. If the
/// file BUNDLE/hang exists, `create` never exits. With `--after`, `create` first waits until the
/// pipe has data, and then checks for these two files.
const RUNTIME: &str = r#"#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
    --log) log=$2; shift ;;
    --log-format) shift ;;
    --bundle) bundle=$2; shift ;;
    --pid-file) pid_file=$2; shift ;;
    --process) process=$2; shift ;;
    --after) after=$2; shift ;;
    --detach | --force) ;;
    create | start | delete | exec | kill) verb=$1 ;;
    *) id=$1 ;;
    esac
    shift
done
root=${0%/*}
case $verb in
create)
    if [ -n "$after" ] && [ -z "$(head -c 1 "$after")" ]; then
        echo '{"level":"error","msg":"the caller cancelled the creation"}' >> "$log"
        exit 1
    fi
    if [ -e "$bundle/refuse" ]; then
        echo '{"level":"error","msg":"disk quota exceeded"}' >> "$log"
        exit 1
    fi
    [ ! -e "$bundle/hang" ] || exec sleep 1000
    mkfifo "$root/start-$id"
    setsid sh -c "read go < $root/start-$id; exec sh $bundle/program" &
    echo $! > "$pid_file"
    ;;
start) echo go > "$root/start-$id" ;;
exec)
    script=$(cat "$process")
    setsid sh -c "$script" &
    echo $! > "$pid_file"
    ;;
delete) rm -f "$root/start-$id" ;;
esac
"#;

/// Returns the path of the monitor's binary. Cargo places the monitor's binary in the parent
/// directory of the directory that contains the test binary.
fn monitor() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let binary = own.ancestors().nth(2).unwrap().join("rrun-monitor");
    assert!(
        binary.is_file(),
        "{} does not exist: run `cargo build --workspace` first",
        binary.display()
    );
    binary
}

/// A monitor in its own directory. The directory has a long path. The path of the monitor's socket
/// therefore does not fit into a socket address.
struct Fixture {
    dir: PathBuf,
    client: MonitorClient,
}

fn write_script(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

impl Fixture {
    async fn new(name: &str) -> Self {
        Self::with_options(name, "").await
    }

    async fn with_options(name: &str, options: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join("monitor".repeat(20))
            .join(name);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        write_script(&dir.join("runtime"), RUNTIME);
        let binary = dir.join("rrun-monitor");
        let monitor = monitor();
        let monitor = monitor.display();
        write_script(
            &binary,
            &format!("#!/bin/sh\nexec {monitor} \"$@\" {options}\n"),
        );
        let pod = Pod {
            id: name.into(),
            hostname: None,
            new_ipc: false,
            shared_pid: false,
            users: None,
            runtime: None,
            pause: None,
        };
        rrun_monitor_client::spawn(&dir, &pod, &binary)
            .await
            .unwrap();
        let client = MonitorClient::new(dir.join(rrun_protocol::SOCKET_NAME));
        Fixture { dir, client }
    }

    fn bundle(&self, id: &str, program: &str) -> PathBuf {
        let bundle = self.dir.join(id);
        std::fs::create_dir_all(&bundle).unwrap();
        std::fs::write(bundle.join("program"), program).unwrap();
        bundle
    }

    fn create(&self, id: &str, program: &str) -> Create {
        let bundle = self.bundle(id, program);
        Create {
            id: id.into(),
            cgroup: bundle.join("no-cgroup"),
            log: Some(bundle.join("log")),
            bundle,
            runtime: vec![self.dir.join("runtime").to_str().unwrap().to_owned()],
            terminal: false,
            stdin: false,
            stdin_once: false,
            native: true,
            namespaces_of: Vec::new(),
        }
    }

    async fn run(&self, id: &str, program: &str) {
        let create = self.create(id, program);
        self.client.create(create, None).await.unwrap();
        self.client.start(id).await.unwrap();
    }

    /// Returns the lines of the container's log without their timestamps.
    fn log(&self, id: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.join(id).join("log")).unwrap();
        text.lines().map(|line| line[31..].to_owned()).collect()
    }

    async fn hello(&self) -> Hello {
        self.client.subscribe().await.unwrap().0
    }

    async fn end(self) {
        for container in self.hello().await.containers {
            self.client.delete(&container.id).await.unwrap();
        }
        self.client.shutdown().await.unwrap();
        let gone = self.client.subscribe().await;
        assert!(matches!(gone, Err(MonitorError::Gone { .. })));
        std::fs::remove_dir_all(&self.dir).unwrap();
    }
}

async fn exit_of(events: &mut Events, id: &str) -> ExitRecord {
    loop {
        if let Event::Exited { id: of, exit } = events.next().await.unwrap()
            && of == id
        {
            return exit;
        }
    }
}

#[tokio::test]
async fn the_exit_record_and_the_log_are_complete_when_the_exit_is_reported() {
    let pod = Fixture::new("exit").await;
    let (_, mut events) = pod.client.subscribe().await.unwrap();
    pod.run("a", "echo out; echo err >&2; printf part; exit 7")
        .await;
    let exit = exit_of(&mut events, "a").await;
    assert_eq!((exit.code, exit.oom_killed), (7, false));
    let record = std::fs::read(pod.dir.join("a/exit.json")).unwrap();
    assert_eq!(serde_json::from_slice::<ExitRecord>(&record).unwrap(), exit);
    let mut log = pod.log("a");
    log.sort();
    assert_eq!(log, ["stderr F err", "stdout F out", "stdout P part"]);
    let container = &pod.hello().await.containers[0];
    assert_eq!(container.phase, Phase::Exited(exit));
    pod.client.delete("a").await.unwrap();
    assert!(!pod.dir.join("a/exit.json").exists());
    assert!(pod.hello().await.containers.is_empty());
    pod.client.delete("a").await.unwrap();
    pod.end().await;
}

#[tokio::test]
async fn an_exit_by_a_signal_is_reported_as_128_plus_n_without_waiting_for_background_processes() {
    let pod = Fixture::new("signal").await;
    let (_, mut events) = pod.client.subscribe().await.unwrap();
    pod.run("a", "sleep 1000 & echo $!; wait").await;
    pod.client.kill("a", 15, false).await.unwrap();
    assert_eq!(exit_of(&mut events, "a").await.code, 128 + 15);
    // The container has no cgroup, so the monitor cannot kill the background process. The test
    // kills this process.
    if let Some(pid) = pod.log("a").first().and_then(|line| line[9..].parse().ok()) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
    }
    pod.client.kill("a", 15, false).await.unwrap();
    pod.end().await;
}

#[tokio::test]
async fn a_failed_create_request_reports_the_reason_and_leaves_no_container() {
    let pod = Fixture::new("refuse").await;
    let create = pod.create("a", "");
    std::fs::write(create.bundle.join("refuse"), "").unwrap();
    match pod.client.create(create, None).await {
        Err(MonitorError::Failed(failure)) => {
            assert_eq!(failure.kind, FailureKind::Runtime);
            assert_eq!(failure.message, "disk quota exceeded");
        }
        other => panic!("{other:?}"),
    }
    assert!(pod.hello().await.containers.is_empty());
    pod.end().await;
}

#[tokio::test]
async fn a_runtime_that_hangs_is_killed_and_does_not_delay_other_containers() {
    let pod = Fixture::with_options("hang", "--runtime-timeout 1").await;
    let (_, mut events) = pod.client.subscribe().await.unwrap();
    let create = pod.create("a", "");
    std::fs::write(create.bundle.join("hang"), "").unwrap();
    let client = pod.client.clone();
    let hanging = tokio::spawn(async move { client.create(create, None).await });
    pod.run("b", "exit 3").await;
    assert_eq!(exit_of(&mut events, "b").await.code, 3);
    match hanging.await.unwrap() {
        Err(MonitorError::Failed(failure)) => {
            assert_eq!(failure.kind, FailureKind::Runtime);
            assert!(failure.message.contains("killed"), "{}", failure.message);
        }
        other => panic!("{other:?}"),
    }
    pod.end().await;
}

#[tokio::test]
async fn a_runtime_can_be_started_before_its_bundle_is_written() {
    let pod = Fixture::new("after").await;
    let hello = pod.hello().await;
    assert!(hello.passes_after && hello.relays && hello.relays_terminals);
    for (id, written) in [("a", true), ("b", false)] {
        let create = pod.create(id, "");
        let refuse = create.bundle.join("refuse");
        std::fs::write(&refuse, "").unwrap();
        let (after, mut writer) = std::io::pipe().unwrap();
        let client = pod.client.clone();
        let create = tokio::spawn(async move { client.create(create, Some(after.into())).await });
        tokio::task::yield_now().await;
        // The monitor accepts connections in the order of their arrival. The reply to this
        // subscription therefore shows that the monitor has already received the create request.
        pod.hello().await;
        std::fs::remove_file(&refuse).unwrap();
        if written {
            writer.write_all(b"1").unwrap();
        }
        drop(writer);
        match create.await.unwrap() {
            Ok(_) if written => {}
            Err(MonitorError::Failed(failure)) if !written => {
                assert_eq!(failure.message, "the caller cancelled the creation");
            }
            other => panic!("wrong result of the creation of the container {id}: {other:?}"),
        }
    }
    assert_eq!(pod.hello().await.containers.len(), 1);
    pod.client.kill("a", 9, true).await.unwrap();
    pod.end().await;
}

#[tokio::test]
async fn a_process_that_exec_starts_has_its_own_stdio_and_exit_status() {
    let pod = Fixture::new("exec").await;
    pod.run("a", "exec sleep 1000").await;
    let (mut out, theirs) = std::io::pipe().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let exec = Exec {
        id: "a".into(),
        process: "echo here; exit 5".into(),
        terminal: false,
    };
    let stdio = [null.as_fd(), theirs.as_fd(), theirs.as_fd()];
    let mut handle = pod.client.exec(exec, &stdio).await.unwrap();
    drop(theirs);
    assert_eq!(handle.wait().await.unwrap(), 5);
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert_eq!(text, "here\n");
    assert!(pod.log("a").is_empty());
    pod.end().await;
}

#[tokio::test]
async fn the_process_of_an_exec_is_killed_when_its_client_disconnects() {
    let pod = Fixture::new("exec-dies").await;
    pod.run("a", "exec sleep 1000").await;
    let (mut out, theirs) = std::io::pipe().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let exec = Exec {
        id: "a".into(),
        process: "exec sleep 1000".into(),
        terminal: false,
    };
    let stdio = [null.as_fd(), theirs.as_fd(), theirs.as_fd()];
    let handle = pod.client.exec(exec, &stdio).await.unwrap();
    drop((theirs, handle));
    // The pipe's reading end gets the end of file only when the process has exited.
    assert_eq!(out.read(&mut [0]).unwrap(), 0);
    pod.end().await;
}

#[tokio::test]
async fn an_exec_request_fails_unless_the_container_is_running() {
    let pod = Fixture::new("exec-none").await;
    let exec = |id: &str| Exec {
        id: id.into(),
        process: String::new(),
        terminal: true,
    };
    pod.client.create(pod.create("a", ""), None).await.unwrap();
    for (id, kind) in [("a", FailureKind::WrongState), ("b", FailureKind::NotFound)] {
        match pod.client.exec(exec(id), &[]).await {
            Err(MonitorError::Failed(failure)) => assert_eq!(failure.kind, kind),
            other => panic!("{:?}", other.err()),
        }
    }
    pod.end().await;
}

#[tokio::test]
async fn an_invalid_message_closes_only_its_own_connection() {
    let pod = Fixture::new("garbage").await;
    let (_, mut events) = pod.client.subscribe().await.unwrap();
    // The path of the pod's directory is too long for a socket address. Rust's standard library
    // cannot connect to such a path, so the test creates a symbolic link with a short path.
    let short = std::env::temp_dir().join(format!("rrun-monitor-{}", std::process::id()));
    let _ = std::fs::remove_file(&short);
    std::os::unix::fs::symlink(&pod.dir, &short).unwrap();
    for garbage in [
        &b"\xff\xff\xff\xff"[..],
        b"\x03\0\0\0abc",
        b"\x02\0\0\0{}rest",
    ] {
        let mut socket = UnixStream::connect(short.join("monitor.sock")).unwrap();
        socket.write_all(garbage).unwrap();
        assert_eq!(socket.read(&mut [0; 16]).unwrap_or(0), 0);
    }
    std::fs::remove_file(&short).unwrap();
    pod.run("a", "exit 0").await;
    assert_eq!(exit_of(&mut events, "a").await.code, 0);
    pod.end().await;
}

#[tokio::test]
async fn a_create_request_whose_client_disconnects_is_completed_before_a_delete_request() {
    let pod = Fixture::new("orphan").await;
    let create = pod.create("a", "exec sleep 1000");
    let client = pod.client.clone();
    let create = tokio::spawn(async move { client.create(create, None).await });
    // The client disconnects at an arbitrary time while the create request is in progress.
    tokio::task::yield_now().await;
    create.abort();
    pod.client.delete("a").await.unwrap();
    assert!(pod.hello().await.containers.is_empty());
    pod.end().await;
}

#[tokio::test]
async fn a_log_rotation_loses_no_line_of_a_hundred_thousand() {
    let pod = Fixture::new("lines").await;
    let (_, mut events) = pod.client.subscribe().await.unwrap();
    pod.run("a", "seq 1 100000").await;
    let (log, old) = (pod.dir.join("a/log"), pod.dir.join("a/log.1"));
    std::fs::rename(&log, &old).unwrap();
    pod.client.reopen_log("a").await.unwrap();
    assert_eq!(exit_of(&mut events, "a").await.code, 0);
    let mut text = std::fs::read_to_string(&old).unwrap();
    text += &std::fs::read_to_string(&log).unwrap();
    let numbers = text.lines().map(|line| line[40..].parse::<u32>().unwrap());
    assert!(numbers.eq(1..=100_000));
    pod.end().await;
}

#[tokio::test]
async fn a_monitor_refuses_to_shut_down_while_a_container_runs() {
    let pod = Fixture::new("shutdown").await;
    pod.run("a", "exec sleep 1000").await;
    match pod.client.shutdown().await {
        Err(MonitorError::Failed(failure)) => {
            assert_eq!(failure.kind, FailureKind::WrongState);
        }
        other => panic!("{other:?}"),
    }
    pod.end().await;
}

#[tokio::test]
async fn many_containers_can_exit_at_once() {
    let pod = Fixture::new("many").await;
    let (_, mut events) = pod.client.subscribe().await.unwrap();
    for number in 0..20 {
        pod.run(&format!("c{number}"), "exec sleep 1000").await;
    }
    for number in 0..20 {
        pod.client
            .kill(&format!("c{number}"), 9, true)
            .await
            .unwrap();
    }
    let mut ended = Vec::new();
    while ended.len() < 20 {
        if let Event::Exited { id, exit } = events.next().await.unwrap() {
            assert_eq!(exit.code, 137);
            ended.push(id);
        }
    }
    pod.end().await;
}
