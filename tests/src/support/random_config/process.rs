//! The member `process` of a random config.json.

use serde_json::{Value, json};

use super::{Choices, Part, push, set};

pub(super) const PARTS: &[Part] = &[
    (20, user),
    (10, groups),
    (10, umask),
    (20, capabilities),
    (15, limit),
    (30, flags),
    (10, directory),
    (10, environment),
    (4, program),
    (10, io_priority),
    (10, scheduler),
    (4, affinity),
];

const IDS: &[u32] = &[0, 0, 1, 5, 1000, 65534, 65535, 65536, 100_000, u32::MAX - 1];

fn user(dice: &mut Choices, config: &mut Value) {
    set(config, "/process/user", "uid", json!(dice.pick(IDS)));
    set(config, "/process/user", "gid", json!(dice.pick(IDS)));
}

fn groups(dice: &mut Choices, config: &mut Value) {
    for _ in 0..dice.below(4) {
        let id = dice.pick(IDS);
        push(config, "/process/user", "additionalGids", json!(id));
    }
}

fn umask(dice: &mut Choices, config: &mut Value) {
    let mask = dice.either(&[0, 0o22, 0o27, 0o77, 0o777], &[0o1022, 0o7777]);
    set(config, "/process/user", "umask", json!(mask));
}

const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_ADMIN",
    "CAP_SYS_ADMIN",
    "CAP_SYS_PTRACE",
    "CAP_AUDIT_WRITE",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Adds capability sets. Usually the effective, permitted and bounding sets are equal, as engines
/// write them.
fn capabilities(dice: &mut Choices, config: &mut Value) {
    let count = dice.below(8) as usize;
    let all = dice.draw(CAPABILITIES.to_vec(), count);
    let mut sets = json!({ "bounding": all, "effective": all, "permitted": all });
    if dice.one_in(4) {
        sets["inheritable"] = json!(all);
        if dice.one_in(2) {
            sets["ambient"] = json!(all);
        }
    }
    let names = [
        "bounding",
        "effective",
        "permitted",
        "inheritable",
        "ambient",
    ];
    if dice.errs(4) {
        let name = dice.pick(&names);
        let count = dice.below(4) as usize;
        sets[name] = json!(dice.draw(CAPABILITIES.to_vec(), count));
    }
    if dice.errs(4) {
        let name = dice.pick(&names);
        let odd = dice.pick(&["CAP_NO_SUCH", "cap_chown", "CHOWN", "CAP_SYS_RESOURCE", ""]);
        sets[name] = json!([odd]);
    }
    set(config, "/process", "capabilities", sets);
    if dice.one_in(12)
        && let Some(Value::Object(process)) = config.get_mut("process")
    {
        process.remove("capabilities");
    }
}

fn limit(dice: &mut Choices, config: &mut Value) {
    let kinds = [
        "AS",
        "CORE",
        "CPU",
        "DATA",
        "FSIZE",
        "LOCKS",
        "MEMLOCK",
        "MSGQUEUE",
        "NOFILE",
        "NPROC",
        "RSS",
        "RTTIME",
        "SIGPENDING",
        "STACK",
    ];
    // These limits are 0 by default. A process without CAP_SYS_RESOURCE cannot raise them.
    let kind = dice.either(&kinds, &["NICE", "RTPRIO"]);
    // Less would not be enough for the program.
    let least: u64 = match kind {
        "AS" | "DATA" | "STACK" | "FSIZE" => 1 << 30,
        "CPU" | "RTTIME" | "NOFILE" | "NPROC" | "SIGPENDING" => 512,
        _ => 0,
    };
    let soft = least + dice.below(3) * 10;
    let hard = match dice.below(8) {
        0 => u64::MAX,
        1 if dice.mistakes => soft.saturating_sub(1),
        _ => soft + dice.below(3),
    };
    if kind == "NOFILE" && !dice.errs(2) {
        set(config, "/process", "rlimits", json!([]));
    }
    let kind = format!("RLIMIT_{kind}");
    let entry = json!({ "type": kind, "soft": soft, "hard": hard });
    push(config, "/process", "rlimits", entry.clone());
    if dice.errs(6) {
        push(config, "/process", "rlimits", entry);
    }
    if dice.errs(6) {
        let entry = json!({ "type": "RLIMIT_NO_SUCH", "soft": 1, "hard": 1 });
        push(config, "/process", "rlimits", entry);
    }
}

fn flags(dice: &mut Choices, config: &mut Value) {
    set(config, "/process", "noNewPrivileges", json!(dice.one_in(2)));
    if dice.one_in(2) {
        let score = dice.either(&[0, 1, 500, 1000], &[1001, -1000]);
        set(config, "/process", "oomScoreAdj", json!(score));
    }
    if dice.one_in(8) {
        set(config, "/process", "apparmorProfile", json!(""));
    }
    if dice.one_in(8) {
        let size = json!({ "height": dice.below(100), "width": 0 });
        set(config, "/process", "consoleSize", size);
    }
}

fn directory(dice: &mut Choices, config: &mut Value) {
    let usual = ["/", "/tmp", "/proc/self", "/tmp/../bin", "//tmp/.", "/link"];
    let path = dice.either(&usual, &["/no/such", "/bin/inside", "relative", ""]);
    set(config, "/process", "cwd", json!(path));
}

fn environment(dice: &mut Choices, config: &mut Value) {
    let long = format!("LONG={}", "x".repeat(100_000));
    let odd = ["NAME", "=value", ""];
    let usual = [
        "A=1\n2",
        "A=a=b",
        "PATH=/bin",
        "HOME=/x",
        "HOME=",
        "Ä=ö",
        &long,
    ];
    for _ in 0..=dice.below(3) {
        let entry = dice.either(&usual, &odd);
        push(config, "/process", "env", json!(entry));
    }
    if dice.one_in(4) {
        set(config, "/process", "env", json!([]));
    }
}

fn program(dice: &mut Choices, config: &mut Value) {
    let usual: [&[&str]; 2] = [&["inside", "observe"], &["/link/inside", "observe"]];
    let odd: [&[&str]; 6] = [
        &["../bin/inside", "observe"],
        &["/bin/no-such-program"],
        &["/bin/no-program"],
        &["/bin"],
        &[""],
        &[],
    ];
    let program = dice.either(&usual, &odd);
    set(config, "/process", "args", json!(program));
}

fn io_priority(dice: &mut Choices, config: &mut Value) {
    let classes = [
        "IOPRIO_CLASS_RT",
        "IOPRIO_CLASS_BE",
        "IOPRIO_CLASS_BE",
        "IOPRIO_CLASS_IDLE",
    ];
    let class = dice.either(&classes, &["IOPRIO_CLASS_NO_SUCH"]);
    let priority = dice.either(&[0, 1, 4, 7, 7], &[8]);
    let value = json!({ "class": class, "priority": priority });
    set(config, "/process", "ioPriority", value);
}

fn scheduler(dice: &mut Choices, config: &mut Value) {
    let policies = ["SCHED_OTHER", "SCHED_BATCH", "SCHED_IDLE"];
    let real_time = ["SCHED_FIFO", "SCHED_RR"];
    let all = [policies.as_slice(), &real_time].concat();
    let policy = dice.either(&all, &["SCHED_ISO"]);
    let mut value = json!({ "policy": policy });
    let is_real_time = real_time.contains(&policy);
    if !is_real_time && dice.one_in(2) || dice.errs(2) {
        value["nice"] = json!(dice.either(&[0, 5, 19, -20], &[20]));
    }
    if is_real_time && !dice.errs(4) || dice.errs(4) {
        value["priority"] = json!(dice.either(&[1, 99], &[0, 100]));
    }
    if dice.one_in(4) {
        let flag = dice.either(&["SCHED_FLAG_RESET_ON_FORK"], &["SCHED_FLAG_NO_SUCH"]);
        value["flags"] = json!([flag]);
    }
    set(config, "/process", "scheduler", value);
}

fn affinity(dice: &mut Choices, config: &mut Value) {
    let (usual, odd) = (["0", "0-1", "1", "0,1"], ["", "1-0", "x", "99999"]);
    let value = json!({
        "initial": dice.either(&usual, &odd), "final": dice.either(&usual, &odd),
    });
    set(config, "/process", "execCPUAffinity", value);
}
