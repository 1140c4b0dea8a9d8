//! Pinned images, which kubelet's garbage collection does not remove.

use serde::{Deserialize, Serialize};

use crate::record::Image;
use crate::reference::Name;

/// The name patterns of pinned images. rrun-cri reports these images to kubelet as pinned. The
/// garbage collection of kubelet does not remove pinned images. An explicit request to remove a
/// pinned image still removes it, as in containerd and CRI-O.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<String>", into = "Vec<String>")]
pub struct Pins {
    patterns: Vec<String>,
}

impl From<Vec<String>> for Pins {
    /// Creates pins from image names in which `*` matches any text. A name without a registry
    /// refers to Docker Hub.
    fn from(patterns: Vec<String>) -> Self {
        let full = |pattern: String| match Name::parse(&pattern) {
            Ok(name) => name.canonical(),
            Err(_) => pattern,
        };
        Pins {
            patterns: patterns.into_iter().map(full).collect(),
        }
    }
}

impl From<Pins> for Vec<String> {
    fn from(pins: Pins) -> Self {
        pins.patterns
    }
}

impl Pins {
    pub fn hold(&self, image: &Image) -> bool {
        let mut names = image.repo_tags.iter().chain(&image.repo_digests);
        names.any(|name| self.hold_name(name))
    }

    /// Returns whether a pattern matches `name`, which is a complete tag or digest reference.
    pub(crate) fn hold_name(&self, name: &str) -> bool {
        self.patterns.iter().any(|pattern| matches(pattern, name))
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = name.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.find(part).and_then(|at| rest.get(at + part.len()..)) {
            Some(after) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_matches_any_text() {
        for (pattern, name, is) in [
            ("r.io/pause:3.9", "r.io/pause:3.9", true),
            ("r.io/pause:3.9", "r.io/pause:3.91", false),
            ("r.io/pause:*", "r.io/pause:3.91", true),
            ("r.io/pause*", "r.io/pause@sha256:0", true),
            ("*", "anything", true),
            ("*pause*", "r.io/pause:1", true),
            ("r.io/*/app:*", "r.io/a/b/app:1", true),
            ("r.io/*/app:*", "r.io/app:1", false),
            ("a*a", "a", false),
            ("", "a", false),
        ] {
            assert_eq!(
                matches(pattern, name),
                is,
                "whether the pattern {pattern:?} matches the image name {name:?}"
            );
        }
    }

    #[test]
    fn short_names_refer_to_docker_hub() {
        assert_eq!(
            Pins::from(vec!["busybox".to_owned(), "*pause*".to_owned()]).patterns,
            ["docker.io/library/busybox:latest", "*pause*"]
        );
    }
}
