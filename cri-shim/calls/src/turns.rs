//! Turns for threads that work for a long time, such as the removal of millions of files.
//!
//! Only one thread has the turn, and the threads get it in the order in which they began to wait. But
//! a system call of a thread can take very long: a container can make the kernel lock a directory for
//! minutes. If a thread does not end its turn in time, the next thread gets the turn.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::thread::{Thread, current, park_timeout, sleep};
use std::time::{Duration, Instant};

use crate::lock::lock;

pub struct Turns {
    times: TurnTimes,
    threads: Mutex<Threads>,
}

#[derive(Clone, Copy)]
pub struct TurnTimes {
    /// The length of a turn.
    pub turn: Duration,
    /// The time after the end of a turn at which the next thread gets the turn in any case.
    pub overtime: Duration,
    /// The time that a thread pauses after its turn.
    pub pause: Duration,
    /// If a thread has not ended its turn in time, it pauses for this number multiplied by the length
    /// of the turn, but at most for one minute. Its next turn will probably be late, too.
    pub late_pause_factor: u32,
}

const MAX_LATE_PAUSE: Duration = Duration::from_secs(60);

/// The threads, by numbers that are never used again.
#[derive(Default)]
struct Threads {
    /// The thread that has the turn, and the time at which the turn began.
    running: Option<(u64, Instant)>,
    waiting: VecDeque<(u64, Thread)>,
    last: u64,
}

impl Threads {
    /// Wakes the thread that gets the next turn.
    fn wake_next(&self) {
        if let Some((_, thread)) = self.waiting.front() {
            thread.unpark();
        }
    }
}

/// The turn of a thread. Dropping this value ends the turn.
pub struct Turn<'a> {
    turns: &'a Turns,
    number: u64,
    began: Instant,
}

impl Turns {
    pub fn new(times: TurnTimes) -> Self {
        Turns {
            times,
            threads: Mutex::default(),
        }
    }

    /// Waits for a turn. This call blocks.
    pub fn wait(&self) -> Turn<'_> {
        let number = {
            let mut threads = lock(&self.threads);
            threads.last += 1;
            let number = threads.last;
            threads.waiting.push_back((number, current()));
            number
        };
        loop {
            let left = self.try_begin(number);
            if left.is_zero() {
                break;
            }
            park_timeout(left);
        }
        Turn {
            turns: self,
            number,
            began: Instant::now(),
        }
    }

    /// Begins the turn of a waiting thread. If this is not possible yet, returns the time after which
    /// the thread must try again, unless it is woken before.
    fn try_begin(&self, number: u64) -> Duration {
        let mut threads = lock(&self.threads);
        if threads
            .waiting
            .front()
            .is_none_or(|(next, _)| *next != number)
        {
            return Duration::MAX;
        }
        if let Some((_, began)) = threads.running {
            let limit = self.times.turn + self.times.overtime;
            let left = limit.saturating_sub(began.elapsed());
            if !left.is_zero() {
                return left;
            }
        }
        threads.waiting.pop_front();
        threads.running = Some((number, Instant::now()));
        // The next thread must measure the time of this turn.
        threads.wake_next();
        Duration::ZERO
    }

    /// Ends the turn of a thread. Returns false if another thread has got the turn already.
    fn end(&self, number: u64) -> bool {
        let mut threads = lock(&self.threads);
        let had = threads
            .running
            .is_some_and(|(running, _)| running == number);
        if had {
            threads.running = None;
            threads.wake_next();
        }
        had
    }
}

impl Turn<'_> {
    /// Call this function between the steps of the work. If the turn is over, this call waits for the
    /// next turn, and blocks.
    pub fn go_on(&mut self) {
        let times = &self.turns.times;
        if self.began.elapsed() < times.turn {
            return;
        }
        let lasted = self.began.elapsed();
        let is_in_time = self.turns.end(self.number);
        sleep(if is_in_time {
            times.pause
        } else {
            MAX_LATE_PAUSE.min(lasted.saturating_mul(times.late_pause_factor))
        });
        *self = self.turns.wait();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.end(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::{scope, spawn};

    use super::*;

    const STEP: Duration = Duration::from_millis(1);

    fn turns() -> Turns {
        Turns::new(TurnTimes {
            turn: 10 * STEP,
            overtime: 10 * STEP,
            pause: Duration::ZERO,
            late_pause_factor: 0,
        })
    }

    #[test]
    fn threads_that_work_without_end_take_turns() {
        let turns = turns();
        let has_worked = [AtomicBool::new(false), AtomicBool::new(false)];
        scope(|scope| {
            for own in &has_worked {
                scope.spawn(|| {
                    let mut turn = turns.wait();
                    own.store(true, Ordering::Relaxed);
                    while !has_worked.iter().all(|one| one.load(Ordering::Relaxed)) {
                        sleep(STEP);
                        turn.go_on();
                    }
                });
            }
        });
        assert!(lock(&turns.threads).running.is_none());
    }

    #[test]
    fn a_thread_that_hangs_delays_the_next_one_only_until_its_turn_is_over() {
        let turns: &'static Turns = Box::leak(Box::new(turns()));
        let hanging = turns.wait();
        let number = spawn(|| turns.wait().number).join().unwrap_or_default();
        assert!(number > hanging.number);
        assert!(!turns.end(hanging.number), "the turn was not taken away");
    }
}
