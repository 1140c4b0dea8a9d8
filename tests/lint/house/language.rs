//! Finds constructions that readers have to read twice. CONTRIBUTING.md lists these constructions
//! with plain rewrites.

use crate::sentences::{Kind, Sentence};

/// Words that must not begin a sentence, because the subject of such a sentence is not a noun.
const OPENINGS: &[&str] = &["Of", "Has", "Who", "Whom", "Whose", "Else", "Nor"];

/// Words that must not begin a doc comment. A comment with such a beginning does not name the
/// described item.
const DOC_OPENINGS: &[&str] = &["That", "Not", "By", "What", "Which", "None", "Only"];

/// Phrases that are hard to read, each with its plain replacement.
const PHRASES: &[(&str, &str)] = &[
    ("is none", "does not exist, or is not set"),
    ("are none", "do not exist, or are not set"),
    ("was none", "did not exist, or was not set"),
    ("is no", "is not a"),
    ("are no", "are not"),
    ("was no", "was not a"),
    ("by which", "with which, or a second sentence"),
    ("to be had", "available"),
    ("anew", "again"),
    ("all the same", "nevertheless, or nothing"),
    ("of its own", "its own, or separate"),
    ("of their own", "their own, or separate"),
    ("for want of", "for lack of"),
    ("as far as", "if, or where"),
    ("told", "reported, logged, or returned"),
    ("is told", "is reported, or is logged"),
    ("is said", "is specified"),
    ("is asked", "is requested"),
    ("is asked for", "is requested"),
    ("are asked for", "are requested"),
    ("asked for", "requested"),
    ("is looked for", "is searched"),
    ("is looked", "checks, with its subject"),
    ("whoever", "the process, caller or user that"),
    ("so much as", "even"),
    ("its like", "similar ones"),
    ("let alone", "a second sentence"),
];

/// Texts that are allowed to contain the phrases. Other programs write or match these texts.
const QUOTED: &[&str] = &[];

/// Returns a message that describes the fault of a sentence, with the sentence and its place.
/// Returns `None` if the sentence is plain.
pub(crate) fn complaint(sentence: &Sentence) -> Option<String> {
    if QUOTED.iter().any(|text| sentence.text.contains(text)) {
        return None;
    }
    let what = opening(sentence).or_else(|| phrase(&sentence.text))?;
    Some(format!(
        "{}:{}: {what}: {}",
        sentence.file,
        sentence.line(),
        sentence.text
    ))
}

fn opening(sentence: &Sentence) -> Option<String> {
    if matches!(sentence.kind, Kind::Text | Kind::TestName) {
        return None;
    }
    let mut words = sentence.text.split_whitespace();
    let first = words.next()?;
    // "Of 500 pods …" is an ordinary sentence: a number or a name follows its first word.
    if !words.next()?.starts_with(|c: char| c.is_ascii_lowercase()) {
        return None;
    }
    let banned = OPENINGS.contains(&first)
        || sentence.kind == Kind::DocOpening && DOC_OPENINGS.contains(&first);
    banned.then(|| format!("begins with the word {first:?}"))
}

fn phrase(text: &str) -> Option<String> {
    let words: Vec<String> = text.split_whitespace().map(bare).collect();
    let (phrase, plain) = PHRASES.iter().find(|(phrase, _)| {
        let phrase: Vec<&str> = phrase.split(' ').collect();
        let mut places = words.windows(phrase.len()).enumerate();
        // A phrase is allowed after "there". For example, "There is no …" is plain English.
        let there = |at: usize| at > 0 && words[at - 1] == "there";
        places.any(|(at, part)| part == phrase && !there(at))
    })?;
    Some(format!("contains {phrase:?}; write instead: {plain}"))
}

/// Returns a word in lower case without the punctuation around it. Returns an empty string for code
/// in backticks.
fn bare(word: &str) -> String {
    if word.contains('`') {
        return String::new();
    }
    let letters = word.trim_matches(|c: char| !c.is_alphanumeric());
    letters.to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint_of(kind: Kind, text: &str) -> Option<String> {
        complaint(&Sentence {
            file: "a.rs".to_owned(),
            lines: 6..7,
            kind,
            text: text.to_owned(),
        })
    }

    #[test]
    fn sentences_that_begin_without_a_subject_are_found() {
        for (kind, text) in [
            (Kind::DocOpening, "Of the process."),
            (Kind::Comment, "Who reads this."),
            (Kind::DocOpening, "What pods need."),
        ] {
            let found = complaint_of(kind, text).unwrap_or_default();
            assert!(found.starts_with("a.rs:7: begins with"), "{text}: {found}");
        }
        for (kind, text) in [
            (Kind::Comment, "Of 500 pods."),
            (Kind::Doc, "Not every kernel."),
            (Kind::Text, "Of the process."),
        ] {
            assert_eq!(complaint_of(kind, text), None, "{text}");
        }
    }

    #[test]
    fn phrases_are_found_only_as_whole_words() {
        let found = complaint_of(Kind::Text, "path (is none)");
        assert!(found.is_some_and(|text| text.contains("\"is none\"")));
        for text in ["it is nonexistent", "there is no"] {
            assert_eq!(complaint_of(Kind::Text, text), None, "{text}");
        }
        assert_eq!(complaint_of(Kind::Comment, "Option `is none`"), None);
    }
}
