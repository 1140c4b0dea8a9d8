//! Which levels pods have: a pair of categories for each, that no other pod has.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard};

use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;

/// The levels that pods have, and how many of them.
pub(crate) struct Categories {
    /// Pairs are of c0 up to, and without, this one.
    range: u16,
    held: Mutex<HashMap<String, usize>>,
}

/// A level that no new pod is given until this is dropped.
pub(crate) struct LevelHold {
    categories: Arc<Categories>,
    level: String,
}

impl Categories {
    pub(crate) fn new(range: u16) -> Self {
        Categories {
            range,
            held: Mutex::default(),
        }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        lock(&self.held)
    }

    /// This level, whoever has it besides.
    pub(crate) fn hold(self: &Arc<Self>, level: &str) -> LevelHold {
        *self.held().entry(level.to_owned()).or_default() += 1;
        self.of(level)
    }

    /// One that nobody holds. The search begins where the pod's id, a random number, says: what a
    /// pod has left behind is not the next one's.
    pub(crate) fn unique(self: &Arc<Self>, id: &str) -> Result<LevelHold> {
        let range = u64::from(self.range);
        let all = range * range.saturating_sub(1) / 2;
        let digits = id.get(..8).unwrap_or_default();
        let begin = u64::from_str_radix(digits, 16).unwrap_or_default();
        let mut held = self.held();
        for step in 0..all {
            let (first, second) = pair(range, (begin + step) % all);
            let level = format!("s0:c{first},c{second}");
            if let Entry::Vacant(free) = held.entry(level.clone()) {
                free.insert(1);
                return Ok(self.of(&level));
            }
        }
        Err(Error::wrong_state(format!(
            "all {all} pairs of {range} SELinux categories (selinux_category_range) belong to pods"
        )))
    }

    fn of(self: &Arc<Self>, level: &str) -> LevelHold {
        LevelHold {
            categories: Arc::clone(self),
            level: level.to_owned(),
        }
    }
}

impl LevelHold {
    pub(crate) fn level(&self) -> &str {
        &self.level
    }
}

impl Drop for LevelHold {
    fn drop(&mut self) {
        let mut held = self.categories.held();
        if let Some(count) = held.get_mut(&self.level) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.level);
            }
        }
    }
}

/// The pair of this number among those of `range` categories, the lower one first: a category
/// twice would be another pod's pair to a kernel that leaves the second one out.
fn pair(range: u64, mut number: u64) -> (u64, u64) {
    let mut first = 0;
    while number >= range - 1 - first {
        number -= range - 1 - first;
        first += 1;
    }
    (first, first + 1 + number)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_pairs_are_all_there_are() {
        let pairs: BTreeSet<_> = (0..6).map(|number| pair(4, number)).collect();
        let all = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)];
        assert_eq!(pairs, BTreeSet::from(all));
        assert_eq!(pair(1024, 523_775), (1022, 1023));
    }

    #[test]
    fn no_two_have_the_same_and_what_is_let_go_is_given_again() -> Result<()> {
        let categories = Arc::new(Categories::new(4));
        let explicit = categories.hold("s0:c1,c2");
        let twice = categories.hold("s0:c1,c2");
        drop(twice);
        let mut all = Vec::new();
        for id in ["ffffffff01", "ffffffff02", "00000000", "odd", "7"] {
            all.push(categories.unique(id)?);
        }
        let levels: BTreeSet<&str> = all.iter().map(LevelHold::level).collect();
        assert_eq!(levels.len(), 5);
        assert!(!levels.contains(explicit.level()));
        let full = categories.unique("0");
        assert!(full.is_err_and(|error| error.sentence().contains("selinux_category_range")));
        let freed = all.remove(2).level().to_owned();
        assert_eq!(categories.unique("12345678")?.level(), freed);
        Ok(())
    }
}
