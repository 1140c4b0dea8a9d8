//! The handling of execs and of the relays between processes and clients.

use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::termios::{Winsize, tcsetwinsize};

use super::super::connection::{ClientId, Stage};
use super::super::exec::{ExecProcess, StartedExec, StartedTerminal};
use super::super::exec_cgroup::ExecCgroup;
use super::super::relay::Relay;
use super::super::runtime::Call;
use super::Monitor;
use rrun_kernel::errno::describe;
use rrun_protocol::{Exec, FailureKind, Reply};

impl Monitor {
    pub(super) fn exec(&mut self, client: ClientId, exec: &Exec, fds: Vec<OwnedFd>) {
        let number = self.serials.next();
        let Some(container) = self.containers.values().find(|it| it.id() == exec.id) else {
            return self.not_found(client, &exec.id);
        };
        let dir = &self.pod.dir;
        let effects = self.execs.begin(number, client, exec, fds, container, dir);
        self.carry_out(effects);
    }

    pub(super) fn exec_call_ended(&mut self, number: u64, call: &Call, code: i32) {
        let Some(exec) = self.execs.take_starting(number) else {
            return;
        };
        match exec.finish(call, code) {
            Ok(started) => self.exec_started(started, call.started),
            Err(failed) => {
                self.fail(failed.client(), FailureKind::Runtime, failed.reason());
                let pid = failed.pid();
                let exited = pid.and_then(|pid| self.early_exits.claim(pid, call.started));
                let cgroup = failed.kill(exited.is_some(), &mut self.execs.killed);
                self.remove_exec_cgroup(cgroup);
            }
        }
    }

    /// Handles an exec that the runtime has started. `called` is the time of the runtime call.
    fn exec_started(&mut self, exec: StartedExec, called: Instant) {
        let StartedExec {
            mut process,
            terminal,
        } = exec;
        let (client, pid) = (process.client(), process.pid());
        let exited = self.early_exits.claim(pid, called);
        match terminal {
            Ok(terminal) => {
                let fds = match terminal {
                    None => Vec::new(),
                    Some(StartedTerminal::Passed(master)) => vec![master],
                    Some(StartedTerminal::Relayed(relays)) => {
                        relays.into_iter().for_each(|relay| self.begin_relay(relay));
                        Vec::new()
                    }
                };
                self.send(client, Stage::Working, &Reply::Started { pid }, fds);
            }
            Err(errno) => {
                let reason = describe(&errno.into());
                let message = format!("exec: receive the terminal from the runtime: {reason}");
                self.fail(client, FailureKind::Monitor, message);
                // If the process has been reaped, its pid may already belong to another process,
                // which must not be killed.
                if exited.is_none() {
                    process.kill(&mut self.execs.killed);
                }
            }
        }
        match exited {
            Some(code) => self.exec_exited(process, code),
            None => {
                if !self.clients.contains(client) {
                    process.kill(&mut self.execs.killed);
                }
                self.execs.add_running(process);
            }
        }
    }

    pub(super) fn exec_exited(&mut self, process: ExecProcess, code: i32) {
        let client = process.client();
        match self.relays.exec_exited(client, code, &self.poller) {
            Ok(true) => self.reply(client, &Reply::Exited { code }),
            Ok(false) => {}
            Err(errno) => self.relay_failed(client, errno),
        }
        self.remove_exec_cgroup(process.into_cgroup());
    }

    pub(super) fn resize(&mut self, client: ClientId, id: &str, exec: Option<i32>, size: Winsize) {
        let Some(container) = self.containers.values().find(|it| it.id() == id) else {
            return self.not_found(client, id);
        };
        let terminal = container.output.terminal();
        let resized = match exec {
            Some(pid) => match self.execs.client_of(pid, container.serial) {
                Some(client) => self.relays.resize(client, size),
                None => Err(Errno::SRCH),
            },
            None => match terminal.filter(|_| container.spec.terminal) {
                Some(master) => tcsetwinsize(master, size),
                None => Err(Errno::NOTTY),
            },
        };
        match resized {
            Ok(()) => self.reply(client, &Reply::Done),
            Err(errno) => {
                let of = exec
                    .map(|pid| format!("the process {pid} in "))
                    .unwrap_or_default();
                let reason = describe(&errno.into());
                let message = format!("resize the terminal of {of}container {id}: {reason}");
                self.fail(client, FailureKind::WrongState, message);
            }
        }
    }

    pub(super) fn begin_relay(&mut self, relay: Relay) {
        let (number, client) = (self.serials.next(), relay.client());
        if let Err(errno) = self.relays.begin(number, relay, &self.poller) {
            self.relay_failed(client, errno);
        }
    }

    /// Ends the exec or the attachment of a client of which a stream is incomplete.
    fn relay_failed(&mut self, client: ClientId, errno: Errno) {
        let reason = describe(&errno.into());
        let message = format!("transfer a stream between the container and the client: {reason}");
        self.fail(client, FailureKind::Monitor, message);
    }

    pub(super) fn relay_ready(&mut self, number: u64) {
        match self.relays.ready(number, &self.poller) {
            Some((client, Ok(code))) => self.reply(client, &Reply::Exited { code }),
            Some((client, Err(errno))) => self.relay_failed(client, errno),
            None => {}
        }
    }

    fn remove_exec_cgroup(&mut self, cgroup: Option<ExecCgroup>) {
        if let Some(cgroup) = cgroup {
            let (poller, serials) = (&self.poller, &mut self.serials);
            let now = Instant::now();
            self.execs.leftovers.add(cgroup, now, poller, serials);
        }
    }
}
