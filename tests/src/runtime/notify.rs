//! Tests of readiness notifications, which a container sends to the service manager through
//! NOTIFY_SOCKET.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use serde_json::json;

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Directory, Result, Run, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(start_returns_when_the_container_is_ready),
    test!(run_with_detach_returns_when_the_container_is_ready),
    test!(start_returns_if_the_container_exits_without_a_notification),
    test!(a_container_without_a_manager_gets_no_notification_socket),
    test!(run_forwards_only_the_first_notification, Need::Rrun),
    test!(start_waits_if_the_queue_of_the_manager_is_full, Need::Rrun),
    test!(
        delete_removes_what_a_container_left_beside_its_notification_socket,
        Need::Rrun
    ),
    test!(preserved_descriptors_have_higher_numbers_than_the_managers_sockets),
];

/// The service manager's side of the notification socket.
struct Manager {
    directory: Directory,
    socket: UnixDatagram,
}

impl Manager {
    fn new() -> Result<Manager> {
        let directory = Directory::new("notify")?;
        let socket = UnixDatagram::bind(directory.join("socket"))?;
        socket.set_nonblocking(true)?;
        Ok(Manager { directory, socket })
    }

    /// Returns a call of the runtime in which the variable NOTIFY_SOCKET contains the path of this
    /// manager's socket.
    fn runtime(&self, bundle: &Bundle, args: &[&str]) -> Result<Run> {
        bundle.write_config()?;
        Ok(under(&self.directory.join("socket"), bundle, args))
    }

    fn receive(&self) -> Result<String> {
        wait_for("a notification to arrive at the service manager", || {
            let mut buffer = [0u8; 4096];
            match self.socket.recv(&mut buffer) {
                Ok(length) => Ok(Some(
                    String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned(),
                )),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Receives and checks the three notifications about a ready container. Returns the second
    /// notification, which contains the id of the container's main process. The last notification
    /// is a barrier, which carries a descriptor. The kernel closes this descriptor immediately,
    /// because this receiver accepts no descriptors.
    fn receive_ready(&self) -> Result<String> {
        let ready = self.receive()?;
        ensure_eq!(ready.trim(), "READY=1", "the first notification");
        let main = self.receive()?;
        ensure_eq!(self.receive()?.trim(), "BARRIER=1", "the last notification");
        Ok(main.trim().to_owned())
    }
}

fn under(socket: &Path, bundle: &Bundle, args: &[&str]) -> Run {
    command("env", [format!("NOTIFY_SOCKET={}", socket.display())])
        .arg(runtime_program())
        .arg("--root")
        .arg(bundle.root())
        .args(args)
        .dir(bundle.path())
}

fn start_returns_when_the_container_is_ready() -> Result {
    let manager = Manager::new()?;
    let bundle = Bundle::new(&["notify", "READY=1\nSTATUS=here"])?;
    manager.runtime(&bundle, &["create", bundle.id()])?.ok()?;
    let starting = manager.runtime(&bundle, &["start", bundle.id()])?.start()?;
    ensure_eq!(
        manager.receive_ready()?,
        format!("MAINPID={}", bundle.pid()?),
        "the notification with the id of the main process"
    );
    let started = starting.end()?;
    ensure!(started.code == 0, "`start` failed:\n{}", started.told());
    bundle.end()?;
    Ok(())
}

fn run_with_detach_returns_when_the_container_is_ready() -> Result {
    let manager = Manager::new()?;
    let mut bundle = Bundle::new(&["notify", "READY=1"])?;
    // The program is not root, because every user in the container must be able to send the
    // notification.
    bundle.set("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    let running = manager
        .runtime(&bundle, &["run", "--detach", bundle.id()])?
        .start()?;
    ensure_eq!(
        manager.receive_ready()?,
        format!("MAINPID={}", bundle.pid()?),
        "the notification with the id of the main process"
    );
    let ran = running.end()?;
    ensure!(ran.code == 0, "`run --detach` failed:\n{}", ran.told());
    bundle.end()?;
    Ok(())
}

fn start_returns_if_the_container_exits_without_a_notification() -> Result {
    let manager = Manager::new()?;
    let bundle = Bundle::new(&["exit", "3"])?;
    manager.runtime(&bundle, &["create", bundle.id()])?.ok()?;
    manager.runtime(&bundle, &["start", bundle.id()])?.ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn run_forwards_only_the_first_notification() -> Result {
    let manager = Manager::new()?;
    let bundle = Bundle::new(&["notify-often", "READY=1", "20"])?;
    manager.runtime(&bundle, &["run", bundle.id()])?.ok()?;
    ensure_eq!(
        manager.receive()?.trim(),
        "READY=1",
        "the first notification"
    );
    let main = manager.receive()?;
    ensure!(
        main.starts_with("MAINPID="),
        "the second notification is {main}"
    );
    let mut buffer = [0u8; 4096];
    ensure!(
        manager.socket.recv(&mut buffer).is_err(),
        "the service manager receives a third notification: {}",
        String::from_utf8_lossy(&buffer)
    );
    Ok(())
}

/// A container with CAP_SYS_ADMIN can make its read-only mount of the directory writable.
fn delete_removes_what_a_container_left_beside_its_notification_socket() -> Result {
    let manager = Manager::new()?;
    let bundle = Bundle::new(&["sleep", "600"])?;
    manager.runtime(&bundle, &["create", bundle.id()])?.ok()?;
    let directory = bundle.root().join(bundle.id()).join("notify");
    fs::create_dir_all(directory.join("of/the/container"))?;
    fs::write(directory.join("file"), "text")?;
    bundle.runtime(&["delete", "--force", bundle.id()]).ok()?;
    ensure!(
        !directory.exists(),
        "`delete` left the directory of the notification socket behind"
    );
    Ok(())
}

fn start_waits_if_the_queue_of_the_manager_is_full() -> Result {
    let manager = Manager::new()?;
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    sender.connect(manager.directory.join("socket"))?;
    let mut queued = 0;
    while sender.send(b"STATUS=other").is_ok() {
        queued += 1;
    }
    let bundle = Bundle::new(&["notify-often", "READY=1", "1"])?;
    manager.runtime(&bundle, &["create", bundle.id()])?.ok()?;
    let starting = manager.runtime(&bundle, &["start", bundle.id()])?.start()?;
    bundle.wait_status("stopped")?;
    // Without the waiting, `start` fails in this time. A shorter time does not let the test fail.
    std::thread::sleep(std::time::Duration::from_millis(300));
    for _ in 0..queued {
        manager.receive()?;
    }
    manager.receive_ready()?;
    let started = starting.end()?;
    ensure!(started.code == 0, "`start` failed:\n{}", started.told());
    bundle.delete()?;
    Ok(())
}

fn a_container_without_a_manager_gets_no_notification_socket() -> Result {
    let mut bundle = Bundle::new(&[])?;
    let report = bundle.report()?;
    ensure!(
        report["env"].get("NOTIFY_SOCKET").is_none(),
        "the container's environment contains NOTIFY_SOCKET; the environment: {}",
        report["env"]
    );
    Ok(())
}

/// The service manager passes sockets (LISTEN_FDS) only to the process whose id is in LISTEN_PID.
/// In the container, the numbers of the sockets begin at 3. The descriptors that --preserve-fds
/// passes have the next numbers.
fn preserved_descriptors_have_higher_numbers_than_the_managers_sockets() -> Result {
    let bundle = Bundle::new(&["report"])?;
    bundle.write_config()?;
    let with = |pid: &str| {
        let script = format!(
            "exec 3</dev/zero 4</dev/full; LISTEN_FDS=1 LISTEN_PID={pid} exec {} --root {} run --preserve-fds 1 {}",
            runtime_program(),
            bundle.root().display(),
            bundle.id()
        );
        command("sh", ["-c", &script])
            .dir(bundle.path())
            .ok()?
            .json()
    };
    let for_runtime = with("$$")?;
    ensure_eq!(
        (&for_runtime["fds"]["3"], &for_runtime["fds"]["4"]),
        (&json!("/dev/zero"), &json!("/dev/full")),
        "the descriptors 3 and 4 of a container whose runtime received a socket from the service manager"
    );
    ensure_eq!(
        (
            &for_runtime["env"]["LISTEN_FDS"],
            &for_runtime["env"]["LISTEN_PID"]
        ),
        (&json!("1"), &json!("1")),
        "the variables LISTEN_FDS and LISTEN_PID of a container whose runtime received a socket from the service manager"
    );
    let for_another = with("1")?;
    ensure_eq!(
        (&for_another["fds"]["3"], for_another["fds"].get("4")),
        (&json!("/dev/zero"), None),
        "the descriptors 3 and 4 of a container whose runtime received no socket from the service manager"
    );
    ensure!(
        for_another["env"].get("LISTEN_FDS").is_none(),
        "the container's environment contains LISTEN_FDS, although LISTEN_PID is the id of another process; the environment: {}",
        for_another["env"]
    );
    Ok(())
}
