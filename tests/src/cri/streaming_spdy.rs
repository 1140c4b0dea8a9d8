//! Tests of all versions of the remotecommand protocol over SPDY. Old clients use old versions, but
//! crictl uses only the newest version.

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
    test!(
        the_server_supports_every_version_of_the_remotecommand_protocol,
        A_NODE
    ),
    test!(
        a_resize_does_not_wait_for_unread_input,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        clients_of_protocol_version_3_and_later_can_resize_a_terminal,
        A_NODE
    ),
    test!(
        the_output_to_a_terminal_that_was_closed_and_opened_again_reaches_the_client,
        A_NODE,
        Need::RrunCri
    ),
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

fn the_server_supports_every_version_of_the_remotecommand_protocol() -> Result {
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
            let received = client.all()?;
            let of = |kind| received.get(kind).map(String::as_str).unwrap_or_default();
            ensure_eq!(
                of("stdout"),
                "typed",
                "stdout of a command that exec ran with protocol version {version:?}"
            );
            ensure_eq!(
                of("stderr"),
                "err\n",
                "stderr of a command that exec ran with protocol version {version:?}"
            );
            let status = serde_json::from_str::<serde_json::Value>(of("error"));
            if version == "v4.channel.k8s.io" {
                let code = status?.pointer("/details/causes/0/message").cloned();
                ensure_eq!(
                    code,
                    Some("3".into()),
                    "exit code of a command that exec ran with protocol version {version:?}"
                );
            } else {
                ensure!(
                    status.is_err()
                        && of("error").contains("exit code")
                        && of("error").contains('3'),
                    "the error stream with protocol version {version:?} lacks the exit code: {}",
                    of("error")
                );
            }
        }
        Ok(())
    })
}

fn a_resize_does_not_wait_for_unread_input() -> Result {
    /// The number of bytes that the client sends. A terminal's buffer is a little larger than 64
    /// KiB, so these bytes do not fit into the buffer.
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
        let shows = |word: &'static str| {
            move |received: &BTreeMap<&'static str, String>| {
                received
                    .get("stdout")
                    .is_some_and(|text| text.contains(word))
            }
        };
        client.until(shows("ready"))?;
        for _ in 0..TYPED_BYTES / 20_000 {
            client.sends("stdin", 0, &[b'x'; 20_000])?;
        }
        client.sends("resize", 0, b"{\"Width\":101,\"Height\":31}\n")?;
        let received = client.until(shows("resized"))?;
        ensure!(
            shows("resized")(&received),
            "the exec session ended before its program reported the new terminal size; received data: {received:?}"
        );
        // The program must also receive all input from before the resize.
        let received = client.all()?;
        let read = received.get("stdout").map(|text| text.trim().to_owned());
        ensure_eq!(
            read,
            Some(TYPED_BYTES.to_string()),
            "number of bytes that the program read"
        );
        Ok(())
    })
}

fn clients_of_protocol_version_3_and_later_can_resize_a_terminal() -> Result {
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
            // The shell reads this line after the new size has taken effect.
            client.sends("stdin", 0, b"go\n")?;
            let received = client.all()?;
            let screen = received
                .get("stdout")
                .map(String::as_str)
                .unwrap_or_default();
            ensure!(
                screen.contains("go") && screen.contains("31 101") == resizes,
                "the terminal has the wrong size with protocol version {version:?}; received data: {received:?}"
            );
        }
        Ok(())
    })
}

/// Processes can close their terminal and open it again later.
fn the_output_to_a_terminal_that_was_closed_and_opened_again_reaches_the_client() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "reopened")?;
        let calls = Calls::new(node)?;
        let script =
            "tty=$(tty); echo before; exec <&- >&- 2>&-; sleep 1; echo after >$tty; exit 3";
        let url = exec_url(&calls, &id, script, true)?;
        let mut client = SpdyClient::upgraded(&url, "v4.channel.k8s.io")?;
        for kind in ["error", "stdin", "stdout", "resize"] {
            client.open(kind)?;
        }
        let received = client.all()?;
        let of = |kind| received.get(kind).map(String::as_str).unwrap_or_default();
        ensure_eq!(
            of("stdout"),
            "before\r\nafter\r\n",
            "the output of the command"
        );
        ensure!(
            of("error").contains('3'),
            "the error stream does not contain the exit code 3: {}",
            of("error")
        );
        Ok(())
    })
}
