//! Tests of the runtime's output in the formats that other programs parse. In these formats, rrun
//! prints the same fields as runc.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::fields::{is_time, keys};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(state_prints_the_same_fields_as_runc_in_every_status),
    test!(list_prints_a_table_with_aligned_columns),
    test!(list_prints_json_or_ids),
    test!(
        no_control_character_of_a_bundles_path_is_printed,
        Need::Rrun
    ),
    test!(list_fails_for_a_missing_state_directory),
    test!(ps_prints_a_table_of_the_containers_processes),
    test!(ps_prints_json),
    test!(ps_accepts_the_options_of_the_program_ps),
    test!(statistics_have_the_same_fields_as_in_runc),
    test!(an_event_begins_with_the_same_fields_as_in_runc),
    test!(
        a_cgroup_with_the_name_of_a_file_does_not_prevent_statistics,
        Need::Rrun
    ),
    test!(
        the_runtime_logs_the_steps_of_a_command_with_the_option_debug,
        Need::Rrun
    ),
    test!(
        statistics_contain_the_counters_of_the_cgroup_controllers,
        Need::Controller("memory"),
        Need::Controller("pids"),
        Need::Controller("cpu")
    ),
    test!(features_prints_the_fields_of_the_specification),
    test!(spec_writes_a_configuration_that_can_be_run),
    test!(spec_writes_the_same_configuration_as_runc),
    test!(spec_writes_a_rootless_configuration),
    test!(version_prints_the_same_first_lines_as_runc),
];

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Checks the types of values. Each entry of `fields` is a JSON pointer and the expected type.
fn has(value: &Value, fields: &[(&str, &str)]) -> Result {
    for (pointer, expected) in fields {
        let actual = value.pointer(pointer).map_or("missing", kind);
        ensure!(
            actual == *expected,
            "the JSON type of the field {pointer} is {actual}, but should be {expected}; the whole value: {value}"
        );
    }
    Ok(())
}

/// Checks the fields in the output of `state`, or in one entry of the output of `list`.
fn has_state(value: &Value, bundle: &Bundle, status: &str) -> Result {
    ensure_eq!(
        keys(value),
        [
            "annotations",
            "bundle",
            "created",
            "id",
            "ociVersion",
            "owner",
            "pid",
            "rootfs",
            "status"
        ],
        "the fields in the printed state of a {status} container"
    );
    ensure_eq!(value["id"], json!(bundle.id()), "the container's id");
    ensure_eq!(value["status"], status, "the container's status");
    ensure_eq!(value["bundle"], json!(bundle.path()), "the bundle's path");
    ensure_eq!(
        value["rootfs"],
        json!(bundle.rootfs()),
        "the path of the root file system"
    );
    ensure_eq!(
        value["annotations"],
        json!({ "org.example.answer": "42" }),
        "the container's annotations"
    );
    let runs = status != "stopped";
    ensure!(
        value["pid"].as_i64().is_some_and(|pid| (pid > 1) == runs),
        "the process id in the state of a {status} container is wrong; the state: {value}"
    );
    for (field, is_valid) in [
        (
            "ociVersion",
            (|text| text.starts_with("1.")) as fn(&str) -> bool,
        ),
        ("created", is_time),
        ("owner", |_| true),
    ] {
        ensure!(
            value[field].as_str().is_some_and(is_valid),
            "the content of the field {field} in the container's state is invalid; the state: {value}"
        );
    }
    Ok(())
}

fn state_prints_the_same_fields_as_runc_in_every_status() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set("/annotations", json!({ "org.example.answer": "42" }));
    let look = |bundle: &Bundle, status: &str| -> Result {
        has_state(&bundle.state()?, bundle, status)?;
        let listed = bundle.runtime(&["list", "-f", "json"]).ok()?.json()?;
        ensure_eq!(
            listed.as_array().map(Vec::len),
            Some(1),
            "the number of containers that `list` prints"
        );
        has_state(&listed[0], bundle, status)?;
        ensure_eq!(listed[0]["owner"], "root", "the container's owner");
        Ok(())
    };
    bundle.call(&["create"])?.ok()?;
    look(&bundle, "created")?;
    bundle.call(&["start"])?.ok()?;
    look(&bundle, "running")?;
    bundle.call(&["pause"])?.ok()?;
    look(&bundle, "paused")?;
    bundle.call(&["resume"])?.ok()?;
    look(&bundle, "running")?;
    bundle.call(&["kill"])?.arg("KILL").ok()?;
    bundle.wait_status("stopped")?;
    look(&bundle, "stopped")?;
    bundle.delete()?;
    // The runtime omits empty fields.
    bundle.without("/annotations");
    bundle.call(&["create"])?.ok()?;
    ensure!(
        !keys(&bundle.state()?).contains(&"annotations"),
        "the state contains annotations, but the configuration has none"
    );
    bundle.end()?;
    Ok(())
}

fn list_prints_a_table_with_aligned_columns() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let output = bundle.runtime(&["list"]).ok()?;
    let lines: Vec<&str> = output.stdout.lines().collect();
    ensure_eq!(lines.len(), 2, "the number of lines in the table");
    let cells = [
        ("ID", bundle.id().to_owned()),
        ("PID", bundle.pid()?.to_string()),
        ("STATUS", "running".to_owned()),
        ("BUNDLE", bundle.path().display().to_string()),
        (
            "CREATED",
            bundle.state()?["created"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        ),
        ("OWNER", "root".to_owned()),
    ];
    // A column is three characters wider than its longest cell, but at least 12 characters wide.
    let mut place = 0;
    for (name, cell) in cells {
        for (line, text) in [(lines[0], name), (lines[1], &cell)] {
            let rest = line.get(place..).unwrap_or_default();
            let word = rest.split(' ').next().unwrap_or_default();
            ensure!(
                word == text,
                "the cell {text:?} of the column {name} does not begin at character {place} of its line:\n{}",
                output.told()
            );
        }
        place += (cell.len().max(name.len()) + 3).max(12);
    }
    bundle.end()?;
    let empty = bundle.runtime(&["list"]).ok()?;
    let head: Vec<&str> = empty.stdout.split_whitespace().collect();
    ensure_eq!(
        head,
        ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"],
        "the table that `list` prints without containers"
    );
    Ok(())
}

fn list_prints_json_or_ids() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let ids = bundle.runtime(&["list", "-q"]).ok()?;
    ensure_eq!(
        ids.stdout,
        format!("{}\n", bundle.id()),
        "the ids that `list -q` prints"
    );
    bundle.end()?;
    let ids = bundle.runtime(&["list", "--quiet"]).ok()?;
    ensure_eq!(
        ids.stdout,
        "",
        "the output of `list --quiet` without containers"
    );
    let none = bundle.runtime(&["list", "--format", "json"]).ok()?;
    ensure_eq!(
        none.text(),
        "null",
        "the JSON output of `list` without containers"
    );
    Ok(())
}

/// With a newline in its path, a bundle could pretend that another container exists. With an escape
/// sequence, it could control the terminal of the administrator.
fn no_control_character_of_a_bundles_path_is_printed() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let path = bundle.root().join(bundle.id()).join("state.json");
    let mut state: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let text = "/bundle\nOTHER 1 running\u{1b}[2J\u{7f}\u{9b}2J\ttext";
    for field in ["bundle", "owner", "created"] {
        state[field] = json!(text);
    }
    std::fs::write(&path, state.to_string())?;
    for (args, lines) in [
        (&["list"][..], 2),
        (&["list", "--format", "json"], 1),
        (&["state", bundle.id()], 10),
    ] {
        let output = bundle.runtime(args).ok()?;
        ensure_eq!(
            output.stdout.lines().count(),
            lines,
            "the number of lines that {args:?} prints"
        );
        ensure!(
            !output.stdout.replace('\n', "").contains(char::is_control),
            "{args:?} printed a control character:\n{:?}",
            output.stdout
        );
    }
    ensure_eq!(
        bundle.state()?["bundle"],
        json!(text),
        "the bundle in the JSON that `state` prints"
    );
    bundle.end()?;
    Ok(())
}

fn list_fails_for_a_missing_state_directory() -> Result {
    let bundle = Bundle::new(&[])?;
    let output = bundle.runtime(&["list"]).exits(1)?;
    ensure!(
        output.stderr.contains(&*bundle.root().to_string_lossy()),
        "the error of `list` does not contain the path of the missing state directory:\n{}",
        output.told()
    );
    Ok(())
}

fn ps_prints_a_table_of_the_containers_processes() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    bundle.exec(&["--detach"], &["sleep", "500"]).ok()?;
    let table = bundle.call(&["ps"])?.ok()?;
    let lines: Vec<Vec<&str>> = table
        .stdout
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    ensure_eq!(
        lines.len(),
        3,
        "the number of lines that `ps` prints ({})",
        table.told()
    );
    ensure_eq!(
        lines[0],
        ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"],
        "the heading of the table that `ps` prints"
    );
    let pid = bundle.pid()?.to_string();
    ensure!(
        lines[1..].iter().any(|line| line.get(1) == Some(&&*pid)),
        "the table that `ps` prints does not contain the process {pid}:\n{}",
        table.told()
    );
    table.says("inside sleep 600")?.says("inside sleep 500")?;
    bundle.end()?;
    Ok(())
}

fn ps_prints_json() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let ps = || bundle.call(&["ps", "-f", "json"])?.ok();
    ensure_eq!(
        ps()?.json()?,
        json!([bundle.pid()?]),
        "the process ids that `ps` prints for a running container"
    );
    bundle.call(&["kill"])?.arg("KILL").ok()?;
    bundle.wait_status("stopped")?;
    wait_for("the container's cgroup to become empty", || {
        let procs = bundle.cgroup_file("cgroup.procs")?;
        Ok(procs.is_empty().then_some(()))
    })?;
    ensure_eq!(
        ps()?.text().trim(),
        "null",
        "the process ids that `ps` prints for a stopped container"
    );
    bundle.delete()?;
    Ok(())
}

fn ps_accepts_the_options_of_the_program_ps() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let ps = |options: &[&str]| bundle.runtime(&["ps", bundle.id()]).args(options);
    let table = ps(&["-o", "pid,args"]).ok()?;
    let lines: Vec<&str> = table.stdout.lines().map(str::trim).collect();
    ensure_eq!(
        lines,
        [
            "PID COMMAND",
            &format!("{} /bin/inside sleep 600", bundle.pid()?)
        ],
        "the output of `ps -o pid,args`"
    );
    ps(&["aux"]).ok()?.says("inside sleep 600")?;
    for options in [&["-o", "comm"][..], &["--no-such-option"]] {
        let refused = ps(options).exits(1)?;
        ensure!(
            !refused.stderr.is_empty(),
            "`ps` with the options {options:?} prints no error message:\n{}",
            refused.told()
        );
    }
    bundle
        .runtime(&["ps", "-f", "nosuch", bundle.id()])
        .exits(1)?;
    bundle.end()?;
    Ok(())
}

/// Returns the single event that `events --stats` prints.
fn statistics(bundle: &Bundle) -> Result<Value> {
    let output = bundle.call(&["events", "--stats"])?.ok()?;
    ensure!(
        output.stdout.ends_with('\n') && output.stdout.lines().count() == 1,
        "the output of `events --stats` is not a single line:\n{}",
        output.told()
    );
    output.json()
}

fn an_event_begins_with_the_same_fields_as_in_runc() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let output = bundle.call(&["events", "--stats"])?.ok()?;
    let beginning = format!(
        "{{\"type\":\"stats\",\"id\":\"{}\",\"data\":{{",
        bundle.id()
    );
    ensure!(
        output.stdout.starts_with(&beginning),
        "the event that `events --stats` prints does not begin with {beginning}:\n{}",
        output.told()
    );
    bundle.end()?;
    Ok(())
}

/// A container can create cgroups in its own cgroup. A cgroup can have the name of a file that the
/// kernel does not provide, because the controller is not enabled.
fn a_cgroup_with_the_name_of_a_file_does_not_prevent_statistics() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    for name in ["rdma.max", "hugetlb.2MB.max", "memory.current"] {
        let path = bundle.cgroup().join(name);
        if !path.exists() {
            fs::create_dir(path)?;
        }
    }
    statistics(&bundle)?;
    bundle.end()?;
    Ok(())
}

fn the_runtime_logs_the_steps_of_a_command_with_the_option_debug() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.write_config()?;
    let log = bundle.join("log");
    let path = log.to_string_lossy();
    let run = |debug: &[&str]| {
        let mut words = vec!["--log", &*path];
        words.extend(debug);
        words.extend(["run", "--bundle"]);
        let directory = bundle.path().to_string_lossy();
        words.extend([&*directory, bundle.id()]);
        bundle.runtime(&words).ok()
    };
    run(&[])?;
    ensure_eq!(
        fs::read_to_string(&log)?,
        "",
        "the content of the log file without `--debug`"
    );
    run(&["--debug"])?;
    let text = fs::read_to_string(&log)?;
    for words in [
        "level=debug",
        "created cgroup /",
        "first process",
        "executes",
    ] {
        ensure!(
            text.contains(words),
            "the runtime's log does not contain {words:?}; the log:\n{text}"
        );
    }
    Ok(())
}

fn statistics_have_the_same_fields_as_in_runc() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let event = statistics(&bundle)?;
    ensure_eq!(
        keys(&event),
        ["data", "id", "type"],
        "the fields of the event"
    );
    ensure_eq!(event["type"], "stats", "the type of the event");
    ensure_eq!(
        event["id"],
        json!(bundle.id()),
        "the container's id in the event"
    );
    has(
        &event["data"],
        &[
            ("/cpu/usage/total", "number"),
            ("/cpu/usage/kernel", "number"),
            ("/cpu/usage/user", "number"),
            ("/cpu/throttling", "object"),
            ("/cpuset", "object"),
            ("/memory/usage/limit", "number"),
            ("/memory/usage/failcnt", "number"),
            ("/memory/swap/limit", "number"),
            ("/memory/kernel/limit", "number"),
            ("/memory/kernelTCP/limit", "number"),
            ("/pids/current", "number"),
            ("/blkio", "object"),
            ("/hugetlb", "object"),
            ("/intel_rdt", "object"),
            ("/network_interfaces", "null"),
        ],
    )?;
    bundle.end()?;
    let refused = bundle.call(&["events", "--stats"])?.exits(1)?;
    ensure!(
        refused.stderr.contains("does not exist"),
        "the error of `events` does not report that the container does not exist:\n{}",
        refused.told()
    );
    Ok(())
}

fn statistics_contain_the_counters_of_the_cgroup_controllers() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/resources",
        json!({ "memory": { "limit": 64 << 20, "swap": 96 << 20 }, "pids": { "limit": 50 } }),
    );
    bundle.start()?;
    let event = statistics(&bundle)?;
    let data = &event["data"];
    for (pointer, value) in [
        ("/memory/usage/limit", 64u64 << 20),
        ("/memory/swap/limit", 96 << 20),
        ("/pids/limit", 50),
        ("/pids/current", 1),
    ] {
        let actual = data.pointer(pointer).and_then(Value::as_u64);
        ensure_eq!(actual, Some(value), "the field {pointer} of the statistics");
    }
    has(
        data,
        &[
            ("/memory/usage/usage", "number"),
            ("/memory/usage/max", "number"),
            ("/memory/raw/anon", "number"),
            ("/memory/raw/pgfault", "number"),
        ],
    )?;
    let used = |pointer: &str| data.pointer(pointer).and_then(Value::as_u64);
    for pointer in [
        "/memory/usage/usage",
        "/memory/raw/anon",
        "/cpu/usage/total",
    ] {
        ensure!(
            used(pointer) > Some(0),
            "the field {pointer} is not greater than 0 in the event that `events --stats` prints: {event}"
        );
    }
    bundle.end()?;
    Ok(())
}

fn features_prints_the_fields_of_the_specification() -> Result {
    let bundle = Bundle::new(&[])?;
    let features = bundle.runtime(&["features"]).ok()?.json()?;
    has(
        &features,
        &[
            ("/ociVersionMin", "string"),
            ("/ociVersionMax", "string"),
            ("/hooks/0", "string"),
            ("/mountOptions/0", "string"),
            ("/linux/namespaces/0", "string"),
            ("/linux/capabilities/0", "string"),
            ("/linux/cgroup/v1", "bool"),
            ("/linux/cgroup/v2", "bool"),
            ("/linux/cgroup/systemd", "bool"),
            ("/linux/cgroup/systemdUser", "bool"),
            ("/linux/cgroup/rdma", "bool"),
            ("/linux/seccomp/enabled", "bool"),
            ("/linux/seccomp/actions/0", "string"),
            ("/linux/seccomp/operators/0", "string"),
            ("/linux/seccomp/archs/0", "string"),
            ("/linux/seccomp/knownFlags/0", "string"),
            ("/linux/seccomp/supportedFlags/0", "string"),
            ("/linux/apparmor/enabled", "bool"),
            ("/linux/selinux/enabled", "bool"),
            ("/linux/intelRdt/enabled", "bool"),
            ("/linux/mountExtensions/idmap/enabled", "bool"),
            ("/annotations", "object"),
            ("/potentiallyUnsafeConfigAnnotations", "array"),
        ],
    )?;
    for (pointer, entries) in [
        (
            "/hooks",
            &["prestart", "createRuntime", "createContainer", "poststop"][..],
        ),
        (
            "/linux/namespaces",
            &["pid", "network", "ipc", "uts", "mount", "cgroup", "user"],
        ),
        ("/linux/capabilities", &["CAP_CHOWN", "CAP_SYS_ADMIN"]),
        ("/mountOptions", &["ro", "rbind", "rslave", "noexec"]),
        ("/linux/seccomp/actions", &["SCMP_ACT_NOTIFY"]),
        (
            "/potentiallyUnsafeConfigAnnotations",
            &["org.systemd.property."],
        ),
    ] {
        let all = features.pointer(pointer).and_then(Value::as_array);
        for entry in entries {
            ensure!(
                all.is_some_and(|all| all.iter().any(|one| one == entry)),
                "the list {pointer} does not contain the entry {entry}; the output of `features`: {features}"
            );
        }
    }
    ensure_eq!(
        features["linux"]["cgroup"]["v2"],
        json!(true),
        "the field linux.cgroup.v2 of `features`"
    );
    Ok(())
}

fn spec_config(bundle: &Bundle, options: &[&str]) -> Result<Value> {
    let output = bundle.runtime(&["spec"]).args(options).ok()?;
    ensure_eq!(output.stdout, "", "the standard output of `spec`");
    Ok(serde_json::from_slice(&fs::read(
        bundle.join("config.json"),
    )?)?)
}

fn spec_writes_a_configuration_that_can_be_run() -> Result {
    let mut bundle = Bundle::new(&[])?;
    let mut config = spec_config(&bundle, &[])?;
    // `spec` does not overwrite an existing configuration.
    bundle.runtime(&["spec"]).exits(1)?;
    config["process"]["terminal"] = json!(false);
    config["linux"]["cgroupsPath"] = bundle.config["linux"]["cgroupsPath"].clone();
    bundle.config = config;
    ensure_eq!(
        bundle.args(&["echo", "ran"]).run()?.text(),
        "ran",
        "the output of the container that uses the configuration written by `spec`"
    );
    Ok(())
}

fn spec_writes_the_same_configuration_as_runc() -> Result {
    let bundle = Bundle::new(&[])?;
    let path = bundle.path().to_string_lossy();
    let config = spec_config(&bundle, &["--bundle", &path])?;
    // A new `Bundle` has the configuration from `runc spec`, with a few changes for the tests. The
    // following lines restore the original values.
    let mut expected = bundle.config.clone();
    expected["process"]["terminal"] = json!(true);
    expected["process"]["args"] = json!(["sh"]);
    expected["process"]["env"][0] =
        json!("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    for (name, value) in expected["process"].as_object().into_iter().flatten() {
        ensure_eq!(
            config["process"][name],
            *value,
            "the field process.{name} of the configuration that `spec` writes"
        );
    }
    for name in ["root", "mounts"] {
        ensure_eq!(
            config[name],
            expected[name],
            "the field {name} of the configuration that `spec` writes"
        );
    }
    for name in ["namespaces", "maskedPaths", "readonlyPaths"] {
        ensure_eq!(
            config["linux"][name],
            expected["linux"][name],
            "the field linux.{name} of the configuration that `spec` writes"
        );
    }
    ensure_eq!(
        config["linux"]["resources"],
        json!({ "devices": [{ "allow": false, "access": "rwm" }] }),
        "the value of linux.resources in the configuration that `spec` writes"
    );
    has(
        &config,
        &[("/ociVersion", "string"), ("/hostname", "string")],
    )
}

fn spec_writes_a_rootless_configuration() -> Result {
    let bundle = Bundle::new(&[])?;
    let config = spec_config(&bundle, &["--rootless"])?;
    let kinds: Vec<&str> = config["linux"]["namespaces"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|namespace| namespace["type"].as_str())
        .collect();
    ensure_eq!(
        kinds,
        ["pid", "ipc", "uts", "mount", "cgroup", "user"],
        "the namespaces of a rootless configuration"
    );
    for name in ["uidMappings", "gidMappings"] {
        ensure_eq!(
            config["linux"][name],
            json!([{ "containerID": 0, "hostID": 0, "size": 1 }]),
            "the field linux.{name} of the configuration that `spec` writes"
        );
    }
    ensure!(
        config["linux"].get("resources").is_none(),
        "the rootless configuration contains the field linux.resources; the configuration: {config}"
    );
    let mounts: Vec<&Value> = config["mounts"].as_array().into_iter().flatten().collect();
    let sys = mounts.iter().find(|mount| mount["destination"] == "/sys");
    ensure!(
        sys.is_some_and(|mount| mount["source"] == "/sys" && mount["type"] == "none"),
        "the rootless configuration does not mount the host's /sys on /sys; the configuration: {config}"
    );
    let text = config.to_string();
    ensure!(
        !text.contains("gid=") && !text.contains("null"),
        "the rootless configuration contains the option gid= or a null value; the configuration: {config}"
    );
    Ok(())
}

/// containerd, docker and podman show the first line of the output of `--version`. They parse the
/// other lines.
fn version_prints_the_same_first_lines_as_runc() -> Result {
    let bundle = Bundle::new(&[])?;
    let long = bundle.runtime(&["--version"]).ok()?;
    let program = runtime_program();
    let name = program.rsplit('/').next().unwrap_or_default();
    let first = long.stdout.lines().next().unwrap_or_default();
    let version = first.strip_prefix(&format!("{name} version "));
    ensure!(
        version.is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit())),
        "the first line of the output of `--version` is not `{name} version NUMBER`:\n{}",
        long.told()
    );
    let spec = long
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("spec: "));
    ensure!(
        spec.is_some_and(|version| version.starts_with("1.")),
        "no line of the output of `--version` contains the version of the specification:\n{}",
        long.told()
    );
    ensure_eq!(
        bundle.runtime(&["-v"]).ok()?.stdout,
        long.stdout,
        "the output of `-v`"
    );
    Ok(())
}
