//! The `[cni]` table of the configuration, which contains the settings for running CNI plugins.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The settings in the `[cni]` table of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CniSettings {
    /// The maximum number of CNI configurations that are used. Each configuration is one network.
    /// The value 0 means that all configurations are used.
    pub max_conf_num: usize,
    /// The timeout in seconds for one ADD or DEL of a network, including all its plugins.
    pub timeout_seconds: u64,
    /// The time in seconds for which a failing DEL prevents a pod from being stopped. After this
    /// time, the pod is stopped without the DEL.
    pub teardown_patience_seconds: u64,
}

impl Default for CniSettings {
    fn default() -> Self {
        CniSettings {
            max_conf_num: 1,
            // This timeout is shorter than kubelet's timeouts of 120 s for StopPodSandbox and 240 s
            // for RunPodSandbox.
            timeout_seconds: 100,
            teardown_patience_seconds: 300,
        }
    }
}

impl CniSettings {
    /// Refuses an invalid value. The error consists of the configuration key and a description of
    /// the problem with the key's value.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let timeout = self.timeout_seconds;
        if (1..=3600).contains(&timeout) {
            return Ok(());
        }
        let reason = format!("{timeout} is not between 1 and 3600");
        Err(("cni.timeout_seconds", reason))
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }

    pub(crate) fn teardown_timeout(&self) -> Duration {
        Duration::from_secs(self.teardown_patience_seconds)
    }
}
