//! The compiler that translates a checked profile into a filter program. For each architecture, the
//! compiler merges the numbers of all system calls into ranges with the same decision. The compiler
//! then generates a binary search over the ranges.
//!
//! Other runtimes commonly use a chain of comparisons, one for each system call. The kernel has a
//! bitmap of the calls that a filter always allows, and runs the filter only for the other calls.
//! For these other calls, a long chain is slow. A long chain also takes longer to load. When a
//! process loads a filter, the kernel runs the filter once for each system call to fill the bitmap.

use super::architecture::Architecture;
use super::bpf::{ARCHITECTURE, Goal, INSTRUCTIONS_MAX, NUMBER, ProgramBuilder, Test};
use super::profile::{CheckedProfile, Comparison, Condition, SeccompRule};
use super::table::{ARM_PRIVATE, Syscall, X32_BIT, multiplexed};
use crate::error::{Result, refuse};
use crate::sys::syscalls::SockFilter;

/// The call number that a tracer sets to make the kernel skip a call.
const SKIPPED: u32 = u32::MAX;
/// The numbers 512 to 547. x32 uses these numbers for the calls that differ from x86-64. Linux
/// assigns numbers to new x32 calls in ascending order up to 511, and will continue at 548.
const X32_OWN: std::ops::Range<u32> = X32_BIT + 512..X32_BIT + 548;
/// The value that the filter returns for programs of an architecture that the profile does not
/// list. libseccomp uses the same value.
const FOREIGN: u32 = libc::SECCOMP_RET_KILL_THREAD;

/// The decision about all calls in a range of call numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    Answer(u32),
    /// The decision depends on the arguments of the system call. The number is an index into
    /// `Compiler::chains`.
    Chain(usize),
}

/// The ranges of call numbers in ascending order. Each entry contains the first number of a range,
/// and the range ends where the next range starts.
struct Ranges(Vec<(u32, Decision)>);

impl Ranges {
    /// Sets the decision for all system call numbers from `first` upwards. A later call of this
    /// function with a larger number ends this range and starts the next one.
    fn from(&mut self, first: u32, decision: Decision) {
        match self.0.last_mut() {
            Some((start, last)) if *start == first => *last = decision,
            _ => self.0.push((first, decision)),
        }
        // If the last two ranges have the same decision, this function merges them into one range.
        if let [.., (_, before), (_, last)] = self.0.as_slice()
            && before == last
        {
            self.0.pop();
        }
    }
}

/// The filter's decision about the system calls that the profile does not name.
///
/// A C library tries a new system call first. The library falls back to an old call if the new call
/// does not exist (ENOSYS), but not if the new call is forbidden. The C library must also work with
/// a profile that is older than the library. So a call that is newer than all calls in the profile
/// fails with ENOSYS, as on an old kernel. runc has done the same since version 1.0.
struct UnnamedCalls {
    architecture: Architecture,
    default: u32,
    /// The number of the newest call that the profile names. This field is `None` if newer calls
    /// are treated like all other unnamed calls.
    newest: Option<u32>,
}

impl UnnamedCalls {
    fn new(profile: &CheckedProfile, architecture: Architecture) -> UnnamedCalls {
        let permissive = matches!(
            profile.default & libc::SECCOMP_RET_ACTION_FULL,
            libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG | libc::SECCOMP_RET_TRACE
        );
        let numbers = profile
            .named
            .iter()
            .filter_map(|syscall| syscall.number(architecture));
        UnnamedCalls {
            architecture,
            default: profile.default,
            newest: if permissive {
                None
            } else {
                numbers
                    .filter(|number| !is_unordered(architecture, *number))
                    .max()
            },
        }
    }

    fn decision(&self, number: u32) -> Decision {
        Decision::Answer(match self.newest {
            Some(newest) if number > newest && !is_unordered(self.architecture, number) => {
                libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32
            }
            _ => self.default,
        })
    }

    /// Returns the call numbers at which the decision changes, in ascending order. The first number
    /// in the list is `base`.
    fn boundaries(&self, base: u32) -> Vec<u32> {
        let mut all = vec![base];
        if let Some(newest) = self.newest {
            all.push(newest + 1);
            match self.architecture {
                Architecture::X32 => all.extend([X32_OWN.start, X32_OWN.end]),
                Architecture::Arm => all.push(ARM_PRIVATE),
                _ => {}
            }
        }
        all.sort_unstable();
        all
    }
}

/// Returns whether `number` is in a range in which a higher number does not mean a newer call.
fn is_unordered(architecture: Architecture, number: u32) -> bool {
    match architecture {
        Architecture::X32 => X32_OWN.contains(&number),
        Architecture::Arm => number >= ARM_PRIVATE,
        _ => false,
    }
}

struct Compiler<'a> {
    profile: &'a CheckedProfile,
    program: ProgramBuilder,
    /// The profile's rules, and the rules that are derived from them for socketcall(2) and ipc(2).
    rules: Vec<SeccompRule>,
    chains: Vec<Chain>,
    /// True if a rule could not be derived, because `rules` is too long for its indices.
    lacks_rules: bool,
}

/// A list of rules that the filter tries one after the other.
struct Chain {
    rules: Vec<u16>,
    /// True if the chain's code compares all 64 bits of an argument.
    wide: bool,
    /// The position of the chain's code, or `None` until the code is generated.
    code: Option<Goal>,
}

/// Compiles a checked profile to a filter program.
///
/// # Errors
/// Fails if the program has more instructions than the kernel accepts.
pub(crate) fn compile(profile: &CheckedProfile) -> Result<Vec<SockFilter>> {
    let mut compiler = Compiler {
        profile,
        program: ProgramBuilder::default(),
        rules: profile.rules.clone(),
        chains: Vec::new(),
        lacks_rules: false,
    };
    let mut sections: Vec<(u32, Goal)> = Vec::new();
    for architecture in &profile.architectures {
        // x32 has the same AUDIT_ARCH value as x86-64, so the section for x86-64 also filters the
        // calls of x32.
        if *architecture != Architecture::X32 {
            let section = compiler.section(*architecture);
            sections.push((architecture.audit(), section));
        }
    }
    // The program must test for the kernel's own architecture first. This architecture is the first
    // entry of `sections`. The comparisons are added in reverse order, because the builder writes
    // the program from its end.
    let mut goal = Goal::Return(FOREIGN);
    for (audit, section) in sections.into_iter().rev() {
        goal = compiler.program.branch(Test::Equal, audit, section, goal);
    }
    let start = compiler.program.load(ARCHITECTURE, u32::MAX, goal);
    if compiler.lacks_rules {
        refuse!(
            "linux.seccomp: the profile contains more rules for socketcall(2) and ipc(2) than rrun supports"
        );
    }
    let Some(program) = compiler.program.finish(start) else {
        refuse!(
            "linux.seccomp: the filter needs more than the {INSTRUCTIONS_MAX} instructions that the kernel accepts"
        );
    };
    Ok(program)
}

impl Compiler<'_> {
    fn section(&mut self, architecture: Architecture) -> Goal {
        let mut ranges = Ranges(Vec::with_capacity(512));
        self.add_calls(&mut ranges, architecture, 0);
        if architecture == Architecture::X86_64 {
            if self.profile.architectures.contains(&Architecture::X32) {
                self.add_calls(&mut ranges, Architecture::X32, X32_BIT);
            } else {
                ranges.from(X32_BIT, Decision::Answer(FOREIGN));
            }
        }
        ranges.from(SKIPPED, Decision::Answer(self.profile.default));
        let goal = self.search(&ranges.0);
        match goal {
            Goal::Return(_) => goal,
            goal => self.program.load(NUMBER, u32::MAX, goal),
        }
    }

    /// Adds the ranges for all calls of `architecture`. The call numbers of this architecture start
    /// at `base`.
    fn add_calls(&mut self, ranges: &mut Ranges, architecture: Architecture, base: u32) {
        let mut rules: Vec<(u32, u16)> = Vec::with_capacity(self.profile.calls.len());
        for (syscall, rule) in &self.profile.calls {
            if let Some(number) = syscall.number(architecture) {
                rules.push((number, *rule));
            }
        }
        if architecture == Architecture::X86 {
            self.add_multiplexed(&mut rules);
        }
        // The sort is stable, so rules for the same call remain in the profile's order.
        rules.sort_by_key(|(number, _)| *number);

        let unnamed = UnnamedCalls::new(self.profile, architecture);
        let mut boundaries = unnamed.boundaries(base).into_iter().peekable();
        for same_call in rules.chunk_by(|(one, _), (other, _)| one == other) {
            let Some((number, _)) = same_call.first() else {
                continue;
            };
            while let Some(boundary) = boundaries.next_if(|boundary| boundary <= number) {
                ranges.from(boundary, unnamed.decision(boundary));
            }
            let decision = self.decide(same_call, architecture.is_wide());
            ranges.from(*number, decision);
            ranges.from(number + 1, unnamed.decision(number + 1));
        }
        for boundary in boundaries {
            ranges.from(boundary, unnamed.decision(boundary));
        }
    }

    /// Adds rules for the calls that programs make through socketcall(2) and ipc(2). The first
    /// argument of socketcall(2) or ipc(2) identifies the actual call. Each added rule tests this
    /// argument.
    ///
    /// The arguments of the actual call are behind a pointer, so a filter cannot test the
    /// conditions of a rule. If a rule with conditions is stricter than the default action, the
    /// added rule applies to the call with any arguments. If a rule with conditions is laxer than
    /// the default action, the compiler adds no rule.
    fn add_multiplexed(&mut self, rules: &mut Vec<(u32, u16)>) {
        for (syscall, rule) in &self.profile.calls {
            let Some((through, call)) = multiplexed(syscall.name()) else {
                continue;
            };
            let Some(it) = self.profile.rules.get(usize::from(*rule)) else {
                continue;
            };
            let number = Syscall::by_name(through).and_then(|it| it.number(Architecture::X86));
            let Some(number) = number else {
                continue;
            };
            if !it.conditions.is_empty() && !is_stricter(it.answer, self.profile.default) {
                continue;
            }
            let Ok(made) = u16::try_from(self.rules.len()) else {
                self.lacks_rules = true;
                return;
            };
            self.rules.push(SeccompRule {
                answer: it.answer,
                conditions: vec![Condition {
                    argument: 0,
                    // The mask removes the version number in the upper half of ipc(2)'s first
                    // argument.
                    comparison: Comparison::Masked {
                        mask: 0xffff,
                        value: u64::from(call),
                    },
                }],
            });
            rules.push((number, made));
        }
    }

    /// Returns the decision that results from all rules for one system call.
    fn decide(&mut self, rules: &[(u32, u16)], wide: bool) -> Decision {
        let rule = |place: &u16| self.rules.get(usize::from(*place));
        // As in libseccomp, a rule without conditions overrides all other rules for the same system
        // call.
        let always = rules
            .iter()
            .filter_map(|(_, place)| rule(place))
            .find(|rule| rule.conditions.is_empty());
        if let Some(always) = always {
            return Decision::Answer(always.answer);
        }
        // As in libseccomp, the filter tries a rule with fewer conditions before a rule with more
        // conditions.
        let mut chain: Vec<u16> = rules.iter().map(|(_, place)| *place).collect();
        chain.sort_by_key(|place| rule(place).map_or(0, |rule| rule.conditions.len()));
        let same = |known: &Chain| known.rules == chain && known.wide == wide;
        let known = self.chains.iter().position(same);
        Decision::Chain(known.unwrap_or_else(|| {
            self.chains.push(Chain {
                rules: chain,
                wide,
                code: None,
            });
            self.chains.len() - 1
        }))
    }

    /// Generates the code that finds the decision for the call number in the accumulator.
    fn search(&mut self, ranges: &[(u32, Decision)]) -> Goal {
        match ranges {
            [] => Goal::Return(self.profile.default),
            [(_, Decision::Answer(answer))] => Goal::Return(*answer),
            [(_, Decision::Chain(chain))] => self.chain(*chain),
            // The middle range is a single number between two ranges with the same decision, so one
            // comparison is enough.
            [(_, around), (number, decision), (next, after)]
                if around == after && *next == number + 1 =>
            {
                let around = self.search(&[(0, *around)]);
                let goal = self.search(&[(*number, *decision)]);
                self.program.branch(Test::Equal, *number, goal, around)
            }
            ranges => {
                let (lower, upper) = ranges.split_at(ranges.len() / 2);
                let first = upper.first().map_or(0, |(first, _)| *first);
                let upper = self.search(upper);
                let lower = self.search(lower);
                self.program
                    .branch(Test::GreaterOrEqual, first, upper, lower)
            }
        }
    }

    fn chain(&mut self, chain: usize) -> Goal {
        let Some(chain) = self.chains.get_mut(chain) else {
            return Goal::Return(self.profile.default);
        };
        if let Some(goal) = chain.code {
            return goal;
        }
        let mut goal = Goal::Return(self.profile.default);
        for place in chain.rules.iter().rev() {
            let Some(rule) = self.rules.get(usize::from(*place)) else {
                continue;
            };
            let otherwise = goal;
            goal = Goal::Return(rule.answer);
            for condition in rule.conditions.iter().rev() {
                goal = compare(&mut self.program, *condition, chain.wide, goal, otherwise);
            }
        }
        chain.code = Some(goal);
        goal
    }
}

/// Returns whether the return value `answer` of a filter is stricter than the return value `than`.
/// The kernel compares return values as signed numbers, and treats the smallest value as the
/// strictest (seccomp_run_filters).
fn is_stricter(answer: u32, than: u32) -> bool {
    let action = |answer: u32| (answer & libc::SECCOMP_RET_ACTION_FULL) as i32;
    action(answer) < action(than)
}

/// Generates the code that compares an argument of the system call with a value. If `wide` is true,
/// the generated code compares the upper half of the argument first.
fn compare(
    program: &mut ProgramBuilder,
    condition: Condition,
    wide: bool,
    holds: Goal,
    fails: Goal,
) -> Goal {
    // `low_at` and `high_at` are offsets in struct seccomp_data. All architectures that rrun
    // supports are little-endian, so the lower half of an argument comes before the upper half.
    let low_at = 16 + 8 * condition.argument;
    let high_at = low_at + 4;
    let value = match condition.comparison {
        Comparison::Equal(value)
        | Comparison::NotEqual(value)
        | Comparison::Less(value)
        | Comparison::LessOrEqual(value)
        | Comparison::Greater(value)
        | Comparison::GreaterOrEqual(value)
        | Comparison::Masked { value, .. } => value,
    };
    let (low, high) = (value as u32, (value >> 32) as u32);
    let mut equal = |mask: (u32, u32), holds: Goal, fails: Goal| {
        let mut goal = holds;
        for (at, mask, value, compared) in
            [(low_at, mask.0, low, true), (high_at, mask.1, high, wide)]
        {
            if !compared {
                continue;
            }
            if mask == 0 {
                if value != 0 {
                    return fails;
                }
                continue;
            }
            let test = program.branch(Test::Equal, value, goal, fails);
            goal = program.load(at, mask, test);
        }
        goal
    };
    let (order, holds, fails) = match condition.comparison {
        Comparison::Equal(_) => return equal((u32::MAX, u32::MAX), holds, fails),
        Comparison::NotEqual(_) => return equal((u32::MAX, u32::MAX), fails, holds),
        Comparison::Masked { mask, .. } => {
            return equal((mask as u32, (mask >> 32) as u32), holds, fails);
        }
        Comparison::Greater(_) => (Test::Greater, holds, fails),
        Comparison::GreaterOrEqual(_) => (Test::GreaterOrEqual, holds, fails),
        Comparison::LessOrEqual(_) => (Test::Greater, fails, holds),
        Comparison::Less(_) => (Test::GreaterOrEqual, fails, holds),
    };
    let test = program.branch(order, low, holds, fails);
    let lower = program.load(low_at, u32::MAX, test);
    if !wide {
        return lower;
    }
    let test = program.branch(Test::Equal, high, lower, fails);
    let test = program.branch(Test::Greater, high, holds, test);
    program.load(high_at, u32::MAX, test)
}
