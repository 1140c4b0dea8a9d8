//! Signal names and numbers.

use crate::error::{Error, Result};

/// Name without SIG, number on this architecture.
const NAMES: &[(&str, i32)] = &[
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("IOT", libc::SIGIOT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("POLL", libc::SIGPOLL),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];

/// The kernel's real-time signals; a C library keeps some for itself and hides them.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// A number, or a name with or without SIG, in upper or lower case; `RTMIN+3` as well.
pub(crate) fn number(text: &str) -> Result<i32> {
    let unknown = || Error::new(format!("unknown signal \"{text}\""));
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=RTMAX).contains(&number) {
            Ok(number)
        } else {
            Err(unknown())
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let real_time = |prefix: &str, base: i32| {
        let rest = name.strip_prefix(prefix)?;
        let offset: i32 = if rest.is_empty() {
            0
        } else {
            rest.parse().ok()?
        };
        Some(base + offset).filter(|number| (RTMIN..=RTMAX).contains(number))
    };
    real_time("RTMIN", RTMIN)
        .or_else(|| real_time("RTMAX", RTMAX))
        .ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_in_all_usual_forms() {
        for (text, expected) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGTERM", 15),
            ("sigusr1", libc::SIGUSR1),
            ("RTMIN+3", 37),
            ("SIGRTMAX-1", 63),
            ("0", 0),
        ] {
            assert_eq!(number(text).unwrap(), expected, "{text}");
        }
        for text in ["", "SIG", "NOPE", "65", "-1", "RTMIN-1", "RTMAX+1"] {
            assert!(number(text).is_err(), "{text}");
        }
    }
}
