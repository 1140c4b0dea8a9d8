//! CRI-O, which is named among rrun's callers and could not be tried: what it asks of a runtime beside
//! conmon, podman asks too.

use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::test;

pub(crate) const TESTS: &[Test] = &[test!(
    crio_keeps_pods_as_a_cri_server,
    Need::Works(
        "CRI-O (Debian has no package of it, the Go module proxy no version)",
        "command -v crio"
    ),
)];

fn crio_keeps_pods_as_a_cri_server() -> Result {
    Err("CRI-O is to be had by now: let it pass what containerd passes as a CRI server".into())
}
