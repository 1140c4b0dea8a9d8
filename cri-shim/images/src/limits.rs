//! How slow a registry may be.

use std::time::Duration;

/// The least rate of an answer: `rate` bytes a second, on the average of `over`. 0 allows any rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MinRate {
    pub rate: u64,
    pub over: Duration,
}

/// How long rrun-cri waits for a registry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RegistryLimits {
    /// How long a registry may send no byte.
    pub silence: Duration,
    pub min_rate: MinRate,
}
