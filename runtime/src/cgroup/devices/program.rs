//! The rules as a program for the kernel's BPF machine.
//!
//! As short as it can be made, because the kernel checks every way through it when it is
//! loaded, and that is part of a container's start. Rules next to each other that say the
//! same (allow, or deny) may be asked in any order; so each run of them is sorted by type,
//! rights and major number, and each of those is compared once.

use super::rule::{ALL, BLOCK, CHAR, DeviceRule};

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BpfInsn {
    code: u8,
    /// Destination register in the low half, source register in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Opcodes, see the kernel's Documentation/bpf/standardization/instruction-set.rst.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbc;
const MOVE_CONSTANT: u8 = 0xb7;
const AND_CONSTANT: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP: u8 = 0x05;
const JUMP_UNEQUAL: u8 = 0x55;
const JUMP_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;

// Registers: the result, the context and then scratch, type, access, major, minor.
const R_RESULT: u8 = 0;
const R_SCRATCH: u8 = 1;
const R_KIND: u8 = 2;
const R_ACCESS: u8 = 3;
const R_MAJOR: u8 = 4;
const R_MINOR: u8 = 5;

/// A place in the program that is jumped to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Label(usize);

const ALLOW: Label = Label(0);
const DENY: Label = Label(1);

struct Assembler {
    code: Vec<BpfInsn>,
    /// BpfInsns that jump, and where to.
    jumps: Vec<(usize, Label)>,
    /// Where each label is.
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

    /// `label:` return whether it is allowed.
    fn return_decision(&mut self, label: Label) {
        self.place_label(label);
        self.put(MOVE_CONSTANT, R_RESULT, 0, 0, i32::from(label == ALLOW));
        self.put(EXIT, 0, 0, 0, 0);
    }

    fn finished(mut self) -> Vec<BpfInsn> {
        for (at, label) in self.jumps {
            if let (Some(instruction), Some(place)) =
                (self.code.get_mut(at), self.places.get(label.0))
            {
                instruction.offset = (*place as i64 - at as i64 - 1) as i16;
            }
        }
        self.code
    }

    /// Rules that all say the same, in any order.
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
        for of_a_type in rules.chunk_by(|a, b| a.kind == b.kind) {
            let next = self.label();
            if let Some(kind) = of_a_type.first().and_then(|rule| rule.kind) {
                self.jump(JUMP_UNEQUAL, R_KIND, kind, next);
            }
            for of_an_access in of_a_type.chunk_by(|a, b| a.access == b.access) {
                self.with_access(of_an_access);
            }
            self.place_label(next);
        }
    }

    /// Rules of one type for the same rights.
    fn with_access(&mut self, rules: &[DeviceRule]) {
        let Some(DeviceRule { allow, access, .. }) = rules.first().copied() else {
            return;
        };
        let answer = if allow { ALLOW } else { DENY };
        let next = self.label();
        let every = rules
            .iter()
            .any(|rule| rule.major.is_none() && rule.minor.is_none());
        if access != ALL {
            // An allowing rule speaks of an attempt only if it covers all that is attempted,
            // a denying one already if it covers some of it.
            let (mask, speaks, passes) = if allow {
                (!access & ALL, JUMP_EQUAL, JUMP_UNEQUAL)
            } else {
                (access, JUMP_UNEQUAL, JUMP_EQUAL)
            };
            self.put(MOVE, R_SCRATCH, R_ACCESS, 0, 0);
            self.put(AND_CONSTANT, R_SCRATCH, 0, 0, mask);
            if every {
                self.jump(speaks, R_SCRATCH, 0, answer);
                return;
            }
            self.jump(passes, R_SCRATCH, 0, next);
        } else if every {
            self.jump(JUMP, 0, 0, answer);
            return;
        }
        for of_a_major in rules.chunk_by(|a, b| a.major == b.major) {
            let Some(major) = of_a_major.first().and_then(|rule| rule.major) else {
                for minor in of_a_major.iter().filter_map(|rule| rule.minor) {
                    self.jump(JUMP_EQUAL, R_MINOR, minor, answer);
                }
                continue;
            };
            if of_a_major.iter().any(|rule| rule.minor.is_none()) {
                self.jump(JUMP_EQUAL, R_MAJOR, major, answer);
                continue;
            }
            let other = self.label();
            self.jump(JUMP_UNEQUAL, R_MAJOR, major, other);
            for minor in of_a_major.iter().filter_map(|rule| rule.minor) {
                self.jump(JUMP_EQUAL, R_MINOR, minor, answer);
            }
            self.place_label(other);
        }
        self.place_label(next);
    }
}

/// There are two types; a rule for each of them is one for both.
fn merge_types(rules: &mut Vec<DeviceRule>) {
    let of_blocks: Vec<DeviceRule> = rules
        .iter()
        .filter(|rule| rule.kind == Some(BLOCK))
        .copied()
        .collect();
    for block in of_blocks {
        let char = DeviceRule {
            kind: Some(CHAR),
            ..block
        };
        if rules.contains(&char) {
            rules.retain(|rule| *rule != char && *rule != block);
            rules.push(DeviceRule {
                kind: None,
                ..block
            });
        }
    }
}

/// The program that asks the rules, from the last to the first.
pub(crate) fn compile(rules: &[DeviceRule]) -> Vec<BpfInsn> {
    let mut program = Assembler {
        code: Vec::with_capacity(48),
        jumps: Vec::new(),
        places: vec![0; 2],
    };
    // The first word has the rights in its upper half, the type in its lower one.
    program.put(LOAD_WORD, R_KIND, R_SCRATCH, 0, 0);
    program.put(LOAD_WORD, R_MAJOR, R_SCRATCH, 4, 0);
    program.put(LOAD_WORD, R_MINOR, R_SCRATCH, 8, 0);
    program.put(MOVE, R_ACCESS, R_KIND, 0, 0);
    program.put(AND_CONSTANT, R_KIND, 0, 0, 0xffff);
    program.put(SHIFT_RIGHT, R_ACCESS, 0, 0, 16);
    // What comes before a rule for everything has no say.
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
    // The verifier refuses code that can not be reached.
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

    /// What the program decides, computed by running it.
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

    /// What the rules say, one after the other.
    fn meant(rules: &[DeviceRule], kind: i32, access: i32, major: i32, minor: i32) -> bool {
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
    fn the_program_decides_as_the_rules_say() {
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
                let code = compile(&rules);
                for kind in [BLOCK, CHAR] {
                    for access in 1..=ALL {
                        for major in [0, 1, 5, 8, 10, 136] {
                            for minor in [0, 1, 2, 3, 7, 200] {
                                assert_eq!(
                                    decides(&code, kind, access, major, minor),
                                    meant(&rules, kind, access, major, minor),
                                    "{json}: {kind} {access} {major}:{minor}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_default_denies_disks_and_allows_null_in_few_instructions() {
        let mut rules = parsed(r#"[{"allow":false,"access":"rwm"}]"#);
        rules.extend(DEFAULTS);
        rules.extend(DEFAULTS);
        let code = compile(&rules);
        assert!(decides(&code, CHAR, READ | WRITE, 1, 3));
        assert!(decides(&code, CHAR, READ, 136, 7));
        assert!(decides(&code, BLOCK, MKNOD, 8, 0));
        assert!(!decides(&code, BLOCK, READ, 8, 0));
        assert!(!decides(&code, CHAR, READ, 1, 1));
        assert!(code.len() <= 24, "{} instructions", code.len());
    }
}
