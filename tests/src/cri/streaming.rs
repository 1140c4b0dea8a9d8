//! Streams as critest tests them.

use crate::support::critest::CRITEST;
use crate::support::machine::{Result, command, deadline};
use crate::support::needs::Test;
use crate::support::node::{A_NODE, on_a_node};
use crate::test;

pub(crate) const TESTS: &[Test] = &[test!(critest_s_streaming_tests_pass, A_NODE, CRITEST)];

/// critest's own tests, over SPDY and with each WebSocket flag.
fn critest_s_streaming_tests_pass() -> Result {
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
