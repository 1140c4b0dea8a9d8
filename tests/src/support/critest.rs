//! critest, the CRI's own suite.

use std::time::Duration;

use crate::support::needs::Need;

pub(crate) const CRITEST: Need = Need::Program("critest");

/// Three minutes with containerd on an idle machine, fifteen under emulation.
pub(crate) const CRITEST_TIMEOUT: Duration = Duration::from_secs(3600);
