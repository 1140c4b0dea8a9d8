//! Numbers by which clients, containers and execs are known within a monitor.

/// Gives each number once.
#[derive(Debug, Default)]
pub(crate) struct Serials(u64);

impl Serials {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
}
