//! Ids of pods and containers.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use rrun_calls::error::{During, Result};

/// Returns a new id: 64 hexadecimal digits from the kernel's random number generator.
pub(crate) fn new_id() -> Result<String> {
    let mut bytes = [0_u8; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut urandom| std::io::Read::read_exact(&mut urandom, &mut bytes))
        .during(|| "read random numbers from /dev/urandom".to_owned())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Returns the first 12 digits of an id, for log messages.
pub(crate) fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// Returns the entry whose id is `id`. A prefix of the id is sufficient if no other id has this
/// prefix.
pub(crate) fn by_prefix<T>(all: &BTreeMap<String, Arc<T>>, id: &str) -> Option<Arc<T>> {
    if let Some(found) = all.get(id) {
        return Some(Arc::clone(found));
    }
    if id.is_empty() {
        return None;
    }
    let mut matches = all
        .range::<str, _>((Bound::Included(id), Bound::Unbounded))
        .take_while(|(key, _)| key.starts_with(id));
    match (matches.next(), matches.next()) {
        (Some((_, found)), None) => Some(Arc::clone(found)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_finds_an_entry_only_if_it_is_unambiguous() {
        let all: BTreeMap<String, Arc<u32>> = [("ab1", 1), ("ab2", 2), ("c", 3)]
            .map(|(id, n)| (id.to_owned(), Arc::new(n)))
            .into();
        assert_eq!(by_prefix(&all, "ab1").as_deref(), Some(&1));
        assert_eq!(by_prefix(&all, "ab"), None);
        assert_eq!(by_prefix(&all, "c").as_deref(), Some(&3));
        assert_eq!(by_prefix(&all, ""), None);
        assert_eq!(by_prefix(&all, "d"), None);
    }

    #[test]
    fn ids_are_64_hexadecimal_digits() -> Result<()> {
        let id = new_id()?;
        assert_eq!(id.len(), 64);
        assert!(id.bytes().all(|b| b.is_ascii_hexdigit()));
        assert_ne!(id, new_id()?);
        Ok(())
    }
}
