//! The signal that stops a container.

use rrun_kernel::signal::{self, Notation};
use rrun_proto::v1::Signal;

use rrun_calls::error::{Error, Result};

/// Returns the signal that stops a container. The signal in the request has priority over the
/// image's signal, and SIGTERM is the default.
pub(crate) fn stop_signal(config: Signal, image: Option<&str>) -> Result<i32> {
    let name = match (config, image) {
        (Signal::RuntimeDefault, None | Some("")) => return Ok(libc::SIGTERM),
        (Signal::RuntimeDefault, Some(image)) => image,
        (signal, _) => signal.as_str_name(),
    };
    signal::parse(name, Notation::Image)
        .ok_or_else(|| Error::invalid(format!("the stop signal {name:?} does not exist")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_the_cri_has_a_number() {
        for value in 1..=65 {
            let Ok(signal) = Signal::try_from(value) else {
                panic!("the CRI has no signal with the number {value}");
            };
            assert!(stop_signal(signal, None).is_ok(), "{signal:?}");
        }
    }

    #[test]
    fn the_cris_stop_signal_wins_over_the_images() -> Result<()> {
        assert_eq!(stop_signal(Signal::RuntimeDefault, None)?, libc::SIGTERM);
        assert_eq!(
            stop_signal(Signal::RuntimeDefault, Some("SIGQUIT"))?,
            libc::SIGQUIT
        );
        assert_eq!(
            stop_signal(Signal::Sigkill, Some("SIGQUIT"))?,
            libc::SIGKILL
        );
        // 37 is the number of SIGRTMIN+3 for programs that use glibc.
        assert_eq!(stop_signal(Signal::RuntimeDefault, Some("SIGRTMIN+3"))?, 37);
        let wrong = stop_signal(Signal::RuntimeDefault, Some("SIGFUN"));
        assert!(wrong.is_err_and(|error| error.sentence().contains("SIGFUN")));
        Ok(())
    }
}
