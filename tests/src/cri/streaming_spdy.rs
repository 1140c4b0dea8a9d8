//! Clients of every age: the versions of remotecommand over SPDY, of which crictl speaks the last.

use std::collections::BTreeMap;

use rrun_proto::v1::ExecRequest;

use crate::support::calls::Calls;
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, on_a_node};
use crate::support::spdy::{FIN, SpdyClient};
use crate::support::streams::waiting;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(every_version_of_remotecommand_is_spoken, A_NODE),
    test!(
        a_new_size_does_not_wait_behind_what_nobody_reads,
        A_NODE,
        Need::RrunCri
    ),
    test!(a_terminal_is_resized_since_version_3, A_NODE),
];

const VERSIONS: [&str; 4] = [
    "channel.k8s.io",
    "v2.channel.k8s.io",
    "v3.channel.k8s.io",
    "v4.channel.k8s.io",
];

fn exec_url(calls: &Calls, id: &str, script: &str, tty: bool) -> Result<String> {
    let mut runtime = calls.runtime();
    let request = ExecRequest {
        container_id: id.to_owned(),
        cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    let answer = calls.wait(async move { runtime.exec(request).await })??;
    Ok(answer.into_inner().url)
}

fn every_version_of_remotecommand_is_spoken() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "versions")?;
        let calls = Calls::new(node)?;
        for version in ["", VERSIONS[0], VERSIONS[1], VERSIONS[2], VERSIONS[3]] {
            let url = exec_url(&calls, &id, "cat; echo err >&2; exit 3", false)?;
            let mut client = SpdyClient::upgraded(&url, version)?;
            for kind in ["error", "stdin", "stdout", "stderr"] {
                client.open(kind)?;
            }
            client.sends("stdin", FIN, b"typed")?;
            let came = client.all()?;
            let of = |kind| came.get(kind).map(String::as_str).unwrap_or_default();
            ensure_eq!(of("stdout"), "typed", "stdout by {version:?}");
            ensure_eq!(of("stderr"), "err\n", "stderr by {version:?}");
            let status = serde_json::from_str::<serde_json::Value>(of("error"));
            if version == "v4.channel.k8s.io" {
                let code = status?.pointer("/details/causes/0/message").cloned();
                ensure_eq!(code, Some("3".into()), "the code by {version}");
            } else {
                ensure!(
                    status.is_err()
                        && of("error").contains("exit code")
                        && of("error").contains('3'),
                    "the error by {version:?}: {}",
                    of("error")
                );
            }
        }
        Ok(())
    })
}

fn a_new_size_does_not_wait_behind_what_nobody_reads() -> Result {
    /// More than a terminal holds, which is 64 KiB and some.
    const TYPED_BYTES: usize = 400_000;
    let script = format!(
        "stty raw -echo; echo ready; until [ \"$(stty size)\" = '31 101' ]; do sleep 0.1; done; \
         echo resized; head -c {TYPED_BYTES} | wc -c"
    );
    on_a_node(|node| {
        let id = waiting(node, "unread")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &script, true)?;
        let mut client = SpdyClient::upgraded(&url, "v4.channel.k8s.io")?;
        for kind in ["error", "stdin", "stdout", "resize"] {
            client.open(kind)?;
        }
        let said = |word: &'static str| {
            move |came: &BTreeMap<&'static str, String>| {
                came.get("stdout").is_some_and(|text| text.contains(word))
            }
        };
        client.until(said("ready"))?;
        for _ in 0..TYPED_BYTES / 20_000 {
            client.sends("stdin", 0, &[b'x'; 20_000])?;
        }
        client.sends("resize", 0, b"{\"Width\":101,\"Height\":31}\n")?;
        let came = client.until(said("resized"))?;
        ensure!(said("resized")(&came), "it ended: {came:?}");
        // What was typed before it is all there.
        let came = client.all()?;
        let read = came.get("stdout").map(|text| text.trim().to_owned());
        ensure_eq!(read, Some(TYPED_BYTES.to_string()), "what the program read");
        Ok(())
    })
}

fn a_terminal_is_resized_since_version_3() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "sizes")?;
        let calls = Calls::new(node)?;
        for version in VERSIONS {
            let url = exec_url(&calls, &id, "read line; stty size", true)?;
            let mut client = SpdyClient::upgraded(&url, version)?;
            for kind in ["error", "stdin", "stdout"] {
                client.open(kind)?;
            }
            let resizes = version.starts_with("v3") || version.starts_with("v4");
            if resizes {
                client.open("resize")?;
                client.sends("resize", 0, b"{\"Width\":101,\"Height\":31}\n")?;
            }
            // What is typed is read after the new size.
            client.sends("stdin", 0, b"go\n")?;
            let came = client.all()?;
            let screen = came.get("stdout").map(String::as_str).unwrap_or_default();
            ensure!(
                screen.contains("go") && screen.contains("31 101") == resizes,
                "the terminal by {version}: {came:?}"
            );
        }
        Ok(())
    })
}
