//! Filters that ask an agent (SCMP_ACT_NOTIFY): the socket at listenerPath, and what is asked there.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Directory, Output, Result, deadline, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::seccomp::{LEAST_PROGRAM, filtered, for_getpgid, getpgid, with_least_program};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(an_agent_is_asked),
    test!(an_agent_is_asked_about_the_execution_itself, Need::Rrun),
    test!(an_agent_is_asked_about_what_a_hook_does),
    test!(a_hook_that_fails_under_an_agent_is_reported, Need::Rrun),
    test!(an_agent_that_went_away_is_reported_by_start, Need::Rrun),
    test!(an_agent_is_asked_about_what_exec_runs),
    test!(an_agent_that_is_not_there_is_told),
];

/// One side of the socket at listenerPath.
struct AgentSocket {
    listener: UnixListener,
    directory: Directory,
}

/// A seccomp listener, and what came with it.
struct Asked {
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

    /// What the next runtime process sends. The connection must be closed after it.
    fn accept(&self) -> Result<Asked> {
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
        ensure_eq!(descriptors.len(), 1, "descriptors that were sent");
        let Some(listener) = descriptors.pop() else {
            return Err("no descriptor was sent".into());
        };
        Ok(Asked {
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
            // SAFETY: the kernel has just given them to this process, which owns them alone.
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

impl Asked {
    /// Takes the next question, and answers with that errno. Gives the call's number.
    fn answer(&self, errno: i32) -> Result<i32> {
        self.decide(|_| Some(errno))
    }

    /// The same, but `errno` depends on the call's number. If it is `None`, the call is made.
    fn decide(&self, errno: impl FnOnce(i32) -> Option<i32>) -> Result<i32> {
        // SAFETY: all-zero values of these plain types are valid, and RECV wants them so.
        let (mut question, mut answer): (libc::seccomp_notif, libc::seccomp_notif_resp) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        let fd = self.listener.as_raw_fd();
        // SAFETY: RECV writes a seccomp_notif, which question is.
        let got =
            unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV as _, &raw mut question) };
        nix::errno::Errno::result(got)?;
        answer.id = question.id;
        match errno(question.data.nr) {
            Some(errno) => answer.error = -errno,
            None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        }
        // SAFETY: SEND reads a seccomp_notif_resp, which answer is.
        let sent = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut answer) };
        nix::errno::Errno::result(sent)?;
        Ok(question.data.nr)
    }
}

fn asking(socket: &AgentSocket) -> Value {
    let mut profile = for_getpgid("SCMP_ACT_NOTIFY");
    profile["listenerPath"] = json!(socket.path());
    profile["listenerMetadata"] = json!("of interest to the agent");
    profile
}

fn an_agent_is_asked() -> Result {
    for no_new_privileges in [true, false] {
        let socket = AgentSocket::new()?;
        let mut bundle = filtered(asking(&socket), &["call", &getpgid()])?;
        bundle
            .set("/process/noNewPrivileges", json!(no_new_privileges))
            .set("/annotations", json!({ "some.key": "value" }));
        let running = bundle.call(&["run"])?.start()?;
        let asked = socket.accept()?;
        let state = &asked.state;
        ensure_eq!(state["fds"], json!(["seccompFd"]), "descriptors' names");
        ensure_eq!(state["metadata"], "of interest to the agent", "metadata");
        ensure_eq!(state["state"]["id"], bundle.id(), "id");
        ensure_eq!(state["state"]["status"], "creating", "status");
        ensure_eq!(
            state["state"]["annotations"]["some.key"],
            "value",
            "annotation"
        );
        ensure_eq!(state["state"]["pid"], state["pid"], "the container's pid");
        ensure!(state["ociVersion"].is_string(), "no ociVersion: {state}");
        let pid = state["pid"].as_i64().unwrap_or_default();
        ensure!(
            Path::new(&format!("/proc/{pid}")).exists(),
            "no process {pid}"
        );
        ensure_eq!(
            i64::from(asked.answer(libc::EOWNERDEAD)?),
            libc::SYS_getpgid,
            "call"
        );
        let output = running.end_within(deadline())?;
        ensure_eq!(output.text(), "EOWNERDEAD", "what the call gave");
    }
    Ok(())
}

/// The agent is asked about every call, and allows only those of [`LEAST`].
fn an_agent_is_asked_about_the_execution_itself() -> Result {
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
        let asked_in_order = |asked: &Asked, calls: &[i64]| -> Result {
            for call in calls {
                ensure_eq!(i64::from(asked.decide(allowed)?), *call, "call");
            }
            Ok(())
        };
        let bundle = with(2)?;
        let running = bundle.call(&["run"])?.start()?;
        asked_in_order(&socket.accept()?, &least[..2])?;
        let output = running.end_within(deadline())?;
        ensure_eq!(output.code, 7, "run: {}", output.told());

        let bundle = with(3)?;
        bundle.call(&["create"])?.ok()?;
        let starting = bundle.call(&["start"])?.start()?;
        let asked = socket.accept()?;
        ensure_eq!(asked.state["state"]["id"], bundle.id(), "id");
        ensure_eq!(asked.state["pid"], bundle.pid()?, "pid");
        asked_in_order(&asked, &[least[0], least[2]])?;
        let output = starting.end_within(deadline())?;
        ensure_eq!(output.code, 0, "start: {}", output.told());
        let exec = [&["exec"], &[bundle.id()], &[LEAST_PROGRAM; 2][..]].concat();
        let running = bundle.runtime(&exec).start()?;
        asked_in_order(&socket.accept()?, &least[..2])?;
        let output = running.end_within(deadline())?;
        ensure_eq!(output.code, 7, "exec: {}", output.told());
        bundle.end()?;
    }
    Ok(())
}

fn an_agent_is_asked_about_what_a_hook_does() -> Result {
    let socket = AgentSocket::new()?;
    let mut bundle = filtered(asking(&socket), &["call", &getpgid()])?;
    let args = json!(["inside", "call", getpgid()]);
    bundle.set(
        "/hooks/startContainer",
        json!([{ "path": "/bin/inside", "args": args }]),
    );
    let running = bundle.call(&["run"])?.start()?;
    let asked = socket.accept()?;
    for asker in ["hook", "program"] {
        let call = i64::from(asked.answer(libc::EDOM)?);
        ensure_eq!(call, libc::SYS_getpgid, "call of the {asker}");
    }
    let output = running.end_within(deadline())?;
    ensure_eq!(output.text(), "EDOM", "what the program's call gave");
    Ok(())
}

/// The filter forbids the process to report it by a message.
fn a_hook_that_fails_under_an_agent_is_reported() -> Result {
    let socket = AgentSocket::new()?;
    let mut profile = asking(&socket);
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
            "{}",
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

fn an_agent_that_went_away_is_reported_by_start() -> Result {
    // With NOTIFY, the process cannot even end by a system call.
    for default in ["SCMP_ACT_ALLOW", "SCMP_ACT_NOTIFY"] {
        let socket = AgentSocket::new()?;
        let path = socket.path();
        let mut profile = asking(&socket);
        profile["defaultAction"] = json!(default);
        let bundle = filtered(profile, &["exit", "0"])?;
        bundle.call(&["create"])?.ok()?;
        drop(socket);
        let output = bundle.call(&["start"])?.exits(1)?;
        ensure!(output.stderr.contains(&path), "{}", output.told());
        bundle.wait_status("stopped")?;
        bundle.delete()?;
        let output = bundle.call(&["create"])?.exits(1)?;
        ensure!(output.stderr.contains(&path), "{}", output.told());
    }
    Ok(())
}

fn an_agent_is_asked_about_what_exec_runs() -> Result {
    let socket = AgentSocket::new()?;
    let bundle = filtered(asking(&socket), &["sleep", "60"])?;
    bundle.start()?;
    let of_container = socket.accept()?;
    let running = bundle.exec(&[], &["call", &getpgid()]).start()?;
    let asked = socket.accept()?;
    ensure_eq!(asked.state["state"]["status"], "running", "status");
    ensure_eq!(
        asked.state["state"]["pid"],
        of_container.state["pid"],
        "the container's pid"
    );
    ensure!(
        asked.state["pid"] != of_container.state["pid"],
        "exec's pid"
    );
    asked.answer(libc::EDOM)?;
    let output = running.end_within(deadline())?;
    ensure_eq!(output.text(), "EDOM", "what the call gave");
    bundle.end()?;
    Ok(())
}

fn an_agent_that_is_not_there_is_told() -> Result {
    let socket = AgentSocket::new()?;
    let profile = asking(&socket);
    let path = socket.path();
    drop(socket);
    let output = filtered(profile, &["exit", "0"])?.call(&["run"])?.end()?;
    ensure_eq!(output.code, 1, "exit code");
    ensure!(output.stderr.contains(&path), "{}", output.told());
    Ok(())
}
