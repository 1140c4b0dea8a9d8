//! Parses signals in the notations of command lines, image configurations and CRI requests.

use nix::sys::signal::Signal;

/// The environment variable with which the monitor reports to rrun that no signal is ignored. rrun
/// then does not need to reset the signals, which requires a system call for each signal.
pub const NONE_IGNORED: &str = "RRUN_NO_SIGNAL_IGNORED";

/// The lowest real-time signal that is not reserved by the C library. `SIGRTMIN()` returns 34 with
/// glibc and 35 with musl. The constant is glibc's value. Docker and runc also use this value.
const RTMIN: i32 = 34;
/// The highest real-time signal of the kernel.
const RTMAX: i32 = 64;

/// The source of a signal's text, which determines the valid notations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notation {
    /// A command line, where signals are written in runc's notation. The signal 0, for which
    /// kill(2) sends no signal, is valid on a command line. The offset after `RTMIN` or `RTMAX` is
    /// a signed number, such as `+3`, `3` or `-3`.
    CommandLine,
    /// An image's configuration or a CRI request, where signals are written in Docker's notation.
    /// Real-time signals are written as `RTMIN+3`, `RTMINPLUS3`, `RTMAX-3` or `RTMAXMINUS3`, and
    /// SIGCHLD can also be written as SIGCLD.
    Image,
}

/// Returns the number of the signal that `text` names, such as `SIGTERM`, `term`, `15` or
/// `SIGRTMIN+3`. Returns `None` if `text` is not a valid signal.
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
        // signal(7) lists these alternative names.
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

/// Parses the text after `RTMIN` or `RTMAX`. An empty text means the offset 0. On a command line,
/// the text is a signed number. In an image or a CRI request, the text is `sign` or `word`,
/// followed by a number.
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

/// Returns the kernel's signal with this number, which can be a real-time signal. Returns `None` if
/// the number is out of range.
pub fn by_number(number: i32) -> Option<rustix::process::Signal> {
    if !(1..=RTMAX).contains(&number) {
        return None;
    }
    // SAFETY: the number is a valid signal of the kernel. rrun's programs do not wait for the
    // real-time signals that the C library reserves.
    Some(unsafe { rustix::process::Signal::from_raw_unchecked(number) })
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
    fn signals_on_a_command_line_have_the_notation_of_runc() {
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
    fn signals_in_an_image_have_the_notation_of_docker() {
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
