//! Lists and objects in JSON documents, of which only a limited number of entries is kept in memory.

use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The first `MOST` entries of a JSON array, and the number of all its entries. The further entries
/// occupy no memory.
#[derive(Debug)]
pub(crate) struct LimitedList<T, const MOST: usize> {
    pub entries: Vec<T>,
    pub count: usize,
}

/// The keys of a JSON object, with the same limit.
#[derive(Debug)]
pub(crate) struct LimitedKeys<const MOST: usize> {
    pub keys: BTreeSet<String>,
    pub count: usize,
}

impl<T, const MOST: usize> Default for LimitedList<T, MOST> {
    fn default() -> Self {
        LimitedList {
            entries: Vec::new(),
            count: 0,
        }
    }
}

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for LimitedList<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ListVisitor(PhantomData))
    }
}

struct ListVisitor<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for ListVisitor<T, MOST> {
    type Value = LimitedList<T, MOST>;

    fn expecting(&self, text: &mut fmt::Formatter) -> fmt::Result {
        text.write_str("a sequence")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut all: A) -> Result<Self::Value, A::Error> {
        let mut list = LimitedList::default();
        while list.entries.len() < MOST {
            match all.next_element()? {
                Some(entry) => list.entries.push(entry),
                None => break,
            }
        }
        list.count = list.entries.len();
        while all.next_element::<IgnoredAny>()?.is_some() {
            list.count += 1;
        }
        Ok(list)
    }
}

impl<'de, const MOST: usize> Deserialize<'de> for LimitedKeys<MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(KeysVisitor)
    }
}

struct KeysVisitor<const MOST: usize>;

impl<'de, const MOST: usize> Visitor<'de> for KeysVisitor<MOST> {
    type Value = LimitedKeys<MOST>;

    fn expecting(&self, text: &mut fmt::Formatter) -> fmt::Result {
        text.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut all: A) -> Result<Self::Value, A::Error> {
        let mut keys = BTreeSet::new();
        while keys.len() < MOST {
            match all.next_entry::<String, IgnoredAny>()? {
                Some((key, _)) => keys.insert(key),
                None => break,
            };
        }
        let mut count = keys.len();
        while all.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            count += 1;
        }
        Ok(LimitedKeys { keys, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_permitted_number_of_entries_is_kept() -> Result<(), serde_json::Error> {
        for (text, kept, count) in [("[]", 0, 0), ("[1, 2]", 2, 2), ("[1, 2, 3, {}]", 2, 4)] {
            let list: LimitedList<u8, 2> = serde_json::from_str(text)?;
            assert_eq!((list.entries.len(), list.count), (kept, count), "{text}");
        }
        for (text, kept, count) in [
            ("{}", 0, 0),
            (r#"{"a": 1, "a": 2}"#, 1, 1),
            (r#"{"a": 1, "b": 2, "c": 3}"#, 2, 3),
        ] {
            let keys: LimitedKeys<2> = serde_json::from_str(text)?;
            assert_eq!((keys.keys.len(), keys.count), (kept, count), "{text}");
        }
        Ok(())
    }
}
