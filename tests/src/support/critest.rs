//! critest, the CRI's own test suite.

use std::time::Duration;

use crate::support::needs::Need;

pub(crate) const CRITEST: Need = Need::Program("critest");

/// The timeout of a critest run. With containerd, critest takes three minutes on an idle machine,
/// and fifteen minutes under emulation.
pub(crate) const CRITEST_TIMEOUT: Duration = Duration::from_secs(3600);
