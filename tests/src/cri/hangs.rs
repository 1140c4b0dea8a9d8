//! Tests with file systems that hang, are full or are read-only. A broken file system affects only
//! the CRI calls that use this file system. A failed call returns a clear error, and leaves no pod
//! and no container behind.

use std::fs::{self, File};
use std::io::Write;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::support::counted_lines::{line_numbers, without_gap};
use crate::support::hung::{FUSE, Hung};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_hanging_volume_delays_only_the_container_that_uses_it,
        A_NODE,
        FUSE
    ),
    test!(
        a_hanging_log_file_system_delays_no_container_exit_and_loses_no_log_line,
        A_NODE,
        FUSE,
        Need::RrunCri
    ),
    test!(
        empty_lines_do_not_fill_the_memory_of_a_monitor_whose_log_hangs,
        A_NODE,
        FUSE,
        Need::RrunCri
    ),
    test!(
        the_server_reports_a_full_disk_and_works_again_when_space_is_free,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_server_reports_a_read_only_state_directory_and_leaves_no_partial_container,
        A_NODE,
        Need::RrunCri
    ),
];

fn a_hanging_volume_delays_only_the_container_that_uses_it() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let hung = Hung::mount(&node.join("hung"))?;
        let pod = node.pod("hangs");
        let pod_id = node.runp(&pod)?;
        let mut config = node.container("stuck", &["sleep", "600"]);
        config["mounts"] = json!([{
            "container_path": "/volume", "host_path": node.join("hung/volume"),
        }]);
        let stuck = node.start_create(&pod_id, &pod, &config)?;
        // The first CreateContainer still hangs. The second, identical CreateContainer joins the
        // first call.
        let again = node.start_create(&pod_id, &pod, &config)?;
        std::thread::sleep(Duration::from_secs(1));

        // The hanging volume does not affect other containers, even in the same pod.
        let beside = node.run(&pod_id, &pod, &node.container("beside", &["sleep", "600"]))?;
        let other = node.pod("other");
        let other_id = node.runp(&other)?;
        let id = node.run(
            &other_id,
            &other,
            &node.container("goes", &["sleep", "600"]),
        )?;
        ensure_eq!(
            node.asks(&["exec", "-s", &id, "echo", "on"])?,
            "on",
            "output of a command that exec ran in another pod"
        );
        node.asks(&["ps", "--all"])?;
        node.asks(&["stats", "--all"])?;
        node.asks(&["rmp", "--force", &other_id])?;
        node.asks(&["rm", "--force", &beside])?;

        // While the creation of a container hangs, its pod can be stopped but not removed. The
        // error of the removal reports that the container is still being created.
        node.asks(&["stopp", &pod_id])?;
        if is_rrun() {
            let refused = node.crictl(&["rmp", &pod_id]).end()?;
            ensure!(
                refused.code != 0 && refused.stderr.contains("still being created"),
                "the pod's removal succeeded, or its error does not report that a container is still being created: {}",
                refused.told()
            );
        }
        drop(hung);
        for call in [stuck, again] {
            let output = call.end()?;
            ensure!(
                output.code != 0,
                "the server created a container although the file system of its volume failed: {}",
                output.told()
            );
        }
        node.asks(&["rmp", "--force", &pod_id])?;
        Ok(())
    })
}

fn a_hanging_log_file_system_delays_no_container_exit_and_loses_no_log_line() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("logs");
        let pod_id = node.runp(&pod)?;
        let run =
            |name: &str, command: &[&str]| node.run(&pod_id, &pod, &node.container(name, command));
        let counts = run("counts", &["/inside", "count", "2"])?;
        let other = run("other", &["/inside", "count", "2"])?;
        let logs = node.join("logs/logs");
        // The hanging file system will hide the old log files. The test therefore opens these files
        // before the mount. A thread of the monitor then hangs while it reopens `counts.log`. From
        // this moment, the monitor writes nothing to this log.
        let (old, other_log) = (
            File::open(logs.join("counts.log"))?,
            File::open(logs.join("other.log"))?,
        );
        let hung = Hung::mount(&logs)?;
        let reopening = node.start_reopen(&counts)?;
        let length = |file: &File| Ok::<_, std::io::Error>(file.metadata()?.len());
        std::thread::sleep(Duration::from_millis(500));
        let (stalled, other_before) = (length(&old)?, length(&other_log)?);
        wait_for("the log of the other container to grow", || {
            Ok((length(&other_log)? > other_before + 1000).then_some(()))
        })?;
        ensure_eq!(
            length(&old)?,
            stalled,
            "length of the old log file while the reopening of the log hangs"
        );
        ensure_eq!(
            node.asks(&["exec", "-s", &counts, "echo", "lives"])?,
            "lives",
            "output of an exec command in the container with the hanging log"
        );
        node.asks(&["stop", "--timeout", "0", &counts])?;
        ensure_eq!(
            node.status(&counts)?["exitCode"],
            137,
            "exit code of the container whose log is on the hanging file system"
        );
        node.asks(&["stop", "--timeout", "0", &other])?;
        drop(hung);
        let output = reopening.end()?;
        ensure!(
            output.code != 0,
            "the server reopened the log on a hanging file system: {}",
            output.told()
        );
        // While the thread hung, the monitor kept the output that it read from the container. The
        // monitor now writes this output to the old log file.
        wait_for("the stalled log to grow again", || {
            Ok((length(&old)? > stalled).then_some(()))
        })?;
        for name in ["counts", "other"] {
            let log = node.log_of("logs", name)?;
            let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
            without_gap(&line_numbers(whole)?)?;
        }
        Ok(())
    })
}

/// A log line is 42 times longer than an empty line in the output. The monitor enlarges the pipe of the
/// container to 1 MiB, because the container first prints a lot.
fn empty_lines_do_not_fill_the_memory_of_a_monitor_whose_log_hangs() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("empty");
        let pod_id = node.runp(&pod)?;
        let program =
            "head -c 4000000 /dev/zero; until [ -e /go ]; do sleep 0.1; done; exec yes ''";
        let spec = node.container("lines", &["sh", "-c", program]);
        let id = node.run(&pod_id, &pod, &spec)?;
        let logs = node.join("logs/empty");
        let log = File::open(logs.join("lines.log"))?;
        let length = || Ok::<_, std::io::Error>(log.metadata()?.len());
        wait_for("the long line to be logged", || {
            Ok((length()? > 3_900_000).then_some(()))
        })?;
        let hung = Hung::mount(&logs)?;
        let reopening = node.start_reopen(&id)?;
        let before = node.monitor_resident(&pod_id)?;
        node.asks(&["exec", "-s", &id, "touch", "/go"])?;
        std::thread::sleep(Duration::from_secs(1));
        node.asks(&["stop", "--timeout", "0", &id])?;
        let grown = node.monitor_resident(&pod_id)?.saturating_sub(before);
        drop(hung);
        reopening.end()?;
        ensure!(
            grown < 10_000,
            "the resident memory of the monitor has grown by {grown} kB"
        );
        wait_for("the output in the pipe to be logged", || {
            Ok((length()? > 42 * 1_000_000).then_some(()))
        })
    })
}

fn the_server_reports_a_full_disk_and_works_again_when_space_is_free() -> Result {
    on_a_node(|node| {
        let root = node.join("root");
        node.terminate_server()?;
        let flags = MsFlags::empty();
        mount(Some("disk"), &root, Some("tmpfs"), flags, Some("size=24m"))?;
        let result = (|| {
            node.start_server()?;
            node.pull(BUSYBOX)?;
            let pod = node.pod("full");
            let pod_id = node.runp(&pod)?;
            let id = node.run(&pod_id, &pod, &node.container("before", &["sleep", "600"]))?;
            let filler = root.join("filler");
            let mut file = File::create(&filler)?;
            for size in [1 << 20, 4096, 1] {
                while file.write_all(&vec![0; size]).is_ok() {}
            }
            drop(file);
            // CRI calls that need disk space report the full disk, and all other CRI calls still
            // work.
            let refused = node.crictl(&["pull", WEB]).end()?;
            ensure!(
                refused.code != 0 && refused.stderr.contains("No space left"),
                "a pull onto a full disk did not report that the disk is full: {}",
                refused.told()
            );
            let second = node.pod("second");
            let tried = node.try_runp(&second)?;
            ensure!(
                tried.code == 0 || tried.stderr.contains("o space left"),
                "the creation of a pod on a full disk failed, but not because the disk is full: {}",
                tried.told()
            );
            let tried = node.try_create(&pod_id, &pod, &node.container("second", &["true"]))?;
            ensure!(
                tried.code == 0 || tried.stderr.contains("o space left"),
                "the creation of a container on a full disk failed, but not because the disk is full: {}",
                tried.told()
            );
            ensure_eq!(
                node.asks(&["exec", "-s", &id, "echo", "on"])?,
                "on",
                "output of an exec command while the disk is full"
            );
            node.asks(&["stop", "--timeout", "0", &id])?;
            ensure_eq!(
                node.status(&id)?["exitCode"],
                137,
                "exit code of the stopped container"
            );

            fs::remove_file(&filler)?;
            node.asks(&["rmp", "--all", "--force"])?;
            let pod_id = node.runp(&pod)?;
            let id = node.run(&pod_id, &pod, &node.container("after", &["sleep", "600"]))?;
            ensure_eq!(
                node.asks(&["exec", "-s", &id, "echo", "on"])?,
                "on",
                "output of an exec command after space was freed"
            );
            // The server has recorded the container on disk, so a restarted server finds the
            // container again.
            node.kill_server()?;
            node.start_server()?;
            ensure_eq!(
                node.status(&id)?["state"],
                "CONTAINER_RUNNING",
                "the container's state after the restart"
            );
            node.asks(&["rmp", "--all", "--force"])?;
            node.asks(&["rmi", "--all"])?;
            node.terminate_server()
        })();
        if result.is_err() {
            let _ = node.crictl(&["rmp", "--all", "--force"]).end();
            let _ = node.kill_server();
        }
        umount2(&root, MntFlags::MNT_DETACH)?;
        result
    })
}

fn the_server_reports_a_read_only_state_directory_and_leaves_no_partial_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("before");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("before", &["sleep", "600"]))?;
        let state = node.join("state");
        let none = None::<&str>;
        mount(
            Some(&state),
            &state,
            none,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            none,
        )?;
        // The mount becomes private, so its later unmount does not propagate to other mounts.
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(none, &state, none, private, none)?;
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let result: Result = (|| {
            mount(none, &state, none, read_only, none)?;
            let tried = node.try_runp(&node.pod("second"))?;
            ensure!(
                tried.code != 0 && tried.stderr.contains("Read-only file system"),
                "the error of the failed pod creation does not contain \"Read-only file system\": {}",
                tried.told()
            );
            let second = node.container("second", &["true"]);
            let tried = node.try_create(&pod_id, &pod, &second)?;
            ensure!(
                tried.code != 0 && tried.stderr.contains("Read-only file system"),
                "the error of the failed container creation does not contain \"Read-only file system\": {}",
                tried.told()
            );
            ensure_eq!(
                node.asks(&["ps", "--quiet"])?,
                id,
                "ids of the running containers"
            );
            node.asks(&["stop", "--timeout", "0", &id])?;
            ensure_eq!(
                node.status(&id)?["exitCode"],
                137,
                "exit code of the stopped container"
            );
            Ok(())
        })();
        umount2(&state, MntFlags::MNT_DETACH)?;
        result?;
        node.asks(&["rm", &id])?;
        let again = node.run(&pod_id, &pod, &node.container("after", &["sleep", "600"]))?;
        node.asks(&["rm", "--force", &again])?;
        Ok(())
    })
}
