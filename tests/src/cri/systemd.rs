//! Tests of the server's systemd unit, which `make install` installs. A restart, a reload or a stop
//! of the unit must not affect pods.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::support::caller::cgroup_of;
use crate::support::counted_lines::{line_numbers, without_gap};
use crate::support::machine::{Failed, Result, command, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        pods_keep_running_when_the_unit_is_restarted_or_reloaded_or_stopped,
        Need::Systemd,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_pause_process_is_in_the_pods_slice,
        Need::Systemd,
        A_NODE,
        Need::RrunCri
    ),
];

const UNIT: &str = "rrun-cri.service";
const UNITS: &str = "/run/systemd/system";

fn systemctl(args: &[&str]) -> Result<String> {
    Ok(command("systemctl", args).ok()?.text().to_owned())
}

fn property(name: &str) -> Result<String> {
    systemctl(&["show", "--value", "--property", name, UNIT])
}

/// Installs the unit as `make install` does. A drop-in file makes the unit start the server with
/// this test's configuration.
fn install(node: &Node) -> Result {
    let installed = node.join("installed");
    command("/src/contrib/install", [installed.as_os_str()])
        .arg("/usr/local")
        .ok()?;
    let unit = installed.join("usr/local/lib/systemd/system").join(UNIT);
    fs::copy(unit, Path::new(UNITS).join(UNIT))?;
    let dropins = Path::new(UNITS).join(format!("{UNIT}.d"));
    fs::create_dir_all(&dropins)?;
    let program = program_path("rrun-cri").ok_or("rrun-cri is not in PATH")?;
    let (program, config) = (program.display(), node.join("config.toml"));
    let config = config.display();
    let line = format!(
        "[Service]\nExecStart=\nExecStart={program} --config {config}\n\
         ExecReload=\nExecReload={program} config check --config {config}\n\
         ExecReload=/bin/kill -HUP $MAINPID\n"
    );
    fs::write(dropins.join("e2e.conf"), line)?;
    systemctl(&["daemon-reload"]).map(|_| ())
}

fn uninstall() -> Result {
    fs::remove_file(Path::new(UNITS).join(UNIT))?;
    fs::remove_dir_all(Path::new(UNITS).join(format!("{UNIT}.d")))?;
    systemctl(&["daemon-reload"]).map(|_| ())
}

fn pods_keep_running_when_the_unit_is_restarted_or_reloaded_or_stopped() -> Result {
    on_a_node(|node| {
        node.terminate_server()?;
        install(node)?;
        let result = use_the_unit(node);
        let journal = command(
            "journalctl",
            ["--unit", UNIT, "--lines", "30", "--no-pager"],
        )
        .end();
        let stopped = systemctl(&["stop", UNIT]).map(|_| ());
        let result = result.and(stopped).and(uninstall());
        result.map_err(|failed| {
            let journal = journal.map(|output| output.stdout).unwrap_or_default();
            format!(
                "{}; journal of the unit:\n{journal}",
                failed.message().unwrap_or_default()
            )
            .into()
        })
    })
}

fn use_the_unit(node: &mut Node) -> Result {
    // `systemctl start` returns only when the server can answer CRI calls.
    systemctl(&["start", UNIT])?;
    node.asks(&["version"])?;
    ensure_eq!(property("Type")?, "notify", "the unit's type");
    node.pull(BUSYBOX)?;
    let pod = node.pod("unit");
    let pod_id = node.runp(&pod)?;
    let container = node.container("counts", &["/inside", "count", "20"]);
    let id = node.run(&pod_id, &pod, &container)?;
    let pid = node.pid(&id)?;
    let log = node.join("logs/unit/counts.log");
    let lines = || Ok::<_, Failed>(line_numbers(&fs::read_to_string(&log)?)?.len());
    let keeps_writing = || {
        let before = lines()?;
        wait_for("the container to write more lines", || {
            Ok((lines()? > before).then_some(()))
        })
    };
    let is_unaffected = || -> Result {
        ensure_eq!(
            node.status(&id)?["state"],
            "CONTAINER_RUNNING",
            "the container's state after the unit was restarted, reloaded or started"
        );
        ensure_eq!(
            node.pid(&id)?,
            pid,
            "the container's process id after the unit was restarted, reloaded or started"
        );
        keeps_writing()
    };

    let first = property("MainPID")?;
    systemctl(&["restart", UNIT])?;
    ensure!(
        property("MainPID")? != first,
        "the restart of the unit did not start a new server process"
    );
    is_unaffected()?;
    node.asks(&["exec", "-s", &id, "true"])?;

    let second = property("MainPID")?;
    systemctl(&["reload", UNIT])?;
    ensure_eq!(
        property("MainPID")?,
        second,
        "process id of the server after a reload"
    );
    ensure_eq!(
        property("ReloadResult")?,
        "success",
        "result of the unit's reload"
    );
    wait_for("the server to log the SIGHUP", || {
        let journal = command("journalctl", ["--unit", UNIT, "--no-pager"]).ok()?;
        Ok(journal.stdout.contains("SIGHUP: ").then_some(()))
    })?;
    is_unaffected()?;

    // A configuration error makes the reload fail with a clear error, and has no other effect.
    let config = node.join("config.toml");
    let text = fs::read_to_string(&config)?;
    fs::write(&config, format!("nonsense = 1\n{text}"))?;
    ensure!(
        systemctl(&["reload", UNIT]).is_err(),
        "a reload of the unit succeeded although the configuration has an error"
    );
    wait_for("systemctl status to show the error", || {
        let status = command("systemctl", ["status", "--no-pager", "--full", UNIT]).end()?;
        Ok(status.stdout.contains("line 1, nonsense").then_some(()))
    })?;
    ensure_eq!(
        property("MainPID")?,
        second,
        "process id of the server after the failed reload"
    );
    fs::write(&config, &text)?;
    systemctl(&["reload", UNIT])?;
    ensure_eq!(
        property("ReloadResult")?,
        "success",
        "result of the reload with the corrected configuration"
    );
    wait_for("the error to disappear from the unit's status", || {
        Ok(property("StatusText")?.is_empty().then_some(()))
    })?;
    is_unaffected()?;

    systemctl(&["stop", UNIT])?;
    ensure_eq!(
        property("ActiveState")?,
        "inactive",
        "ActiveState of the unit after systemctl stop"
    );
    ensure!(
        node.crictl(&["version"]).end()?.code != 0,
        "the server still answers after its unit was stopped"
    );
    ensure!(
        Path::new(&format!("/proc/{pid}")).exists(),
        "the container exited together with the server"
    );
    keeps_writing()?;
    systemctl(&["start", UNIT])?;
    is_unaffected()?;
    without_gap(&line_numbers(&fs::read_to_string(&log)?)?)?;
    node.asks(&["rmp", "--all", "--force"])?;
    Ok(())
}

fn the_pause_process_is_in_the_pods_slice() -> Result {
    const SLICE: &str = "e2epause.slice";
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for requested in ["", SLICE] {
            let mut pod = node.pod("sliced");
            pod["linux"]["cgroup_parent"] = json!(requested);
            pod["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
            let pod_id = node.runp(&pod)?;
            let slice = match requested {
                "" => format!("rrun.slice/rrun-{pod_id}.slice"),
                requested => requested.to_owned(),
            };
            let pause = node.pause_process(&pod_id)?.to_string();
            let cgroup = Path::new("/sys/fs/cgroup")
                .join(slice)
                .join(format!("rrun-pause-{pod_id}"));
            let is_inside = || -> Result {
                ensure_eq!(cgroup_of(&pause)?, cgroup, "cgroup of the pause process");
                Ok(())
            };
            is_inside()?;
            let mut container = node.container("sliced", &["sleep", "600"]);
            container["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
            let id = node.run(&pod_id, &pod, &container)?;
            // systemd applies its settings to the slice again, and the last unit leaves the slice.
            systemctl(&["daemon-reload"])?;
            is_inside()?;
            node.asks(&["rm", "--force", &id])?;
            is_inside()?;
            node.asks(&["exec", "-s", &node.run(&pod_id, &pod, &container)?, "true"])?;
            is_inside()?;
            node.asks(&["stopp", &pod_id])?;
            ensure!(
                !cgroup.exists(),
                "{} still exists after the pod was stopped",
                cgroup.display()
            );
            node.asks(&["rmp", &pod_id])?;
        }
        // Only the caller that requested the slice stops it.
        systemctl(&["stop", SLICE]).map(|_| ())
    })
}
