//! The server as a unit of systemd's, as `make install` leaves it: what its restart, its reload
//! and its end do to pods.

use std::fs;
use std::path::Path;

use crate::support::counted_lines::{line_numbers, without_gap};
use crate::support::machine::{Failed, Result, command, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[test!(
    the_units_restart_reload_and_end_leave_the_pods_alone,
    Need::Systemd,
    A_NODE,
    Need::RrunCri
)];

const UNIT: &str = "rrun-cri.service";
const UNITS: &str = "/run/systemd/system";

fn systemctl(args: &[&str]) -> Result<String> {
    Ok(command("systemctl", args).ok()?.text().to_owned())
}

fn property(name: &str) -> Result<String> {
    systemctl(&["show", "--value", "--property", name, UNIT])
}

/// The unit as it is installed, but for the configuration of this test.
fn install(node: &Node) -> Result {
    let installed = node.join("installed");
    command("/src/contrib/install", [installed.as_os_str()])
        .arg("/usr/local")
        .ok()?;
    let unit = installed.join("usr/local/lib/systemd/system").join(UNIT);
    fs::copy(unit, Path::new(UNITS).join(UNIT))?;
    let dropins = Path::new(UNITS).join(format!("{UNIT}.d"));
    fs::create_dir_all(&dropins)?;
    let program = program_path("rrun-cri").ok_or("no rrun-cri")?;
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

fn the_units_restart_reload_and_end_leave_the_pods_alone() -> Result {
    on_a_node(|node| {
        node.terminate_server()?;
        install(node)?;
        let result = story(node);
        let journal = command(
            "journalctl",
            ["--unit", UNIT, "--lines", "30", "--no-pager"],
        )
        .end();
        let stopped = systemctl(&["stop", UNIT]).map(|_| ());
        let result = result.and(stopped).and(uninstall());
        result.map_err(|failed| {
            let journal = journal.map(|output| output.stdout).unwrap_or_default();
            format!("{}\n{journal}", failed.message().unwrap_or_default()).into()
        })
    })
}

fn story(node: &mut Node) -> Result {
    // It is started when it answers, not before.
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
    let goes_on = || {
        let before = lines()?;
        wait_for("the container to write on", || {
            Ok((lines()? > before).then_some(()))
        })
    };
    let is_as_it_was = || -> Result {
        ensure_eq!(node.status(&id)?["state"], "CONTAINER_RUNNING", "state");
        ensure_eq!(node.pid(&id)?, pid, "the container's process");
        goes_on()
    };

    let first = property("MainPID")?;
    systemctl(&["restart", UNIT])?;
    ensure!(property("MainPID")? != first, "it has not been restarted");
    is_as_it_was()?;
    node.asks(&["exec", "-s", &id, "true"])?;

    let second = property("MainPID")?;
    systemctl(&["reload", UNIT])?;
    ensure_eq!(property("MainPID")?, second, "main process after a reload");
    ensure_eq!(property("ReloadResult")?, "success", "the reload");
    wait_for("the server to have been told", || {
        let told = command("journalctl", ["--unit", UNIT, "--no-pager"]).ok()?;
        Ok(told.stdout.contains("SIGHUP: ").then_some(()))
    })?;
    is_as_it_was()?;

    // A mistake makes the reload fail, with a sentence, and nothing else.
    let config = node.join("config.toml");
    let text = fs::read_to_string(&config)?;
    fs::write(&config, format!("nonsense = 1\n{text}"))?;
    ensure!(systemctl(&["reload", UNIT]).is_err(), "it is reloaded");
    wait_for("systemctl status to have the sentence", || {
        let status = command("systemctl", ["status", "--no-pager", "--full", UNIT]).end()?;
        Ok(status.stdout.contains("line 1, nonsense").then_some(()))
    })?;
    ensure_eq!(property("MainPID")?, second, "main process after it");
    fs::write(&config, &text)?;
    systemctl(&["reload", UNIT])?;
    ensure_eq!(property("ReloadResult")?, "success", "the next reload");
    wait_for("the sentence to be gone", || {
        Ok(property("StatusText")?.is_empty().then_some(()))
    })?;
    is_as_it_was()?;

    systemctl(&["stop", UNIT])?;
    ensure_eq!(property("ActiveState")?, "inactive", "after its stop");
    ensure!(node.crictl(&["version"]).end()?.code != 0, "it answers");
    ensure!(
        Path::new(&format!("/proc/{pid}")).exists(),
        "the container ended with the server"
    );
    goes_on()?;
    systemctl(&["start", UNIT])?;
    is_as_it_was()?;
    without_gap(&line_numbers(&fs::read_to_string(&log)?)?)?;
    node.asks(&["rmp", "--all", "--force"])?;
    Ok(())
}
