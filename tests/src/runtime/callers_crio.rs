//! CRI-O is one of rrun's intended callers. CRI-O and podman both call a runtime through conmon. No
//! test with CRI-O exists, because no package of CRI-O was available.

use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::test;

pub(crate) const TESTS: &[Test] = &[test!(
    crio_runs_pods_as_a_cri_server,
    Need::Works(
        "CRI-O (Debian has no package of CRI-O, and the Go module proxy has no version of CRI-O)",
        "command -v crio"
    ),
)];

fn crio_runs_pods_as_a_cri_server() -> Result {
    Err(
        "CRI-O is available on this machine, so this test should be replaced \
         by the tests that containerd passes as a CRI server"
            .into(),
    )
}
