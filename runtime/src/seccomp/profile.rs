//! The checks of `linux.seccomp` in config.json. See config-linux.md of the runtime specification,
//! "Seccomp".

use super::architecture::{self, Architecture, NATIVE};
use super::table::Syscall;
use crate::config::spec::{SeccompArg, SeccompCallName, SeccompProfile, SeccompSyscalls};
use crate::error::{Result, refuse};

/// The names of all actions in alphabetical order, each with the value that the filter returns
/// (linux/seccomp.h).
pub(crate) const ACTIONS: [(&str, u32); 9] = [
    ("SCMP_ACT_ALLOW", libc::SECCOMP_RET_ALLOW),
    ("SCMP_ACT_ERRNO", libc::SECCOMP_RET_ERRNO),
    ("SCMP_ACT_KILL", libc::SECCOMP_RET_KILL_THREAD),
    ("SCMP_ACT_KILL_PROCESS", libc::SECCOMP_RET_KILL_PROCESS),
    ("SCMP_ACT_KILL_THREAD", libc::SECCOMP_RET_KILL_THREAD),
    ("SCMP_ACT_LOG", libc::SECCOMP_RET_LOG),
    ("SCMP_ACT_NOTIFY", libc::SECCOMP_RET_USER_NOTIF),
    ("SCMP_ACT_TRACE", libc::SECCOMP_RET_TRACE),
    ("SCMP_ACT_TRAP", libc::SECCOMP_RET_TRAP),
];

/// The names of all operators, in alphabetical order.
pub(crate) const OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];

/// The largest errno that a system call can return (linux/err.h, `MAX_ERRNO`).
const LARGEST_ERRNO: u32 = 4095;

/// The largest number of pairs of a system call and a rule. A filter that the kernel accepts has at
/// most 4096 instructions, so a larger number would only use memory.
const CALLS_MAX: usize = 1 << 20;

/// The comparison of an argument of a system call with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal(u64),
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Greater(u64),
    GreaterOrEqual(u64),
    /// True if the argument is equal to `value` after all bits outside `mask` are cleared.
    Masked {
        mask: u64,
        value: u64,
    },
}

/// A condition on an argument of a system call. The first argument has the number 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) argument: u32,
    pub(crate) comparison: Comparison,
}

/// A rule of the profile: the value that the filter returns if all conditions are true.
#[derive(Clone, Debug)]
pub(crate) struct SeccompRule {
    pub(crate) answer: u32,
    pub(crate) conditions: Vec<Condition>,
}

/// A seccomp profile that was checked.
pub(crate) struct CheckedProfile {
    /// The filter's default return value: a `SECCOMP_RET_*` action with its data.
    pub(crate) default: u32,
    /// The architectures that the filter supports, including this kernel's own architecture.
    pub(crate) architectures: Vec<Architecture>,
    pub(crate) rules: Vec<SeccompRule>,
    /// System calls in the profile's order, each with the index of one of its rules in `rules`.
    pub(crate) calls: Vec<(Syscall, u16)>,
    /// Every system call that the profile names, whatever the action for the call is.
    pub(crate) named: Vec<Syscall>,
    /// True if the filter sends some system calls to an agent (SCMP_ACT_NOTIFY).
    pub(crate) notifies: bool,
}

impl CheckedProfile {
    /// Returns whether the filter allows the system call with any arguments. Returns false if the
    /// profile does not contain the system call's name and the filter's default is different.
    pub(crate) fn allows(&self, name: &str) -> bool {
        let rules = self
            .calls
            .iter()
            .filter(|(syscall, _)| syscall.name() == name)
            .filter_map(|(_, rule)| self.rules.get(usize::from(*rule)));
        let is_allowed = |answer| answer == libc::SECCOMP_RET_ALLOW;
        let mut always = is_allowed(self.default);
        for rule in rules {
            if !is_allowed(rule.answer) {
                return false;
            }
            always |= rule.conditions.is_empty();
        }
        always
    }
}

fn answer(field: &str, action: &str, errno: Option<u32>) -> Result<u32> {
    let Some((_, answer)) = ACTIONS.iter().find(|(name, _)| *name == action) else {
        if action.is_empty() {
            refuse!("{field}: is missing");
        }
        refuse!("{field}: {action} is unknown");
    };
    // The errno is in the field "errnoRet" or "defaultErrnoRet" of the object that contains the
    // action.
    let errno_field = || {
        field.strip_suffix("defaultAction").map_or_else(
            || field.replace(".action", ".errnoRet"),
            |object| format!("{object}defaultErrnoRet"),
        )
    };
    let largest = match *answer {
        libc::SECCOMP_RET_ERRNO => LARGEST_ERRNO,
        libc::SECCOMP_RET_TRACE => libc::SECCOMP_RET_DATA,
        _ => match errno {
            None => return Ok(*answer),
            Some(_) => refuse!("{}: {action} has no errno", errno_field()),
        },
    };
    match errno.unwrap_or(libc::EPERM as u32) {
        errno if errno <= largest => Ok(answer | errno),
        errno => refuse!(
            "{}: {errno} is more than the maximum of {largest}",
            errno_field()
        ),
    }
}

fn condition(field: impl Fn() -> String, arg: &SeccompArg) -> Result<Condition> {
    if arg.index > 5 {
        refuse!(
            "{}.index: {} is not the number of an argument, because the last argument has the number 5",
            field(),
            arg.index
        );
    }
    let comparison = match arg.op.as_str() {
        "SCMP_CMP_EQ" => Comparison::Equal(arg.value),
        "SCMP_CMP_NE" => Comparison::NotEqual(arg.value),
        "SCMP_CMP_LT" => Comparison::Less(arg.value),
        "SCMP_CMP_LE" => Comparison::LessOrEqual(arg.value),
        "SCMP_CMP_GT" => Comparison::Greater(arg.value),
        "SCMP_CMP_GE" => Comparison::GreaterOrEqual(arg.value),
        "SCMP_CMP_MASKED_EQ" => Comparison::Masked {
            mask: arg.value,
            value: arg.value_two,
        },
        "" => refuse!("{}.op: is missing", field()),
        op => refuse!("{}.op: {op} is unknown", field()),
    };
    Ok(Condition {
        argument: arg.index,
        comparison,
    })
}

impl SeccompProfile {
    /// Returns whether the profile is empty. Callers of runc pass an empty profile to disable
    /// seccomp.
    pub(crate) fn is_empty(&self) -> bool {
        self.default_action.is_empty() && self.syscalls.as_ref().is_none_or(Vec::is_empty)
    }

    /// Checks the profile. Calls the function `unknown` with the name of every unknown system
    /// call.
    ///
    /// # Errors
    /// Fails if a value is unknown, or contradicts another value. The error names the field that
    /// contains the value.
    pub(crate) fn check(&self, unknown: &mut dyn FnMut(&str)) -> Result<CheckedProfile> {
        self.check_for(NATIVE, unknown)
    }

    pub(crate) fn check_for(
        &self,
        native: Architecture,
        unknown: &mut dyn FnMut(&str),
    ) -> Result<CheckedProfile> {
        let default = answer(
            "linux.seccomp.defaultAction",
            &self.default_action,
            self.default_errno_ret,
        )?;
        let mut checked = CheckedProfile {
            default,
            architectures: self.architectures(native)?,
            rules: Vec::new(),
            calls: Vec::with_capacity(512),
            named: Vec::with_capacity(512),
            notifies: default == libc::SECCOMP_RET_USER_NOTIF,
        };
        for (index, entry) in self.syscalls.iter().flatten().enumerate() {
            entry.check(index, &mut checked, unknown)?;
        }
        Ok(checked)
    }

    fn architectures(&self, native: Architecture) -> Result<Vec<Architecture>> {
        let mut all = vec![native];
        for (index, name) in self.architectures.iter().flatten().enumerate() {
            match Architecture::by_name(name) {
                Some(architecture) if !architecture.runs_on(native) => {}
                Some(architecture) if all.contains(&architecture) => {}
                Some(architecture) => all.push(architecture),
                // rrun ignores this architecture, because its programs cannot run on this kernel.
                None if architecture::NAMES.contains(&name.as_str()) => {}
                None => refuse!("linux.seccomp.architectures[{index}]: {name} is unknown"),
            }
        }
        Ok(all)
    }
}

/// Returns the rules of an entry of the profile. If the conditions of an entry test different
/// arguments, all conditions must be true, as in runc. But if two conditions test the same
/// argument, it is enough that one condition of the entry is true.
fn rules(answer: u32, conditions: Vec<Condition>) -> Vec<SeccompRule> {
    let arguments = conditions
        .iter()
        .fold(0u64, |bits, one| bits | 1 << one.argument);
    if arguments.count_ones() as usize == conditions.len() {
        return vec![SeccompRule { answer, conditions }];
    }
    conditions
        .into_iter()
        .map(|one| SeccompRule {
            answer,
            conditions: vec![one],
        })
        .collect()
}

impl SeccompSyscalls {
    fn check(
        &self,
        index: usize,
        checked: &mut CheckedProfile,
        unknown: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let field = || format!("linux.seccomp.syscalls[{index}]");
        let answer = match &self.errno_ret {
            // SCMP_ACT_ALLOW is a common action. rrun needs the name of the field `action` only for
            // error messages, so rrun saves the time to construct the name here.
            None if self.action == "SCMP_ACT_ALLOW" => libc::SECCOMP_RET_ALLOW,
            errno => answer(&format!("{}.action", field()), &self.action, *errno)?,
        };
        let conditions = self
            .args
            .iter()
            .flatten()
            .enumerate()
            .map(|(arg, it)| condition(|| format!("{}.args[{arg}]", field()), it))
            .collect::<Result<Vec<Condition>>>()?;
        let first = checked.rules.len();
        if answer != checked.default {
            checked.notifies |= answer == libc::SECCOMP_RET_USER_NOTIF && !self.names.is_empty();
            checked.rules.extend(rules(answer, conditions));
        }
        let rules = first..checked.rules.len();
        if rules.end > usize::from(u16::MAX)
            || checked.calls.len() + self.names.len() * rules.len() > CALLS_MAX
        {
            refuse!(
                "{}: the profile contains more rules than rrun supports",
                field()
            );
        }
        for (at, name) in self.names.iter().enumerate() {
            match name {
                SeccompCallName::Unknown(name) if name.is_empty() => {
                    refuse!("{}.names[{at}]: is empty", field())
                }
                SeccompCallName::Unknown(name) => unknown(name),
                SeccompCallName::Known(syscall) => {
                    checked.named.push(*syscall);
                    let calls = rules.clone().map(|rule| (*syscall, rule as u16));
                    checked.calls.extend(calls);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(json: &str) -> String {
        let profile: SeccompProfile = serde_json::from_str(json).unwrap();
        match profile.check(&mut |_| {}) {
            Ok(_) => panic!("the invalid profile {json} was accepted"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn errors_name_the_unknown_or_contradictory_field() {
        let call = |inner: &str| {
            format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["write"]{inner}}}]}}"#
            )
        };
        for (json, words) in [
            (
                r#"{"defaultErrnoRet":1}"#.to_owned(),
                "defaultAction: is missing",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_BAN"}"#.to_owned(),
                "defaultAction: SCMP_ACT_BAN",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":1}"#.to_owned(),
                "linux.seccomp.defaultErrnoRet: SCMP_ACT_ALLOW has no errno",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":4096}"#.to_owned(),
                "defaultErrnoRet: 4096",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86","VAX"]}"#
                    .to_owned(),
                "architectures[1]: VAX",
            ),
            (call(""), "syscalls[0].action: is missing"),
            (
                call(r#","action":"SCMP_ACT_KILL","errnoRet":3"#),
                "syscalls[0].errnoRet: SCMP_ACT_KILL has no errno",
            ),
            (
                call(
                    r#","action":"SCMP_ACT_KILL","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]"#,
                ),
                "syscalls[0].args[0].index: 6",
            ),
            (
                call(r#","action":"SCMP_ACT_KILL","args":[{"index":1,"value":0,"op":"EQ"}]"#),
                "syscalls[0].args[0].op: EQ",
            ),
        ] {
            let sentence = refusal(&json);
            assert!(
                sentence.contains(words),
                "wrong error for the profile {json}: {sentence}"
            );
        }
    }

    #[test]
    fn every_architecture_of_the_specification_is_accepted() {
        let json = serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": architecture::NAMES,
        });
        let profile: SeccompProfile = serde_json::from_value(json).unwrap();
        let checked = profile
            .check_for(Architecture::X86_64, &mut |_| {})
            .unwrap();
        assert_eq!(
            checked.architectures,
            [Architecture::X86_64, Architecture::X32, Architecture::X86]
        );
    }

    #[test]
    fn unknown_calls_are_ignored_and_reported() {
        let json = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["fly","read"],"action":"SCMP_ACT_LOG"}]}"#;
        let profile: SeccompProfile = serde_json::from_str(json).unwrap();
        let mut unknown = Vec::new();
        let checked = profile
            .check(&mut |name| unknown.push(name.to_owned()))
            .unwrap();
        assert_eq!(
            (unknown.as_slice(), checked.calls.len()),
            (&["fly".to_owned()][..], 1)
        );
    }

    #[test]
    fn a_call_is_allowed_only_with_all_arguments_and_by_all_rules() {
        let allow = r#"{"names":["close"],"action":"SCMP_ACT_ALLOW"}"#;
        let notify = r#"{"names":["close"],"action":"SCMP_ACT_NOTIFY"}"#;
        let one = r#"{"names":["close"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":3,"op":"SCMP_CMP_EQ"}]}"#;
        for (default, rules, allowed) in [
            ("ALLOW", String::new(), true),
            ("ALLOW", notify.to_owned(), false),
            ("ERRNO", String::new(), false),
            ("ERRNO", allow.to_owned(), true),
            ("ERRNO", one.to_owned(), false),
            ("ERRNO", format!("{one},{allow}"), true),
            ("ERRNO", format!("{allow},{notify}"), false),
        ] {
            let json = format!(r#"{{"defaultAction":"SCMP_ACT_{default}","syscalls":[{rules}]}}"#);
            let profile: SeccompProfile = serde_json::from_str(&json).unwrap();
            let checked = profile.check(&mut |_| {}).unwrap();
            assert_eq!(checked.allows("close"), allowed, "{json}");
        }
    }
}
