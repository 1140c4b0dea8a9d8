//! SELinux labels, selinux(8): `user:role:type`, followed by `:level` if the policy has levels.

use std::fmt;
use std::str::FromStr;

use rrun_proto::v1::SeLinuxOption;
use serde::{Deserialize, Serialize};

use rrun_calls::error::{Error, Result};

/// An SELinux label, which is stored as text in records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Label {
    pub user: String,
    pub role: String,
    pub kind: String,
    /// The label's level, or an empty string if the policy has no levels.
    pub level: String,
}

impl Label {
    /// Returns the mount(2) option that labels the files of a file system. The option begins with a
    /// comma and can therefore be appended to other options.
    pub(crate) fn as_mount_option(&self) -> String {
        format!(",context=\"{self}\"")
    }
}

impl FromStr for Label {
    type Err = Error;

    fn from_str(text: &str) -> Result<Label> {
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let mut part = || parts.next().unwrap_or_default();
        let label = Label {
            user: part(),
            role: part(),
            kind: part(),
            level: part(),
        };
        let all = [&label.user, &label.role, &label.kind];
        if all.iter().any(|part| part.is_empty()) {
            return Err(Error::invalid(format!(
                "{text:?} is not an SELinux label, which has the form user:role:type:level"
            )));
        }
        Ok(label)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        if self.level.is_empty() {
            Ok(())
        } else {
            write!(f, ":{}", self.level)
        }
    }
}

impl TryFrom<String> for Label {
    type Error = Error;

    fn try_from(text: String) -> Result<Label> {
        text.parse()
    }
}

impl From<Label> for String {
    fn from(label: Label) -> String {
        label.to_string()
    }
}

/// Refuses values that can't be part of a label; the error names the field. The values are checked
/// even if SELinux is disabled.
pub(crate) fn check(requested: Option<&SeLinuxOption>) -> Result<()> {
    let Some(requested) = requested else {
        return Ok(());
    };
    let refuse = |field: &str, value: &str| {
        Err(Error::invalid(format!(
            "the SELinux {field} {value:?} (linux.security_context.selinux_options.{field}) contains characters that are not allowed"
        )))
    };
    let fields = [
        ("user", &requested.user),
        ("role", &requested.role),
        ("type", &requested.r#type),
    ];
    for (field, value) in fields {
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if !value.chars().all(word) {
            return refuse(field, value);
        }
    }
    if requested.level.is_empty() || is_level(&requested.level) {
        Ok(())
    } else {
        refuse("level", &requested.level)
    }
}

/// Returns whether the text is a level such as `s0` or `s0:c1,c3.c5`, or two levels separated by a
/// hyphen.
fn is_level(text: &str) -> bool {
    let numbered = |text: &str, letter: char| {
        let digits = text.strip_prefix(letter).unwrap_or_default();
        !digits.is_empty() && digits.len() <= 4 && digits.chars().all(|c| c.is_ascii_digit())
    };
    let categories = |text: &str| {
        text.split(',').all(|item| match item.split_once('.') {
            Some((first, last)) => numbered(first, 'c') && numbered(last, 'c'),
            None => numbered(item, 'c'),
        })
    };
    let one = |text: &str| match text.split_once(':') {
        Some((sensitivity, rest)) => numbered(sensitivity, 's') && categories(rest),
        None => numbered(text, 's'),
    };
    match text.split_once('-') {
        Some((low, high)) => one(low) && one(high),
        None => one(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_parsed_and_printed_unchanged() -> Result<()> {
        for text in ["u:r:t", "u:r:t:s0", "u:r:t:s0-s0:c0.c1023"] {
            assert_eq!(text.parse::<Label>()?.to_string(), text);
        }
        for text in ["", "u", "u:r", "u::t:s0", ":r:t"] {
            assert!(text.parse::<Label>().is_err(), "{text}");
        }
        Ok(())
    }

    #[test]
    fn a_level_is_a_sensitivity_with_categories() {
        for level in [
            "s0",
            "s15",
            "s0-s0",
            "s0:c0",
            "s0:c0,c3",
            "s0:c0.c3",
            "s0-s0:c0,c3.c6,c8.c10",
            "s0:c1-s1:c1,c1023",
        ] {
            assert!(is_level(level), "{level}");
        }
        for level in [
            "",
            "0",
            "s",
            "c1",
            "s0:",
            "s0:c",
            "s0,c1",
            "s0:c1,",
            "s0:c1.",
            "s0:c10000",
            "s0-",
            "s0:c1\n",
            "s0 ",
        ] {
            assert!(!is_level(level), "{level:?}");
        }
    }

    #[test]
    fn a_value_that_would_change_another_field_is_refused() {
        let refused = |requested: SeLinuxOption, field: &str| {
            let checked = check(Some(&requested));
            assert!(
                checked.is_err_and(|error| error.sentence().contains(field)),
                "{requested:?}"
            );
        };
        let with = SeLinuxOption::default;
        refused(
            SeLinuxOption {
                r#type: "a:b".into(),
                ..with()
            },
            "selinux_options.type",
        );
        refused(
            SeLinuxOption {
                user: "a\"".into(),
                ..with()
            },
            "selinux_options.user",
        );
        refused(
            SeLinuxOption {
                level: "s0,c1".into(),
                ..with()
            },
            "selinux_options.level",
        );
        assert!(check(None).is_ok());
        assert!(check(Some(&with())).is_ok());
    }
}
