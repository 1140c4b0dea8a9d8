//! Bounds on pulls.

use std::time::Duration;

/// Bounds on a pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Layers fetched at once, over all pulls.
    pub parallel_layers: usize,
    /// Layers fetched at once from one host.
    pub layers_per_host: usize,
    /// Layers unpacked at once.
    pub parallel_unpacks: usize,
    /// The most bytes that one layer may unpack to.
    pub layer_bytes: u64,
    /// The most files that one layer may hold.
    pub layer_entries: u64,
    /// How long a registry may send nothing in the middle of an answer.
    pub silence: Duration,
    /// The least rate of a registry's answers.
    pub min_rate: MinRate,
    /// How long a pull continues after its last caller has gone.
    pub abandoned: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            parallel_layers: 4,
            layers_per_host: 3,
            parallel_unpacks: 3,
            layer_bytes: 64 << 30,
            layer_entries: 4 << 20,
            silence: Duration::from_secs(30),
            min_rate: MinRate {
                rate: 100,
                over: Duration::from_secs(60),
            },
            abandoned: Duration::from_secs(300),
        }
    }
}

/// The least rate of an answer: `rate` bytes a second, on the average of `over`. 0 allows any rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MinRate {
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
