//! The `[image]` table of the configuration: limits for pulls, and the pinned images.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::documents::DOCUMENT_BYTES;
use crate::limits::{MinRate, Permissions};
use crate::manifest::MAX_LAYERS;
use crate::pin::Pins;

/// The settings in the `[image]` table of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageSettings {
    /// The maximum number of layers that all pulls together fetch at the same time. The extra slots
    /// do not count (see the module `slots`).
    pub parallel_layers: usize,
    /// The maximum number of layers that are fetched from one host at the same time. See
    /// [`ImageSettings::layers_per_host`].
    pub parallel_layers_per_host: Option<usize>,
    /// The maximum number of layers that are unpacked at the same time.
    pub parallel_unpacks: usize,
    /// The maximum number of layers of one image. The kernel needs memory for each layer of each mount of
    /// an image, and the server for each layer of each image.
    pub layers: usize,
    /// The maximum number of bytes of one layer: of its uncompressed archive, and of its files on the
    /// disk.
    pub layer_bytes: u64,
    /// The maximum number of files in one layer.
    pub layer_files: u64,
    /// The maximum memory, in bytes, for the strings in an image's configuration that the server keeps:
    /// arguments, environment variables, volumes, and the user, working directory and stop signal.
    pub configuration_bytes: usize,
    /// The maximum number of bytes and files in the volumes that the image of one container declares.
    pub volume_bytes: u64,
    pub volume_files: u64,
    /// The maximum number of bytes of all partial blobs, which are kept for the next pull after an
    /// interrupted pull. A fetch without room for more bytes continues, but keeps no more bytes.
    pub partial_bytes: u64,
    /// The maximum number of bytes of all indexes, manifests and configurations that are being
    /// received or used. See the module `documents`.
    pub document_bytes: u64,
    /// The time, in seconds, within which such a document must arrive.
    pub document_seconds: u64,
    /// The time without received data, in seconds, after which a registry's answer fails. The whole
    /// response head must also arrive within this time.
    pub silence_seconds: u64,
    /// The minimum rate of a registry's answers in bytes per second, on average over
    /// `least_rate_seconds`. 0 disables the check.
    pub least_rate: u64,
    pub least_rate_seconds: u64,
    /// The minimum rate, in bytes per second, of a fetch by another pull. A pull that needs the same
    /// blob from the same registry does not wait for a slower fetch, but fetches the blob itself. 0
    /// disables the check.
    pub join_rate: u64,
    /// The time, in seconds, for which a pull continues after its last caller disconnected. A pull
    /// whose layers are not known yet ends immediately.
    pub abandoned_seconds: u64,
    /// True if a registry may redirect requests to addresses of this node itself, to link-local
    /// addresses and to metadata services, and may have its token server there. A registry with
    /// such an address may always lead to addresses of the same kind.
    pub local_redirects: bool,
    /// True if credentials may be sent without TLS to a token server on another host than the
    /// registry, or to the token server of a registry that uses TLS.
    pub plain_token_servers: bool,
    /// The images that kubelet's garbage collection must keep.
    pub pinned: Pins,
}

impl Default for ImageSettings {
    fn default() -> Self {
        ImageSettings {
            parallel_layers: 4,
            parallel_layers_per_host: None,
            parallel_unpacks: 3,
            layers: 128,
            layer_bytes: 64 << 30,
            layer_files: 4 << 20,
            configuration_bytes: 1 << 20,
            volume_bytes: 16 << 30,
            volume_files: 1 << 20,
            partial_bytes: 16 << 30,
            document_bytes: 64 << 20,
            document_seconds: 300,
            silence_seconds: 30,
            least_rate: 100,
            least_rate_seconds: 60,
            join_rate: 64 << 10,
            abandoned_seconds: 300,
            local_redirects: false,
            plain_token_servers: false,
            pinned: Pins::default(),
        }
    }
}

impl ImageSettings {
    /// Checks the settings. If a value is invalid, returns the key of the value and the reason.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let zeros = [
            ("image.parallel_layers", self.parallel_layers == 0),
            (
                "image.parallel_layers_per_host",
                self.parallel_layers_per_host == Some(0),
            ),
            ("image.parallel_unpacks", self.parallel_unpacks == 0),
            ("image.layers", self.layers == 0),
            ("image.layer_bytes", self.layer_bytes == 0),
            ("image.layer_files", self.layer_files == 0),
            ("image.configuration_bytes", self.configuration_bytes == 0),
            ("image.document_seconds", self.document_seconds == 0),
            ("image.silence_seconds", self.silence_seconds == 0),
            ("image.least_rate_seconds", self.least_rate_seconds == 0),
            ("image.abandoned_seconds", self.abandoned_seconds == 0),
        ];
        if let Some((key, _)) = zeros.into_iter().find(|(_, zero)| *zero) {
            return Err((key, "0 would prevent all pulls".to_owned()));
        }
        if self.layers > MAX_LAYERS {
            return Err((
                "image.layers",
                format!("an image can't have more than {MAX_LAYERS} layers"),
            ));
        }
        if self.document_bytes < DOCUMENT_BYTES {
            return Err((
                "image.document_bytes",
                format!("one document of an image can need {DOCUMENT_BYTES} bytes"),
            ));
        }
        let (per_host, all) = (self.layers_per_host(), self.parallel_layers);
        if per_host > self.most_layers_per_host() {
            return Err((
                "image.parallel_layers_per_host",
                format!(
                    "{per_host} would let one host use all {all} slots of image.parallel_layers"
                ),
            ));
        }
        Ok(())
    }

    /// Returns how many layers may be fetched from one host at the same time. The default is the
    /// maximum value of `parallel_layers_per_host`.
    pub(crate) fn layers_per_host(&self) -> usize {
        let given = self.parallel_layers_per_host;
        given.unwrap_or_else(|| self.most_layers_per_host())
    }

    /// Returns the maximum value of `parallel_layers_per_host`. If `parallel_layers` is more than
    /// 1, the maximum is less than `parallel_layers`. One host then can't use all slots.
    fn most_layers_per_host(&self) -> usize {
        self.parallel_layers.saturating_sub(1).max(1)
    }

    /// Returns how many layers of one pull are fetched or wait to be fetched at the same time.
    pub(crate) fn layers_per_pull(&self) -> usize {
        let all = self.parallel_layers.saturating_add(self.parallel_unpacks);
        all.min(MAX_LAYERS)
    }

    pub(crate) fn silence_timeout(&self) -> Duration {
        Duration::from_secs(self.silence_seconds)
    }

    pub(crate) fn document_timeout(&self) -> Duration {
        Duration::from_secs(self.document_seconds.min(u32::MAX.into()))
    }

    pub(crate) fn min_rate(&self) -> MinRate {
        MinRate {
            rate: self.least_rate,
            over: Duration::from_secs(self.least_rate_seconds),
        }
    }

    pub(crate) fn permissions(&self) -> Permissions {
        Permissions {
            local_redirects: self.local_redirects,
            plain_token_servers: self.plain_token_servers,
        }
    }

    pub(crate) fn abandoned_timeout(&self) -> Duration {
        // More than `u32::MAX` seconds (about 136 years) could overflow the clock.
        Duration::from_secs(self.abandoned_seconds.min(u32::MAX.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_gets_all_slots_only_if_there_is_one_slot() {
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
            assert_eq!(
                settings.layers_per_host(),
                per_host,
                "number of layers per host for parallel_layers = {layers}"
            );
        }
        let refused = settings(3, Some(3)).check();
        assert!(
            refused
                .is_err_and(|(_, reason)| reason.contains("all 3 slots of image.parallel_layers"))
        );
    }
}
