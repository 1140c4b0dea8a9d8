//! Exit statuses of children that ended before their runtime reported their pid.

use std::collections::VecDeque;

/// The most exit statuses that are kept; the oldest go first.
const MAX_EARLY_EXITS: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct EarlyExits(VecDeque<(i32, i32)>);

impl EarlyExits {
    pub(crate) fn add(&mut self, pid: i32, code: i32) {
        if self.0.len() >= MAX_EARLY_EXITS {
            self.0.pop_front();
        }
        self.0.push_back((pid, code));
    }

    /// Takes the exit status of a child whose pid has become known now, if it has ended already.
    pub(crate) fn claim(&mut self, pid: i32) -> Option<i32> {
        let at = self.0.iter().rposition(|(ended, _)| *ended == pid)?;
        self.0.remove(at).map(|(_, code)| code)
    }

    /// No runtime is at work: nobody will claim what is here.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}
