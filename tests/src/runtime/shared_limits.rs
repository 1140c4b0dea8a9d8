//! Tests of the kernel's limits that apply to all processes of a user together. A container must not
//! prevent another container of the same user from starting programs.

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, Running, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_container_starts_although_another_container_has_many_descriptors_in_transit,
        Need::Rrun
    ),
    test!(
        a_terminal_is_opened_although_another_container_has_many_descriptors_in_transit,
        Need::Rrun
    ),
    test!(
        a_container_starts_although_another_container_used_up_the_quota_of_keys,
        Need::Rrun
    ),
    test!(
        a_container_starts_although_roots_quota_of_keys_is_used_up,
        Need::Rrun
    ),
    test!(
        a_container_starts_although_the_limits_on_roots_namespaces_are_used_up,
        Need::Rrun,
        Need::Program("unshare")
    ),
    test!(
        a_container_is_the_same_if_the_kernel_refuses_each_first_namespace,
        Need::Rrun
    ),
    test!(
        a_process_with_no_new_privs_loads_its_filter_with_cap_sys_admin,
        Need::Rrun,
        Need::Program("strace")
    ),
];

/// The ids that only these tests use. Otherwise, the tests would disturb other processes on this
/// kernel.
const DESCRIPTORS_USER: u32 = 2_054_321;
const KEYS_USER: u32 = 2_900_000_000;
/// The limit on open descriptors in the victim's container. The kernel also limits the number of
/// descriptors in transit to this number.
const OPEN_DESCRIPTORS: u64 = 64;

fn a_container_starts_although_another_container_has_many_descriptors_in_transit() -> Result {
    let attacker = attack_with_descriptors()?;
    for user_namespace in [false, true] {
        let mut victim = victim(&["echo", "runs"])?;
        if user_namespace {
            add_user_namespace(&mut victim, DESCRIPTORS_USER);
        } else {
            let user = json!({ "uid": DESCRIPTORS_USER, "gid": DESCRIPTORS_USER });
            victim.set("/process/user", user);
        }
        ensure_eq!(victim.run()?.text(), "runs", "the output of the container");
        victim.args(&["sleep", "600"]).start()?;
        ensure_eq!(
            victim.exec(&[], &["echo", "runs"]).ok()?.text(),
            "runs",
            "the output of `exec` (user namespace: {user_namespace})"
        );
        let failed = victim.exec(&[], &["/missing"]).end()?;
        ensure!(
            failed.code != 0 && !failed.stderr.contains("transit"),
            "`exec` of a missing program does not report it:\n{}",
            failed.told()
        );
        victim.end()?;
    }
    attacker.end()?;
    Ok(())
}

fn a_terminal_is_opened_although_another_container_has_many_descriptors_in_transit() -> Result {
    let attacker = attack_with_descriptors()?;
    let mut victim = victim(&["echo", "runs"])?;
    add_user_namespace(&mut victim, DESCRIPTORS_USER);
    victim.set("/process/terminal", json!(true));
    ensure_eq!(victim.run()?.text(), "runs", "the output of the container");
    victim
        .set("/process/terminal", json!(false))
        .args(&["sleep", "600"])
        .start()?;
    ensure_eq!(
        victim.exec(&["--tty"], &["echo", "runs"]).ok()?.text(),
        "runs",
        "the output of `exec --tty`"
    );
    victim.end()?;
    attacker.end()?;
    Ok(())
}

/// Starts a container of the user `DESCRIPTORS_USER` that has more descriptors in transit than the
/// victim may have.
fn attack_with_descriptors() -> Result<Bundle> {
    let count = (2 * OPEN_DESCRIPTORS).to_string();
    let mut attacker = Bundle::new(&["in-transit", &count])?;
    let user = json!({ "uid": DESCRIPTORS_USER, "gid": DESCRIPTORS_USER });
    attacker.set("/process/user", user);
    printed(attacker.run_in_background()?, "sent")?;
    Ok(attacker)
}

fn victim(args: &[&str]) -> Result<Bundle> {
    let mut victim = Bundle::new(args)?;
    let limit = json!({
        "type": "RLIMIT_NOFILE", "soft": OPEN_DESCRIPTORS, "hard": OPEN_DESCRIPTORS
    });
    victim
        .set("/process/rlimits", json!([limit]))
        .set("/process/noNewPrivileges", json!(true))
        .set(
            "/linux/seccomp",
            json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                { "names": ["reboot"], "action": "SCMP_ACT_ERRNO" }
            ] }),
        );
    Ok(victim)
}

fn a_container_starts_although_another_container_used_up_the_quota_of_keys() -> Result {
    let mut attacker = Bundle::new(&["keys", "exhaust"])?;
    add_user_namespace(&mut attacker, KEYS_USER);
    printed(attacker.run_in_background()?, "Some(EDQUOT)")?;

    let mut victim = Bundle::new(&[])?;
    add_user_namespace(&mut victim, KEYS_USER);
    let report = victim.report()?;
    has_own_keyring(&victim, &report)?;
    victim.args(&["keys", "session"]);
    let first = victim.run()?.stdout;
    victim.args(&["sleep", "600"]).start()?;
    let second = victim.exec(&[], &["keys", "session"]).ok()?.stdout;
    let third = victim.exec(&[], &["keys", "session"]).ok()?.stdout;
    ensure!(
        first != second && second != third,
        "processes share the session keyring {second}, although the kernel could not find it"
    );
    victim.end()?;
    attacker.end()?;
    Ok(())
}

/// Without a user namespace, the quota belongs to root. The test does not use up root's quota,
/// because other programs need it. strace(1) makes the first keyctl(2) fail instead.
fn a_container_starts_although_roots_quota_of_keys_is_used_up() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    bundle.set("/process/user", json!({ "uid": 0, "gid": 0 }));
    bundle.write_config()?;
    let report = report_if_first_fails(&bundle, "keyctl:error=EDQUOT")?;
    has_own_keyring(&bundle, &report)
}

/// Runs the container, and returns its report. The first system call of each process that `fault`
/// names fails. `fault` has the form of strace(1): `CALL:error=ERRNO`.
fn report_if_first_fails(bundle: &Bundle, fault: &str) -> Result<Value> {
    let inject = format!("--inject={fault}:when=1");
    command("strace", ["--follow-forks", "--output=/dev/null", &inject])
        .arg(runtime_program())
        .arg("--root")
        .arg(bundle.root())
        .args(["run", bundle.id()])
        .dir(bundle.path())
        .ok()?
        .json()
}

/// The limits apply to a separate user namespace, because other programs on the node also need
/// namespaces. In this user namespace, a container without its own user namespace could not get its
/// devices.
fn a_container_starts_although_the_limits_on_roots_namespaces_are_used_up() -> Result {
    let limit = r#"
        for type in uts ipc net mnt cgroup; do
            echo 20 >/proc/sys/user/max_"$type"_namespaces
        done
        exec sh -c "$0" "$0" 20 "$@""#;
    // Each level of this recursive script keeps a namespace of each type.
    let hold = r#"
        level=$1
        shift
        if [ "$level" -gt 0 ]; then
            unshare --uts --ipc --net --mount --cgroup sh -c "$0" "$0" $((level - 1)) "$@"
            exit
        fi
        unshare --mount true 2>&1 | grep -q "No space left" || exit 1
        exec "$@""#;
    let mut bundle = Bundle::new(&["report"])?;
    add_user_namespace(&mut bundle, KEYS_USER);
    // Only root of the initial user namespace can restrict devices.
    let all = json!([{ "allow": true, "access": "rwm" }]);
    bundle.set("/linux/resources/devices", all).write_config()?;
    let report = command("unshare", ["--user", "--setuid=0", "--setgid=0"])
        .args(["--map-users=0,0,4294967295", "--map-groups=0,0,4294967295"])
        .args(["sh", "-c", limit, hold, &runtime_program(), "--root"])
        .arg(bundle.root())
        .args(["run", bundle.id()])
        .dir(bundle.path())
        .ok()?
        .json()?;
    ensure_eq!(report["uid"], 0, "the user id of the container's program");
    Ok(())
}

/// The test does not use up the limits, because other programs on the node need namespaces.
/// strace(1) makes the first call of each process fail instead.
fn a_container_is_the_same_if_the_kernel_refuses_each_first_namespace() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    bundle.set("/process/user", json!({ "uid": 0, "gid": 0 }));
    let whole = bundle.report()?;
    for call in ["clone3", "unshare", "open_tree", "fsmount"] {
        let report = report_if_first_fails(&bundle, &format!("{call}:error=ENOSPC"))?;
        for part in ["uid", "gid", "groups", "devices", "files", "fds", "limits"] {
            ensure_eq!(
                report[part],
                whole[part],
                "the {part} of a container for which {call} failed at first"
            );
        }
        for part in ["Uid", "Gid", "CapEff", "CapPrm", "CapBnd", "NoNewPrivs"] {
            ensure_eq!(
                report["status"][part],
                whole["status"][part],
                "the {part} of a container for which {call} failed at first"
            );
        }
    }
    Ok(())
}

fn has_own_keyring(bundle: &Bundle, report: &Value) -> Result {
    let own = format!("_ses.{}", bundle.id());
    let keyring = report["keyring"].as_str().unwrap_or_default();
    ensure!(
        keyring.contains(&own),
        "the container has the session keyring {keyring}, whose name does not contain {own}"
    );
    Ok(())
}

fn add_user_namespace(bundle: &mut Bundle, host: u32) {
    let ids = json!([{ "containerID": 0, "hostID": host, "size": 65_536 }]);
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", ids.clone())
        .set("/linux/gidMappings", ids);
}

fn printed(mut running: Running, line: &str) -> Result {
    wait_for("the attacker to print its line", || {
        let output = running.stdout();
        Ok((output.trim() == line).then_some(()))
    })
}

/// The kernel's limit on the memory for BPF programs (net.core.bpf_jit_limit), which containers can use
/// up, does not apply to a process that has CAP_SYS_ADMIN.
fn a_process_with_no_new_privs_loads_its_filter_with_cap_sys_admin() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    let filter = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["acct"], "action": "SCMP_ACT_ERRNO" }],
    });
    bundle.set("/linux/seccomp", filter);
    bundle.set("/process/noNewPrivileges", json!(true));
    bundle.write_config()?;
    let trace = bundle.join("trace");
    let run = command("strace", ["-f", "-e", "trace=capset,seccomp", "-o"]).arg(&trace);
    let run = run.arg(runtime_program()).arg("--root").arg(bundle.root());
    let run = run.args(["run", bundle.id()]).dir(bundle.path());
    let report = run.ok()?.json()?;
    ensure_eq!(
        report["status"]["CapEff"],
        report["status"]["CapBnd"],
        "the capabilities of the program"
    );
    let trace = std::fs::read_to_string(trace)?;
    let mut lines = trace.lines().rev();
    let loads = lines.find(|line| line.contains("SECCOMP_SET_MODE_FILTER"));
    let loads = loads.ok_or(format!("no process loaded a filter:\n{trace}"))?;
    let process = loads.split(' ').next().unwrap_or_default();
    let capabilities = lines.find(|line| line.starts_with(process) && line.contains("capset("));
    ensure!(
        capabilities.is_some_and(|line| line.contains("CAP_SYS_ADMIN")),
        "the process that loads the filter does not have CAP_SYS_ADMIN:\n{trace}"
    );
    Ok(())
}
