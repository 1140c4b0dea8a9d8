//! Tests of compiled filters. The tests interpret a filter to find the filter's decisions.

use serde_json::{Value, json};

use super::architecture::Architecture::{self, Aarch64, Arm, X32, X86, X86_64};
use super::bpf::interpret;
use super::compile::compile;
use super::table::Syscall;
use crate::config::spec::SeccompProfile;
use crate::sys::syscalls::SockFilter;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const LOG: u32 = libc::SECCOMP_RET_LOG;
const KILL: u32 = libc::SECCOMP_RET_KILL_THREAD;
const TRAP: u32 = libc::SECCOMP_RET_TRAP;

const fn errno(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

const EPERM: u32 = errno(libc::EPERM);
const ENOSYS: u32 = errno(libc::ENOSYS);

struct CompiledProfile(Vec<SockFilter>);

impl CompiledProfile {
    fn on(native: Architecture, profile: Value) -> CompiledProfile {
        let profile: SeccompProfile = serde_json::from_value(profile).unwrap();
        let checked = profile.check_for(native, &mut |_| {}).unwrap();
        CompiledProfile(compile(&checked).unwrap())
    }

    fn number(&self, architecture: Architecture, number: u32, args: [u64; 6]) -> u32 {
        interpret(&self.0, architecture.audit(), number, &args)
    }

    fn call(&self, architecture: Architecture, name: &str, args: &[u64]) -> u32 {
        let syscall = Syscall::by_name(name).unwrap();
        let number = syscall.number(architecture).unwrap();
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        self.number(architecture, number, all)
    }
}

fn rule(names: &[&str], action: &str, args: Value) -> Value {
    json!({ "names": names, "action": action, "args": args })
}

fn when(index: u32, op: &str, value: u64) -> Value {
    json!({ "index": index, "op": format!("SCMP_CMP_{op}"), "value": value })
}

fn profile(default: &str, syscalls: Value) -> Value {
    json!({
        "defaultAction": default,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": syscalls,
    })
}

#[test]
fn the_filter_applies_the_rule_of_a_call_and_the_default_to_all_other_calls() {
    let names = ["read", "write", "execve", "openat", "pwritev2", "clone3"];
    let filter = CompiledProfile::on(
        X86_64,
        profile(
            "SCMP_ACT_ERRNO",
            json!([rule(&names, "SCMP_ACT_ALLOW", json!([]))]),
        ),
    );
    for architecture in [X86_64, X86, X32] {
        for name in names {
            assert_eq!(filter.call(architecture, name, &[]), ALLOW, "{name}");
        }
        for name in ["open", "close", "mount", "bpf"] {
            assert_eq!(filter.call(architecture, name, &[]), EPERM, "{name}");
        }
    }
    assert!(filter.0.len() < 80, "{}", filter.0.len());
}

#[test]
fn every_action_becomes_a_return_value_of_the_filter() {
    for (action, errno_ret, answer) in [
        ("SCMP_ACT_KILL", None, KILL),
        ("SCMP_ACT_KILL_THREAD", None, KILL),
        (
            "SCMP_ACT_KILL_PROCESS",
            None,
            libc::SECCOMP_RET_KILL_PROCESS,
        ),
        ("SCMP_ACT_TRAP", None, TRAP),
        ("SCMP_ACT_ERRNO", None, EPERM),
        ("SCMP_ACT_ERRNO", Some(0), errno(0)),
        ("SCMP_ACT_ERRNO", Some(4095), errno(4095)),
        ("SCMP_ACT_TRACE", None, libc::SECCOMP_RET_TRACE | 1),
        (
            "SCMP_ACT_TRACE",
            Some(65535),
            libc::SECCOMP_RET_TRACE | 65535,
        ),
        ("SCMP_ACT_LOG", None, LOG),
        ("SCMP_ACT_NOTIFY", None, libc::SECCOMP_RET_USER_NOTIF),
    ] {
        let mut one = rule(&["mkdir"], action, json!([]));
        one["errnoRet"] = json!(errno_ret);
        let filter = CompiledProfile::on(X86_64, profile("SCMP_ACT_ALLOW", json!([one])));
        assert_eq!(filter.call(X86_64, "mkdir", &[]), answer, "{action}");
        assert_eq!(filter.call(X86_64, "rmdir", &[]), ALLOW, "{action}");
    }
}

#[test]
fn programs_of_unlisted_architectures_are_killed() {
    let only_native = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
    let filter = CompiledProfile::on(X86_64, only_native.clone());
    assert_eq!(filter.call(X86_64, "read", &[]), ALLOW);
    for architecture in [X32, X86, Aarch64, Arm] {
        assert_eq!(
            filter.call(architecture, "read", &[]),
            KILL,
            "{architecture:?}"
        );
    }
    // A tracer skips a system call by setting its number to u32::MAX. The filter must not treat
    // this number as an x32 call.
    assert_eq!(filter.number(X86_64, u32::MAX, [0; 6]), ALLOW);
    let filter = CompiledProfile::on(Aarch64, only_native);
    assert_eq!(filter.call(Aarch64, "read", &[]), ALLOW);
    assert_eq!(filter.call(Arm, "read", &[]), KILL);
}

#[test]
fn calls_that_are_newer_than_the_profile_fail_with_enosys() {
    let names = ["read", "faccessat2", "set_tls", "preadv2"];
    let rules = json!([rule(&names, "SCMP_ACT_ALLOW", json!([]))]);
    let mut with_all = profile("SCMP_ACT_ERRNO", rules);
    with_all["architectures"] = json!(["SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_ARM"]);
    let filter = CompiledProfile::on(X86_64, with_all.clone());
    for architecture in [X86_64, X86, X32] {
        assert_eq!(filter.call(architecture, "close_range", &[]), EPERM);
        assert_eq!(filter.call(architecture, "epoll_pwait2", &[]), ENOSYS);
        assert_eq!(filter.call(architecture, "mseal", &[]), ENOSYS);
    }
    assert_eq!(filter.number(X86_64, 511, [0; 6]), ENOSYS);
    assert_eq!(filter.number(X86_64, 9999, [0; 6]), ENOSYS);
    // The calls with the numbers 512 to 547 of x32 are old, so the filter must not treat these
    // calls as newer than the profile.
    assert_eq!(filter.call(X32, "preadv2", &[]), ALLOW);
    assert_eq!(filter.call(X32, "ioctl", &[]), EPERM);
    assert_eq!(filter.number(X32, 0x4000_0000 + 548, [0; 6]), ENOSYS);
    assert_eq!(filter.number(X86_64, u32::MAX, [0; 6]), EPERM);

    // Arm's private calls have high numbers although they are old, so the filter must not treat
    // these calls as newer than the profile.
    let filter = CompiledProfile::on(Aarch64, with_all.clone());
    for architecture in [Aarch64, Arm] {
        assert_eq!(filter.call(architecture, "faccessat2", &[]), ALLOW);
        assert_eq!(filter.call(architecture, "close_range", &[]), EPERM);
        assert_eq!(filter.call(architecture, "mseal", &[]), ENOSYS);
    }
    assert_eq!(filter.call(Arm, "set_tls", &[]), ALLOW);
    assert_eq!(filter.call(Arm, "cacheflush", &[]), EPERM);

    for (default, answer) in [
        ("SCMP_ACT_ALLOW", ALLOW),
        ("SCMP_ACT_LOG", LOG),
        ("SCMP_ACT_TRACE", libc::SECCOMP_RET_TRACE | 1),
        ("SCMP_ACT_KILL", ENOSYS),
        ("SCMP_ACT_TRAP", ENOSYS),
    ] {
        with_all["defaultAction"] = json!(default);
        let filter = CompiledProfile::on(X86_64, with_all.clone());
        assert_eq!(filter.call(X86_64, "mseal", &[]), answer, "{default}");
    }
}

#[test]
fn arguments_are_compared_as_64_bits() {
    let values = [
        0,
        1,
        2,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        0x1_0000_0001,
        0x2_0000_0000,
        0x8000_0000_0000_0000,
        u64::MAX - 1,
        u64::MAX,
    ];
    type Holds = fn(u64, u64) -> bool;
    let operators: [(&str, Holds); 6] = [
        ("EQ", |a, b| a == b),
        ("NE", |a, b| a != b),
        ("LT", |a, b| a < b),
        ("LE", |a, b| a <= b),
        ("GT", |a, b| a > b),
        ("GE", |a, b| a >= b),
    ];
    for (op, holds) in operators {
        for value in values {
            for index in [0, 5] {
                let args = json!([when(index, op, value)]);
                let filter = CompiledProfile::on(
                    X86_64,
                    profile(
                        "SCMP_ACT_ALLOW",
                        json!([rule(&["ioctl"], "SCMP_ACT_TRAP", args)]),
                    ),
                );
                for arg in values {
                    let mut args = [7; 6];
                    args[index as usize] = arg;
                    let answer = |holds| if holds { TRAP } else { ALLOW };
                    assert_eq!(
                        filter.call(X86_64, "ioctl", &args),
                        answer(holds(arg, value)),
                        "result of the filter for the comparison {arg:#x} {op} {value:#x}"
                    );
                    // The arguments of 32-bit programs are 32 bits wide.
                    let (low, low_value) = (arg & 0xffff_ffff, value & 0xffff_ffff);
                    args[index as usize] = low;
                    for narrow in [X86, X32] {
                        assert_eq!(
                            filter.call(narrow, "ioctl", &args),
                            answer(holds(low, low_value)),
                            "result of the filter for {low:#x} {op} {low_value:#x} on {narrow:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn masked_bits_are_compared() {
    for (mask, value) in [
        (0x7e02_0000u64, 0u64),
        (0xffff_0000_0000, 0x1234_0000_0000),
        (0xff_0000_00ff, 0x12_0000_0034),
        (u64::MAX, 5),
        (0, 0),
        (0xf0, 1),
        (0xf0, 0x1_0000_0000),
    ] {
        let mut arg = when(1, "MASKED_EQ", mask);
        arg["valueTwo"] = json!(value);
        let filter = CompiledProfile::on(
            X86_64,
            profile(
                "SCMP_ACT_ERRNO",
                json!([rule(&["clone"], "SCMP_ACT_ALLOW", json!([arg]))]),
            ),
        );
        for arg in [
            0,
            5,
            value,
            value | 0x20_0000,
            0x1000_0000,
            !mask,
            u64::MAX,
            value | !mask,
        ] {
            let answer = if arg & mask == value { ALLOW } else { EPERM };
            let case = format!("{arg:#x} & {mask:#x} == {value:#x}");
            assert_eq!(filter.call(X86_64, "clone", &[9, arg]), answer, "{case}");
        }
    }
}

#[test]
fn all_conditions_must_be_true_if_they_test_different_arguments() {
    let args = json!([when(0, "EQ", 2), when(1, "EQ", 3), when(2, "NE", 4)]);
    let rules = json!([rule(&["socket"], "SCMP_ACT_ALLOW", args)]);
    let filter = CompiledProfile::on(X86_64, profile("SCMP_ACT_ERRNO", rules));
    assert_eq!(filter.call(X86_64, "socket", &[2, 3, 5]), ALLOW);
    for args in [[2, 3, 4], [2, 2, 5], [1, 3, 5]] {
        assert_eq!(filter.call(X86_64, "socket", &args), EPERM);
    }
}

/// In runc, a rule also applies if only one of several conditions on the same argument is true.
/// Existing profiles rely on this behaviour.
#[test]
fn one_true_condition_is_enough_if_several_conditions_test_the_same_argument() {
    let args = json!([when(0, "EQ", 2), when(0, "EQ", 10), when(1, "EQ", 1)]);
    let rules = json!([rule(&["socket"], "SCMP_ACT_ALLOW", args)]);
    let filter = CompiledProfile::on(X86_64, profile("SCMP_ACT_ERRNO", rules));
    for args in [[2, 0], [10, 0], [7, 1]] {
        assert_eq!(filter.call(X86_64, "socket", &args), ALLOW);
    }
    assert_eq!(filter.call(X86_64, "socket", &[7, 0]), EPERM);
}

#[test]
fn any_rule_for_a_call_can_match_and_a_rule_without_conditions_overrides_the_others() {
    let personality = |value: u64| {
        rule(
            &["personality"],
            "SCMP_ACT_ALLOW",
            json!([when(0, "EQ", value)]),
        )
    };
    let rules = json!([
        personality(0),
        personality(8),
        personality(0xffff_ffff),
        rule(
            &["socket"],
            "SCMP_ACT_ALLOW",
            json!([when(0, "EQ", 2), when(1, "EQ", 1)])
        ),
        rule(&["socket"], "SCMP_ACT_TRAP", json!([when(0, "EQ", 2)])),
        rule(&["clone"], "SCMP_ACT_TRAP", json!([when(0, "EQ", 1)])),
        rule(&["clone"], "SCMP_ACT_ALLOW", json!([])),
        // A rule whose action is the default action does not override other rules.
        rule(&["mount"], "SCMP_ACT_ERRNO", json!([])),
        rule(&["mount"], "SCMP_ACT_ALLOW", json!([when(3, "EQ", 1)])),
    ]);
    let filter = CompiledProfile::on(X86_64, profile("SCMP_ACT_ERRNO", rules));
    for value in [0, 8, 0xffff_ffff] {
        assert_eq!(filter.call(X86_64, "personality", &[value]), ALLOW);
        assert_eq!(filter.call(X86, "personality", &[value]), ALLOW);
    }
    assert_eq!(filter.call(X86_64, "personality", &[1]), EPERM);
    assert_eq!(filter.call(X86_64, "socket", &[2, 1]), TRAP);
    assert_eq!(filter.call(X86_64, "clone", &[1]), ALLOW);
    assert_eq!(filter.call(X86_64, "mount", &[0, 0, 0, 1]), ALLOW);
    assert_eq!(filter.call(X86_64, "mount", &[0, 0, 0, 2]), EPERM);
}

#[test]
fn calls_through_socketcall_and_ipc_are_filtered_on_32_bit_x86() {
    let allowed = ["socket", "sendmsg", "shmat"];
    let rules = json!([
        rule(&allowed, "SCMP_ACT_ALLOW", json!([])),
        rule(&["bind"], "SCMP_ACT_ALLOW", json!([when(0, "EQ", 1)])),
    ]);
    let filter = CompiledProfile::on(X86_64, profile("SCMP_ACT_ERRNO", rules));
    assert_eq!(filter.call(X86, "socket", &[]), ALLOW);
    for (through, call, answer) in [
        ("socketcall", 1, ALLOW),
        ("socketcall", 16, ALLOW),
        // If a program calls bind through socketcall, the filter cannot see the arguments of bind.
        // So the rule, which allows bind only for some arguments, does not apply.
        ("socketcall", 2, EPERM),
        ("socketcall", 3, EPERM),
        ("ipc", 21, ALLOW),
        ("ipc", 21 | 1 << 16, ALLOW),
        ("ipc", 22, EPERM),
    ] {
        assert_eq!(
            filter.call(X86, through, &[call]),
            answer,
            "result of the filter for the operation {call} of {through}"
        );
    }
    // The filter cannot see the arguments of a call that a program makes through socketcall. So if
    // the profile forbids the call for some arguments, the filter forbids the call through
    // socketcall for all arguments.
    let vsock = rule(&["socket"], "SCMP_ACT_ERRNO", json!([when(0, "EQ", 40)]));
    let filter = CompiledProfile::on(X86_64, profile("SCMP_ACT_ALLOW", json!([vsock])));
    assert_eq!(filter.call(X86, "socket", &[40]), EPERM);
    assert_eq!(filter.call(X86, "socket", &[1]), ALLOW);
    assert_eq!(filter.call(X86, "socketcall", &[1]), EPERM);
    assert_eq!(filter.call(X86, "socketcall", &[2]), ALLOW);
}

/// The kernel reads only the lower half of these arguments.
#[test]
fn no_bit_of_an_upper_half_bypasses_the_default_profile() {
    let text = include_str!("../../../tests/seccomp/default.json");
    let filter = CompiledProfile::on(X86_64, serde_json::from_str(text).unwrap());
    const ALG: u64 = 38;
    const VSOCK: u64 = 40;
    for upper in [0, 1, 2, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff] {
        for architecture in [X86_64, X32] {
            let call = |name, lower| filter.call(architecture, name, &[lower | upper << 32]);
            for family in 0..64 {
                let known = family < 46 && family != ALG && family != VSOCK;
                let answer = if known { ALLOW } else { EPERM };
                assert_eq!(call("socket", family), answer, "{family}");
                assert_eq!(call("socketpair", family), answer, "{family}");
            }
            assert_eq!(call("personality", 0x4_0000), EPERM);
            assert_eq!(call("personality", 8), ALLOW);
            assert_eq!(call("clone", libc::CLONE_NEWUSER as u64), EPERM);
            assert_eq!(call("clone", libc::CLONE_VM as u64), ALLOW);
        }
    }
    for family in [ALG, VSOCK] {
        assert_eq!(filter.call(X86, "socket", &[family]), EPERM);
    }
    for operation in 0..32 {
        assert_eq!(filter.call(X86, "socketcall", &[operation]), ENOSYS);
    }
}

#[test]
fn a_profile_with_a_rule_for_each_call_fits_into_a_filter() {
    let rules: Vec<Value> = (0..470u32)
        .map(|number| {
            let names: Vec<&str> = super::table::names_of(X86_64, number);
            let mut one = rule(&names, "SCMP_ACT_ERRNO", json!([]));
            one["errnoRet"] = json!(number + 1);
            one
        })
        .collect();
    let filter = CompiledProfile::on(X86_64, profile("SCMP_ACT_ALLOW", json!(rules)));
    for number in [0, 1, 100, 334, 424, 469] {
        assert_eq!(
            filter.number(X86_64, number, [0; 6]),
            errno(number as i32 + 1)
        );
    }
}

#[test]
fn a_profile_too_large_for_the_kernel_is_refused() {
    let args: Vec<Value> = (0..1500u64).map(|value| when(0, "EQ", value)).collect();
    let rules = json!([rule(&["ioctl"], "SCMP_ACT_ALLOW", json!(args))]);
    let profile: SeccompProfile = serde_json::from_value(profile("SCMP_ACT_ERRNO", rules)).unwrap();
    let checked = profile.check_for(X86_64, &mut |_| {}).unwrap();
    let error = compile(&checked).unwrap_err().to_string();
    assert!(
        error.contains("linux.seccomp") && error.contains("4096"),
        "{error}"
    );
}

/// If the compiler left out the rules for socketcall(2), 32-bit programs could make the calls.
#[test]
fn a_profile_with_too_many_rules_for_socketcall_is_refused() {
    // These conditions are always true, so they need no instructions.
    let always = json!({ "index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 0, "valueTwo": 0 });
    let rules = json!([
        rule(&["read"], "SCMP_ACT_LOG", json!(vec![always; 65_533])),
        rule(&["socket", "bind"], "SCMP_ACT_ERRNO", json!([])),
        rule(&["listen"], "SCMP_ACT_ERRNO", json!([])),
    ]);
    let profile: SeccompProfile = serde_json::from_value(profile("SCMP_ACT_ALLOW", rules)).unwrap();
    let checked = profile.check_for(X86_64, &mut |_| {}).unwrap();
    let error = compile(&checked).unwrap_err().to_string();
    assert!(error.contains("socketcall(2)"), "{error}");
}
