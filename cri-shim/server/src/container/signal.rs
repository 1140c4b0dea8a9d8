//! Signals by the names and numbers in which images and the CRI give them.

use nix::sys::signal::Signal as Nix;
use rrun_proto::v1::Signal;

use rrun_calls::error::{Error, Result};

/// The signal that stops a container: the CRI's, else the image's, else SIGTERM.
pub(crate) fn stop_signal(config: Signal, image: Option<&str>) -> Result<i32> {
    let name = match (config, image) {
        (Signal::RuntimeDefault, None | Some("")) => return Ok(libc::SIGTERM),
        (Signal::RuntimeDefault, Some(image)) => image,
        (signal, _) => signal.as_str_name(),
    };
    number(name).ok_or_else(|| Error::invalid(format!("there is no stop signal {name:?}")))
}

/// `SIGTERM`, `term`, `15`, `SIGRTMIN+3`, `SIGRTMINPLUS3`.
fn number(name: &str) -> Option<i32> {
    let (first, last) = (libc::SIGRTMIN(), libc::SIGRTMAX());
    if let Ok(number) = name.parse::<i32>() {
        return (1..=last).contains(&number).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    let realtime = if let Some(rest) = bare.strip_prefix("RTMIN") {
        let plus = rest.strip_prefix("PLUS").or(rest.strip_prefix('+'));
        Some(first + offset(rest, plus)?)
    } else if let Some(rest) = bare.strip_prefix("RTMAX") {
        let minus = rest.strip_prefix("MINUS").or(rest.strip_prefix('-'));
        Some(last - offset(rest, minus)?)
    } else {
        None
    };
    if let Some(number) = realtime {
        return (first..=last).contains(&number).then_some(number);
    }
    let canonical = match bare {
        // Second names, signal(7).
        "CLD" => "CHLD",
        "IOT" => "ABRT",
        "POLL" => "IO",
        other => other,
    };
    format!("SIG{canonical}")
        .parse::<Nix>()
        .ok()
        .map(|signal| signal as i32)
}

fn offset(rest: &str, signed: Option<&str>) -> Option<i32> {
    if rest.is_empty() {
        return Some(0);
    }
    signed?
        .parse()
        .ok()
        .filter(|offset| (0..64).contains(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_mean_the_same() {
        for name in ["SIGTERM", "term", "15", "TERM"] {
            assert_eq!(number(name), Some(libc::SIGTERM), "{name}");
        }
        assert_eq!(number("SIGRTMIN+3"), Some(libc::SIGRTMIN() + 3));
        assert_eq!(number("SIGRTMAXMINUS2"), Some(libc::SIGRTMAX() - 2));
        assert_eq!(number("SIGPOLL"), Some(libc::SIGIO));
        for name in ["", "0", "99", "SIGFUN", "SIGRTMIN+40", "SIGRTMIN-1"] {
            assert_eq!(number(name), None, "{name}");
        }
    }

    #[test]
    fn every_signal_of_the_cri_has_a_number() {
        for value in 1..=65 {
            let Ok(signal) = Signal::try_from(value) else {
                panic!("no signal {value}");
            };
            assert!(number(signal.as_str_name()).is_some(), "{signal:?}");
        }
    }

    #[test]
    fn the_cris_signal_wins_over_the_images() -> Result<()> {
        assert_eq!(stop_signal(Signal::RuntimeDefault, None)?, libc::SIGTERM);
        assert_eq!(
            stop_signal(Signal::RuntimeDefault, Some("SIGQUIT"))?,
            libc::SIGQUIT
        );
        assert_eq!(
            stop_signal(Signal::Sigkill, Some("SIGQUIT"))?,
            libc::SIGKILL
        );
        Ok(())
    }
}
