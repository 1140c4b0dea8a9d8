//! Fair distribution of a limited number of entries among pods.

use std::collections::HashMap;

/// Returns the pod that must give up an entry so that the pod `newcomer` gets an entry. This pod has
/// more entries than any other pod. Returns `None` if this pod would then have fewer entries than
/// `newcomer`. `pods` contains the pod of each entry.
pub(super) fn pod_with_most<'a>(
    pods: impl Iterator<Item = &'a str>,
    newcomer: &str,
) -> Option<&'a str> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for pod in pods {
        *counts.entry(pod).or_default() += 1;
    }
    let own = counts.get(newcomer).copied().unwrap_or_default();
    let (pod, most) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    (most > own + 1).then_some(pod)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_with_the_most_entries_gives_up_an_entry() {
        let pod = |pods: &str, newcomer: &str| {
            let pods: Vec<&str> = pods.split(' ').collect();
            pod_with_most(pods.into_iter(), newcomer).map(str::to_owned)
        };
        assert_eq!(pod("a a b a", "b").as_deref(), Some("a"));
        assert_eq!(pod("a a b", "c").as_deref(), Some("a"));
        assert_eq!(pod("a a b b", "b"), None);
        assert_eq!(pod("a b c", "d"), None);
        assert_eq!(pod("a a a a", "a"), None);
    }
}
