//! Limits for the time and the rate of a registry's answers, and a registry's permissions.

use std::time::Duration;

/// The minimum rate of an answer. On average over the time `over`, at least `rate` bytes per second
/// must arrive. A rate of 0 disables the check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MinRate {
    pub rate: u64,
    pub over: Duration,
}

/// The limits that apply to every answer of a registry, and the permissions of the registry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RegistryLimits {
    /// The time without a received byte after which a request fails.
    pub silence: Duration,
    pub min_rate: MinRate,
    /// The time within which a document must arrive.
    pub document: Duration,
    pub permissions: Permissions,
}

/// The permissions of every registry. See the settings with the same names.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Permissions {
    pub local_redirects: bool,
    pub plain_token_servers: bool,
}
