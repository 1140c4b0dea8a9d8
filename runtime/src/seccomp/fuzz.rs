//! The fuzz target of the seccomp compiler. The target interprets the compiled filter, and compares
//! the filter's decisions with a plain reading of the profile.

use super::architecture::{Architecture, NATIVE};
use super::bpf::{INSTRUCTIONS_MAX, interpret};
use super::compile::compile;
use super::profile::{ACTIONS, CheckedProfile};
use super::table::Syscall;
use crate::config::spec::{SeccompArg, SeccompCallName, SeccompProfile, SeccompSyscalls};
use crate::fuzz::assert_sentence;

/// The largest number of names for which a target compares decisions, because a profile can contain
/// the same name thousands of times.
const COMPARED_NAMES: usize = 40;

/// Parses a profile, compiles it, and compares decisions.
pub(crate) fn profile(input: &[u8]) {
    let Ok(profile) = serde_json::from_slice::<SeccompProfile>(input) else {
        return;
    };
    let checked = match profile.check_for(NATIVE, &mut |_| {}) {
        Ok(checked) => checked,
        Err(error) => return assert_sentence(&error),
    };
    let program = match compile(&checked) {
        Ok(program) => program,
        Err(error) => return assert_sentence(&error),
    };
    assert!(program.len() <= INSTRUCTIONS_MAX);
    let entries: &[SeccompSyscalls] = profile.syscalls.as_deref().unwrap_or_default();
    let names = entries.iter().flat_map(|entry| &entry.names);
    for name in names.take(COMPARED_NAMES) {
        let SeccompCallName::Known(call) = name else {
            continue;
        };
        for architecture in &checked.architectures {
            let multiplexer =
                *architecture == Architecture::X86 && matches!(call.name(), "socketcall" | "ipc");
            let Some(number) = call.number(*architecture).filter(|_| !multiplexer) else {
                continue;
            };
            for args in interesting_arguments(entries, *call) {
                let found = interpret(&program, architecture.audit(), number, &args);
                let expected = expected(&checked, entries, *call, *architecture, args);
                assert_eq!(
                    found,
                    expected,
                    "{} on {architecture:?} with {args:x?}",
                    call.name()
                );
            }
        }
    }
    // The filter also returns a decision for calls that do not exist.
    for number in [0, 1, 511, 512, 0x3fff_ffff, 0x4000_0000, u32::MAX] {
        for audit in [NATIVE.audit(), 0x4000_0003, 7] {
            let _ = interpret(&program, audit, number, &[0; 6]);
        }
    }
}

/// Returns arguments with which the conditions on `call` are just true or just false.
fn interesting_arguments(entries: &[SeccompSyscalls], call: Syscall) -> Vec<[u64; 6]> {
    let mut all = vec![[0; 6], [u64::MAX; 6]];
    for entry in entries.iter().filter(|entry| has(entry, call)) {
        let mut together = [0; 6];
        for arg in entry.args.iter().flatten().take(6) {
            let index = arg.index as usize;
            together[index] = arg.value;
            for value in [
                arg.value,
                arg.value.wrapping_add(1),
                arg.value.wrapping_sub(1),
                arg.value ^ (1 << 32),
                arg.value_two,
            ] {
                let mut args = together;
                args[index] = value;
                all.push(args);
            }
        }
        all.push(together);
        if all.len() > 200 {
            break;
        }
    }
    all
}

fn has(entry: &SeccompSyscalls, call: Syscall) -> bool {
    let mut names = entry.names.iter();
    names.any(|name| matches!(name, SeccompCallName::Known(known) if *known == call))
}

/// Returns the decision that the profile specifies for a call that it names.
fn expected(
    checked: &CheckedProfile,
    entries: &[SeccompSyscalls],
    call: Syscall,
    architecture: Architecture,
    args: [u64; 6],
) -> u32 {
    // Each alternative is a list of conditions that must all be true, with the answer.
    let mut alternatives: Vec<(Vec<&SeccompArg>, u32)> = Vec::new();
    for entry in entries.iter().filter(|entry| has(entry, call)) {
        let answer = answer(entry);
        if answer == checked.default {
            continue;
        }
        let conditions: Vec<&SeccompArg> = entry.args.iter().flatten().collect();
        let mut indexes: Vec<u32> = conditions.iter().map(|arg| arg.index).collect();
        indexes.sort_unstable();
        indexes.dedup();
        if indexes.len() < conditions.len() {
            alternatives.extend(conditions.into_iter().map(|one| (vec![one], answer)));
        } else {
            alternatives.push((conditions, answer));
        }
    }
    if let Some((_, answer)) = alternatives.iter().find(|(all, _)| all.is_empty()) {
        return *answer;
    }
    alternatives.sort_by_key(|(all, _)| all.len());
    let wide = architecture.is_wide();
    alternatives
        .iter()
        .find(|(all, _)| all.iter().all(|arg| holds(arg, args, wide)))
        .map_or(checked.default, |(_, answer)| *answer)
}

fn answer(entry: &SeccompSyscalls) -> u32 {
    let (_, action) = ACTIONS
        .iter()
        .find(|(name, _)| *name == entry.action)
        .unwrap();
    match *action {
        libc::SECCOMP_RET_ERRNO | libc::SECCOMP_RET_TRACE => action | entry.errno_ret.unwrap_or(1),
        action => action,
    }
}

fn holds(arg: &SeccompArg, args: [u64; 6], wide: bool) -> bool {
    let keep = if wide { u64::MAX } else { u64::from(u32::MAX) };
    let (found, value) = (args[arg.index as usize] & keep, arg.value & keep);
    match arg.op.as_str() {
        "SCMP_CMP_EQ" => found == value,
        "SCMP_CMP_NE" => found != value,
        "SCMP_CMP_LT" => found < value,
        "SCMP_CMP_LE" => found <= value,
        "SCMP_CMP_GT" => found > value,
        "SCMP_CMP_GE" => found >= value,
        _ => found & value == arg.value_two & keep,
    }
}
