//! The signal that stops a container.

use rrun_kernel::signal::{self, Notation};
use rrun_proto::v1::Signal;

use rrun_calls::error::{Error, Result};

/// The signal that stops a container: the CRI's, else the image's, else SIGTERM.
pub(crate) fn stop_signal(config: Signal, image: Option<&str>) -> Result<i32> {
    let name = match (config, image) {
        (Signal::RuntimeDefault, None | Some("")) => return Ok(libc::SIGTERM),
        (Signal::RuntimeDefault, Some(image)) => image,
        (signal, _) => signal.as_str_name(),
    };
    signal::parse(name, Notation::Image)
        .ok_or_else(|| Error::invalid(format!("there is no stop signal {name:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_the_cri_has_a_number() {
        for value in 1..=65 {
            let Ok(signal) = Signal::try_from(value) else {
                panic!("no signal {value}");
            };
            assert!(stop_signal(signal, None).is_ok(), "{signal:?}");
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
        // What the programs of an image take for it, whose C library is glibc.
        assert_eq!(stop_signal(Signal::RuntimeDefault, Some("SIGRTMIN+3"))?, 37);
        let wrong = stop_signal(Signal::RuntimeDefault, Some("SIGFUN"));
        assert!(wrong.is_err_and(|error| error.sentence().contains("SIGFUN")));
        Ok(())
    }
}
