//! From a checked profile to a filter program: for each architecture the numbers of all
//! calls, made into ranges with the same answer, and a binary search over those.
//!
//! A chain of comparisons, one for each call, as is common, costs the container at every
//! call that the kernel can not answer by its bitmap of what is always allowed, and costs
//! more to load: the kernel runs the filter once for each call that there is.

use super::architecture::Architecture;
use super::bpf::{ARCHITECTURE, Goal, INSTRUCTIONS_MAX, NUMBER, ProgramBuilder, Test};
use super::profile::{CheckedProfile, Comparison, Condition, SeccompRule};
use super::table::{ARM_PRIVATE, Syscall, X32_BIT, multiplexed};
use crate::error::{Result, refuse};
use crate::sys::syscalls::SockFilter;

/// The number that a tracer puts in place of a call that is not to be made.
const SKIPPED: u32 = u32::MAX;
/// Numbers 512 to 547 are x32's for calls that it has differently: newer ones follow the
/// others below, and start again above.
const X32_OWN: std::ops::Range<u32> = X32_BIT + 512..X32_BIT + 548;
/// What a program of another architecture gets, as from libseccomp.
const FOREIGN: u32 = libc::SECCOMP_RET_KILL_THREAD;

/// What is to be done with the calls of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    Answer(u32),
    /// It depends on the arguments: the chain of that number.
    Chain(usize),
}

/// Ranges by their first number, in order, from 0; each ends where the next one starts.
struct Ranges(Vec<(u32, Decision)>);

impl Ranges {
    /// Everything from `first` on, until something else is said of it.
    fn from(&mut self, first: u32, decision: Decision) {
        match self.0.last_mut() {
            Some((start, last)) if *start == first => *last = decision,
            _ => self.0.push((first, decision)),
        }
        // The same as before goes on.
        if let [.., (_, before), (_, last)] = self.0.as_slice()
            && before == last
        {
            self.0.pop();
        }
    }
}

/// What is done with numbers of which the profile says nothing.
///
/// A C library tries new calls first and falls back on old ones if they are not there, but
/// not if they are forbidden. So that it works with profiles older than itself, a call that
/// is newer than the newest that the profile names is answered as an old kernel would
/// answer it. runc does so since its version 1.0.
struct UnnamedCalls {
    architecture: Architecture,
    default: u32,
    /// The newest call named; `None` if new calls are to be treated as all others.
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
                    .filter(|number| !is_apart(architecture, *number))
                    .max()
            },
        }
    }

    fn decision(&self, number: u32) -> Decision {
        Decision::Answer(match self.newest {
            Some(newest) if number > newest && !is_apart(self.architecture, number) => {
                libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32
            }
            _ => self.default,
        })
    }

    /// Where the decision changes, in order, from `base` on.
    fn borders(&self, base: u32) -> Vec<u32> {
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

/// Numbers that have nothing to do with a call's age.
fn is_apart(architecture: Architecture, number: u32) -> bool {
    match architecture {
        Architecture::X32 => X32_OWN.contains(&number),
        Architecture::Arm => number >= ARM_PRIVATE,
        _ => false,
    }
}

struct Compiler<'a> {
    profile: &'a CheckedProfile,
    program: ProgramBuilder,
    /// The profile's, and what is made of them for calls that come through another.
    rules: Vec<SeccompRule>,
    chains: Vec<Chain>,
}

/// Rules to try one after the other.
struct Chain {
    rules: Vec<u16>,
    /// Whether arguments are compared as 64 bits.
    wide: bool,
    /// Where its code is, once that is written.
    code: Option<Goal>,
}

/// # Errors
/// A profile that needs more instructions than the kernel takes.
pub(crate) fn compile(profile: &CheckedProfile) -> Result<Vec<SockFilter>> {
    let mut compiler = Compiler {
        profile,
        program: ProgramBuilder::default(),
        rules: profile.rules.clone(),
        chains: Vec::new(),
    };
    let mut sections: Vec<(u32, Goal)> = Vec::new();
    for architecture in &profile.architectures {
        // x32 is filtered beside x86-64, whose name it has.
        if *architecture != Architecture::X32 {
            let section = compiler.section(*architecture);
            sections.push((architecture.audit(), section));
        }
    }
    // The kernel's own, which comes first, is to be compared first.
    let mut goal = Goal::Return(FOREIGN);
    for (audit, section) in sections.into_iter().rev() {
        goal = compiler.program.branch(Test::Equal, audit, section, goal);
    }
    let start = compiler.program.load(ARCHITECTURE, u32::MAX, goal);
    let program = compiler.program.finish(start);
    if program.len() > INSTRUCTIONS_MAX {
        refuse!(
            "linux.seccomp: makes a filter of {} instructions, of which the kernel takes {INSTRUCTIONS_MAX}",
            program.len()
        );
    }
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

    /// Adds all numbers from `base` on.
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
        // Stable: what is said of the same call stays in the profile's order.
        rules.sort_by_key(|(number, _)| *number);

        let unnamed = UnnamedCalls::new(self.profile, architecture);
        let mut borders = unnamed.borders(base).into_iter().peekable();
        for of_one in rules.chunk_by(|(one, _), (other, _)| one == other) {
            let Some((number, _)) = of_one.first() else {
                continue;
            };
            while let Some(border) = borders.next_if(|border| border <= number) {
                ranges.from(border, unnamed.decision(border));
            }
            let decision = self.decide(of_one, architecture.is_wide());
            ranges.from(*number, decision);
            ranges.from(number + 1, unnamed.decision(number + 1));
        }
        for border in borders {
            ranges.from(border, unnamed.decision(border));
        }
    }

    /// What socketcall(2) and ipc(2) stand for, as rules on their first argument.
    ///
    /// Their own arguments are behind a pointer, where no filter sees them. A rule that is
    /// stricter than the default therefore counts whatever the arguments are; one that is
    /// laxer does not count if it has conditions.
    fn add_multiplexed(&mut self, rules: &mut Vec<(u32, u16)>) {
        for (syscall, rule) in &self.profile.calls {
            let Some((through, call)) = multiplexed(syscall.name()) else {
                continue;
            };
            let Some(it) = self.profile.rules.get(usize::from(*rule)) else {
                continue;
            };
            let number = Syscall::by_name(through).and_then(|it| it.number(Architecture::X86));
            let (Some(number), Ok(made)) = (number, u16::try_from(self.rules.len())) else {
                continue;
            };
            if !it.conditions.is_empty() && !is_stricter(it.answer, self.profile.default) {
                continue;
            }
            self.rules.push(SeccompRule {
                answer: it.answer,
                conditions: vec![Condition {
                    argument: 0,
                    // The upper half of ipc's is a version number.
                    comparison: Comparison::Masked {
                        mask: 0xffff,
                        value: u64::from(call),
                    },
                }],
            });
            rules.push((number, made));
        }
    }

    /// What all rules for one call come to.
    fn decide(&mut self, rules: &[(u32, u16)], wide: bool) -> Decision {
        let rule = |place: &u16| self.rules.get(usize::from(*place));
        // One that asks nothing covers all others, as with libseccomp.
        let always = rules
            .iter()
            .filter_map(|(_, place)| rule(place))
            .find(|rule| rule.conditions.is_empty());
        if let Some(always) = always {
            return Decision::Answer(always.answer);
        }
        // For the same reason, one that asks less comes before one that asks more.
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

    /// The code that finds the decision for the number in the accumulator.
    fn search(&mut self, ranges: &[(u32, Decision)]) -> Goal {
        match ranges {
            [] => Goal::Return(self.profile.default),
            [(_, Decision::Answer(answer))] => Goal::Return(*answer),
            [(_, Decision::Chain(chain))] => self.chain(*chain),
            // One number in the midst of others.
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

/// The kernel takes the strictest of several filters' answers to be the least, as a signed
/// number (seccomp_run_filters).
fn is_stricter(answer: u32, than: u32) -> bool {
    let action = |answer: u32| (answer & libc::SECCOMP_RET_ACTION_FULL) as i32;
    action(answer) < action(than)
}

/// Code that compares an argument, its upper half first if it is `wide`.
fn compare(
    program: &mut ProgramBuilder,
    condition: Condition,
    wide: bool,
    holds: Goal,
    fails: Goal,
) -> Goal {
    // Offsets in struct seccomp_data; the lower half comes first on all that rrun runs on.
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
