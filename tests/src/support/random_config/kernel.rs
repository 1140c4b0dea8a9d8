//! The member `linux` of a random config.json, without namespaces, mounts and limits, and the hooks.

use serde_json::{Value, json};

use super::{Choices, ID, Part, push, set};

pub(super) const PARTS: &[Part] = &[
    (15, sysctl),
    (15, seccomp),
    (6, personality),
    (6, time_offsets),
    (15, cgroup),
    (10, hooks),
    (3, memory_policy),
];

fn sysctl(dice: &mut Choices, config: &mut Value) {
    let all = [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv4.ping_group_range", "0 1000"),
        ("net/ipv4/conf/lo/forwarding", "1"),
        ("net.core.somaxconn", "77"),
        ("kernel.msgmax", "4096"),
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.sem", "100 32000 100 128"),
        ("fs.mqueue.msg_max", "20"),
        ("kernel.domainname", "a.example"),
        ("kernel.hostname", "other"),
        ("vm.swappiness", "10"),
        ("net.no.such", "1"),
        ("kernel.msgmax", "many"),
        ("net.ipv4.ip_forward", ""),
        ("", "1"),
        ("net.ipv4.conf.lo/forwarding", "0"),
    ];
    let (usual, odd) = all.split_at(9);
    let mut values = json!({});
    for _ in 0..=dice.below(2) {
        let (key, value) = dice.either(usual, odd);
        values[key] = json!(value);
    }
    set(config, "/linux", "sysctl", values);
}

/// System calls that neither the runtimes nor the program need, and the least values of their first
/// arguments in the conditions of a rule.
const CALLS: &[&str] = &[
    "getpgid",
    "mincore",
    "swapon",
    "acct",
    "syslog",
    "kexec_load",
    "no_such_call",
];

fn seccomp(dice: &mut Choices, config: &mut Value) {
    let actions = [
        "SCMP_ACT_ERRNO",
        "SCMP_ACT_ERRNO",
        "SCMP_ACT_KILL",
        "SCMP_ACT_KILL_PROCESS",
        "SCMP_ACT_KILL_THREAD",
        "SCMP_ACT_TRAP",
        "SCMP_ACT_LOG",
        "SCMP_ACT_TRACE",
        "SCMP_ACT_ALLOW",
    ];
    let mut profile = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
    if dice.one_in(10) {
        let action = dice.either(&["SCMP_ACT_LOG"], &["SCMP_ACT_NO_SUCH", ""]);
        profile["defaultAction"] = json!(action);
    }
    if dice.errs(6) {
        profile["defaultErrnoRet"] = json!(dice.either(&[1, 38, 4095], &[5000]));
    }
    let architectures = [
        "SCMP_ARCH_X86_64",
        "SCMP_ARCH_X86",
        "SCMP_ARCH_X32",
        "SCMP_ARCH_AARCH64",
    ];
    if dice.one_in(3) {
        let count = dice.below(4) as usize;
        profile["architectures"] = json!(dice.draw(architectures.to_vec(), count));
    }
    if dice.errs(8) {
        profile["architectures"] = json!(["SCMP_ARCH_NO_SUCH"]);
    }
    if dice.one_in(6) {
        let usual = [
            "SECCOMP_FILTER_FLAG_TSYNC",
            "SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
        ];
        let odd = [
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
            "SECCOMP_FILTER_FLAG_NO_SUCH",
        ];
        profile["flags"] = json!([dice.either(&usual, &odd)]);
    }
    for _ in 0..dice.below(4) {
        let count = 1 + dice.below(3) as usize;
        let mut rule = json!({
            "names": dice.draw(CALLS.to_vec(), count),
            "action": dice.either(&actions, &["SCMP_ACT_NOTIFY"]),
        });
        if rule["action"] == "SCMP_ACT_ERRNO" && dice.one_in(3) || dice.errs(6) {
            rule["errnoRet"] = json!(dice.either(&[0, 1, 38, 4094], &[4095, 4096]));
        }
        if dice.one_in(3) {
            rule["args"] = conditions(dice);
        }
        push(&mut profile, "", "syscalls", rule);
    }
    set(config, "/linux", "seccomp", profile);
}

fn conditions(dice: &mut Choices) -> Value {
    let operators = [
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ];
    let mut all = Vec::new();
    for usual in 0..=dice.below(2) {
        all.push(json!({
            // libseccomp accepts only one condition for each argument.
            "index": dice.either(&[usual, 5 - usual], &[0, 1, 2, 5, 6]),
            "value": dice.pick(&[0, 1, 0x7fff_ffff, u64::MAX]),
            "valueTwo": dice.pick(&[0, 1, 0xffff_ffff_u32]),
            "op": dice.either(&operators, &["SCMP_CMP_NO_SUCH"]),
        }));
    }
    json!(all)
}

fn personality(dice: &mut Choices, config: &mut Value) {
    let domain = dice.either(&["LINUX", "LINUX32"], &["no-such"]);
    let mut value = json!({ "domain": domain });
    if dice.one_in(5) {
        value["flags"] = json!([]);
    }
    set(config, "/linux", "personality", value);
}

fn time_offsets(dice: &mut Choices, config: &mut Value) {
    let namespaces = config["linux"]["namespaces"].as_array();
    let is_time = |namespace: &Value| namespace["type"] == "time";
    let has_time = namespaces.is_some_and(|all| all.iter().any(is_time));
    if !has_time && !dice.errs(6) {
        push(config, "/linux", "namespaces", json!({ "type": "time" }));
    }
    let clock = dice.either(&["boottime", "monotonic"], &["no-such"]);
    let offset = json!({
        "secs": dice.either(&[0_i64, 1, 86400], &[-10, i64::MAX]),
        "nanosecs": dice.either(&[0_u64, 1, 999_999_999], &[1_000_000_000]),
    });
    set(config, "/linux", "timeOffsets", json!({ clock: offset }));
}

fn cgroup(dice: &mut Choices, config: &mut Value) {
    let paths = [
        format!("/{ID}"),
        ID.to_owned(),
        format!("/e2e/{ID}"),
        format!("e2e/a/{ID}"),
        format!("/{ID}/"),
        format!("//{ID}"),
    ];
    let outside = format!("/e2e/../{ID}");
    let usual = paths.each_ref().map(String::as_str);
    let path = dice.either(&usual, &[outside.as_str()]);
    set(config, "/linux", "cgroupsPath", json!(path));
    if dice.one_in(4) {
        let devices = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 3, "access": dice.either(&["rwm", "r"], &[""]) },
            { "allow": true, "type": dice.either(&["b", "c"], &["a", "x"]), "access": "m" },
        ]);
        set(config, "/linux", "resources", json!({ "devices": devices }));
    }
}

fn hooks(dice: &mut Choices, config: &mut Value) {
    let kinds = [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
        "poststart",
        "poststop",
    ];
    let kind = dice.pick(&kinds);
    let inside = kind == "startContainer";
    let mut hook = match (inside, dice.either(&[4], &[0, 1, 2, 3])) {
        (_, 0) => json!({ "path": "/no/such" }),
        (_, 1) => json!({ "path": "relative" }),
        (true, 2) => json!({ "path": "/bin/inside", "args": ["inside", "exit", "3"] }),
        (true, 3) => {
            json!({ "path": "/bin/inside", "args": ["inside", "sleep", "9"], "timeout": 1 })
        }
        (true, _) => json!({ "path": "/bin/inside", "args": ["inside", "exit", "0"] }),
        (false, 2) => json!({ "path": "/bin/false" }),
        (false, 3) => json!({ "path": "/bin/sleep", "args": ["sleep", "9"], "timeout": 1 }),
        (false, _) => json!({ "path": "/bin/true" }),
    };
    if dice.one_in(6) {
        hook["env"] = json!([dice.either(&["A=1", "A="], &["B", ""])]);
    }
    if dice.one_in(12) {
        hook["timeout"] = json!(dice.either(&[5], &[0, -1]));
    }
    let mut hooks = json!({});
    push(&mut hooks, "", kind, hook);
    set(config, "", "hooks", hooks);
}

fn memory_policy(dice: &mut Choices, config: &mut Value) {
    let usual = [("MPOL_DEFAULT", ""), ("MPOL_BIND", "0"), ("MPOL_LOCAL", "")];
    let odd = [
        ("MPOL_DEFAULT", "0"),
        ("MPOL_BIND", ""),
        ("MPOL_BIND", "99"),
        ("MPOL_LOCAL", "0"),
        ("MPOL_NO_SUCH", "0"),
    ];
    let (mode, nodes) = dice.either(&usual, &odd);
    let value = json!({ "mode": mode, "nodes": nodes });
    set(config, "/linux", "memoryPolicy", value);
}
