//! How a container tells the service manager that it is ready: NOTIFY_SOCKET.

use std::os::unix::net::UnixDatagram;
use std::path::Path;

use serde_json::json;

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Directory, Result, Run, command, wait_for};
use crate::support::needs::Test;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(start_returns_when_the_container_is_ready),
    test!(run_in_the_background_returns_when_the_container_is_ready),
    test!(a_container_that_ends_without_being_ready_does_not_hold_start),
    test!(without_a_manager_there_is_no_socket),
    test!(descriptors_come_after_the_sockets_of_the_manager),
];

/// The service manager's side.
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

    /// The runtime, run by this manager.
    fn runtime(&self, bundle: &Bundle, args: &[&str]) -> Result<Run> {
        bundle.write_config()?;
        Ok(under(&self.directory.join("socket"), bundle, args))
    }

    fn hear(&self) -> Result<String> {
        wait_for("a notification", || {
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

    /// What is said of a container that is ready, up to the barrier, which a receiver that
    /// takes no descriptors lifts at once.
    fn hear_ready(&self) -> Result<String> {
        let ready = self.hear()?;
        ensure_eq!(ready.trim(), "READY=1", "first notification");
        let main = self.hear()?;
        ensure_eq!(self.hear()?.trim(), "BARRIER=1", "last notification");
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
        manager.hear_ready()?,
        format!("MAINPID={}", bundle.pid()?),
        "main process"
    );
    let started = starting.end()?;
    ensure!(started.code == 0, "{}", started.told());
    bundle.end()?;
    Ok(())
}

fn run_in_the_background_returns_when_the_container_is_ready() -> Result {
    let manager = Manager::new()?;
    let mut bundle = Bundle::new(&["notify", "READY=1"])?;
    // Any user of the container's may say it.
    bundle.set("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    let running = manager
        .runtime(&bundle, &["run", "--detach", bundle.id()])?
        .start()?;
    ensure_eq!(
        manager.hear_ready()?,
        format!("MAINPID={}", bundle.pid()?),
        "main process"
    );
    let ran = running.end()?;
    ensure!(ran.code == 0, "{}", ran.told());
    bundle.end()?;
    Ok(())
}

fn a_container_that_ends_without_being_ready_does_not_hold_start() -> Result {
    let manager = Manager::new()?;
    let bundle = Bundle::new(&["exit", "3"])?;
    manager.runtime(&bundle, &["create", bundle.id()])?.ok()?;
    manager.runtime(&bundle, &["start", bundle.id()])?.ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn without_a_manager_there_is_no_socket() -> Result {
    let mut bundle = Bundle::new(&[])?;
    let report = bundle.report()?;
    ensure!(
        report["env"].get("NOTIFY_SOCKET").is_none(),
        "{}",
        report["env"]
    );
    Ok(())
}

/// The manager's sockets are for who it says; then come those of --preserve-fds.
fn descriptors_come_after_the_sockets_of_the_manager() -> Result {
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
    let meant = with("$$")?;
    ensure_eq!(
        (&meant["fds"]["3"], &meant["fds"]["4"]),
        (&json!("/dev/zero"), &json!("/dev/full")),
        "descriptors"
    );
    ensure_eq!(
        (&meant["env"]["LISTEN_FDS"], &meant["env"]["LISTEN_PID"]),
        (&json!("1"), &json!("1")),
        "environment"
    );
    let not_meant = with("1")?;
    ensure_eq!(
        (&not_meant["fds"]["3"], not_meant["fds"].get("4")),
        (&json!("/dev/zero"), None),
        "descriptors"
    );
    ensure!(
        not_meant["env"].get("LISTEN_FDS").is_none(),
        "{}",
        not_meant["env"]
    );
    Ok(())
}
