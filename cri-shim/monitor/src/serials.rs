//! Serial numbers that identify clients, containers and execs within a monitor.

/// A counter that returns each number once.
#[derive(Debug, Default)]
pub(crate) struct Serials(u64);

impl Serials {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
}
