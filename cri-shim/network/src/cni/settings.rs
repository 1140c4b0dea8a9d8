//! The `[cni]` table of the configuration: how plugins are run.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What the `[cni]` table of the configuration sets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CniSettings {
    /// How many configurations are used, a network each; 0 is all.
    pub max_conf_num: usize,
    /// How long all plugins of a network may take for one ADD or DEL.
    pub timeout_seconds: u64,
    /// How long a DEL that fails keeps a pod from being stopped.
    pub teardown_patience_seconds: u64,
}

impl Default for CniSettings {
    fn default() -> Self {
        CniSettings {
            max_conf_num: 1,
            // Kubelet waits 120 s for StopPodSandbox, and twice as long for RunPodSandbox.
            timeout_seconds: 100,
            teardown_patience_seconds: 300,
        }
    }
}

impl CniSettings {
    /// The key of the configuration whose value can't be used, and what is wrong with it.
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
