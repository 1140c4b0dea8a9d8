//! The reaping of child processes, and the handling of their exits.
//!
//! A container can give the monitor thousands of children that the monitor does not know: siblings
//! of its processes (CLONE_PARENT of clone(2)), and threads that make the monitor their tracer
//! (PTRACE_TRACEME of ptrace(2)). For each exit that it reports, wait(2) searches all of them. The
//! container can create them as fast as the monitor reaps them, so the monitor would never return to
//! its other events. For this reason, the monitor reaps only a limited number of unknown children
//! in a period. Beyond this number, it ignores SIGCHLD for some time. In this time, it asks for the
//! exit of each child that it knows, and reaps unknown children only now and then.

use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::process::{Pid, WaitOptions, WaitStatus, wait, waitpid};

use super::super::exit;
use super::super::own_log;
use super::super::poller::EventSource;
use super::Monitor;
use rrun_kernel::process_stat::exit_code_of_zombie;

/// The number of unknown children that the monitor reaps in a [`PERIOD`] before it ignores SIGCHLD.
const MAX_UNKNOWN: u32 = 64;

/// The period in which [`MAX_UNKNOWN`] is counted.
const PERIOD: Duration = Duration::from_millis(100);

/// The time between two searches for exited children while the monitor ignores SIGCHLD.
const INTERVAL: Duration = Duration::from_millis(25);

/// The time after which a search ends as soon as it has found an unknown child.
const MAX_SEARCH_TIME: Duration = Duration::from_millis(5);

/// The progress of the reaping.
pub(super) struct Reaping {
    /// The begin of the current [`PERIOD`], and the number of unknown children in it.
    period: Instant,
    unknown: u32,
    /// The time of the next search, if the monitor ignores SIGCHLD.
    next: Option<Instant>,
}

impl Reaping {
    pub(super) fn new() -> Self {
        Reaping {
            period: Instant::now(),
            unknown: 0,
            next: None,
        }
    }

    /// Returns the time at which [`Monitor::continue_reaping`] must be called again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Counts an unknown child of the search that began at `begun`. Returns whether the search may
    /// continue.
    fn count(&mut self, begun: Instant, now: Instant) -> bool {
        if now.duration_since(self.period) >= PERIOD {
            (self.period, self.unknown) = (now, 0);
        }
        self.unknown += 1;
        let are_few = self.next.is_some() || self.unknown < MAX_UNKNOWN;
        are_few && now.duration_since(begun) < MAX_SEARCH_TIME
    }
}

impl Monitor {
    /// Handles SIGCHLD.
    pub(super) fn reap(&mut self) {
        // If another signal is pending, the descriptor remains readable.
        let _ = self.signals.read_signal();
        if self.reaping.next.is_none() && !self.reap_children() {
            let flags = EventFlags::empty();
            self.poller
                .modify(&self.signals, EventSource::Signals, flags);
            self.reaping.next = Some(Instant::now() + INTERVAL);
        }
    }

    /// Searches for exited children if the monitor ignores SIGCHLD and the time of the next search
    /// has come.
    pub(super) fn continue_reaping(&mut self, now: Instant) {
        if self.reaping.next.is_none_or(|next| now < next) {
            return;
        }
        for pid in self.known_children() {
            self.reap_child(pid);
        }
        if self.reap_children() {
            self.reaping.next = None;
            self.poller
                .modify(&self.signals, EventSource::Signals, EventFlags::IN);
        } else {
            self.reaping.next = Some(Instant::now() + INTERVAL);
        }
    }

    /// Reaps the children that have exited. Returns false if there can be more of them, because the
    /// search ended early.
    fn reap_children(&mut self) -> bool {
        let begun = Instant::now();
        let mut is_complete = true;
        while is_complete && let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            is_complete =
                self.child_changed(pid, status) || self.reaping.count(begun, Instant::now());
        }
        if self.calls.is_empty() {
            self.early_exits.clear();
        }
        is_complete
    }

    /// Reaps the child with this pid if it has exited. The kernel finds the child without a search.
    fn reap_child(&mut self, pid: i32) {
        if let Some(pid) = Pid::from_raw(pid)
            && let Ok(Some((pid, status))) = waitpid(Some(pid), WaitOptions::NOHANG)
        {
            self.child_changed(pid, status);
        }
    }

    /// Handles the kernel's report that a container's first process has exited. Usually, SIGCHLD
    /// follows. If another process traces the first process, the kernel sends SIGCHLD only when it
    /// no longer traces it.
    pub(super) fn init_died(&mut self, serial: u64) {
        if let Some(container) = self.containers.get_mut(&serial) {
            container.pidfd = None;
            container.expect_exit();
        }
    }

    /// Handles a container whose first process the monitor has not reaped, after the time
    /// [`Container::next_check`] has passed.
    pub(super) fn init_due(&mut self, serial: u64, now: Instant) {
        let Some(container) = self.containers.get_mut(&serial) else {
            return;
        };
        if !container.is_zombie_check_due(now) {
            return self.act_on(serial, |it| it.check_deletion(now));
        }
        let pid = container.pid;
        self.reap_child(pid);
        if let Some(container) = self.containers.get(&serial).filter(|it| it.is_init(pid))
            && let Some(status) = exit_code_of_zombie(pid)
        {
            own_log::write(&format!(
                "container {}: the monitor cannot reap the first process (pid {pid}), which has exited, because another process traces it",
                container.id()
            ));
            self.init_exited(serial, exit::code_of_raw(status));
        }
    }

    /// Handles the killed execs whose processes have exited, but cannot be reaped because another
    /// process traces them. The monitor reaps these processes after the end of the trace.
    pub(super) fn check_killed_execs(&mut self, now: Instant) {
        for pid in self.execs.due_zombie_checks(now) {
            self.reap_child(pid);
            if let Some(status) = exit_code_of_zombie(pid)
                && let Some(process) = self.execs.take_running(pid)
            {
                self.exec_exited(process, exit::code_of_raw(status));
            }
        }
    }

    fn known_children(&self) -> Vec<i32> {
        let containers = self.containers.values().filter(|it| it.has_init());
        let children = containers.map(|container| container.pid);
        children
            .chain(self.calls.pids())
            .chain(self.execs.pids())
            .chain(self.pod.pause())
            .collect()
    }

    /// Handles the status of a child. Returns whether a child that the monitor knows has exited.
    fn child_changed(&mut self, pid: Pid, status: WaitStatus) -> bool {
        let code = exit::code(status);
        code.is_some_and(|code| self.child_ended(pid.as_raw_nonzero().get(), code))
    }

    fn child_ended(&mut self, pid: i32, code: i32) -> bool {
        if let Some((call, purpose)) = self.calls.remove(pid) {
            self.call_ended(&call, purpose, code);
        } else if let Some(process) = self.execs.take_running(pid) {
            self.exec_exited(process, code);
        } else if let Some(container) = self.containers.values().find(|it| it.is_init(pid)) {
            let serial = container.serial;
            self.init_exited(serial, code);
        } else if self.pod.pause() == Some(pid) {
            self.pause_exited(code);
        } else {
            if !self.calls.is_empty() {
                self.early_exits.add(pid, code);
            }
            return false;
        }
        true
    }

    fn pause_exited(&mut self, code: i32) {
        own_log::write(&format!("the pod's pause process exited with code {code}"));
        (self.pod.pid1, self.pod.holder) = (None, None);
        // The clients subscribe again, and the next Hello no longer contains the pause process. Older
        // clients support this, too. They would not support a new event.
        for client in self.clients.subscribers() {
            self.disconnect(client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_unknown_children_end_a_search() {
        let mut reaping = Reaping::new();
        let begun = reaping.period;
        for _ in 1..MAX_UNKNOWN {
            assert!(reaping.count(begun, begun));
        }
        assert!(!reaping.count(begun, begun));
        let later = begun + PERIOD;
        assert!(reaping.count(later, later));
        assert!(!reaping.count(later, later + MAX_SEARCH_TIME));
        // While the monitor ignores SIGCHLD, only the time limits a search.
        reaping.next = Some(later);
        for _ in 0..2 * MAX_UNKNOWN {
            assert!(reaping.count(later, later));
        }
        assert!(!reaping.count(later, later + MAX_SEARCH_TIME));
    }
}
