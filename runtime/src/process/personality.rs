//! The variant of Linux that the kernel emulates for a process (`linux.personality`). See
//! personality(2).

use crate::config::spec;
use crate::error::{Context, Result, refuse};
use crate::log;
use crate::sys::syscalls;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Personality {
    name: &'static str,
    persona: u32,
}

/// The personality domains that the specification defines, with their numbers from
/// linux/personality.h.
const DOMAINS: [Personality; 2] = [
    Personality {
        name: "LINUX",
        persona: 0,
    },
    Personality {
        name: "LINUX32",
        persona: 8,
    },
];

impl Personality {
    /// Reads the personality from the configuration. rrun ignores the flags of the personality, as
    /// runc and crun do, because the specification defines no flags.
    ///
    /// # Errors
    /// Fails if the domain is unknown.
    pub(crate) fn from_spec(personality: &spec::PersonalitySpec) -> Result<Personality> {
        for flag in personality.flags.iter().flatten() {
            log::warning(&format!(
                "linux.personality.flags: rrun ignores {flag:?}, because the specification defines no flags"
            ));
        }
        match DOMAINS
            .iter()
            .find(|domain| domain.name == personality.domain)
        {
            Some(personality) => Ok(*personality),
            None => refuse!(
                "linux.personality.domain: {:?} is neither LINUX nor LINUX32",
                personality.domain
            ),
        }
    }

    /// Sets the personality of the calling process.
    pub(crate) fn apply(self) -> Result<()> {
        syscalls::personality(self.persona)
            .doing(|| format!("set linux.personality to {}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_specifications_domains_are_accepted() {
        let read = |json| Personality::from_spec(&serde_json::from_str(json).unwrap());
        assert_eq!(read(r#"{"domain":"LINUX32"}"#).unwrap().persona, 8);
        assert!(read(r#"{"domain":"BSD"}"#).is_err());
        assert!(read(r#"{"domain":"LINUX","flags":["SHORT_INODE"]}"#).is_ok());
    }
}
