//! Fair distribution of a limited amount among pods.

use std::collections::HashMap;

/// Returns the pod that must give up an entry so that the pod `newcomer` gets an entry of the size
/// `size`. This pod has more than any other pod. Returns `None` if this pod would then have less
/// than `newcomer`. `entries` contains the pod and the size of each entry.
pub(super) fn pod_with_most<'a>(
    entries: impl Iterator<Item = (&'a str, usize)>,
    newcomer: &str,
    size: usize,
) -> Option<&'a str> {
    let mut sums: HashMap<&str, usize> = HashMap::new();
    for (pod, size) in entries {
        *sums.entry(pod).or_default() += size;
    }
    let own = sums.get(newcomer).copied().unwrap_or_default();
    let (pod, most) = sums.into_iter().max_by_key(|(_, sum)| *sum)?;
    (most > own + size).then_some(pod)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_with_the_most_gives_up_an_entry() {
        let pod = |entries: &[(&'static str, usize)], newcomer: &str, size| {
            pod_with_most(entries.iter().copied(), newcomer, size)
        };
        assert_eq!(
            pod(&[("a", 1), ("a", 1), ("b", 1), ("a", 1)], "b", 1),
            Some("a")
        );
        assert_eq!(pod(&[("a", 1), ("a", 1), ("b", 1)], "c", 1), Some("a"));
        assert_eq!(pod(&[("a", 1), ("b", 1), ("a", 1), ("b", 1)], "b", 1), None);
        assert_eq!(pod(&[("a", 1), ("b", 1), ("c", 1)], "d", 1), None);
        assert_eq!(pod(&[("a", 4)], "a", 1), None);
        assert_eq!(pod(&[("a", 1), ("a", 1), ("b", 9)], "a", 1), Some("b"));
        assert_eq!(pod(&[("a", 3), ("b", 2)], "c", 9), None);
    }
}
