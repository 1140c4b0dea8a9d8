//! Signals by the names and numbers that people and configurations write.

use nix::sys::signal::Signal;

/// The kernel's real-time signals. C libraries keep the first ones for themselves: `SIGRTMIN()` is
/// 34 with glibc and 35 with musl. What is written means glibc's, as for Docker and runc.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// Where a signal is written, which decides what may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notation {
    /// runc's command line: 0, which is sent to no process, is a signal, and an offset from `RTMIN`
    /// or `RTMAX` may be any number.
    CommandLine,
    /// An image's configuration or the CRI: real-time signals are `RTMIN+3`, `RTMINPLUS3`,
    /// `RTMAX-3`, `RTMAXMINUS3`, and SIGCHLD has its second name.
    Image,
}

/// The number of `SIGTERM`, `term`, `15` or `SIGRTMIN+3`.
pub fn parse(text: &str, notation: Notation) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        let first = i32::from(notation == Notation::Image);
        return (first..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        return real_time(RTMIN + self::offset(offset, notation, ("+", "PLUS"))?);
    }
    if let Some(offset) = name.strip_prefix("RTMAX") {
        let offset = self::offset(offset, notation, ("-", "MINUS"))?;
        return real_time(match notation {
            Notation::CommandLine => RTMAX + offset,
            Notation::Image => RTMAX - offset,
        });
    }
    let canonical = match name {
        // Second names, signal(7).
        "CLD" if notation == Notation::Image => "CHLD",
        "IOT" => "ABRT",
        "POLL" => "IO",
        other => other,
    };
    let signal = format!("SIG{canonical}").parse::<Signal>().ok()?;
    Some(signal as i32)
}

fn real_time(number: i32) -> Option<i32> {
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

/// What follows `RTMIN` or `RTMAX`: nothing, or a signed number on the command line, or one after
/// one of the two words in an image.
fn offset(text: &str, notation: Notation, (sign, word): (&str, &str)) -> Option<i32> {
    if text.is_empty() {
        return Some(0);
    }
    let digits = match notation {
        Notation::CommandLine => text,
        Notation::Image => text.strip_prefix(word).or(text.strip_prefix(sign))?,
    };
    let offset = digits.parse().ok()?;
    (-RTMAX..=RTMAX).contains(&offset).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(notation: Notation, valid: &[(&str, i32)], invalid: &[&str]) {
        for (text, number) in valid {
            assert_eq!(parse(text, notation), Some(*number), "{text}");
        }
        for text in invalid {
            assert_eq!(parse(text, notation), None, "{text:?}");
        }
    }

    #[test]
    fn a_command_line_has_runcs_notation() {
        check(
            Notation::CommandLine,
            &[
                ("9", 9),
                ("0", 0),
                ("KILL", 9),
                ("SIGTERM", 15),
                ("sigusr1", libc::SIGUSR1),
                ("IOT", libc::SIGABRT),
                ("RTMIN", 34),
                ("RTMIN+3", 37),
                ("RTMIN3", 37),
                ("SIGRTMAX-1", 63),
            ],
            &[
                "",
                "SIG",
                "NOPE",
                "65",
                "-1",
                "RTMIN-1",
                "RTMAX+1",
                "RTMINPLUS3",
                "CLD",
                "RTMIN+2147483647",
            ],
        );
    }

    #[test]
    fn an_image_has_dockers_notation() {
        check(
            Notation::Image,
            &[
                ("SIGTERM", 15),
                ("term", 15),
                ("15", 15),
                ("SIGRTMIN+3", 37),
                ("SIGRTMINPLUS3", 37),
                ("SIGRTMAXMINUS2", 62),
                ("RTMAX-14", 50),
                ("SIGPOLL", libc::SIGIO),
                ("SIGCLD", libc::SIGCHLD),
            ],
            &[
                "",
                "0",
                "99",
                "SIGFUN",
                "SIGRTMIN+40",
                "SIGRTMIN-1",
                "RTMIN3",
                "RTMAX+1",
            ],
        );
    }
}
