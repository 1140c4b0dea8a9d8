//! The streaming tests of critest, which use exec, attach and port-forward.

use crate::support::critest::CRITEST;
use crate::support::machine::{Result, command, deadline};
use crate::support::needs::Test;
use crate::support::node::{A_NODE, on_a_node};
use crate::test;

pub(crate) const TESTS: &[Test] = &[test!(the_streaming_tests_of_critest_pass, A_NODE, CRITEST)];

/// Runs the streaming tests once over SPDY, and once with each WebSocket flag of critest.
fn the_streaming_tests_of_critest_pass() -> Result {
    on_a_node(|node| {
        let endpoint = format!("unix://{}", node.socket().display());
        for flag in [
            None,
            Some("-websocket-exec"),
            Some("-websocket-attach"),
            Some("-websocket-portforward"),
        ] {
            command("critest", ["-ginkgo.focus", "Streaming"])
                .args(["-runtime-endpoint", &endpoint])
                .args(flag)
                .within(deadline() * 4)
                .ok()?;
        }
        Ok(())
    })
}
