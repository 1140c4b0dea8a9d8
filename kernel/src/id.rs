//! User and group ids.
//!
//! The kernel interprets the id 4294967295, `(uid_t) -1`, as "do not change" (setresuid(2),
//! setresgid(2), chown(2)). A process that root starts with this id therefore runs as root. The
//! same is true for 4294967296, if a program truncates this number to 32 bits.

/// The largest id that a user or a group can have.
pub const LARGEST: u32 = u32::MAX - 1;

/// Returns whether a user or a group can have the id `id`.
pub fn is_valid(id: u32) -> bool {
    id <= LARGEST
}

/// The meaning of a text that names a user or a group, for example in an image's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// The text is the name of a user or a group.
    Name,
    Id(u32),
    /// The text is a number, but no user and no group can have this number. A name with this form
    /// must be refused. Otherwise, one program could interpret the text as a number, and another
    /// program as a name with a different id.
    Invalid,
}

impl Named {
    /// Returns the meaning of `text`. An id consists only of decimal digits.
    pub fn parse(text: &str) -> Named {
        let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Named::Name;
        }
        // The parser of the standard library accepts the sign `+`.
        match text.parse() {
            Ok(id) if is_valid(id) && digits.len() == text.len() => Named::Id(id),
            _ => Named::Invalid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_an_id_a_name_or_invalid() {
        for (text, id) in [("0", 0), ("007", 7), ("4294967294", LARGEST)] {
            assert_eq!(Named::parse(text), Named::Id(id), "{text}");
        }
        for text in [
            "root", "", "-", "+", "1a", " 0", "0 ", "0x0", "1.0", "--1", "\u{661}",
        ] {
            assert_eq!(Named::parse(text), Named::Name, "{text:?}");
        }
        for text in [
            "4294967295",
            "4294967296",
            "00004294967296",
            "18446744073709551616",
            "+0",
            "+1000",
            "-0",
            "-1",
            "-4294967296",
        ] {
            assert_eq!(Named::parse(text), Named::Invalid, "{text}");
        }
    }
}
