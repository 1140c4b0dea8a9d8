//! What the runtime prints, in the shapes that programs parse: runc's, field by field. What it says
//! beyond them is its own.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::fields::{is_time, keys};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(state_has_runcs_fields_in_every_status),
    test!(list_is_a_table_with_columns_below_their_names),
    test!(list_is_json_or_ids),
    test!(list_of_a_root_that_is_not_there_is_refused),
    test!(ps_is_a_table_of_the_containers_lines),
    test!(ps_is_json),
    test!(ps_takes_the_options_of_ps),
    test!(statistics_have_runcs_fields),
    test!(an_event_begins_as_runcs),
    test!(debug_tells_the_steps, Need::Rrun),
    test!(
        statistics_count_what_the_controllers_count,
        Need::Controller("memory"),
        Need::Controller("pids"),
        Need::Controller("cpu")
    ),
    test!(features_have_the_specifications_fields),
    test!(spec_writes_a_configuration_that_runs),
    test!(spec_writes_runcs_configuration),
    test!(spec_writes_a_rootless_configuration),
    test!(version_has_runcs_first_lines),
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

/// Each pointer must lead to a value of this kind.
fn has(value: &Value, fields: &[(&str, &str)]) -> Result {
    for (pointer, should) in fields {
        let is = value.pointer(pointer).map_or("missing", kind);
        ensure!(is == *should, "{pointer} is {is}, not {should}, in {value}");
    }
    Ok(())
}

/// The fields of `state` and of an entry of `list`.
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
        "fields of a {status} container"
    );
    ensure_eq!(value["id"], json!(bundle.id()), "id");
    ensure_eq!(value["status"], status, "status");
    ensure_eq!(value["bundle"], json!(bundle.path()), "bundle");
    ensure_eq!(value["rootfs"], json!(bundle.rootfs()), "rootfs");
    ensure_eq!(
        value["annotations"],
        json!({ "org.example.answer": "42" }),
        "annotations"
    );
    let lives = status != "stopped";
    ensure!(
        value["pid"].as_i64().is_some_and(|pid| (pid > 1) == lives),
        "pid of a {status} container: {value}"
    );
    for (field, right) in [
        (
            "ociVersion",
            (|text| text.starts_with("1.")) as fn(&str) -> bool,
        ),
        ("created", is_time),
        ("owner", |_| true),
    ] {
        ensure!(value[field].as_str().is_some_and(right), "{field}: {value}");
    }
    Ok(())
}

fn state_has_runcs_fields_in_every_status() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set("/annotations", json!({ "org.example.answer": "42" }));
    let look = |bundle: &Bundle, status: &str| -> Result {
        has_state(&bundle.state()?, bundle, status)?;
        let listed = bundle.runtime(&["list", "-f", "json"]).ok()?.json()?;
        ensure_eq!(listed.as_array().map(Vec::len), Some(1), "containers");
        has_state(&listed[0], bundle, status)?;
        ensure_eq!(listed[0]["owner"], "root", "owner");
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
    // A field with nothing in it is not there.
    bundle.without("/annotations");
    bundle.call(&["create"])?.ok()?;
    ensure!(
        !keys(&bundle.state()?).contains(&"annotations"),
        "no annotations were given"
    );
    bundle.end()?;
    Ok(())
}

fn list_is_a_table_with_columns_below_their_names() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let output = bundle.runtime(&["list"]).ok()?;
    let lines: Vec<&str> = output.stdout.lines().collect();
    ensure_eq!(lines.len(), 2, "lines of the table");
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
    // A column is at least 12 wide, and three wider than its longest cell.
    let mut place = 0;
    for (name, cell) in cells {
        for (line, text) in [(lines[0], name), (lines[1], &cell)] {
            let rest = line.get(place..).unwrap_or_default();
            let is = rest.split(' ').next().unwrap_or_default();
            ensure!(is == text, "{name} at {place}:\n{}", output.told());
        }
        place += (cell.len().max(name.len()) + 3).max(12);
    }
    bundle.end()?;
    let empty = bundle.runtime(&["list"]).ok()?;
    let head: Vec<&str> = empty.stdout.split_whitespace().collect();
    ensure_eq!(
        head,
        ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"],
        "the table of no container"
    );
    Ok(())
}

fn list_is_json_or_ids() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let ids = bundle.runtime(&["list", "-q"]).ok()?;
    ensure_eq!(ids.stdout, format!("{}\n", bundle.id()), "ids");
    bundle.end()?;
    let ids = bundle.runtime(&["list", "--quiet"]).ok()?;
    ensure_eq!(ids.stdout, "", "ids of no container");
    let none = bundle.runtime(&["list", "--format", "json"]).ok()?;
    ensure_eq!(none.text(), "null", "no container as JSON");
    Ok(())
}

fn list_of_a_root_that_is_not_there_is_refused() -> Result {
    let bundle = Bundle::new(&[])?;
    let output = bundle.runtime(&["list"]).exits(1)?;
    ensure!(
        output.stderr.contains(&*bundle.root().to_string_lossy()),
        "{}",
        output.told()
    );
    Ok(())
}

fn ps_is_a_table_of_the_containers_lines() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    bundle.exec(&["--detach"], &["sleep", "500"]).ok()?;
    let table = bundle.call(&["ps"])?.ok()?;
    let lines: Vec<Vec<&str>> = table
        .stdout
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    ensure_eq!(lines.len(), 3, "lines of {}", table.told());
    ensure_eq!(
        lines[0],
        ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"],
        "heading"
    );
    let pid = bundle.pid()?.to_string();
    ensure!(
        lines[1..].iter().any(|line| line.get(1) == Some(&&*pid)),
        "no {pid} in {}",
        table.told()
    );
    table.says("inside sleep 600")?.says("inside sleep 500")?;
    bundle.end()?;
    Ok(())
}

fn ps_is_json() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let ps = || bundle.call(&["ps", "-f", "json"])?.ok();
    ensure_eq!(ps()?.json()?, json!([bundle.pid()?]), "processes");
    bundle.call(&["kill"])?.arg("KILL").ok()?;
    bundle.wait_status("stopped")?;
    wait_for("an empty cgroup", || {
        let procs = bundle.cgroup_file("cgroup.procs")?;
        Ok(procs.is_empty().then_some(()))
    })?;
    ensure_eq!(ps()?.text().trim(), "null", "no processes");
    bundle.delete()?;
    Ok(())
}

fn ps_takes_the_options_of_ps() -> Result {
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
        "ps -o pid,args"
    );
    ps(&["aux"]).ok()?.says("inside sleep 600")?;
    for options in [&["-o", "comm"][..], &["--no-such-option"]] {
        let refused = ps(options).exits(1)?;
        ensure!(!refused.stderr.is_empty(), "{}", refused.told());
    }
    bundle
        .runtime(&["ps", "-f", "nosuch", bundle.id()])
        .exits(1)?;
    bundle.end()?;
    Ok(())
}

/// The one event of `events --stats`.
fn statistics(bundle: &Bundle) -> Result<Value> {
    let output = bundle.call(&["events", "--stats"])?.ok()?;
    ensure!(
        output.stdout.ends_with('\n') && output.stdout.lines().count() == 1,
        "an event is a line:\n{}",
        output.told()
    );
    output.json()
}

fn an_event_begins_as_runcs() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let output = bundle.call(&["events", "--stats"])?.ok()?;
    let beginning = format!(
        "{{\"type\":\"stats\",\"id\":\"{}\",\"data\":{{",
        bundle.id()
    );
    ensure!(output.stdout.starts_with(&beginning), "{}", output.told());
    bundle.end()?;
    Ok(())
}

fn debug_tells_the_steps() -> Result {
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
    ensure_eq!(fs::read_to_string(&log)?, "", "without --debug");
    run(&["--debug"])?;
    let told = fs::read_to_string(&log)?;
    for words in ["level=debug", "made cgroup /", "first process", "executes"] {
        ensure!(told.contains(words), "{words:?} is not in\n{told}");
    }
    Ok(())
}

fn statistics_have_runcs_fields() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let event = statistics(&bundle)?;
    ensure_eq!(keys(&event), ["data", "id", "type"], "fields of an event");
    ensure_eq!(event["type"], "stats", "type");
    ensure_eq!(event["id"], json!(bundle.id()), "id");
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
        "{}",
        refused.told()
    );
    Ok(())
}

fn statistics_count_what_the_controllers_count() -> Result {
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
        let is = data.pointer(pointer).and_then(Value::as_u64);
        ensure_eq!(is, Some(value), "{pointer}");
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
        ensure!(used(pointer) > Some(0), "{pointer} in {event}");
    }
    bundle.end()?;
    Ok(())
}

fn features_have_the_specifications_fields() -> Result {
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
                "no {entry} in {pointer}: {features}"
            );
        }
    }
    ensure_eq!(features["linux"]["cgroup"]["v2"], json!(true), "cgroup v2");
    Ok(())
}

fn written(bundle: &Bundle, options: &[&str]) -> Result<Value> {
    let output = bundle.runtime(&["spec"]).args(options).ok()?;
    ensure_eq!(output.stdout, "", "standard output of spec");
    Ok(serde_json::from_slice(&fs::read(
        bundle.join("config.json"),
    )?)?)
}

fn spec_writes_a_configuration_that_runs() -> Result {
    let mut bundle = Bundle::new(&[])?;
    let mut config = written(&bundle, &[])?;
    // It does not overwrite one.
    bundle.runtime(&["spec"]).exits(1)?;
    config["process"]["terminal"] = json!(false);
    config["linux"]["cgroupsPath"] = bundle.config["linux"]["cgroupsPath"].clone();
    bundle.config = config;
    ensure_eq!(bundle.args(&["echo", "ran"]).run()?.text(), "ran", "output");
    Ok(())
}

fn spec_writes_runcs_configuration() -> Result {
    let bundle = Bundle::new(&[])?;
    let path = bundle.path().to_string_lossy();
    let config = written(&bundle, &["--bundle", &path])?;
    // What Bundle begins with is what runc writes, but for what tests want otherwise.
    let mut expected = bundle.config.clone();
    expected["process"]["terminal"] = json!(true);
    expected["process"]["args"] = json!(["sh"]);
    expected["process"]["env"][0] =
        json!("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    for (name, value) in expected["process"].as_object().into_iter().flatten() {
        ensure_eq!(config["process"][name], *value, "process.{name}");
    }
    for name in ["root", "mounts"] {
        ensure_eq!(config[name], expected[name], "{name}");
    }
    for name in ["namespaces", "maskedPaths", "readonlyPaths"] {
        ensure_eq!(
            config["linux"][name],
            expected["linux"][name],
            "linux.{name}"
        );
    }
    ensure_eq!(
        config["linux"]["resources"],
        json!({ "devices": [{ "allow": false, "access": "rwm" }] }),
        "linux.resources"
    );
    has(
        &config,
        &[("/ociVersion", "string"), ("/hostname", "string")],
    )
}

fn spec_writes_a_rootless_configuration() -> Result {
    let bundle = Bundle::new(&[])?;
    let config = written(&bundle, &["--rootless"])?;
    let kinds: Vec<&str> = config["linux"]["namespaces"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|namespace| namespace["type"].as_str())
        .collect();
    ensure_eq!(
        kinds,
        ["pid", "ipc", "uts", "mount", "cgroup", "user"],
        "namespaces"
    );
    for name in ["uidMappings", "gidMappings"] {
        ensure_eq!(
            config["linux"][name],
            json!([{ "containerID": 0, "hostID": 0, "size": 1 }]),
            "linux.{name}"
        );
    }
    ensure!(
        config["linux"].get("resources").is_none(),
        "resources in {config}"
    );
    let mounts: Vec<&Value> = config["mounts"].as_array().into_iter().flatten().collect();
    let sys = mounts.iter().find(|mount| mount["destination"] == "/sys");
    ensure!(
        sys.is_some_and(|mount| mount["source"] == "/sys" && mount["type"] == "none"),
        "/sys is the host's: {config}"
    );
    let text = config.to_string();
    ensure!(!text.contains("gid=") && !text.contains("null"), "{config}");
    Ok(())
}

/// containerd, docker and podman show the first line, and read those after it.
fn version_has_runcs_first_lines() -> Result {
    let bundle = Bundle::new(&[])?;
    let long = bundle.runtime(&["--version"]).ok()?;
    let program = runtime_program();
    let name = program.rsplit('/').next().unwrap_or_default();
    let first = long.stdout.lines().next().unwrap_or_default();
    let version = first.strip_prefix(&format!("{name} version "));
    ensure!(
        version.is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit())),
        "{}",
        long.told()
    );
    let spec = long
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("spec: "));
    ensure!(
        spec.is_some_and(|version| version.starts_with("1.")),
        "{}",
        long.told()
    );
    ensure_eq!(bundle.runtime(&["-v"]).ok()?.stdout, long.stdout, "-v");
    Ok(())
}
