//! Tests of filters with SCMP_ACT_NOTIFY, which let a seccomp agent decide about a system call. The
//! runtime sends the seccomp listener to the agent's socket at listenerPath. The agent then
//! receives the requests on this listener.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Directory, Output, Result, deadline, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::seccomp::{LEAST_PROGRAM, filtered, for_getpgid, getpgid, with_least_program};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(an_agent_decides_about_a_system_call),
    test!(
        an_agent_decides_about_execve_and_every_later_system_call,
        Need::Rrun
    ),
    test!(an_agent_decides_about_the_system_calls_of_a_hook),
    test!(
        a_failed_hook_is_reported_even_if_an_agent_handles_its_system_calls,
        Need::Rrun
    ),
    test!(start_reports_an_agent_that_disconnected, Need::Rrun),
    test!(an_agent_decides_about_system_calls_of_processes_that_exec_starts),
    test!(a_missing_agent_is_reported),
    test!(
        an_agent_that_does_not_read_does_not_keep_the_runtime_waiting,
        Need::Rrun
    ),
    test!(an_agent_that_closes_the_listener_does_not_keep_the_runtime_waiting),
];

/// The socket at listenerPath, on which the test accepts connections as the agent.
struct AgentSocket {
    listener: UnixListener,
    directory: Directory,
}

/// A seccomp listener, and the container's state that the runtime sent with the listener.
struct ReceivedListener {
    state: Value,
    listener: OwnedFd,
}

impl AgentSocket {
    fn new() -> Result<Self> {
        let directory = Directory::new("agent")?;
        let listener = UnixListener::bind(directory.join("agent.sock"))?;
        listener.set_nonblocking(true)?;
        Ok(AgentSocket {
            listener,
            directory,
        })
    }

    fn path(&self) -> String {
        self.directory.join("agent.sock").display().to_string()
    }

    /// Accepts the connection of the next runtime process, and returns the listener that this
    /// process sends. The runtime process must close the connection after it has sent the listener.
    fn accept(&self) -> Result<ReceivedListener> {
        let stream = wait_for("a runtime process to connect to the agent", || {
            match self.listener.accept() {
                Ok((stream, _)) => Ok(Some(stream)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error.into()),
            }
        })?;
        let mut text = Vec::new();
        let mut descriptors = Vec::new();
        while receive(&stream, &mut text, &mut descriptors)? > 0 {}
        ensure_eq!(
            descriptors.len(),
            1,
            "the number of descriptors that the runtime sent"
        );
        let Some(listener) = descriptors.pop() else {
            return Err("the runtime sent no descriptor".into());
        };
        Ok(ReceivedListener {
            state: serde_json::from_slice(&text)?,
            listener,
        })
    }
}

fn receive(
    stream: &UnixStream,
    text: &mut Vec<u8>,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize> {
    let mut buffer = [0; 4096];
    let mut space = nix::cmsg_space!([i32; 4]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(all) = control {
            // SAFETY: the kernel has just given these descriptors to this process, and nothing else
            // owns them.
            descriptors.extend(
                all.into_iter()
                    .map(|it| unsafe { OwnedFd::from_raw_fd(it) }),
            );
        }
    }
    let length = message.bytes;
    text.extend_from_slice(buffer.get(..length).unwrap_or_default());
    Ok(length)
}

impl ReceivedListener {
    /// Receives the kernel's next request about a system call, and makes the system call fail with
    /// `errno`. Returns the system call's number.
    fn answer(&self, errno: i32) -> Result<i32> {
        self.decide(|_| Some(errno))
    }

    /// Receives the kernel's next request about a system call, and calls `errno` with the system
    /// call's number. The system call fails with the errno that this function returns. If the
    /// function returns `None`, the kernel executes the system call. Returns the system call's
    /// number.
    fn decide(&self, errno: impl FnOnce(i32) -> Option<i32>) -> Result<i32> {
        // SAFETY: all-zero values of these plain types are valid, and SECCOMP_IOCTL_NOTIF_RECV
        // requires a zeroed request.
        let (mut request, mut answer): (libc::seccomp_notif, libc::seccomp_notif_resp) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        let fd = self.listener.as_raw_fd();
        // SAFETY: SECCOMP_IOCTL_NOTIF_RECV writes a seccomp_notif, which is the type of `request`.
        let got = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV as _, &raw mut request) };
        nix::errno::Errno::result(got)?;
        answer.id = request.id;
        match errno(request.data.nr) {
            Some(errno) => answer.error = -errno,
            None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        }
        // SAFETY: SECCOMP_IOCTL_NOTIF_SEND reads a seccomp_notif_resp, which is the type of
        // `answer`.
        let sent = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut answer) };
        nix::errno::Errno::result(sent)?;
        Ok(request.data.nr)
    }
}

fn notify_profile(socket: &AgentSocket) -> Value {
    let mut profile = for_getpgid("SCMP_ACT_NOTIFY");
    profile["listenerPath"] = json!(socket.path());
    profile["listenerMetadata"] = json!("metadata for the agent");
    profile
}

fn an_agent_decides_about_a_system_call() -> Result {
    for no_new_privileges in [true, false] {
        let socket = AgentSocket::new()?;
        let mut bundle = filtered(notify_profile(&socket), &["call", &getpgid()])?;
        bundle
            .set("/process/noNewPrivileges", json!(no_new_privileges))
            .set("/annotations", json!({ "some.key": "value" }));
        let running = bundle.call(&["run"])?.start()?;
        let received = socket.accept()?;
        let state = &received.state;
        ensure_eq!(
            state["fds"],
            json!(["seccompFd"]),
            "the names of the descriptors in the state that the agent received"
        );
        ensure_eq!(
            state["metadata"],
            "metadata for the agent",
            "the listener's metadata that the agent received"
        );
        ensure_eq!(
            state["state"]["id"],
            bundle.id(),
            "the container's id in the state that the agent received"
        );
        ensure_eq!(
            state["state"]["status"],
            "creating",
            "the container's status in the state that the agent received"
        );
        ensure_eq!(
            state["state"]["annotations"]["some.key"],
            "value",
            "the container's annotation in the state that the agent received"
        );
        ensure_eq!(
            state["state"]["pid"],
            state["pid"],
            "the container's process id in the state that the agent received"
        );
        ensure!(
            state["ociVersion"].is_string(),
            "the state that the agent received has no field ociVersion; the state: {state}"
        );
        let pid = state["pid"].as_i64().unwrap_or_default();
        ensure!(
            Path::new(&format!("/proc/{pid}")).exists(),
            "the agent received the process id {pid}, but this process does not exist"
        );
        ensure_eq!(
            i64::from(received.answer(libc::EOWNERDEAD)?),
            libc::SYS_getpgid,
            "the number of the system call in the request"
        );
        let output = running.end_within(deadline())?;
        ensure_eq!(
            output.text(),
            "EOWNERDEAD",
            "the result of the system call for which the agent returned an error"
        );
    }
    Ok(())
}

/// The filter sends every system call to the agent. The agent allows only execve(2), exit_group(2)
/// and ppoll(2).
fn an_agent_decides_about_execve_and_every_later_system_call() -> Result {
    for no_new_privileges in [true, false] {
        let socket = AgentSocket::new()?;
        let profile = json!({
            "defaultAction": "SCMP_ACT_NOTIFY",
            "listenerPath": socket.path(),
        });
        let with = |words| -> Result<Bundle> {
            let mut bundle = with_least_program(profile.clone(), words)?;
            bundle.set("/process/noNewPrivileges", json!(no_new_privileges));
            Ok(bundle)
        };
        let least = [libc::SYS_execve, libc::SYS_exit_group, libc::SYS_ppoll];
        let allowed = |call: i32| (!least.contains(&i64::from(call))).then_some(libc::ENOSYS);
        let requests_are = |received: &ReceivedListener, calls: &[i64]| -> Result {
            for call in calls {
                ensure_eq!(
                    i64::from(received.decide(allowed)?),
                    *call,
                    "the number of the system call in the request"
                );
            }
            Ok(())
        };
        let bundle = with(2)?;
        let running = bundle.call(&["run"])?.start()?;
        requests_are(&socket.accept()?, &least[..2])?;
        let output = running.end_within(deadline())?;
        ensure_eq!(output.code, 7, "the exit code of `run` ({})", output.told());

        let bundle = with(3)?;
        bundle.call(&["create"])?.ok()?;
        let starting = bundle.call(&["start"])?.start()?;
        let received = socket.accept()?;
        ensure_eq!(
            received.state["state"]["id"],
            bundle.id(),
            "the container's id in the state from the agent's message after `start`"
        );
        ensure_eq!(
            received.state["pid"],
            bundle.pid()?,
            "the container's process id in the state from the agent's message after `start`"
        );
        requests_are(&received, &[least[0], least[2]])?;
        let output = starting.end_within(deadline())?;
        ensure_eq!(
            output.code,
            0,
            "the exit code of `start` ({})",
            output.told()
        );
        let exec = [&["exec"], &[bundle.id()], &[LEAST_PROGRAM; 2][..]].concat();
        let running = bundle.runtime(&exec).start()?;
        requests_are(&socket.accept()?, &least[..2])?;
        let output = running.end_within(deadline())?;
        ensure_eq!(
            output.code,
            7,
            "the exit code of `exec` ({})",
            output.told()
        );
        bundle.end()?;
    }
    Ok(())
}

fn an_agent_decides_about_the_system_calls_of_a_hook() -> Result {
    let socket = AgentSocket::new()?;
    let mut bundle = filtered(notify_profile(&socket), &["call", &getpgid()])?;
    let args = json!(["inside", "call", getpgid()]);
    bundle.set(
        "/hooks/startContainer",
        json!([{ "path": "/bin/inside", "args": args }]),
    );
    let running = bundle.call(&["run"])?.start()?;
    let received = socket.accept()?;
    for caller in ["hook", "program"] {
        let call = i64::from(received.answer(libc::EDOM)?);
        ensure_eq!(
            call,
            libc::SYS_getpgid,
            "the number of the system call that the container's {caller} makes"
        );
    }
    let output = running.end_within(deadline())?;
    ensure_eq!(
        output.text(),
        "EDOM",
        "the result of the program's system call, for which the agent returned EDOM"
    );
    Ok(())
}

/// The filter forbids sendto(2) and sendmsg(2), so the process cannot report the failed hook in a
/// message.
fn a_failed_hook_is_reported_even_if_an_agent_handles_its_system_calls() -> Result {
    let socket = AgentSocket::new()?;
    let mut profile = notify_profile(&socket);
    profile["syscalls"] = json!([
        { "names": ["getpgid"], "action": "SCMP_ACT_NOTIFY" },
        { "names": ["sendto", "sendmsg"], "action": "SCMP_ACT_ERRNO" },
    ]);
    let mut bundle = filtered(profile, &["exit", "0"])?;
    bundle.set(
        "/hooks/startContainer",
        json!([{ "path": "/bin/inside", "args": ["inside", "exit", "3"] }]),
    );
    let failed = |output: &Output| -> Result {
        let words = ["hooks.startContainer[0]", "exit status: 3"];
        let reported = words.iter().all(|word| output.stderr.contains(word));
        ensure!(
            reported && !output.stderr.contains("execve"),
            "the error does not report the failed startContainer hook:\n{}",
            output.told()
        );
        Ok(())
    };
    failed(&bundle.call(&["run"])?.exits(1)?)?;
    bundle.runtime(&["create", bundle.id()]).ok()?;
    failed(&bundle.runtime(&["start", bundle.id()]).exits(1)?)?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn start_reports_an_agent_that_disconnected() -> Result {
    // With the default action SCMP_ACT_NOTIFY, every system call needs an answer from the agent.
    // Without an agent, the process cannot even exit.
    for default in ["SCMP_ACT_ALLOW", "SCMP_ACT_NOTIFY"] {
        let socket = AgentSocket::new()?;
        let path = socket.path();
        let mut profile = notify_profile(&socket);
        profile["defaultAction"] = json!(default);
        let bundle = filtered(profile, &["exit", "0"])?;
        bundle.call(&["create"])?.ok()?;
        drop(socket);
        let output = bundle.call(&["start"])?.exits(1)?;
        ensure!(
            output.stderr.contains(&path),
            "the error of `start` does not name the agent's socket:\n{}",
            output.told()
        );
        bundle.wait_status("stopped")?;
        bundle.delete()?;
        let output = bundle.call(&["create"])?.exits(1)?;
        ensure!(
            output.stderr.contains(&path),
            "the error of `create` does not name the agent's socket:\n{}",
            output.told()
        );
    }
    Ok(())
}

fn an_agent_decides_about_system_calls_of_processes_that_exec_starts() -> Result {
    let socket = AgentSocket::new()?;
    let bundle = filtered(notify_profile(&socket), &["sleep", "60"])?;
    bundle.start()?;
    let of_container = socket.accept()?;
    let running = bundle.exec(&[], &["call", &getpgid()]).start()?;
    let received = socket.accept()?;
    ensure_eq!(
        received.state["state"]["status"],
        "running",
        "the container's status in the state that the agent received"
    );
    ensure_eq!(
        received.state["state"]["pid"],
        of_container.state["pid"],
        "the container's process id in the state that the agent received"
    );
    ensure!(
        received.state["pid"] != of_container.state["pid"],
        "the agent received the container's process id instead of the id of the process that `exec` starts"
    );
    received.answer(libc::EDOM)?;
    let output = running.end_within(deadline())?;
    ensure_eq!(
        output.text(),
        "EDOM",
        "the result of the system call that the process started by `exec` makes"
    );
    bundle.end()?;
    Ok(())
}

fn a_missing_agent_is_reported() -> Result {
    let socket = AgentSocket::new()?;
    let profile = notify_profile(&socket);
    let path = socket.path();
    drop(socket);
    let output = filtered(profile, &["exit", "0"])?.call(&["run"])?.end()?;
    ensure_eq!(output.code, 1, "the exit code of `run`");
    ensure!(
        output.stderr.contains(&path),
        "the error of `run` does not name the agent's socket:\n{}",
        output.told()
    );
    Ok(())
}

fn an_agent_that_does_not_read_does_not_keep_the_runtime_waiting() -> Result {
    let socket = AgentSocket::new()?;
    let mut bundle = filtered(notify_profile(&socket), &["sleep", "600"])?;
    bundle.set("/annotations", json!({ "key": "x".repeat(2_000_000) }));
    bundle
        .call(&["run"])?
        .end()?
        .fails_with("the agent did not accept or read within 5 s")?;
    let running = bundle.call(&["run"])?.start()?;
    wait_for(
        "the runtime to create the container's first process",
        || Ok((bundle.runtime(&["state", bundle.id()]).end()?.code == 0).then_some(())),
    )?;
    running.signal(Signal::SIGTERM);
    running
        .end()?
        .fails_with("signal 15 arrived, and the container's process was not ready 500 ms later")
}

/// The kernel lets a system call fail with ENOSYS if the filter sends it to an agent, and no process
/// has the listener open.
fn an_agent_that_closes_the_listener_does_not_keep_the_runtime_waiting() -> Result {
    let socket = AgentSocket::new()?;
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["execve"], "action": "SCMP_ACT_NOTIFY" }],
        "listenerPath": socket.path(),
    });
    let bundle = filtered(profile, &["exit", "0"])?;
    let running = bundle.call(&["run"])?.start()?;
    drop(socket.accept()?);
    let output = running.end_within(deadline())?;
    ensure_eq!(output.code, 1, "the exit code of `run`");
    ensure!(
        output.stderr.contains("not implemented"),
        "the error of `run` does not contain the error of execve(2):\n{}",
        output.told()
    );
    Ok(())
}
