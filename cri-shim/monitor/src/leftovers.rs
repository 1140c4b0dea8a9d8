//! The cgroups of execs that have exited and left processes behind.
//!
//! The kernel reports when a watched cgroup has become empty. Each watched cgroup needs a
//! descriptor, so the number of watched cgroups is limited. The monitor examines the other cgroups
//! from time to time.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::exec_cgroup::{ExecCgroup, WatchedCgroup};
use super::poller::{EventSource, Poller};
use super::serials::Serials;

/// The maximum number of watched cgroups.
const MAX_WATCHED: usize = 64;

/// The maximum number of cgroups in one examination.
const MAX_EXAMINED: usize = 256;

/// The shortest time between two examinations. After an examination that removed no cgroup, the
/// time is doubled.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// The longest time between two examinations.
const MAX_INTERVAL: Duration = Duration::from_secs(64);

#[derive(Default)]
pub(crate) struct Leftovers {
    /// The watched cgroups, with the number in [`EventSource::ExecCgroup`] as the key.
    watched: BTreeMap<u64, WatchedCgroup>,
    /// The other cgroups. The first cgroup has waited longest for its examination.
    unwatched: VecDeque<ExecCgroup>,
    /// The time of the next examination. `None` if all cgroups are watched.
    next_examination: Option<Instant>,
    interval: Duration,
}

impl Leftovers {
    /// Removes the cgroup of an exec whose first process has exited. If the cgroup still contains
    /// processes, removes it after these processes have exited.
    pub(crate) fn add(
        &mut self,
        cgroup: ExecCgroup,
        now: Instant,
        poller: &Poller,
        serials: &mut Serials,
    ) {
        if cgroup.remove_if_empty() {
            return;
        }
        self.keep(cgroup, poller, serials);
        if !self.unwatched.is_empty() {
            self.interval = MIN_INTERVAL;
            let soon = now + MIN_INTERVAL;
            let next = self.next_examination.map_or(soon, |next| next.min(soon));
            self.next_examination = Some(next);
        }
    }

    fn keep(&mut self, cgroup: ExecCgroup, poller: &Poller, serials: &mut Serials) {
        if self.watched.len() >= MAX_WATCHED {
            return self.unwatched.push_back(cgroup);
        }
        let watched = match WatchedCgroup::open(cgroup) {
            Ok(watched) => watched,
            Err(cgroup) => return self.unwatched.push_back(cgroup),
        };
        if watched.is_gone() {
            return;
        }
        let number = serials.next();
        match poller.watch(&watched, EventSource::ExecCgroup(number), EventFlags::PRI) {
            Ok(()) => drop(self.watched.insert(number, watched)),
            Err(_) => self.unwatched.push_back(watched.into_cgroup()),
        }
    }

    /// Handles the kernel's report about a watched cgroup.
    pub(crate) fn changed(&mut self, number: u64) {
        let watched = self.watched.get(&number);
        if watched.is_some_and(WatchedCgroup::is_gone) {
            self.watched.remove(&number);
        }
    }

    /// Returns the time at which [`Leftovers::examine`] must be called again.
    pub(crate) fn next_examination(&self) -> Option<Instant> {
        self.next_examination
    }

    /// Removes those of the other cgroups that have become empty. Watches some of these cgroups if
    /// fewer than [`MAX_WATCHED`] cgroups are watched. Does nothing before the time of the next
    /// examination.
    pub(crate) fn examine(&mut self, now: Instant, poller: &Poller, serials: &mut Serials) {
        if self.next_examination.is_none_or(|next| now < next) {
            return;
        }
        let before = self.unwatched.len();
        let examined = self.unwatched.drain(..before.min(MAX_EXAMINED));
        for cgroup in examined.collect::<Vec<_>>() {
            if !cgroup.remove_if_empty() {
                self.keep(cgroup, poller, serials);
            }
        }
        self.interval = if self.unwatched.len() < before {
            MIN_INTERVAL
        } else {
            (self.interval * 2).min(MAX_INTERVAL)
        };
        let next = now + self.interval;
        self.next_examination = (!self.unwatched.is_empty()).then_some(next);
    }

    /// Forgets the cgroups below the cgroup `container`, which has been removed.
    pub(crate) fn container_gone(&mut self, container: &Path) {
        self.watched
            .retain(|_, watched| !watched.cgroup().is_below(container));
        self.unwatched.retain(|cgroup| !cgroup.is_below(container));
    }
}
