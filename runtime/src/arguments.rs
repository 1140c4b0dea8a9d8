//! The command line, read as runc reads it.
//!
//! Written out instead of taken from an argument parser for two reasons: runc's habits
//! (a single dash before a long name, `--keep=false`, flags after the id except where the
//! rest belongs to another program) are what callers rely on, and this is part of the time
//! that every container's start takes.

use std::fmt::Write as _;

use crate::error::{Error, Result, refuse};

/// One flag that a command takes.
pub(crate) struct Flag {
    long: &'static str,
    short: Option<char>,
    /// Whether a value follows; without one it is a switch.
    takes_value: bool,
    help: &'static str,
}

/// A flag that is given or not.
pub(crate) const fn switch(long: &'static str, short: Option<char>, help: &'static str) -> Flag {
    Flag {
        long,
        short,
        takes_value: false,
        help,
    }
}

/// A flag with a value.
pub(crate) const fn value(long: &'static str, short: Option<char>, help: &'static str) -> Flag {
    Flag {
        long,
        short,
        takes_value: true,
        help,
    }
}

/// What was given on the command line.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    flags: Vec<(&'static str, String)>,
    pub(crate) positional: Vec<String>,
}

impl Arguments {
    /// Reads `words`. If `rest_is_foreign`, everything from the first word that is no flag
    /// is positional, as for a program's own arguments.
    ///
    /// # Errors
    /// A flag that is not in `known`, or one whose value is missing.
    pub(crate) fn read(
        words: impl Iterator<Item = String>,
        known: &'static [Flag],
        rest_is_foreign: bool,
    ) -> Result<Arguments> {
        let mut words = words.peekable();
        let mut arguments = Arguments::default();
        while let Some(word) = words.next() {
            if word == "--" {
                arguments.positional.extend(words);
                break;
            }
            let Some(name) = word.strip_prefix('-').filter(|name| !name.is_empty()) else {
                arguments.positional.push(word);
                if rest_is_foreign {
                    arguments.positional.extend(words);
                    break;
                }
                continue;
            };
            let name = name.strip_prefix('-').unwrap_or(name);
            let (name, inline) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            let flag = find(known, name)
                .ok_or_else(|| Error::new(format!("flag provided but not defined: -{name}")))?;
            let value = match (flag.takes_value, inline) {
                (true, Some(value)) => value,
                (true, None) => words
                    .next()
                    .ok_or_else(|| Error::new(format!("flag needs an argument: -{name}")))?,
                (false, None) => "true".to_owned(),
                (false, Some(value)) => match value.as_str() {
                    "1" | "t" | "T" | "true" | "TRUE" | "True" => "true".to_owned(),
                    "0" | "f" | "F" | "false" | "FALSE" | "False" => "false".to_owned(),
                    _ => refuse!("invalid boolean value \"{value}\" for -{name}"),
                },
            };
            arguments.flags.push((flag.long, value));
        }
        Ok(arguments)
    }

    /// Whether a switch is given (the last one counts).
    pub(crate) fn is_set(&self, long: &str) -> bool {
        self.value(long) == Some("true")
    }

    /// The value of a flag, if it is given (the last one counts).
    pub(crate) fn value(&self, long: &str) -> Option<&str> {
        self.values(long).next_back()
    }

    /// All values of a flag that may be given more than once.
    pub(crate) fn values(&self, long: &str) -> impl DoubleEndedIterator<Item = &str> {
        self.flags
            .iter()
            .filter(move |(name, _)| *name == long)
            .map(|(_, value)| value.as_str())
    }

    /// A flag's value as a number.
    pub(crate) fn number<N: std::str::FromStr>(&self, long: &str) -> Result<Option<N>> {
        self.value(long)
            .map(|value| {
                value
                    .parse()
                    .map_err(|_| Error::new(format!("invalid value \"{value}\" for flag -{long}")))
            })
            .transpose()
    }

    /// Checks that there is nothing beside the flags.
    pub(crate) fn none(&self) -> Result<()> {
        match self.positional.len() {
            0 => Ok(()),
            given => refuse!("no argument is needed; {given} are given"),
        }
    }

    /// The one argument that most commands take.
    pub(crate) fn container_id(&self) -> Result<&str> {
        match self.positional.as_slice() {
            [id] if !id.is_empty() => Ok(id),
            [] | [_] => Err(Error::new("a container id is needed as argument")),
            _ => Err(Error::new(format!(
                "exactly one argument is needed, a container id; {} are given",
                self.positional.len()
            ))),
        }
    }
}

fn find(known: &'static [Flag], name: &str) -> Option<&'static Flag> {
    let mut letters = name.chars();
    let letter = match (letters.next(), letters.next()) {
        (Some(letter), None) => Some(letter),
        _ => None,
    };
    known
        .iter()
        .find(|flag| flag.long == name || (letter.is_some() && flag.short == letter))
}

/// The flags as a `--help` text shows them.
pub(crate) fn describe(flags: &[Flag]) -> String {
    let mut text = String::new();
    for flag in flags {
        let mut name = format!("--{}", flag.long);
        if let Some(short) = flag.short {
            let _ = write!(name, ", -{short}");
        }
        if flag.takes_value {
            name.push_str(" value");
        }
        let _ = writeln!(text, "   {name:<34} {}", flag.help);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAGS: &[Flag] = &[
        value("bundle", Some('b'), ""),
        switch("keep", None, ""),
        value("env", Some('e'), ""),
    ];

    fn read(words: &[&str], foreign: bool) -> Result<Arguments> {
        Arguments::read(words.iter().map(|word| word.to_string()), FLAGS, foreign)
    }

    #[test]
    fn one_dash_or_two_and_values_with_or_without_equals_sign() {
        for words in [
            ["--bundle", "/b", "id"],
            ["-bundle", "/b", "id"],
            ["-b", "/b", "id"],
        ] {
            let arguments = read(&words, false).unwrap();
            assert_eq!(arguments.value("bundle"), Some("/b"));
            assert_eq!(arguments.container_id().unwrap(), "id");
        }
        assert_eq!(
            read(&["--bundle=/b=c", "id"], false)
                .unwrap()
                .value("bundle"),
            Some("/b=c")
        );
    }

    #[test]
    fn flags_may_follow_the_id_unless_the_rest_is_foreign() {
        assert!(read(&["id", "--keep"], false).unwrap().is_set("keep"));
        let foreign = read(&["--keep=false", "id", "sh", "--keep", "-c"], true).unwrap();
        assert!(!foreign.is_set("keep"));
        assert_eq!(foreign.positional, ["id", "sh", "--keep", "-c"]);
    }

    #[test]
    fn repeated_flags_keep_their_order() {
        let arguments = read(&["-e", "A=1", "-e", "B=2", "id"], false).unwrap();
        assert_eq!(arguments.values("env").collect::<Vec<_>>(), ["A=1", "B=2"]);
    }

    #[test]
    fn unknown_flags_and_missing_values_are_refused_by_name() {
        for (words, name) in [(vec!["--nope"], "-nope"), (vec!["--bundle"], "-bundle")] {
            let error = read(&words, false).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
