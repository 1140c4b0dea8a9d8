//! Tests that check system call filters by their effect.

use nix::libc;
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Directory, Result, command, deadline, note};
use crate::support::needs::{Need, Test};
use crate::support::seccomp::{
    CALLS_32, LEAST_PROGRAM, REFUSING, but, filtered, for_getpgid, getpgid, least,
    with_least_program,
};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(each_seccomp_action_has_its_effect),
    test!(a_filter_returns_the_configured_errno_and_default_errno),
    test!(a_filter_compares_the_arguments_of_a_system_call),
    test!(system_calls_newer_than_those_in_the_profile_fail_with_enosys),
    test!(
        programs_of_other_architectures_are_filtered_or_killed,
        CALLS_32
    ),
    test!(unknown_system_calls_and_architectures_are_ignored),
    test!(seccomp_flags_are_accepted),
    test!(a_filter_applies_to_a_user_without_privileges),
    test!(the_containers_filter_applies_to_processes_that_exec_starts),
    test!(a_process_without_a_seccomp_profile_has_no_filter),
    test!(
        a_filter_does_not_need_to_allow_the_runtimes_own_system_calls,
        Need::Rrun
    ),
    test!(
        execve_is_the_only_system_call_after_the_filter_is_loaded,
        Need::Rrun
    ),
    test!(
        a_program_that_can_not_be_executed_is_reported_with_every_seccomp_filter,
        Need::Rrun
    ),
    test!(the_program_does_not_keep_the_capability_to_load_a_filter),
    test!(
        the_error_about_a_bad_profile_names_the_bad_field,
        Need::Rrun
    ),
    test!(features_prints_the_seccomp_support, Need::Rrun),
    test!(
        filters_choose_the_same_actions_as_libseccomps_filters,
        Need::Rrun,
        Need::File("/usr/bin/python3"),
    ),
];

/// The number of the 32-bit x86 system call getpid(2).
const GETPID_32: &str = "20";

/// Runs `inside` with the arguments `args` and the seccomp profile `profile`, and returns its exit
/// code and output.
fn outcome(profile: Value, args: &[&str]) -> Result<(i32, String)> {
    let output = filtered(profile, args)?.call(&["run"])?.end()?;
    ensure!(
        output.code == 0 || output.stderr.is_empty(),
        "the filtered program prints an error:\n{}",
        output.told()
    );
    Ok((output.code, output.text().to_owned()))
}

fn each_seccomp_action_has_its_effect() -> Result {
    let number = getpgid();
    const KILLED: i32 = 128 + libc::SIGSYS;
    for (action, program, code, text) in [
        ("SCMP_ACT_ALLOW", "call", 0, "1"),
        ("SCMP_ACT_LOG", "call", 0, "1"),
        ("SCMP_ACT_ERRNO", "call", 0, "EPERM"),
        // No tracer is attached, so the system call fails.
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
        ensure_eq!(
            got,
            (code, text.to_owned()),
            "the exit code and output of `inside {program}` with a seccomp filter that answers getpgid with {action}"
        );
    }
    Ok(())
}

fn a_filter_returns_the_configured_errno_and_default_errno() -> Result {
    let mut profile = for_getpgid("SCMP_ACT_ERRNO");
    profile["syscalls"][0]["errnoRet"] = json!(libc::ENOTTY);
    let got = outcome(profile, &["call", &getpgid()])?;
    ensure_eq!(
        got.1,
        "ENOTTY",
        "the errno of a system call whose rule contains errnoRet"
    );
    let mut profile = all_but(&["getpgid"], "SCMP_ACT_ERRNO");
    profile["defaultErrnoRet"] = json!(libc::EXDEV);
    let got = outcome(profile, &["call", &getpgid()])?;
    ensure_eq!(
        got.1,
        "EXDEV",
        "the errno of a system call to which defaultErrnoRet applies"
    );
    Ok(())
}

/// Returns a profile that allows all system calls with two exceptions: the calls in `forbidden`,
/// and calls newer than openat2(2).
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

fn a_filter_compares_the_arguments_of_a_system_call() -> Result {
    // The test filters getpriority(2) by its second argument, a process id. getpriority(2) returns
    // ESRCH if no process has this id.
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
        ensure_eq!(
            text == "EDOM",
            is_filtered,
            "whether a rule with the operator {op} and the value {value} matches the argument {arg} (a match returns EDOM; the system call returned {text})"
        );
    }
    // The next profile contains several rules for personality(2).
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
        ensure_eq!(
            got.1,
            text,
            "the result of the system call personality({value})"
        );
    }
    Ok(())
}

fn system_calls_newer_than_those_in_the_profile_fail_with_enosys() -> Result {
    for default in ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"] {
        let profile = all_but(&["getpgid"], default);
        for number in ["9999", "449", "438"] {
            let got = outcome(profile.clone(), &["call", number])?;
            ensure_eq!(
                got.1,
                "ENOSYS",
                "the result of the system call {number} with the default action {default}"
            );
        }
    }
    let profile = all_but(&["getpgid"], "SCMP_ACT_ERRNO");
    let got = outcome(profile, &["call", &getpgid()])?;
    ensure_eq!(
        got.1,
        "EPERM",
        "the result of a forbidden system call that is older than the newest system call in the profile"
    );
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
    ensure_eq!(
        got.1,
        "EPERM",
        "the result of the 32-bit system call getpid(2), which the profile forbids"
    );
    // On x86-64, the number 20 is the system call writev(2), but among the 32-bit system calls it
    // is getpid(2). A rule for writev(2) must not affect getpid(2).
    let got = outcome(profile("writev", both), &args)?;
    ensure_eq!(
        got.1,
        "1",
        "the result of the 32-bit system call getpid(2), which the profile allows"
    );
    let got = outcome(profile("writev", json!(["SCMP_ARCH_X86_64"])), &args)?;
    ensure_eq!(
        got.0,
        128 + libc::SIGSYS,
        "the exit code after a 32-bit system call with a profile that does not list x86"
    );
    // If the profile does not list x32, the filter kills the caller of an x32 system call. The
    // filter does so even if the kernel does not support x32.
    let x32 = (libc::SYS_getpgid | 0x4000_0000).to_string();
    let got = outcome(for_getpgid("SCMP_ACT_LOG"), &["call", &x32])?;
    ensure_eq!(
        got.0,
        128 + libc::SIGSYS,
        "the exit code after an x32 system call with a profile that does not list x32"
    );
    Ok(())
}

fn unknown_system_calls_and_architectures_are_ignored() -> Result {
    let mut profile = but(json!([
        { "names": ["not_a_call", "getpgid"], "action": "SCMP_ACT_ERRNO" },
    ]));
    profile["architectures"] = json!([
        "SCMP_ARCH_MIPSEL64",
        "SCMP_ARCH_RISCV64",
        "SCMP_ARCH_PPC64LE"
    ]);
    let got = outcome(profile, &["call", &getpgid()])?;
    ensure_eq!(
        got.1,
        "EPERM",
        "the result of a forbidden system call that is in the same rule as an unknown system call"
    );
    Ok(())
}

fn seccomp_flags_are_accepted() -> Result {
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
        ensure_eq!(
            got.1,
            "EPERM",
            "the result of a forbidden system call with the filter flags {flags}"
        );
    }
    Ok(())
}

fn a_filter_applies_to_a_user_without_privileges() -> Result {
    for no_new_privileges in [true, false] {
        let mut bundle = filtered(for_getpgid("SCMP_ACT_ERRNO"), &["call", &getpgid()])?;
        bundle
            .set("/process/noNewPrivileges", json!(no_new_privileges))
            .set("/process/user", json!({ "uid": 1000, "gid": 1000 }))
            .set("/process/capabilities", json!({}));
        ensure_eq!(
            bundle.run()?.text(),
            "EPERM",
            "the result of a forbidden system call with noNewPrivileges set to {no_new_privileges}"
        );
        let report = bundle.report()?;
        ensure_eq!(
            report["status"]["Seccomp"],
            "2",
            "the seccomp mode of the process"
        );
        ensure_eq!(
            report["status"]["CapEff"],
            "0000000000000000",
            "the effective capabilities of the process"
        );
    }
    Ok(())
}

fn the_containers_filter_applies_to_processes_that_exec_starts() -> Result {
    for no_new_privileges in [true, false] {
        let mut bundle = filtered(for_getpgid("SCMP_ACT_ERRNO"), &["sleep", "60"])?;
        bundle.set("/process/noNewPrivileges", json!(no_new_privileges));
        bundle.start()?;
        let call = bundle.exec(&[], &["call", &getpgid()]).ok()?;
        ensure_eq!(
            call.text(),
            "EPERM",
            "the result of a forbidden system call in the process that `exec` starts"
        );
        let report = bundle.exec(&["--user", "7:7"], &["report"]).ok()?.json()?;
        ensure_eq!(
            report["status"]["Seccomp"],
            "2",
            "the seccomp mode of the process that `exec` starts"
        );
        ensure_eq!(
            report["status"]["Seccomp_filters"],
            "1",
            "the number of seccomp filters of the process that `exec` starts"
        );
        bundle.end()?;
    }
    Ok(())
}

fn a_process_without_a_seccomp_profile_has_no_filter() -> Result {
    let report = Bundle::new(&[])?.report()?;
    ensure_eq!(
        report["status"]["Seccomp"],
        "0",
        "the seccomp mode of a process without a seccomp profile"
    );
    let mut bundle = filtered(json!({ "defaultAction": "SCMP_ACT_ALLOW" }), &[])?;
    let report = bundle.report()?;
    ensure_eq!(
        report["status"]["Seccomp"],
        "2",
        "the seccomp mode of a process with a profile that allows all system calls"
    );
    Ok(())
}

/// With noNewPrivileges, rrun loads the filter directly before it executes the program. So the
/// profile does not need to allow the system calls that rrun itself makes.
fn a_filter_does_not_need_to_allow_the_runtimes_own_system_calls() -> Result {
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
    ensure_eq!(bundle.run()?.text(), "confined", "the program's output");
    bundle.start()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn execve_is_the_only_system_call_after_the_filter_is_loaded() -> Result {
    for (default, no_new_privileges, uid, terminal) in REFUSING.iter().flat_map(|default| {
        [
            (*default, true, 0, false),
            (*default, false, 0, true),
            (*default, true, 1000, true),
            (*default, false, 1000, false),
        ]
    }) {
        let case = format!(
            "the default action {default}, noNewPrivileges {no_new_privileges} and user {uid}"
        );
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
        ensure_eq!(
            output.code,
            7,
            "the exit code of `run` with {case} ({})",
            output.told()
        );

        let bundle = with(3)?;
        bundle.start()?;
        ensure_eq!(
            bundle.status()?,
            "running",
            "the container's status after `start` with {case}"
        );
        let exec = [&["exec"], &[bundle.id()], &[LEAST_PROGRAM; 2][..]].concat();
        let output = bundle.runtime(&exec).end()?;
        ensure_eq!(
            output.code,
            7,
            "the exit code of `exec` with {case} ({})",
            output.told()
        );
        bundle.end()?;
    }
    Ok(())
}

/// If the container's process cannot execute the program, it must report this error. A filter can
/// forbid the system calls for the report. Even with such a filter, the runtime must report the
/// error.
fn a_program_that_can_not_be_executed_is_reported_with_every_seccomp_filter() -> Result {
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
            "which linux.seccomp possibly forbids",
        ),
    ] {
        for no_new_privileges in [true, false] {
            let mut bundle = with_least_program(profile.clone(), 3)?;
            bundle
                .set("/process/args", json!([program]))
                .set("/process/noNewPrivileges", json!(no_new_privileges));
            let output = bundle.call(&["run"])?.exits(1)?;
            ensure!(
                output.stderr.contains(words),
                "the error about the program {program} does not contain {words:?}:\n{}",
                output.told()
            );
            let created = bundle.runtime(&["create", bundle.id()]).end()?;
            let output = match created.code {
                0 => bundle.runtime(&["start", bundle.id()]).end()?,
                _ => created,
            };
            ensure!(
                output.stderr.contains(words),
                "the error about the program {program} does not contain {words:?}:\n{}",
                output.told()
            );
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
        ensure!(
            output.stderr.contains(words),
            "the error about the program {program} does not contain {words:?}:\n{}",
            output.told()
        );
    }
    bundle.end()?;
    Ok(())
}

/// Without noNewPrivileges, rrun needs CAP_SYS_ADMIN to load a filter. The program must not keep
/// this capability.
fn the_program_does_not_keep_the_capability_to_load_a_filter() -> Result {
    for uid in [0, 1000] {
        let mut bundle = filtered(for_getpgid("SCMP_ACT_ERRNO"), &["report"])?;
        bundle
            .set("/process/noNewPrivileges", json!(false))
            .set("/process/user", json!({ "uid": uid, "gid": uid }));
        let filtered = bundle.run()?.json()?;
        bundle.without("/linux/seccomp");
        let free = bundle.run()?.json()?;
        ensure_eq!(
            filtered["status"]["Seccomp"],
            "2",
            "the seccomp mode of the process"
        );
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure_eq!(
                filtered["status"][set],
                free["status"][set],
                "the capability set {set} of user {uid} with a seccomp filter, which must be the same as without a filter"
            );
        }
    }
    Ok(())
}

fn the_error_about_a_bad_profile_names_the_bad_field() -> Result {
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
        ensure!(
            output.stderr.contains(words),
            "the error about the invalid profile does not contain {words:?}:\n{}",
            output.told()
        );
        ensure!(
            !bundle.root().join(bundle.id()).exists(),
            "the container's directory still exists"
        );
        ensure!(
            !bundle.cgroup().exists(),
            "the container's cgroup still exists"
        );
    }
    Ok(())
}

fn features_prints_the_seccomp_support() -> Result {
    let features = Bundle::new(&[])?.runtime(&["features"]).ok()?.json()?;
    let seccomp = &features["linux"]["seccomp"];
    ensure_eq!(
        seccomp["enabled"],
        true,
        "the field linux.seccomp.enabled of `features`"
    );
    for (list, name) in [
        ("actions", "SCMP_ACT_NOTIFY"),
        ("operators", "SCMP_CMP_MASKED_EQ"),
        ("archs", "SCMP_ARCH_AARCH64"),
        ("knownFlags", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"),
        ("supportedFlags", "SECCOMP_FILTER_FLAG_LOG"),
    ] {
        let entries = seccomp[list].as_array();
        ensure!(
            entries.is_some_and(|all| all.iter().any(|one| one == name)),
            "the list {list} does not contain the name {name}; the seccomp features: {seccomp}"
        );
    }
    Ok(())
}

/// Compares rrun's filters with libseccomp's filters, for a default profile and for random
/// profiles.
fn filters_choose_the_same_actions_as_libseccomps_filters() -> Result {
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
    ensure!(
        filters.len() >= 40,
        "the test compared only {} profiles, but should compare at least 40",
        filters.len()
    );
    let compared = python(&["compare"])
        .stdin(serde_json::to_vec(&filters)?)
        .within(deadline() * 4)
        .ok()?;
    note(compared.text().to_owned());
    Ok(())
}
