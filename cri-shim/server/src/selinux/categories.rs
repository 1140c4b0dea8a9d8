//! The SELinux levels of pods: each pod gets a pair of categories that no other pod has.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard};

use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;

/// The SELinux levels in use, and the number of reservations of each level.
pub(crate) struct Categories {
    /// The number of categories from which pairs are built. The first category is c0.
    range: u16,
    held: Mutex<HashMap<String, usize>>,
}

/// A reservation of an SELinux level. No new pod gets the level until all reservations of the level
/// are dropped.
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

    /// Reserves the level `level`, even if other pods have also reserved it.
    pub(crate) fn hold(self: &Arc<Self>, level: &str) -> LevelHold {
        *self.held().entry(level.to_owned()).or_default() += 1;
        self.of(level)
    }

    /// Reserves an SELinux level that no pod uses. The search starts with a pair of categories that
    /// depends on the pod's random id. A new pod therefore rarely gets the level of a removed pod.
    /// With that level, the new pod could read the removed pod's remaining files.
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
            "pods already use all {all} pairs of the {range} SELinux categories (selinux_category_range)"
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

/// Returns the pair with the index `number` in the list of all pairs of two different categories
/// below `range`. The lower category of the pair is first. The two categories of a pair must
/// differ. The kernel would shorten a pair of equal categories to one category. Other pods' pairs
/// can contain this category too, so those pods would have access to the pod's files.
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
    fn every_pair_of_categories_has_a_number() {
        let pairs: BTreeSet<_> = (0..6).map(|number| pair(4, number)).collect();
        let all = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)];
        assert_eq!(pairs, BTreeSet::from(all));
        assert_eq!(pair(1024, 523_775), (1022, 1023));
    }

    #[test]
    fn unique_levels_differ_and_a_released_level_is_used_again() -> Result<()> {
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
