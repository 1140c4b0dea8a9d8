//! Selects the annotations that are passed to a runtime handler, according to the patterns in the
//! handler's configuration.

use std::collections::BTreeMap;

use crate::config::RuntimeHandler;

/// Returns the annotations of the pod and the container that match the handler's patterns. If the
/// pod and the container set the same annotation, the container's value is used.
pub(crate) fn chosen(
    handler: &RuntimeHandler,
    pod: &BTreeMap<String, String>,
    container: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let through = |patterns: &[String], all: &BTreeMap<String, String>| {
        let one = |name: &str| patterns.iter().any(|pattern| matches(pattern, name));
        let all = all.iter().filter(|(name, _)| one(name));
        all.map(|(name, value)| (name.clone(), value.clone()))
            .collect::<BTreeMap<_, _>>()
    };
    let mut chosen = through(&handler.pod_annotations, pod);
    chosen.extend(through(&handler.container_annotations, container));
    chosen
}

/// Returns whether a pattern matches the whole text. The character `*` matches any number of
/// characters, `?` matches one character, and any other character matches itself.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    // `p` is an index into the pattern, and `t` is an index into the text. `star` contains two
    // indices: the index of the last `*` in the pattern, and the index of the end of its match in
    // the text.
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == '?' || Some(c) == text.get(t) => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, swallowed)) => {
                    star = Some((at, swallowed + 1));
                    p = at + 1;
                    t = swallowed + 1;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_and_question_marks_match_other_characters() {
        for (pattern, text, expected) in [
            ("io.katacontainers.*", "io.katacontainers.config", true),
            ("io.katacontainers.*", "io.kata", false),
            ("*.devices/*", "a.b.devices/x", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*", "", true),
            ("exact", "exactly", false),
        ] {
            assert_eq!(
                matches(pattern, text),
                expected,
                "whether the pattern {pattern:?} matches {text:?}"
            );
        }
    }

    #[test]
    fn only_annotations_that_match_a_pattern_are_passed_on() {
        let handler = RuntimeHandler {
            path: "r".into(),
            options: Vec::new(),
            native: true,
            pod_annotations: vec!["p.*".into()],
            container_annotations: vec!["c.*".into()],
        };
        let of = |names: &[&str], value: &str| -> BTreeMap<String, String> {
            let pairs = names.iter();
            pairs
                .map(|name| ((*name).to_owned(), value.to_owned()))
                .collect()
        };
        let pod = of(&["p.1", "c.1"], "pod");
        let container = of(&["p.1", "c.1", "d.1"], "container");
        let chosen = chosen(&handler, &pod, &container);
        assert_eq!(chosen.len(), 2);
        assert_eq!(chosen["p.1"], "pod");
        assert_eq!(chosen["c.1"], "container");
    }
}
