//! Tests of containers, images and requests that try to give the server work without end. The
//! server limits this work, and answers other requests in the meantime.

use std::fs;

use serde_json::json;

use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        processes_that_a_command_leaves_behind_do_not_delay_its_result,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_client_accepts_the_output_of_a_command_that_writes_too_much,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_path_that_is_too_long_is_refused_immediately,
        A_NODE,
        Need::RrunCri
    ),
];

/// The commands leave processes behind that write to the commands' stdout without a pause. The
/// server has two worker threads, so two such commands would occupy the server.
fn processes_that_a_command_leaves_behind_do_not_delay_its_result() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("floods");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("floods", &["sleep", "600"]))?;
        let script = "for n in 1 2 3 4 5 6 7 8; do setsid yes & done; exec echo started >&2";
        let exec = ["exec", "-s", &id, "sh", "-c", script];
        let commands = [node.crictl(&exec).start()?, node.crictl(&exec).start()?];
        for _ in 0..5 {
            node.asks(&["version"])?;
        }
        for command in commands {
            let output = command.end()?;
            ensure!(
                output.code == 0 && output.stdout.contains("started"),
                "a command that left writing processes behind failed: exit code {}, stderr {:?}",
                output.code,
                output.stderr
            );
        }
        node.asks(&["stopp", &pod_id])?;
        Ok(())
    })
}

/// crictl and kubelet refuse a message of more than 16 MiB. crictl writes stdout and stderr of the
/// command to its stdout.
fn the_client_accepts_the_output_of_a_command_that_writes_too_much() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("writes");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("writes", &["sleep", "600"]))?;
        let note = "[rrun: the rest of the output was dropped]\n\n";
        for (script, end) in [
            ("yes | head -c 17000000; echo end >&2", "end\n\n"),
            ("yes | head -c 17000000; yes | head -c 17000000 >&2", note),
        ] {
            let exec = node.crictl(&["exec", "-s", &id, "sh", "-c", script]);
            let output = exec.ok()?;
            let length = output.stdout.len();
            ensure!(
                length > 16_700_000 && output.stdout.ends_with(end) && output.stdout.contains(note),
                "crictl receives {length} bytes from {script:?}, which do not end with {end:?}"
            );
        }
        Ok(())
    })
}

/// The creation of a million nested directories would take hours, and the pod could not be removed
/// in the meantime.
fn a_path_that_is_too_long_is_refused_immediately() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("long");
        let pod_id = node.runp(&pod)?;
        let long = "/a".repeat(1_000_000);
        let path = node.join("volume");
        fs::create_dir(&path)?;
        let mount = |image: serde_json::Value, host: &str, to: &str, sub_path: &str| {
            json!([{
                "container_path": to, "host_path": host, "image": image,
                "image_sub_path": sub_path, "readonly": true,
            }])
        };
        let image = json!({ "image": BUSYBOX });
        let host = path.to_string_lossy();
        for (number, (key, value)) in [
            ("working_dir", json!(long)),
            ("mounts", mount(json!(null), &host, &long, "")),
            ("mounts", mount(json!(null), &long, "/mnt", "")),
            ("mounts", mount(image, "", "/mnt", &long[1..])),
        ]
        .into_iter()
        .enumerate()
        {
            let mut container = node.container(&format!("long-{number}"), &["sleep", "600"]);
            container[key] = value;
            let output = node.try_create(&pod_id, &pod, &container)?;
            // The middle of a long error is left out, so only one reason is checked.
            ensure!(
                output.code == 1
                    && (key != "working_dir" || output.stderr.contains("at most 4095 bytes")),
                "the creation of a container with a long path in {key} (number {number}) ended with the exit code {} and the error {:.500}",
                output.code,
                output.stderr
            );
        }
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id])?;
        Ok(())
    })
}
