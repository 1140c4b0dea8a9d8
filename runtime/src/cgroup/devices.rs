//! `linux.resources.devices`: which device nodes may be opened or made, enforced by a small
//! program that the kernel runs at every attempt (BPF_PROG_TYPE_CGROUP_DEVICE).
//!
//! Rules are in cgroup v1's terms: everything is denied at first, each rule changes what
//! the ones before it said. The program asks them from the last to the first; the first
//! that speaks of the attempt decides it. An attempt for several rights at once (opening
//! for reading and writing) is allowed only if one rule allows all of them.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use rustix::io::Errno;

use super::Cgroup;
use crate::dbus::{Property, Value};
use crate::error::{Context, Error, Result};
use crate::refuse;

// linux/bpf.h, struct bpf_cgroup_dev_ctx
const BLOCK: i32 = 1;
const CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// One rule; `None` stands for every one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

const fn allow(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// What every container may do, as with runc: make nodes (but not open them), use the
/// default devices and terminals. These come after the configuration's own rules.
const DEFAULTS: [Rule; 10] = [
    allow(CHAR, None, None, MKNOD),
    allow(BLOCK, None, None, MKNOD),
    allow(CHAR, Some(1), Some(3), ALL),
    allow(CHAR, Some(1), Some(5), ALL),
    allow(CHAR, Some(1), Some(7), ALL),
    allow(CHAR, Some(1), Some(8), ALL),
    allow(CHAR, Some(1), Some(9), ALL),
    allow(CHAR, Some(5), Some(0), ALL),
    allow(CHAR, Some(5), Some(2), ALL),
    allow(CHAR, Some(136), None, ALL),
];

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination register in the low half, source register in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    }
}

// Opcodes, see the kernel's Documentation/bpf/standardization/instruction-set.rst.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbc;
const MOVE_CONSTANT: u8 = 0xb7;
const AND_CONSTANT: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
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

fn rules(spec: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    let number = |index: usize, field: &str, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => i32::try_from(value)
            .ok()
            .filter(|value| *value >= 0)
            .map(Some)
            .ok_or_else(|| {
                Error::new(format!(
                    "linux.resources.devices[{index}].{field}: {value} is no device number"
                ))
            }),
    };
    spec.iter()
        .enumerate()
        .map(|(index, rule)| {
            let kind = match rule.typ() {
                None | Some(LinuxDeviceType::A) => None,
                Some(LinuxDeviceType::B) => Some(BLOCK),
                Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
                Some(LinuxDeviceType::P) => {
                    refuse!("linux.resources.devices[{index}].type: p has no device number")
                }
            };
            let mut access = 0;
            for letter in rule.access().as_deref().unwrap_or("").chars() {
                access |= match letter {
                    'm' => MKNOD,
                    'r' => READ,
                    'w' => WRITE,
                    _ => refuse!(
                        "linux.resources.devices[{index}].access: {letter} is none of r, w, m"
                    ),
                };
            }
            // cgroup v1 took a rule for all types as one for all devices and all rights.
            let every = kind.is_none();
            Ok(Rule {
                allow: rule.allow(),
                kind,
                major: if every {
                    None
                } else {
                    number(index, "major", rule.major())?
                },
                minor: if every {
                    None
                } else {
                    number(index, "minor", rule.minor())?
                },
                access: if every || access == 0 { ALL } else { access },
            })
        })
        .collect()
}

pub fn validate(spec: &[LinuxDeviceCgroup]) -> Result<()> {
    rules(spec).map(|_| ())
}

/// Whether nothing is denied, so that no program is needed.
fn allows_everything(rules: &[Rule]) -> bool {
    for rule in rules.iter().rev() {
        if !rule.allow {
            return false;
        }
        if rule.kind.is_none() {
            return true;
        }
    }
    false
}

fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut code = vec![
        // The first word has the rights in its upper half, the type in its lower one.
        instruction(LOAD_WORD, R_KIND, R_SCRATCH, 0, 0),
        instruction(MOVE, R_ACCESS, R_KIND, 0, 0),
        instruction(AND_CONSTANT, R_KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, R_ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, R_MAJOR, R_SCRATCH, 4, 0),
        instruction(LOAD_WORD, R_MINOR, R_SCRATCH, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut part = Vec::with_capacity(8);
        if let Some(kind) = rule.kind {
            part.push(instruction(JUMP_UNEQUAL, R_KIND, 0, 0, kind));
        }
        if rule.access != ALL {
            part.push(instruction(MOVE, R_SCRATCH, R_ACCESS, 0, 0));
            if rule.allow {
                // Speaks of the attempt only if it covers all that is attempted.
                part.push(instruction(
                    AND_CONSTANT,
                    R_SCRATCH,
                    0,
                    0,
                    !rule.access & ALL,
                ));
                part.push(instruction(JUMP_UNEQUAL, R_SCRATCH, 0, 0, 0));
            } else {
                part.push(instruction(AND_CONSTANT, R_SCRATCH, 0, 0, rule.access));
                part.push(instruction(JUMP_EQUAL, R_SCRATCH, 0, 0, 0));
            }
        }
        for (register, number) in [(R_MAJOR, rule.major), (R_MINOR, rule.minor)] {
            if let Some(number) = number {
                part.push(instruction(JUMP_UNEQUAL, register, 0, 0, number));
            }
        }
        let unconditional = !part.iter().any(is_jump);
        part.push(instruction(
            MOVE_CONSTANT,
            R_RESULT,
            0,
            0,
            i32::from(rule.allow),
        ));
        part.push(instruction(EXIT, 0, 0, 0, 0));
        let length = part.len();
        for (at, instruction) in part.iter_mut().enumerate() {
            if is_jump(instruction) {
                instruction.offset = (length - at - 1) as i16;
            }
        }
        code.extend(part);
        if unconditional {
            // The verifier refuses code that can not be reached.
            return code;
        }
    }
    code.push(instruction(MOVE_CONSTANT, R_RESULT, 0, 0, 0));
    code.push(instruction(EXIT, 0, 0, 0, 0));
    code
}

fn is_jump(instruction: &Instruction) -> bool {
    matches!(instruction.code, JUMP_UNEQUAL | JUMP_EQUAL)
}

/// `union bpf_attr` for BPF_PROG_LOAD, as far as it is used.
#[repr(C)]
struct LoadAttributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// The same for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

fn bpf<A>(command: libc::c_int, attributes: &A) -> std::result::Result<i32, Errno> {
    // SAFETY: attributes is a prefix of bpf_attr of the length given, and what it points to
    // outlives the call; the kernel takes what is missing as zero.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes as *const A,
            std::mem::size_of::<A>(),
        )
    };
    if returned < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(returned as i32)
}

fn load(code: &[Instruction]) -> std::result::Result<OwnedFd, Errno> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let fd = bpf(
        BPF_PROG_LOAD,
        &LoadAttributes {
            prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
            insn_cnt: code.len() as u32,
            insns: code.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log_buf: 0,
            kern_version: 0,
            prog_flags: 0,
        },
    )?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach(cgroup: &Cgroup, program: &OwnedFd) -> std::result::Result<(), Errno> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    bpf(
        BPF_PROG_ATTACH,
        &AttachAttributes {
            target_fd: cgroup.fd.as_raw_fd() as u32,
            attach_bpf_fd: program.as_raw_fd() as u32,
            attach_type: BPF_CGROUP_DEVICE,
            // A container that divides its cgroup may add programs, which only restrict.
            attach_flags: BPF_F_ALLOW_MULTI,
        },
    )
    .map(|_| ())
}

/// The rules as systemd's properties DevicePolicy and DeviceAllow, which know no exception
/// to what they allow: they may allow more than the program does, never less.
pub fn properties(spec: &[LinuxDeviceCgroup]) -> Result<[Property; 2]> {
    let mut rules = rules(spec)?;
    rules.extend(DEFAULTS);
    let mut allowed: Vec<Rule> = Vec::new();
    let mut policy = "strict";
    for rule in rules {
        match (rule.allow, rule.kind) {
            (allow, None) => {
                policy = if allow { "auto" } else { "strict" };
                allowed.clear();
            }
            (true, Some(_)) => allowed.push(rule),
            (false, Some(_)) => allowed.retain(|known| {
                (known.kind, known.major, known.minor) != (rule.kind, rule.major, rule.minor)
                    || known.access & !rule.access != 0
            }),
        }
    }
    if policy == "auto" {
        allowed.clear();
    }
    let needs_names = |rule: &Rule| rule.major.is_some() && rule.minor.is_none();
    let drivers = if allowed.iter().any(needs_names) {
        std::fs::read_to_string("/proc/devices").doing(|| "read /proc/devices")?
    } else {
        String::new()
    };
    let entries = allowed
        .iter()
        .filter_map(|rule| Some((rule.node(&drivers)?, rule.letters())))
        .collect();
    Ok([
        ("DevicePolicy".to_owned(), Value::Text(policy.to_owned())),
        ("DeviceAllow".to_owned(), Value::Pairs(entries)),
    ])
}

impl Rule {
    /// The device as systemd's DeviceAllow has it; `None` if no driver has that number.
    fn node(&self, drivers: &str) -> Option<String> {
        let kind = if self.kind == Some(BLOCK) {
            "block"
        } else {
            "char"
        };
        Some(match (self.major, self.minor) {
            (Some(major), Some(minor)) => format!("/dev/{kind}/{major}:{minor}"),
            (Some(major), None) => format!("{kind}-{}", driver(drivers, kind, major)?),
            (None, _) => format!("{kind}-*"),
        })
    }

    fn letters(&self) -> String {
        [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')]
            .into_iter()
            .filter(|(right, _)| self.access & right != 0)
            .map(|(_, letter)| letter)
            .collect()
    }
}

/// The name of the driver of a major number in the text of /proc/devices.
fn driver<'a>(drivers: &'a str, kind: &str, major: i32) -> Option<&'a str> {
    let heading = match kind {
        "block" => "Block devices:",
        _ => "Character devices:",
    };
    drivers
        .lines()
        .skip_while(|line| *line != heading)
        .skip(1)
        .take_while(|line| !line.is_empty())
        .find_map(|line| {
            let (number, name) = line.trim().split_once(' ')?;
            (number.parse() == Ok(major)).then_some(name)
        })
}

/// Enforces the rules on a cgroup and all below it.
pub fn apply(cgroup: &Cgroup, spec: &[LinuxDeviceCgroup]) -> Result<()> {
    let mut rules = rules(spec)?;
    rules.extend(DEFAULTS);
    if allows_everything(&rules) {
        return Ok(());
    }
    let doing = || {
        format!(
            "enforce linux.resources.devices on cgroup {} (BPF)",
            cgroup.path.display()
        )
    };
    let program = load(&program(&rules)).doing(doing)?;
    attach(cgroup, &program).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str) -> Vec<Rule> {
        rules(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(json).unwrap()).unwrap()
    }

    /// What the program would decide, computed by running it.
    fn decides(code: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0i64; 6];
        let mut at = 0usize;
        loop {
            let i = code[at];
            let (to, from) = ((i.registers & 15) as usize, (i.registers >> 4) as usize);
            at += 1;
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
                JUMP_UNEQUAL if registers[to] != i64::from(i.immediate) => at += i.offset as usize,
                JUMP_EQUAL if registers[to] == i64::from(i.immediate) => at += i.offset as usize,
                EXIT => return registers[0] == 1,
                _ => {}
            }
        }
    }

    #[test]
    fn the_default_denies_disks_and_allows_null() {
        let mut rules = parsed(r#"[{"allow":false,"access":"rwm"}]"#);
        rules.extend(DEFAULTS);
        assert!(!allows_everything(&rules));
        let code = program(&rules);
        assert!(decides(&code, CHAR, READ | WRITE, 1, 3));
        assert!(decides(&code, CHAR, READ, 136, 7));
        assert!(decides(&code, BLOCK, MKNOD, 8, 0));
        assert!(!decides(&code, BLOCK, READ, 8, 0));
        assert!(!decides(&code, CHAR, READ, 1, 1));
    }

    #[test]
    fn systemd_is_told_what_is_allowed() {
        let told = |json: &str| {
            let [(_, policy), (_, Value::Pairs(allowed))] =
                properties(&serde_json::from_str::<Vec<_>>(json).unwrap()).unwrap()
            else {
                panic!("DeviceAllow is no list of pairs");
            };
            (policy, allowed)
        };
        let entry = |node: &str, access: &str| (node.to_owned(), access.to_owned());
        let (policy, allowed) = told(
            r#"[{"allow":true,"type":"c","major":10,"minor":1,"access":"rw"},
                {"allow":false},
                {"allow":true,"type":"b","major":8,"minor":0,"access":"r"}]"#,
        );
        assert_eq!(policy, Value::Text("strict".to_owned()));
        assert_eq!(
            allowed.get(..3).unwrap(),
            [
                entry("/dev/block/8:0", "r"),
                entry("char-*", "m"),
                entry("block-*", "m")
            ]
        );
        assert!(allowed.contains(&entry("/dev/char/1:3", "rwm")));
        assert_eq!(
            told(r#"[{"allow":true,"type":"a"}]"#).0,
            Value::Text("auto".to_owned())
        );
        let drivers = "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  1 ramdisk\n";
        assert_eq!(driver(drivers, "char", 136), Some("pts"));
        assert_eq!(driver(drivers, "block", 1), Some("ramdisk"));
        assert_eq!(driver(drivers, "block", 136), None);
    }

    #[test]
    fn a_later_rule_overrides_an_earlier_one() {
        let code = program(&parsed(
            r#"[{"allow":true,"type":"a","access":"rwm"},
                {"allow":false,"type":"c","major":10,"minor":200,"access":"w"}]"#,
        ));
        assert!(decides(&code, CHAR, READ, 10, 200));
        assert!(!decides(&code, CHAR, READ | WRITE, 10, 200));
        assert!(decides(&code, BLOCK, READ | WRITE, 8, 1));
        assert!(allows_everything(&parsed(r#"[{"allow":true,"type":"a"}]"#)));
    }
}
