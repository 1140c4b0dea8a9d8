//! The parser of the command line, which accepts the same forms as runc's parser.
//!
//! rrun does not use an argument parser crate, for two reasons. First, rrun's callers rely on
//! runc's conventions. A long name can have a single dash, a switch can have a value
//! (`--keep=false`), and flags can follow the container id. `exec` and `ps` are exceptions: the
//! words after the container id are the command line of another program. Second, the parser must be
//! fast, because every start of a container parses a command line.

use std::fmt::Write as _;

use crate::error::{Error, Result, refuse};

/// A flag that a command accepts.
pub(crate) struct Flag {
    long: &'static str,
    short: Option<char>,
    /// True if a value follows the flag. A flag without a value is a switch.
    takes_value: bool,
    help: &'static str,
}

/// Returns a flag that has no value.
pub(crate) const fn switch(long: &'static str, short: Option<char>, help: &'static str) -> Flag {
    Flag {
        long,
        short,
        takes_value: false,
        help,
    }
}

/// Returns a flag that needs a value.
pub(crate) const fn value(long: &'static str, short: Option<char>, help: &'static str) -> Flag {
    Flag {
        long,
        short,
        takes_value: true,
        help,
    }
}

/// The flags and the arguments that were given on the command line.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    flags: Vec<(&'static str, String)>,
    pub(crate) positional: Vec<String>,
}

impl Arguments {
    /// Parses `words`. If `rest_is_foreign` is set, the flags end at the first word that is not a
    /// flag. This word and all words after it are positional. For example, the words after the
    /// container id of `exec` are the command line of another program.
    ///
    /// # Errors
    /// Fails if a flag is not in `known`, or if the value of a flag is missing.
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

    /// Returns whether a switch is set. If the switch is given several times, the last occurrence
    /// counts.
    pub(crate) fn is_set(&self, long: &str) -> bool {
        self.value(long) == Some("true")
    }

    /// Returns the value of a flag, if the flag is given. If the flag is given several times, the
    /// last value counts.
    pub(crate) fn value(&self, long: &str) -> Option<&str> {
        self.values(long).next_back()
    }

    /// Returns all values of a flag that can be given several times.
    pub(crate) fn values(&self, long: &str) -> impl DoubleEndedIterator<Item = &str> {
        self.flags
            .iter()
            .filter(move |(name, _)| *name == long)
            .map(|(_, value)| value.as_str())
    }

    /// Returns a flag's value as a number.
    pub(crate) fn number<N: std::str::FromStr>(&self, long: &str) -> Result<Option<N>> {
        self.value(long)
            .map(|value| {
                value
                    .parse()
                    .map_err(|_| Error::new(format!("invalid value \"{value}\" for flag -{long}")))
            })
            .transpose()
    }

    /// Checks that the command line contains only flags.
    pub(crate) fn check_only_flags(&self) -> Result<()> {
        match self.positional.len() {
            0 => Ok(()),
            given => refuse!(
                "the command accepts only flags, but the command line has {given} other argument(s)"
            ),
        }
    }

    /// Returns the container id, which is the only argument of most commands.
    pub(crate) fn container_id(&self) -> Result<&str> {
        match self.positional.as_slice() {
            [id] if !id.is_empty() => Ok(id),
            [] | [_] => Err(Error::new("the argument for the container id is missing")),
            _ => Err(Error::new(format!(
                "the command needs exactly one argument, the container id, but {} arguments are given",
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

/// Returns the descriptions of the flags for a `--help` text.
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
    fn a_flag_has_one_dash_or_two_and_an_optional_equals_sign() {
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
    fn flags_can_follow_the_id_unless_the_remaining_words_belong_to_another_program() {
        assert!(read(&["id", "--keep"], false).unwrap().is_set("keep"));
        let foreign = read(&["--keep=false", "id", "sh", "--keep", "-c"], true).unwrap();
        assert!(!foreign.is_set("keep"));
        assert_eq!(foreign.positional, ["id", "sh", "--keep", "-c"]);
    }

    #[test]
    fn the_values_of_a_repeated_flag_keep_their_order() {
        let arguments = read(&["-e", "A=1", "-e", "B=2", "id"], false).unwrap();
        assert_eq!(arguments.values("env").collect::<Vec<_>>(), ["A=1", "B=2"]);
    }

    #[test]
    fn errors_name_unknown_flags_and_flags_without_a_value() {
        for (words, name) in [(vec!["--nope"], "-nope"), (vec!["--bundle"], "-bundle")] {
            let error = read(&words, false).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
