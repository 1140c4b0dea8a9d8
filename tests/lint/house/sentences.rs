//! Extracts the sentences of a checkout: comments, string literals, test names, manuals and
//! documents.

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use crate::Result;

/// The part of a file that contains a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The first sentence of a `///` or `//!` comment.
    DocOpening,
    /// Any sentence of a `///` or `//!` comment except the first.
    Doc,
    /// A comment of any language that is not a doc comment.
    Comment,
    /// A string literal of Rust with several words.
    Text,
    TestName,
    /// A paragraph of a Markdown document or a manual page.
    Prose,
}

#[derive(Clone, Debug)]
pub(crate) struct Sentence {
    /// The file's path in the checkout.
    pub(crate) file: String,
    /// The lines of the comment, text, name or paragraph that contains the sentence, counted from
    /// 0.
    pub(crate) lines: Range<usize>,
    pub(crate) kind: Kind,
    pub(crate) text: String,
}

impl Sentence {
    /// Returns the first line of the comment, text, name or paragraph, counted from 1.
    pub(crate) fn line(&self) -> usize {
        self.lines.start + 1
    }
}

/// The minimum number of words in a sentence. A text with fewer words is a label, and labels are
/// not checked.
const WORDS: usize = 4;

/// Returns the paths of all files that git tracks in `checkout`.
pub(crate) fn tracked_files(checkout: &Path) -> Result<Vec<String>> {
    let listed = Command::new("git")
        .arg("-C")
        .arg(checkout)
        .args(["ls-files", "-z"])
        .output()?;
    if !listed.status.success() {
        let error = String::from_utf8_lossy(&listed.stderr);
        return Err(format!("`git ls-files` failed: {}", error.trim()).into());
    }
    let listed = String::from_utf8(listed.stdout)?;
    Ok(listed.split_terminator('\0').map(str::to_owned).collect())
}

/// Returns the sentences of all files that git tracks in `checkout`.
pub(crate) fn of_checkout(checkout: &Path) -> Result<Vec<Sentence>> {
    let mut sentences = Vec::new();
    for file in tracked_files(checkout)? {
        if file.contains("corpus/") || file == "LICENSE" || file == "Cargo.lock" {
            continue;
        }
        // Unreadable files are skipped. A file can be unreadable because it does not contain text,
        // or because it was deleted. A deleted file is listed by git until the deletion is
        // committed.
        if let Ok(text) = std::fs::read_to_string(checkout.join(&file)) {
            of_file(&file, &text, &mut sentences);
        }
    }
    Ok(sentences)
}

fn of_file(file: &str, text: &str, sentences: &mut Vec<Sentence>) {
    let lines: Vec<&str> = text.lines().collect();
    let extension = Path::new(file).extension().and_then(|end| end.to_str());
    let mut add = |lines: Range<usize>, kind: Kind, text: &str| {
        let mut kind = kind;
        for text in split(text) {
            sentences.push(Sentence {
                file: file.to_owned(),
                lines: lines.clone(),
                kind,
                text,
            });
            if kind == Kind::DocOpening {
                kind = Kind::Doc;
            }
        }
    };
    match extension {
        Some("rs") => of_rust(&lines, file.starts_with("tests/"), &mut add),
        Some("md") => of_markdown(&lines, &mut add),
        Some("5" | "8") => of_manual(&lines, &mut add),
        Some("proto") => of_comments(&lines, "//", &mut add),
        Some("toml" | "sh" | "service" | "fish" | "bash") => of_comments(&lines, "#", &mut add),
        _ if file.ends_with("Makefile") || text.starts_with("#!") => {
            of_comments(&lines, "#", &mut add);
        }
        _ => {}
    }
}

/// Splits a paragraph into sentences. A sentence ends at a punctuation mark that is followed by a
/// capital letter, a backtick or a bracket.
fn split(paragraph: &str) -> Vec<String> {
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    let mut sentences = Vec::new();
    let mut first = 0;
    for (at, word) in words.iter().enumerate() {
        let ends = word.ends_with(['.', ';', ':', '!', '?']);
        let starts =
            |next: &&str| next.starts_with(|c: char| c.is_ascii_uppercase() || "`[".contains(c));
        if at + 1 == words.len() || ends && words.get(at + 1).is_some_and(starts) {
            let sentence = &words[first..=at];
            let has_letters = sentence
                .iter()
                .any(|word| word.contains(char::is_alphabetic));
            if sentence.len() >= WORDS && has_letters {
                sentences.push(sentence.join(" "));
            }
            first = at + 1;
        }
    }
    sentences
}

type Add<'a> = dyn FnMut(Range<usize>, Kind, &str) + 'a;

fn of_rust(lines: &[&str], in_tests: bool, add: &mut Add) {
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        if let Some((mark, text)) = rust_comment(line) {
            let start = at;
            let mut comment = text.to_owned();
            while let Some((_, text)) = lines
                .get(at + 1)
                .and_then(|next| rust_comment(next))
                .filter(|(next, _)| *next == mark)
            {
                comment.push(' ');
                comment.push_str(text);
                at += 1;
            }
            let kind = match mark {
                "//" => Kind::Comment,
                _ => Kind::DocOpening,
            };
            add(start..at + 1, kind, &comment);
        } else {
            for text in quoted(line) {
                if text.split_whitespace().count() >= WORDS && has_words(&text) {
                    add(at..at + 1, Kind::Text, &text);
                }
            }
            if in_tests && let Some(name) = function_name(line) {
                add(at..at + 1, Kind::TestName, &name.replace('_', " "));
            }
        }
        at += 1;
    }
}

/// Returns the mark of a line comment (`///`, `//!` or `//`), and the text after the mark.
fn rust_comment(line: &str) -> Option<(&'static str, &str)> {
    let line = line.trim_start();
    ["///", "//!", "//"]
        .into_iter()
        .find_map(|mark| line.strip_prefix(mark).map(|text| (mark, text)))
}

/// Returns the string literals of a line, without their quotation marks.
fn quoted(line: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut text: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (&mut text, c) {
            (None, '"') => text = Some(String::new()),
            (None, _) => {}
            (Some(_), '"') => all.extend(text.take()),
            (Some(text), '\\') => {
                text.push(c);
                text.extend(chars.next());
            }
            (Some(text), _) => text.push(c),
        }
    }
    all
}

/// Returns whether a text looks like prose and not like code. Prose contains a lower-case word
/// directly after another lower-case word.
fn has_words(text: &str) -> bool {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.windows(2).any(|pair| {
        let ends_low = pair[0]
            .chars()
            .rev()
            .take(3)
            .filter(char::is_ascii_lowercase)
            .count()
            == 3;
        ends_low && pair[1].starts_with(|c: char| c.is_ascii_lowercase())
    })
}

/// Returns the name of the function that a line of code defines. Names with fewer than four words
/// are ignored.
fn function_name(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().skip_while(|word| *word != "fn");
    let name = words.nth(1)?.split(['(', '<']).next()?;
    (name.split('_').count() >= WORDS).then_some(name)
}

fn of_markdown(lines: &[&str], add: &mut Add) {
    let mut in_code = false;
    let mut paragraph = String::new();
    let mut start = 0;
    for (at, line) in lines.iter().chain(&[""]).enumerate() {
        if line.starts_with("```") {
            in_code = !in_code;
            continue;
        }
        if in_code || line.starts_with(['|', '#']) || line.starts_with("    ") {
            continue;
        }
        let item = line.trim_start_matches(['*', '-', ' ']);
        let ends = line.trim().is_empty() || line.starts_with(['*', '-']);
        if ends && !paragraph.is_empty() {
            add(start..at, Kind::Prose, &paragraph);
            paragraph.clear();
        }
        if paragraph.is_empty() {
            start = at;
        }
        paragraph.push_str(item);
        paragraph.push(' ');
        if line.trim().is_empty() {
            paragraph.clear();
        }
    }
}

fn of_manual(lines: &[&str], add: &mut Add) {
    let is_text = |line: &&str| line.starts_with(|c: char| c.is_ascii_alphabetic());
    paragraphs(
        lines,
        |line| is_text(&line).then_some(line),
        |lines, text| {
            add(lines, Kind::Prose, text);
        },
    );
}

fn of_comments(lines: &[&str], mark: &str, add: &mut Add) {
    let comment = |line| {
        let text = str::trim_start(line).strip_prefix(mark)?;
        text.strip_prefix(' ')
    };
    paragraphs(lines, comment, |lines, text| {
        add(lines, Kind::Comment, text)
    });
}

/// Joins consecutive lines for which `text` returns a string, and passes each paragraph to `add`.
fn paragraphs<'a>(
    lines: &[&'a str],
    text: impl Fn(&'a str) -> Option<&'a str>,
    mut add: impl FnMut(Range<usize>, &str),
) {
    let mut paragraph = String::new();
    let mut start = 0;
    for (at, line) in lines.iter().copied().chain([""]).enumerate() {
        match text(line) {
            Some(text) => {
                if paragraph.is_empty() {
                    start = at;
                }
                paragraph.push_str(text);
                paragraph.push(' ');
            }
            None if paragraph.is_empty() => {}
            None => {
                add(start..at, &paragraph);
                paragraph.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentences(file: &str, text: &str) -> Vec<(usize, Kind, String)> {
        let mut all = Vec::new();
        of_file(file, text, &mut all);
        all.into_iter()
            .map(|one| (one.line(), one.kind, one.text))
            .collect()
    }

    #[test]
    fn the_sentences_of_a_rust_file_are_its_comments_and_texts_and_test_names() {
        let text = "//! One sentence is here. The second\n//! follows.\n\n// A plain comment of five.\n\
                    fn the_name_of_a_test() { print(\"the text of an error\", \"a b\"); }\n";
        assert_eq!(
            sentences("tests/a.rs", text),
            [
                (1, Kind::DocOpening, "One sentence is here.".to_owned()),
                (4, Kind::Comment, "A plain comment of five.".to_owned()),
                (5, Kind::Text, "the text of an error".to_owned()),
                (5, Kind::TestName, "the name of a test".to_owned()),
            ]
        );
    }

    #[test]
    fn the_sentences_of_a_markdown_file_are_in_its_paragraphs_and_items_and_not_in_its_code() {
        let text = "# A title is not a sentence\n\nThe first paragraph has\ntwo lines.\n\n* An item is a paragraph.\n\
                    * So is the next one.\n\n    code is left out of it\n\n```\nand this is code too\n```\n";
        assert_eq!(
            sentences("README.md", text),
            [
                (
                    3,
                    Kind::Prose,
                    "The first paragraph has two lines.".to_owned()
                ),
                (6, Kind::Prose, "An item is a paragraph.".to_owned()),
                (7, Kind::Prose, "So is the next one.".to_owned()),
            ]
        );
    }

    #[test]
    fn sentences_are_found_in_the_comments_of_scripts_and_in_the_paragraphs_of_manuals() {
        let script = "#!/bin/sh\n# The script does this\n# and that.\necho\n";
        assert_eq!(
            sentences("tests/run", script),
            [(
                2,
                Kind::Comment,
                "The script does this and that.".to_owned()
            )]
        );
        let manual = ".TP\n.B x\nThe flag does this.\n.PP\n";
        assert_eq!(
            sentences("contrib/man/rrun.8", manual),
            [(3, Kind::Prose, "The flag does this.".to_owned())]
        );
    }
}
