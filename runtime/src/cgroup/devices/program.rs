//! The compiler that translates device rules into a program for the kernel's BPF machine.
//!
//! The compiler makes the program as short as possible. When the kernel loads the program, it
//! verifies every path through the program. This verification delays the container's start.
//! Neighbouring rules with the same effect (allow, or deny) can be checked in any order. So the
//! compiler sorts each group of such rules by type, rights and major number. The program then
//! compares each of these values only once.

use std::collections::{BTreeMap, BTreeSet};

use super::rule::{ALL, BLOCK, CHAR, DeviceRule};
use crate::error::{Result, refuse};

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BpfInsn {
    code: u8,
    /// The destination register in the low four bits, and the source register in the high four
    /// bits.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// The opcodes that the program uses. See the kernel's
// Documentation/bpf/standardization/instruction-set.rst.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbc;
const MOVE_CONSTANT: u8 = 0xb7;
const AND_CONSTANT: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP: u8 = 0x05;
const JUMP_UNEQUAL: u8 = 0x55;
const JUMP_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;

// The registers that the program uses. Register 1 contains the address of the program's context at
// first, and temporary values afterwards.
const R_RESULT: u8 = 0;
const R_SCRATCH: u8 = 1;
const R_KIND: u8 = 2;
const R_ACCESS: u8 = 3;
const R_MAJOR: u8 = 4;
const R_MINOR: u8 = 5;

/// The target of a jump in the program.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Label(usize);

const ALLOW: Label = Label(0);
const DENY: Label = Label(1);

struct Assembler {
    code: Vec<BpfInsn>,
    /// The index of each jump instruction, and the label that is the jump's target.
    jumps: Vec<(usize, Label)>,
    /// The index of the instruction that each label marks.
    places: Vec<usize>,
}

impl Assembler {
    fn put(&mut self, code: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        self.code.push(BpfInsn {
            code,
            registers: to | from << 4,
            offset,
            immediate,
        });
    }

    fn jump(&mut self, code: u8, register: u8, value: i32, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.put(code, register, 0, 0, value);
    }

    fn label(&mut self) -> Label {
        self.places.push(0);
        Label(self.places.len() - 1)
    }

    fn place_label(&mut self, label: Label) {
        if let Some(place) = self.places.get_mut(label.0) {
            *place = self.code.len();
        }
    }

    fn is_used(&self, label: Label) -> bool {
        self.jumps.iter().any(|(_, to)| *to == label)
    }

    /// Places `label` at the next instruction, and emits the instructions that return the label's
    /// decision (allow or deny).
    fn return_decision(&mut self, label: Label) {
        self.place_label(label);
        self.put(MOVE_CONSTANT, R_RESULT, 0, 0, i32::from(label == ALLOW));
        self.put(EXIT, 0, 0, 0, 0);
    }

    fn finished(mut self) -> Result<Vec<BpfInsn>> {
        // A jump's distance has 16 bits, so it would be truncated in a longer program.
        let most = i16::MAX as usize;
        if self.code.len() > most {
            refuse!(
                "linux.resources.devices: the rules need a program of {} instructions, but rrun supports at most {most}",
                self.code.len()
            );
        }
        for (at, label) in self.jumps {
            if let (Some(instruction), Some(place)) =
                (self.code.get_mut(at), self.places.get(label.0))
            {
                instruction.offset = (*place as i64 - at as i64 - 1) as i16;
            }
        }
        Ok(self.code)
    }

    /// Emits the code for rules with the same effect (allow, or deny). The order of such rules does
    /// not matter.
    fn add_rules(&mut self, mut rules: Vec<DeviceRule>) {
        merge_types(&mut rules);
        rules.sort_unstable_by_key(|rule| {
            (
                rule.kind,
                rule.access,
                rule.major.is_some(),
                rule.major,
                rule.minor,
            )
        });
        rules.dedup();
        for same_type in rules.chunk_by(|a, b| a.kind == b.kind) {
            let next = self.label();
            if let Some(kind) = same_type.first().and_then(|rule| rule.kind) {
                self.jump(JUMP_UNEQUAL, R_KIND, kind, next);
            }
            for same_access in same_type.chunk_by(|a, b| a.access == b.access) {
                self.add_rules_with_access(same_access);
            }
            self.place_label(next);
        }
    }

    /// Emits the code for rules that have the same device type and the same rights.
    fn add_rules_with_access(&mut self, rules: &[DeviceRule]) {
        let Some(DeviceRule { allow, access, .. }) = rules.first().copied() else {
            return;
        };
        let answer = if allow { ALLOW } else { DENY };
        let next = self.label();
        let every = rules
            .iter()
            .any(|rule| rule.major.is_none() && rule.minor.is_none());
        if access != ALL {
            // An allow rule applies to an access only if the rule covers all requested rights. A
            // deny rule applies if it covers at least one requested right.
            let (mask, jump_if_match, jump_if_no_match) = if allow {
                (!access & ALL, JUMP_EQUAL, JUMP_UNEQUAL)
            } else {
                (access, JUMP_UNEQUAL, JUMP_EQUAL)
            };
            self.put(MOVE, R_SCRATCH, R_ACCESS, 0, 0);
            self.put(AND_CONSTANT, R_SCRATCH, 0, 0, mask);
            if every {
                self.jump(jump_if_match, R_SCRATCH, 0, answer);
                return;
            }
            self.jump(jump_if_no_match, R_SCRATCH, 0, next);
        } else if every {
            self.jump(JUMP, 0, 0, answer);
            return;
        }
        for same_major in rules.chunk_by(|a, b| a.major == b.major) {
            let Some(major) = same_major.first().and_then(|rule| rule.major) else {
                for minor in same_major.iter().filter_map(|rule| rule.minor) {
                    self.jump(JUMP_EQUAL, R_MINOR, minor, answer);
                }
                continue;
            };
            if same_major.iter().any(|rule| rule.minor.is_none()) {
                self.jump(JUMP_EQUAL, R_MAJOR, major, answer);
                continue;
            }
            let other = self.label();
            self.jump(JUMP_UNEQUAL, R_MAJOR, major, other);
            for minor in same_major.iter().filter_map(|rule| rule.minor) {
                self.jump(JUMP_EQUAL, R_MINOR, minor, answer);
            }
            self.place_label(other);
        }
        self.place_label(next);
    }
}

/// If two rules differ only in the type, block or character device, merges the two rules into one
/// rule without a type. The merged rule has the same effect, because device nodes have no other
/// types. All rules must have the same effect (allow, or deny).
fn merge_types(rules: &mut Vec<DeviceRule>) {
    let untyped = |rule: &DeviceRule| (rule.access, rule.major, rule.minor);
    let with_type = |kind: i32| rules.iter().filter(move |rule| rule.kind == Some(kind));
    let char_rules: BTreeSet<_> = with_type(CHAR).map(untyped).collect();
    let blocks = with_type(BLOCK).filter(|rule| char_rules.contains(&untyped(rule)));
    let merged: BTreeMap<_, DeviceRule> = blocks.map(|rule| (untyped(rule), *rule)).collect();
    rules.retain(|rule| rule.kind.is_none() || !merged.contains_key(&untyped(rule)));
    rules.extend(
        merged
            .into_values()
            .map(|rule| DeviceRule { kind: None, ..rule }),
    );
}

/// Compiles a program that checks the rules from the last to the first.
///
/// # Errors
/// Fails if the program is too long.
pub(crate) fn compile(rules: &[DeviceRule]) -> Result<Vec<BpfInsn>> {
    let mut program = Assembler {
        code: Vec::with_capacity(48),
        jumps: Vec::new(),
        places: vec![0; 2],
    };
    // The program's context is a struct bpf_cgroup_dev_ctx. In the first word of this struct, the
    // upper half contains the requested rights, and the lower half contains the device type.
    program.put(LOAD_WORD, R_KIND, R_SCRATCH, 0, 0);
    program.put(LOAD_WORD, R_MAJOR, R_SCRATCH, 4, 0);
    program.put(LOAD_WORD, R_MINOR, R_SCRATCH, 8, 0);
    program.put(MOVE, R_ACCESS, R_KIND, 0, 0);
    program.put(AND_CONSTANT, R_KIND, 0, 0, 0xffff);
    program.put(SHIFT_RIGHT, R_ACCESS, 0, 0, 16);
    // A rule for all devices and all rights overrides all earlier rules. The compiler ignores the
    // overridden rules.
    let decided = |rule: &DeviceRule| {
        rule.kind.is_none() && rule.major.is_none() && rule.minor.is_none() && rule.access == ALL
    };
    let (first, last) = match rules.iter().rposition(decided) {
        Some(at) if rules.get(at).is_some_and(|rule| rule.allow) => (at + 1, ALLOW),
        Some(at) => (at + 1, DENY),
        None => (0, DENY),
    };
    let effective = rules.get(first..).unwrap_or_default();
    for run in effective.chunk_by(|a, b| a.allow == b.allow).rev() {
        program.add_rules(run.to_vec());
    }
    program.return_decision(last);
    // The kernel's verifier refuses unreachable code. So the compiler emits the decision `other`
    // only if a jump leads to it.
    let other = if last == ALLOW { DENY } else { ALLOW };
    if program.is_used(other) {
        program.return_decision(other);
    }
    program.finished()
}

#[cfg(test)]
mod tests {
    use super::super::rule::{DEFAULTS, MKNOD, READ, WRITE, parsed};
    use super::*;

    /// Interprets a program, and returns whether the program allows this access to the device.
    fn decides(code: &[BpfInsn], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0i64; 6];
        let mut at = 0usize;
        loop {
            let i = code[at];
            let (to, from) = ((i.registers & 15) as usize, (i.registers >> 4) as usize);
            at += 1;
            let jumps = match i.code {
                JUMP => true,
                JUMP_UNEQUAL => registers[to] != i64::from(i.immediate),
                JUMP_EQUAL => registers[to] == i64::from(i.immediate),
                _ => false,
            };
            match i.code {
                LOAD_WORD => {
                    registers[to] = match i.offset {
                        0 => i64::from(access << 16 | kind),
                        4 => i64::from(major),
                        _ => i64::from(minor),
                    }
                }
                MOVE => registers[to] = registers[from],
                MOVE_CONSTANT => registers[to] = i64::from(i.immediate),
                AND_CONSTANT => registers[to] &= i64::from(i.immediate),
                SHIFT_RIGHT => registers[to] >>= i.immediate,
                EXIT => return registers[0] == 1,
                _ if jumps => at += i.offset as usize,
                _ => {}
            }
        }
    }

    /// Returns whether the rules allow this access to the device. This function evaluates the rules
    /// directly, from the last to the first, without a compiled program.
    fn expected(rules: &[DeviceRule], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        rules
            .iter()
            .rev()
            .find(|rule| {
                rule.kind.is_none_or(|is| is == kind)
                    && rule.major.is_none_or(|is| is == major)
                    && rule.minor.is_none_or(|is| is == minor)
                    && if rule.allow {
                        access & !rule.access == 0
                    } else {
                        access & rule.access != 0
                    }
            })
            .is_some_and(|rule| rule.allow)
    }

    #[test]
    fn the_program_decides_as_the_rules_specify() {
        for json in [
            "[]",
            r#"[{"allow":false,"access":"rwm"}]"#,
            r#"[{"allow":false},{"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"},
                {"allow":true,"type":"c","access":"m"},{"allow":true,"type":"b","access":"m"},
                {"allow":true,"type":"b","major":8,"access":"r"}]"#,
            r#"[{"allow":true,"type":"a","access":"rwm"},
                {"allow":false,"type":"c","major":10,"minor":200,"access":"w"}]"#,
            r#"[{"allow":true,"type":"c","major":8,"access":"rw"},
                {"allow":true,"type":"b","major":8,"access":"rw"},
                {"allow":false,"type":"b","minor":1,"access":"r"},
                {"allow":true,"type":"b","major":8,"minor":1,"access":"w"},
                {"allow":false,"type":"c","access":"rw"},
                {"allow":true,"type":"c","access":"rw"}]"#,
        ] {
            for defaults in [&DEFAULTS[..], &[]] {
                let mut rules = parsed(json);
                rules.extend(defaults);
                let code = compile(&rules).unwrap();
                for kind in [BLOCK, CHAR] {
                    for access in 1..=ALL {
                        for major in [0, 1, 5, 8, 10, 136] {
                            for minor in [0, 1, 2, 3, 7, 200] {
                                assert_eq!(
                                    decides(&code, kind, access, major, minor),
                                    expected(&rules, kind, access, major, minor),
                                    "decision for the rules {json}, device {kind} {major}:{minor}, \
                                     access {access}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_default_rules_deny_disks_and_allow_dev_null_in_few_instructions() {
        let mut rules = parsed(r#"[{"allow":false,"access":"rwm"}]"#);
        rules.extend(DEFAULTS);
        rules.extend(DEFAULTS);
        let code = compile(&rules).unwrap();
        assert!(decides(&code, CHAR, READ | WRITE, 1, 3));
        assert!(decides(&code, CHAR, READ, 136, 7));
        assert!(decides(&code, BLOCK, MKNOD, 8, 0));
        assert!(!decides(&code, BLOCK, READ, 8, 0));
        assert!(!decides(&code, CHAR, READ, 1, 1));
        assert!(
            code.len() <= 24,
            "number of instructions of the program for the default rules: {}, expected: at most 24",
            code.len()
        );
    }

    #[test]
    fn rules_whose_jumps_would_be_truncated_are_refused() {
        let rule = |minor| DeviceRule {
            allow: true,
            kind: Some(CHAR),
            major: Some(1),
            minor: Some(minor),
            access: ALL,
        };
        let rules: Vec<DeviceRule> = (0..32_000).map(rule).collect();
        let code = compile(&rules).unwrap();
        assert!(decides(&code, CHAR, READ, 1, 0) && decides(&code, CHAR, READ, 1, 31_999));
        assert!(!decides(&code, CHAR, READ, 1, 32_000) && !decides(&code, CHAR, READ, 2, 0));
        let rules: Vec<DeviceRule> = (0..50_000).map(rule).collect();
        let error = compile(&rules).unwrap_err().to_string();
        assert!(error.starts_with("linux.resources.devices: "), "{error}");
    }
}
