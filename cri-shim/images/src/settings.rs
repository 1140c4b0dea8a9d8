//! The `[image]` table of the configuration: bounds on pulls, and which images are kept.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::limits::MinRate;
use crate::pin::Pins;

/// What the `[image]` table of the configuration sets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageSettings {
    /// Layers fetched at once, over all pulls.
    pub parallel_layers: usize,
    /// See [`ImageSettings::layers_per_host`].
    pub parallel_layers_per_host: Option<usize>,
    /// Layers unpacked at once.
    pub parallel_unpacks: usize,
    /// The most bytes that one layer may unpack to.
    pub layer_bytes: u64,
    /// The most files that one layer may hold.
    pub layer_files: u64,
    /// How long a registry may send nothing in the middle of an answer.
    pub silence_seconds: u64,
    /// The least rate of a registry's answers in bytes a second, on the average of
    /// `least_rate_seconds`; 0 allows any rate.
    pub least_rate: u64,
    pub least_rate_seconds: u64,
    /// How long a pull continues after its last caller has gone.
    pub abandoned_seconds: u64,
    /// Images that garbage collection spares.
    pub pinned: Pins,
}

impl Default for ImageSettings {
    fn default() -> Self {
        ImageSettings {
            parallel_layers: 4,
            parallel_layers_per_host: None,
            parallel_unpacks: 3,
            layer_bytes: 64 << 30,
            layer_files: 4 << 20,
            silence_seconds: 30,
            least_rate: 100,
            least_rate_seconds: 60,
            abandoned_seconds: 300,
            pinned: Pins::default(),
        }
    }
}

impl ImageSettings {
    /// The key of the configuration whose value can't be used, and what is wrong with it.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let zeros = [
            ("image.parallel_layers", self.parallel_layers == 0),
            (
                "image.parallel_layers_per_host",
                self.parallel_layers_per_host == Some(0),
            ),
            ("image.parallel_unpacks", self.parallel_unpacks == 0),
            ("image.layer_bytes", self.layer_bytes == 0),
            ("image.layer_files", self.layer_files == 0),
            ("image.silence_seconds", self.silence_seconds == 0),
            ("image.least_rate_seconds", self.least_rate_seconds == 0),
            ("image.abandoned_seconds", self.abandoned_seconds == 0),
        ];
        if let Some((key, _)) = zeros.into_iter().find(|(_, zero)| *zero) {
            return Err((key, "0 would let nothing be pulled".to_owned()));
        }
        let (per_host, all) = (self.layers_per_host(), self.parallel_layers);
        if per_host > self.most_layers_per_host() {
            return Err((
                "image.parallel_layers_per_host",
                format!("{per_host} would let one host take all {all} of image.parallel_layers"),
            ));
        }
        Ok(())
    }

    /// Layers fetched at once from one host; by default as many as there may be.
    pub(crate) fn layers_per_host(&self) -> usize {
        let given = self.parallel_layers_per_host;
        given.unwrap_or_else(|| self.most_layers_per_host())
    }

    /// If there is more than one slot, one host must leave a slot for the others.
    fn most_layers_per_host(&self) -> usize {
        self.parallel_layers.saturating_sub(1).max(1)
    }

    pub(crate) fn silence_timeout(&self) -> Duration {
        Duration::from_secs(self.silence_seconds)
    }

    pub(crate) fn min_rate(&self) -> MinRate {
        MinRate {
            rate: self.least_rate,
            over: Duration::from_secs(self.least_rate_seconds),
        }
    }

    pub(crate) fn abandoned_timeout(&self) -> Duration {
        // A larger number would overflow the clock, and this one is as good as no limit.
        Duration::from_secs(self.abandoned_seconds.min(u32::MAX.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_never_gets_all_of_the_layers_at_once() {
        let settings = |parallel_layers, parallel_layers_per_host| ImageSettings {
            parallel_layers,
            parallel_layers_per_host,
            ..ImageSettings::default()
        };
        for (layers, given, per_host) in
            [(4, None, 3), (10, None, 9), (1, None, 1), (4, Some(2), 2)]
        {
            let settings = settings(layers, given);
            assert_eq!(settings.check(), Ok(()));
            assert_eq!(settings.layers_per_host(), per_host, "of {layers}");
        }
        let refused = settings(3, Some(3)).check();
        assert!(
            refused.is_err_and(|(_, reason)| reason.contains("all 3 of image.parallel_layers"))
        );
    }
}
