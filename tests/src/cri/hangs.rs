//! File systems that hang, are full or read-only: each stalls only what needs it, is told in a
//! sentence, and leaves nothing behind.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::support::counted_lines::{line_numbers, without_gap};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

const FUSE: Need = Need::File("/dev/fuse");

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_volume_that_hangs_stalls_its_own_container_only,
        A_NODE,
        FUSE
    ),
    test!(
        a_log_that_hangs_stalls_no_exit_and_loses_no_line,
        A_NODE,
        FUSE,
        Need::RrunCri
    ),
    test!(
        a_full_disk_is_told_and_gone_when_there_is_room_again,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_read_only_state_directory_is_told_and_leaves_nothing,
        A_NODE,
        Need::RrunCri
    ),
];

/// A file system that never answers: a FUSE whose server does not read. When this is dropped
/// whoever waits for it gets an error.
struct Hung {
    at: PathBuf,
    server: Option<File>,
}

impl Hung {
    fn mount(at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        let server = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")?;
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("hung"), at, Some("fuse"), flags, Some(data.as_str()))?;
        Ok(Hung {
            at: at.to_owned(),
            server: Some(server),
        })
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        drop(self.server.take());
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

fn a_volume_that_hangs_stalls_its_own_container_only() -> Result {
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
        // Two of them: the second joins the first, which is in flight.
        let again = node.start_create(&pod_id, &pod, &config)?;
        std::thread::sleep(Duration::from_secs(1));

        // Everybody else goes on, in the same pod, too.
        let beside = node.run(&pod_id, &pod, &node.container("beside", &["sleep", "600"]))?;
        let other = node.pod("other");
        let other_id = node.runp(&other)?;
        let id = node.run(
            &other_id,
            &other,
            &node.container("goes", &["sleep", "600"]),
        )?;
        ensure_eq!(node.asks(&["exec", "-s", &id, "echo", "on"])?, "on", "exec");
        node.asks(&["ps", "--all"])?;
        node.asks(&["stats", "--all"])?;
        node.asks(&["rmp", "--force", &other_id])?;
        node.asks(&["rm", "--force", &beside])?;

        // A pod in which something hangs can be stopped; its removal says what it waits for.
        node.asks(&["stopp", &pod_id])?;
        if is_rrun() {
            let refused = node.crictl(&["rmp", &pod_id]).end()?;
            ensure!(
                refused.code != 0 && refused.stderr.contains("still being made"),
                "the removal of a pod in which a container is being made: {}",
                refused.told()
            );
        }
        drop(hung);
        for call in [stuck, again] {
            let output = call.end()?;
            ensure!(output.code != 0, "made after all: {}", output.told());
        }
        node.asks(&["rmp", "--force", &pod_id])?;
        Ok(())
    })
}

fn a_log_that_hangs_stalls_no_exit_and_loses_no_line() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("logs");
        let pod_id = node.runp(&pod)?;
        let run =
            |name: &str, command: &[&str]| node.run(&pod_id, &pod, &node.container(name, command));
        let counts = run("counts", &["/inside", "count", "2"])?;
        let other = run("other", &["/inside", "count", "2"])?;
        let logs = node.join("logs/logs");
        // The thread that opens the log again hangs, and with it this log; the old file lies
        // under the mount point.
        let (old, other_log) = (
            File::open(logs.join("counts.log"))?,
            File::open(logs.join("other.log"))?,
        );
        let hung = Hung::mount(&logs)?;
        let reopening = node.start_reopen(&counts)?;
        let length = |file: &File| Ok::<_, std::io::Error>(file.metadata()?.len());
        std::thread::sleep(Duration::from_millis(500));
        let (stalled, goes_on) = (length(&old)?, length(&other_log)?);
        wait_for("the other log to grow", || {
            Ok((length(&other_log)? > goes_on + 1000).then_some(()))
        })?;
        ensure_eq!(length(&old)?, stalled, "length of the log that hangs");
        ensure_eq!(
            node.asks(&["exec", "-s", &counts, "echo", "lives"])?,
            "lives",
            "exec in the container whose log hangs"
        );
        node.asks(&["stop", "--timeout", "0", &counts])?;
        ensure_eq!(node.status(&counts)?["exitCode"], 137, "its exit code");
        node.asks(&["stop", "--timeout", "0", &other])?;
        drop(hung);
        let output = reopening.end()?;
        ensure!(output.code != 0, "reopened: {}", output.told());
        // What had been read goes into the file when it can.
        wait_for("the log to go on", || {
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

fn a_full_disk_is_told_and_gone_when_there_is_room_again() -> Result {
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
            // What needs room says that there is none; the rest goes on.
            let refused = node.crictl(&["pull", WEB]).end()?;
            ensure!(
                refused.code != 0 && refused.stderr.contains("No space left"),
                "a pull onto a full disk: {}",
                refused.told()
            );
            let second = node.pod("second");
            let tried = node.try_runp(&second)?;
            ensure!(
                tried.code == 0 || tried.stderr.contains("o space left"),
                "a pod on a full disk: {}",
                tried.told()
            );
            let tried = node.try_create(&pod_id, &pod, &node.container("second", &["true"]))?;
            ensure!(
                tried.code == 0 || tried.stderr.contains("o space left"),
                "a container on a full disk: {}",
                tried.told()
            );
            ensure_eq!(node.asks(&["exec", "-s", &id, "echo", "on"])?, "on", "exec");
            node.asks(&["stop", "--timeout", "0", &id])?;
            ensure_eq!(node.status(&id)?["exitCode"], 137, "exit code");

            fs::remove_file(&filler)?;
            node.asks(&["rmp", "--all", "--force"])?;
            let pod_id = node.runp(&pod)?;
            let id = node.run(&pod_id, &pod, &node.container("after", &["sleep", "600"]))?;
            ensure_eq!(node.asks(&["exec", "-s", &id, "echo", "on"])?, "on", "exec");
            // It is in the store, too.
            node.kill_server()?;
            node.start_server()?;
            ensure_eq!(node.status(&id)?["state"], "CONTAINER_RUNNING", "state");
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

fn a_read_only_state_directory_is_told_and_leaves_nothing() -> Result {
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
        // Of what is unmounted here nobody else is to lose anything.
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(none, &state, none, private, none)?;
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let result: Result = (|| {
            mount(none, &state, none, read_only, none)?;
            let tried = node.try_runp(&node.pod("second"))?;
            ensure!(
                tried.code != 0 && tried.stderr.contains("Read-only file system"),
                "a pod with a read-only state directory: {}",
                tried.told()
            );
            let second = node.container("second", &["true"]);
            let tried = node.try_create(&pod_id, &pod, &second)?;
            ensure!(
                tried.code != 0 && tried.stderr.contains("Read-only file system"),
                "a container with a read-only state directory: {}",
                tried.told()
            );
            ensure_eq!(node.asks(&["ps", "--quiet"])?, id, "containers");
            node.asks(&["stop", "--timeout", "0", &id])?;
            ensure_eq!(node.status(&id)?["exitCode"], 137, "exit code");
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
