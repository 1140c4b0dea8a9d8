//! System call filters, by their effect.

use nix::libc;
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Directory, Result, command, deadline, note};
use crate::support::needs::{Need, Test};
use crate::support::seccomp::{
    LEAST_PROGRAM, REFUSING, but, filtered, for_getpgid, getpgid, least, with_least_program,
};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(each_action_has_its_effect),
    test!(errno_and_default_errno_are_those_asked_for),
    test!(arguments_decide),
    test!(calls_newer_than_the_profile_are_not_implemented),
    test!(
        programs_of_other_architectures_are_filtered_or_killed,
        CALLS_32
    ),
    test!(unknown_calls_and_architectures_are_passed_over),
    test!(flags_are_taken),
    test!(a_user_without_privileges_is_filtered_too),
    test!(exec_is_filtered_as_the_container_is),
    test!(without_a_profile_nothing_is_filtered),
    test!(a_filter_is_the_programs_concern_alone, Need::Rrun),
    test!(
        between_a_filter_and_its_program_execve_is_the_only_call,
        Need::Rrun
    ),
    test!(
        a_program_that_can_not_be_executed_is_reported_under_any_filter,
        Need::Rrun
    ),
    test!(the_right_to_load_a_filter_ends_with_that),
    test!(a_bad_profile_is_refused_by_its_field, Need::Rrun),
    test!(features_tell_of_seccomp, Need::Rrun),
    test!(
        decisions_are_libseccomps,
        Need::Rrun,
        Need::File("/usr/bin/python3"),
    ),
];

/// What the kernel's 32-bit entry calls getpid(2).
const GETPID_32: &str = "20";

/// x86-64, with that entry. The parent of the shell is this program.
const CALLS_32: Need = Need::Works(
    "32-bit system calls",
    "RRUN_E2E_INSIDE=1 exec /proc/$PPID/exe call32 20",
);

/// What the program says, and its exit code.
fn outcome(profile: Value, args: &[&str]) -> Result<(i32, String)> {
    let output = filtered(profile, args)?.call(&["run"])?.end()?;
    ensure!(
        output.code == 0 || output.stderr.is_empty(),
        "{}",
        output.told()
    );
    Ok((output.code, output.text().to_owned()))
}

fn each_action_has_its_effect() -> Result {
    let number = getpgid();
    const KILLED: i32 = 128 + libc::SIGSYS;
    for (action, program, code, text) in [
        ("SCMP_ACT_ALLOW", "call", 0, "1"),
        ("SCMP_ACT_LOG", "call", 0, "1"),
        ("SCMP_ACT_ERRNO", "call", 0, "EPERM"),
        // Nobody traces it.
        ("SCMP_ACT_TRACE", "call", 0, "ENOSYS"),
        ("SCMP_ACT_TRAP", "call", KILLED, ""),
        ("SCMP_ACT_TRAP", "call-and-catch", 0, "caught SIGSYS"),
        ("SCMP_ACT_KILL", "call", KILLED, ""),
        ("SCMP_ACT_KILL", "call-and-catch", KILLED, ""),
        ("SCMP_ACT_KILL", "call-in-thread", 0, "survived"),
        ("SCMP_ACT_KILL_THREAD", "call-in-thread", 0, "survived"),
        ("SCMP_ACT_KILL_PROCESS", "call", KILLED, ""),
        ("SCMP_ACT_KILL_PROCESS", "call-in-thread", KILLED, ""),
    ] {
        let got = outcome(for_getpgid(action), &[program, &number])?;
        ensure_eq!(got, (code, text.to_owned()), "{program} under {action}");
    }
    Ok(())
}

fn errno_and_default_errno_are_those_asked_for() -> Result {
    let mut profile = for_getpgid("SCMP_ACT_ERRNO");
    profile["syscalls"][0]["errnoRet"] = json!(libc::ENOTTY);
    let got = outcome(profile, &["call", &getpgid()])?;
    ensure_eq!(got.1, "ENOTTY", "errno");
    let mut profile = all_but(&["getpgid"], "SCMP_ACT_ERRNO");
    profile["defaultErrnoRet"] = json!(libc::EXDEV);
    let got = outcome(profile, &["call", &getpgid()])?;
    ensure_eq!(got.1, "EXDEV", "default errno");
    Ok(())
}

/// Every call that there is is allowed, but these and what is newer than openat2(2).
fn all_but(forbidden: &[&str], default: &str) -> Value {
    const NEWER: std::ops::Range<u32> = 438..512;
    let names: Vec<&str> = include_str!("../../../runtime/src/seccomp/syscalls.tbl")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut words = line.split(' ');
            let name = words.next()?;
            let newer = words.any(|word| word.parse().is_ok_and(|number| NEWER.contains(&number)));
            (!newer && !forbidden.contains(&name)).then_some(name)
        })
        .collect();
    json!({
        "defaultAction": default,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
        "syscalls": [{ "names": names, "action": "SCMP_ACT_ALLOW" }],
    })
}

fn arguments_decide() -> Result {
    // getpriority(2) takes an int, and an id that no process has gives ESRCH.
    let call = libc::SYS_getpriority.to_string();
    let big = (1u64 << 32 | 5).to_string();
    for (op, value, value_two, arg, is_filtered) in [
        ("EQ", 5u64, 0u64, "5", true),
        ("EQ", 5, 0, "6", false),
        ("EQ", 5, 0, big.as_str(), false),
        ("EQ", 1 << 32 | 5, 0, big.as_str(), true),
        ("NE", 5, 0, "5", false),
        ("NE", 5, 0, big.as_str(), true),
        ("LT", 5, 0, "4", true),
        ("LT", 5, 0, "5", false),
        ("LE", 5, 0, "5", true),
        ("LE", 5, 0, big.as_str(), false),
        ("GT", 5, 0, "5", false),
        ("GT", 5, 0, big.as_str(), true),
        ("GE", 5, 0, "5", true),
        ("GE", 5, 0, "4", false),
        ("MASKED_EQ", 6, 4, "5", true),
        ("MASKED_EQ", 6, 4, "6", false),
    ] {
        let rule = json!([{
            "names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EDOM,
            "args": [{
                "index": 1, "op": format!("SCMP_CMP_{op}"),
                "value": value, "valueTwo": value_two,
            }],
        }]);
        let (_, text) = outcome(but(rule), &["call", &call, "0", arg])?;
        ensure_eq!(text == "EDOM", is_filtered, "{arg} {op} {value}, {text}");
    }
    // Several rules for one call.
    let personality = |value: u64| {
        json!({
            "names": ["personality"], "action": "SCMP_ACT_ALLOW",
            "args": [{ "index": 0, "op": "SCMP_CMP_EQ", "value": value }],
        })
    };
    let mut profile = all_but(&["personality"], "SCMP_ACT_ERRNO");
    for value in [0, 8, 0xffff_ffff] {
        if let Some(rules) = profile["syscalls"].as_array_mut() {
            rules.push(personality(value));
        }
    }
    let call = libc::SYS_personality.to_string();
    for (value, text) in [("0", "0"), ("8", "0"), ("4294967295", "0"), ("9", "EPERM")] {
        let got = outcome(profile.clone(), &["call", &call, value])?;
        ensure_eq!(got.1, text, "personality {value}");
    }
    Ok(())
}

fn calls_newer_than_the_profile_are_not_implemented() -> Result {
    for default in ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"] {
        let profile = all_but(&["getpgid"], default);
        for number in ["9999", "449", "438"] {
            let got = outcome(profile.clone(), &["call", number])?;
            ensure_eq!(got.1, "ENOSYS", "call {number} under {default}");
        }
    }
    let profile = all_but(&["getpgid"], "SCMP_ACT_ERRNO");
    let got = outcome(profile, &["call", &getpgid()])?;
    ensure_eq!(got.1, "EPERM", "a call that is older");
    Ok(())
}

fn programs_of_other_architectures_are_filtered_or_killed() -> Result {
    let profile = |rule: &str, architectures: Value| {
        let mut profile = but(json!([{ "names": [rule], "action": "SCMP_ACT_ERRNO" }]));
        profile["architectures"] = architectures;
        profile
    };
    let args = ["call32", GETPID_32];
    let both = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]);
    let got = outcome(profile("getpid", both.clone()), &args)?;
    ensure_eq!(got.1, "EPERM", "getpid of a 32-bit program");
    // 20 is writev on x86-64.
    let got = outcome(profile("writev", both), &args)?;
    ensure_eq!(got.1, "1", "getpid of a 32-bit program, not filtered");
    let got = outcome(profile("writev", json!(["SCMP_ARCH_X86_64"])), &args)?;
    ensure_eq!(got.0, 128 + libc::SIGSYS, "exit code, x86 not being listed");
    // x32 is there or not; not listed, it is death in any case.
    let x32 = (libc::SYS_getpgid | 0x4000_0000).to_string();
    let got = outcome(for_getpgid("SCMP_ACT_LOG"), &["call", &x32])?;
    ensure_eq!(got.0, 128 + libc::SIGSYS, "exit code, x32 not being listed");
    Ok(())
}

fn unknown_calls_and_architectures_are_passed_over() -> Result {
    let mut profile = but(json!([
        { "names": ["not_a_call", "getpgid"], "action": "SCMP_ACT_ERRNO" },
    ]));
    profile["architectures"] = json!([
        "SCMP_ARCH_MIPSEL64",
        "SCMP_ARCH_RISCV64",
        "SCMP_ARCH_PPC64LE"
    ]);
    let got = outcome(profile, &["call", &getpgid()])?;
    ensure_eq!(got.1, "EPERM", "a call beside an unknown one");
    Ok(())
}

fn flags_are_taken() -> Result {
    for flags in [
        json!([]),
        json!(["SECCOMP_FILTER_FLAG_LOG"]),
        json!([
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
            "SECCOMP_FILTER_FLAG_TSYNC"
        ]),
    ] {
        let mut profile = for_getpgid("SCMP_ACT_ERRNO");
        profile["flags"] = flags.clone();
        let got = outcome(profile, &["call", &getpgid()])?;
        ensure_eq!(got.1, "EPERM", "with flags {flags}");
    }
    Ok(())
}

fn a_user_without_privileges_is_filtered_too() -> Result {
    for no_new_privileges in [true, false] {
        let mut bundle = filtered(for_getpgid("SCMP_ACT_ERRNO"), &["call", &getpgid()])?;
        bundle
            .set("/process/noNewPrivileges", json!(no_new_privileges))
            .set("/process/user", json!({ "uid": 1000, "gid": 1000 }))
            .set("/process/capabilities", json!({}));
        ensure_eq!(
            bundle.run()?.text(),
            "EPERM",
            "noNewPrivileges {no_new_privileges}"
        );
        let report = bundle.report()?;
        ensure_eq!(report["status"]["Seccomp"], "2", "mode");
        ensure_eq!(
            report["status"]["CapEff"],
            "0000000000000000",
            "capabilities"
        );
    }
    Ok(())
}

fn exec_is_filtered_as_the_container_is() -> Result {
    for no_new_privileges in [true, false] {
        let mut bundle = filtered(for_getpgid("SCMP_ACT_ERRNO"), &["sleep", "60"])?;
        bundle.set("/process/noNewPrivileges", json!(no_new_privileges));
        bundle.start()?;
        let call = bundle.exec(&[], &["call", &getpgid()]).ok()?;
        ensure_eq!(call.text(), "EPERM", "what exec's call gives");
        let report = bundle.exec(&["--user", "7:7"], &["report"]).ok()?.json()?;
        ensure_eq!(report["status"]["Seccomp"], "2", "mode");
        ensure_eq!(report["status"]["Seccomp_filters"], "1", "filters");
        bundle.end()?;
    }
    Ok(())
}

fn without_a_profile_nothing_is_filtered() -> Result {
    let report = Bundle::new(&[])?.report()?;
    ensure_eq!(report["status"]["Seccomp"], "0", "mode");
    let mut bundle = filtered(json!({ "defaultAction": "SCMP_ACT_ALLOW" }), &[])?;
    let report = bundle.report()?;
    ensure_eq!(
        report["status"]["Seccomp"],
        "2",
        "mode with a profile that allows all"
    );
    Ok(())
}

/// With noNewPrivileges the filter is loaded right before the program: nothing that rrun does
/// itself must be allowed.
fn a_filter_is_the_programs_concern_alone() -> Result {
    let names = [
        "execve",
        "exit_group",
        "brk",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlinkat",
        "readlink",
        "getrandom",
        "mprotect",
        "mmap",
        "munmap",
        "poll",
        "ppoll",
        "rt_sigaction",
        "rt_sigprocmask",
        "sigaltstack",
        "sched_getaffinity",
        "gettid",
        "fcntl",
        "openat",
        "read",
        "close",
        "newfstatat",
        "fstat",
        "getcwd",
        "statx",
        "access",
        "write",
    ];
    let profile = json!({
        "defaultAction": "SCMP_ACT_KILL_PROCESS",
        "syscalls": [{ "names": names, "action": "SCMP_ACT_ALLOW" }],
    });
    let bundle = filtered(profile, &["echo", "confined"])?;
    ensure_eq!(bundle.run()?.text(), "confined", "output");
    bundle.start()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn between_a_filter_and_its_program_execve_is_the_only_call() -> Result {
    for (default, no_new_privileges, uid, terminal) in REFUSING.iter().flat_map(|default| {
        [
            (*default, true, 0, false),
            (*default, false, 0, true),
            (*default, true, 1000, true),
            (*default, false, 1000, false),
        ]
    }) {
        let case = format!("{default}, noNewPrivileges {no_new_privileges}, user {uid}");
        let with = |words| -> Result<Bundle> {
            let mut bundle = with_least_program(least(default), words)?;
            bundle
                .set(
                    "/process/rlimits",
                    json!([{ "type": "RLIMIT_FSIZE", "soft": 0, "hard": 0 }]),
                )
                .set("/process/noNewPrivileges", json!(no_new_privileges))
                .set("/process/user", json!({ "uid": uid, "gid": uid }))
                .set(
                    "/hooks/startContainer",
                    json!([{ "path": LEAST_PROGRAM, "args": ["hook"] }]),
                );
            if uid != 0 {
                bundle.set("/process/capabilities", json!({}));
            }
            Ok(bundle)
        };
        let mut bundle = with(2)?;
        bundle.set("/process/terminal", json!(terminal));
        let output = bundle.call(&["run"])?.end()?;
        ensure_eq!(output.code, 7, "run, {case}: {}", output.told());

        let bundle = with(3)?;
        bundle.start()?;
        ensure_eq!(bundle.status()?, "running", "status after start, {case}");
        let exec = [&["exec"], &[bundle.id()], &[LEAST_PROGRAM; 2][..]].concat();
        let output = bundle.runtime(&exec).end()?;
        ensure_eq!(output.code, 7, "exec, {case}: {}", output.told());
        bundle.end()?;
    }
    Ok(())
}

/// The filter may forbid the process to report the failure itself.
fn a_program_that_can_not_be_executed_is_reported_under_any_filter() -> Result {
    let nothing = |default: &str| json!({ "defaultAction": default, "syscalls": [] });
    for (profile, program, words) in [
        (
            least("SCMP_ACT_ERRNO"),
            "/bin/nobody",
            "stat /bin/nobody: no such file",
        ),
        (
            least("SCMP_ACT_KILL_PROCESS"),
            "nobody",
            "executable file not found in $PATH",
        ),
        (
            least("SCMP_ACT_KILL_PROCESS"),
            "/bin/no-program",
            "permission denied",
        ),
        (
            least("SCMP_ACT_ERRNO"),
            "/bin/script",
            "perhaps the interpreter",
        ),
        (
            least("SCMP_ACT_KILL_PROCESS"),
            "/bin/script",
            "perhaps the interpreter",
        ),
        (
            least("SCMP_ACT_KILL_PROCESS"),
            "/bin/text",
            "exec format error",
        ),
        (
            nothing("SCMP_ACT_ERRNO"),
            LEAST_PROGRAM,
            "which linux.seccomp may forbid",
        ),
    ] {
        for no_new_privileges in [true, false] {
            let mut bundle = with_least_program(profile.clone(), 3)?;
            bundle
                .set("/process/args", json!([program]))
                .set("/process/noNewPrivileges", json!(no_new_privileges));
            let output = bundle.call(&["run"])?.exits(1)?;
            ensure!(output.stderr.contains(words), "{}", output.told());
            let created = bundle.runtime(&["create", bundle.id()]).end()?;
            let output = match created.code {
                0 => bundle.runtime(&["start", bundle.id()]).end()?,
                _ => created,
            };
            ensure!(output.stderr.contains(words), "{}", output.told());
            bundle.end()?;
        }
    }
    let killed = with_least_program(nothing("SCMP_ACT_KILL_PROCESS"), 2)?;
    killed.call(&["run"])?.exits(128 + libc::SIGSYS)?;

    let bundle = with_least_program(least("SCMP_ACT_KILL_PROCESS"), 3)?;
    bundle.start()?;
    for (program, words) in [
        ("/bin/nobody", "stat /bin/nobody: no such file"),
        ("/bin/script", "perhaps the interpreter"),
        ("/bin/text", "exec format error"),
    ] {
        let output = bundle.runtime(&["exec", bundle.id(), program]).exits(255)?;
        ensure!(output.stderr.contains(words), "{}", output.told());
    }
    bundle.end()?;
    Ok(())
}

/// The program does not get the capability that loads the filter.
fn the_right_to_load_a_filter_ends_with_that() -> Result {
    for uid in [0, 1000] {
        let mut bundle = filtered(for_getpgid("SCMP_ACT_ERRNO"), &["report"])?;
        bundle
            .set("/process/noNewPrivileges", json!(false))
            .set("/process/user", json!({ "uid": uid, "gid": uid }));
        let filtered = bundle.run()?.json()?;
        bundle.without("/linux/seccomp");
        let free = bundle.run()?.json()?;
        ensure_eq!(filtered["status"]["Seccomp"], "2", "mode");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure_eq!(
                filtered["status"][set],
                free["status"][set],
                "{set} of user {uid}"
            );
        }
    }
    Ok(())
}

fn a_bad_profile_is_refused_by_its_field() -> Result {
    let with = |pointer: &str, value: Value| {
        let mut profile = for_getpgid("SCMP_ACT_ERRNO");
        if let Some(place) = profile.pointer_mut(pointer) {
            *place = value;
        } else {
            let key = pointer.trim_start_matches('/');
            profile[key] = value;
        }
        profile
    };
    for (profile, words) in [
        (
            with("/defaultAction", json!("SCMP_ACT_NO")),
            "linux.seccomp.defaultAction",
        ),
        (
            with("/defaultErrnoRet", json!(1)),
            "linux.seccomp.defaultErrnoRet",
        ),
        (
            with("/architectures", json!(["VAX"])),
            "linux.seccomp.architectures[0]",
        ),
        (with("/flags", json!(["FLAG"])), "linux.seccomp.flags[0]"),
        (
            with("/flags", json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])),
            "linux.seccomp.flags[0]",
        ),
        (
            with("/listenerMetadata", json!("x")),
            "linux.seccomp.listenerMetadata",
        ),
        (
            with("/syscalls/0/action", json!("SCMP_ACT_NOTIFY")),
            "linux.seccomp.listenerPath",
        ),
        (
            with("/syscalls/0/names", json!([""])),
            "linux.seccomp.syscalls[0].names[0]",
        ),
        (
            with(
                "/syscalls/0",
                json!({
                    "names": ["getpgid"], "action": "SCMP_ACT_ERRNO",
                    "args": [{ "index": 9, "value": 0, "op": "SCMP_CMP_EQ" }],
                }),
            ),
            "linux.seccomp.syscalls[0].args[0].index",
        ),
    ] {
        let bundle = filtered(profile, &["exit", "0"])?;
        let output = bundle.call(&["run"])?.exits(1)?;
        ensure!(output.stderr.contains(words), "{words}:\n{}", output.told());
        ensure!(
            !bundle.root().join(bundle.id()).exists(),
            "left its directory"
        );
        ensure!(!bundle.cgroup().exists(), "left its cgroup");
    }
    Ok(())
}

fn features_tell_of_seccomp() -> Result {
    let features = Bundle::new(&[])?.runtime(&["features"]).ok()?.json()?;
    let seccomp = &features["linux"]["seccomp"];
    ensure_eq!(seccomp["enabled"], true, "enabled");
    for (list, name) in [
        ("actions", "SCMP_ACT_NOTIFY"),
        ("operators", "SCMP_CMP_MASKED_EQ"),
        ("archs", "SCMP_ARCH_AARCH64"),
        ("knownFlags", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"),
        ("supportedFlags", "SECCOMP_FILTER_FLAG_LOG"),
    ] {
        let there = seccomp[list].as_array();
        ensure!(
            there.is_some_and(|all| all.iter().any(|one| one == name)),
            "{list} has no {name}: {seccomp}"
        );
    }
    Ok(())
}

/// Filters of a default profile and of random ones, run beside libseccomp's.
fn decisions_are_libseccomps() -> Result {
    let directory = Directory::new("seccomp")?;
    let script = directory.join("compare");
    std::fs::write(&script, include_str!("../../seccomp/compare"))?;
    std::fs::write(
        directory.join("default.json"),
        include_str!("../../seccomp/default.json"),
    )?;
    let python = |words: &[&str]| {
        command("python3", [&script])
            .args(words)
            .dir(directory.path())
    };
    let profiles = python(&["profiles", "40"]).ok()?.json()?;
    let mut filters = Vec::new();
    for profile in profiles.as_array().into_iter().flatten() {
        let bundle = filtered(profile.clone(), &["exit", "0"])?;
        bundle.call(&["create"])?.ok()?;
        let state = std::fs::read(bundle.root().join(bundle.id()).join("state.json"))?;
        let state: Value = serde_json::from_slice(&state)?;
        filters.push(json!({ "profile": profile, "program": state["seccomp"]["program"] }));
        bundle.end()?;
    }
    ensure!(filters.len() >= 40, "only {} profiles", filters.len());
    let compared = python(&["compare"])
        .stdin(serde_json::to_vec(&filters)?)
        .within(deadline() * 4)
        .ok()?;
    note(compared.text().to_owned());
    Ok(())
}
