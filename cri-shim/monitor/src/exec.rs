//! Processes that are started in a running container.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::epoll::EventFlags;

use super::connection::{ClientId, Role};
use super::console::Console;
use super::container::{State, read_pid};
use super::descendants;
use super::exec_cgroup::{ExecCgroup, MAX_KEPT};
use super::own_log;
use super::runtime::{Call, Stdio, memory_file, path_of};
use super::serve::{Monitor, Purpose, Source};
use rrun_kernel::errno::describe;
use rrun_protocol::{Exec, FailureKind, Reply};

/// An exec whose runtime is still at work.
pub(crate) struct Starting {
    client: ClientId,
    serial: u64,
    pid_file: PathBuf,
    console: Option<Console>,
    own: Option<ExecCgroup>,
}

/// An exec's process.
pub(crate) struct Running {
    client: ClientId,
    pid: i32,
    /// The container's first process and its cgroup.
    init: i32,
    cgroup: PathBuf,
    /// Its own cgroup, where there could be one.
    own: Option<ExecCgroup>,
}

impl Monitor {
    pub(super) fn exec(&mut self, client: ClientId, exec: &Exec, fds: &[OwnedFd]) {
        let number = self.number();
        let Some(container) = self.containers.iter().find(|c| c.id() == exec.id) else {
            return self.not_found(client, &exec.id);
        };
        if !matches!(container.state, State::Running) {
            let message = format!("exec in container {}: it is not running", exec.id);
            return self.fail(client, FailureKind::WrongState, message);
        }
        let (serial, command) = (container.serial, container.spec.runtime.clone());
        let pid_file = self.dir.join(format!("exec-{number}.pid"));
        // What runs in a kernel of its own is in no cgroup of this one.
        let own = match container.spec.native {
            true => ExecCgroup::make(&container.spec.cgroup, number),
            false => None,
        };
        let paths = Paths {
            number,
            pid_file: &pid_file,
            cgroup: own.as_ref().map(ExecCgroup::name),
        };
        match start(&command, exec, fds, &paths, self.timeout) {
            Ok((call, console)) => {
                let starting = Starting {
                    client,
                    serial,
                    pid_file,
                    console,
                    own,
                };
                self.calls.insert(call.pid, (call, Purpose::Exec(starting)));
            }
            Err(error) => {
                let message = format!("exec in container {}: {}", exec.id, describe(&error));
                self.fail(client, FailureKind::Monitor, message);
            }
        }
    }

    pub(super) fn exec_started(&mut self, starting: Starting, call: &Call, code: i32) {
        let client = starting.client;
        let pid = read_pid(&starting.pid_file);
        let _ = std::fs::remove_file(&starting.pid_file);
        let (init, cgroup) = self
            .containers
            .iter()
            .find(|container| container.serial == starting.serial)
            .map(|container| (container.pid, container.spec.cgroup.clone()))
            .unwrap_or_default();
        let own = starting.own;
        let running = |pid, own| Running {
            client,
            pid,
            init,
            cgroup,
            own,
        };
        let pid = match pid {
            Some(pid) if code == 0 => pid,
            started => {
                let mut reason = call.reason(code, None);
                if code == 0 {
                    reason = "the runtime started a process, but did not tell its pid".into();
                }
                self.fail(client, FailureKind::Runtime, reason);
                // A runtime that was killed for its slowness may have got that far.
                match started {
                    Some(pid) if self.claim(pid).is_none() => {
                        let running = running(pid, own);
                        running.kill();
                        self.exec_left(running.own);
                    }
                    _ => {
                        if let Some(own) = &own {
                            own.kill();
                        }
                        self.exec_left(own);
                    }
                }
                return;
            }
        };
        let running = running(pid, own);
        let ended = self.claim(pid);
        let master = starting.console.as_ref().map(Console::receive).transpose();
        match master {
            Ok(master) => {
                let fds = master.into_iter().collect();
                self.send(client, Role::Waiting, &Reply::Started { pid }, fds);
            }
            Err(errno) => {
                let said = describe(&errno.into());
                let message = format!("take the terminal of an exec: {said}");
                self.fail(client, FailureKind::Monitor, message);
                running.kill();
            }
        }
        match ended {
            Some(code) => self.exec_ended(running, code),
            None => {
                if !self.has_client(client) {
                    running.kill();
                }
                self.execs.insert(pid, running);
            }
        }
    }

    pub(super) fn exec_ended(&mut self, running: Running, code: i32) {
        self.reply(running.client, &Reply::Exited { code });
        self.exec_left(running.own);
    }

    /// An exec's cgroup goes now, or when what was left in it has ended.
    fn exec_left(&mut self, own: Option<ExecCgroup>) {
        let Some(left) = own.and_then(ExecCgroup::left) else {
            return;
        };
        if left.is_gone() || self.left.len() >= MAX_KEPT {
            return;
        }
        let number = self.number();
        if self
            .watch(&left, Source::ExecCgroup(number), EventFlags::PRI)
            .is_ok()
        {
            self.left.insert(number, left);
        }
    }

    pub(super) fn exec_cgroup_changed(&mut self, number: u64) {
        if self.left.get(&number).is_some_and(|left| left.is_gone()) {
            self.left.remove(&number);
        }
    }

    /// The client is gone, and so nobody who would end or read its process.
    pub(super) fn exec_client_gone(&mut self, client: ClientId) {
        for running in self.execs.values() {
            if running.client == client {
                running.kill();
            }
        }
    }
}

impl Running {
    /// Kills the process, which has not been reaped, and what came from it.
    fn kill(&self) {
        if self.own.as_ref().is_some_and(ExecCgroup::kill) {
            return;
        }
        if !descendants::kill(&self.cgroup, self.pid, self.init) {
            let pid = self.pid;
            own_log::write(&format!("exec {pid} forks faster than it can be killed"));
        }
    }
}

/// What an exec's runtime is told of by name.
struct Paths<'a> {
    /// Of the exec; its console's socket has it in its name.
    number: u64,
    pid_file: &'a Path,
    /// From the container's own.
    cgroup: Option<&'a str>,
}

fn start(
    command: &[String],
    exec: &Exec,
    fds: &[OwnedFd],
    paths: &Paths<'_>,
    timeout: std::time::Duration,
) -> std::io::Result<(Call, Option<Console>)> {
    let process = OwnedFd::from(memory_file("process", exec.process.as_bytes())?);
    let console = exec
        .terminal
        .then(|| Console::open(paths.number))
        .transpose()?;
    let stdio = match fds {
        [] if exec.terminal => Stdio::Log,
        [stdin, stdout, stderr] if !exec.terminal => {
            Stdio::Container([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])
        }
        _ => {
            let count = fds.len();
            let message = format!("{count} descriptors came with the request");
            return Err(std::io::Error::other(message));
        }
    };
    let process_path = path_of(&process);
    let console_path = console.as_ref().map(Console::path);
    let mut arguments: Vec<&OsStr> = vec![
        "--detach".as_ref(),
        "--process".as_ref(),
        process_path.as_ref(),
        "--pid-file".as_ref(),
        paths.pid_file.as_ref(),
    ];
    if let Some(path) = &console_path {
        arguments.extend(["--console-socket".as_ref(), path.as_os_str()]);
    }
    if let Some(cgroup) = paths.cgroup {
        arguments.extend([OsStr::new("--cgroup"), OsStr::new(cgroup)]);
    }
    arguments.push(exec.id.as_ref());
    let call = Call::start(
        command,
        "exec",
        &exec.id,
        &arguments,
        &stdio,
        Some(process),
        timeout,
    )?;
    Ok((call, console))
}
