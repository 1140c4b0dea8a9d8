//! The names and numbers of system calls on all architectures that an x86-64 or arm64 kernel
//! supports, for example i386 and 32-bit Arm.
//!
//! `syscalls.tbl` is the readable source of the numbers. The Rust compiler converts this file to a
//! table without pointers. Pointers in the table would have to be relocated whenever rrun starts.
//! They would delay the start of every container, even without seccomp.

use super::architecture::Architecture;

const TEXT: &[u8] = include_bytes!("syscalls.tbl");
const COLUMNS: usize = 5;
const ABSENT: u16 = u16::MAX;
/// The number at which Arm's private calls start in the table. The kernel numbers these calls from
/// 0x0f0000 (`__ARM_NR_BASE`), but that number does not fit into the 16 bits of a table entry.
const PRIVATE: u16 = 0xf000;
pub(crate) const ARM_PRIVATE: u32 = 0x0f_0000;
/// The bit that marks the number of an x32 call (`__X32_SYSCALL_BIT`).
pub(crate) const X32_BIT: u32 = 0x4000_0000;

/// A system call, represented by the index of the call's row in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Syscall(u16);

const fn starts_a_line(at: usize) -> bool {
    let first = TEXT[at];
    (at == 0 || TEXT[at - 1] == b'\n') && first != b'#' && first != b'\n'
}

/// Returns the number of system calls in the table, and the total length of their names in bytes.
const fn extent() -> (usize, usize) {
    let (mut count, mut bytes, mut at) = (0, 0, 0);
    while at < TEXT.len() {
        if starts_a_line(at) {
            count += 1;
            while TEXT[at] != b' ' {
                bytes += 1;
                at += 1;
            }
        }
        at += 1;
    }
    (count, bytes)
}

const COUNT: usize = extent().0;
const BYTES: usize = extent().1;

struct Table {
    names: [u8; BYTES],
    /// The offset at which each name starts in `names`, and the offset at which the last name ends.
    starts: [u16; COUNT + 1],
    numbers: [[u16; COLUMNS]; COUNT],
}

const fn parse() -> Table {
    let mut table = Table {
        names: [0; BYTES],
        starts: [0; COUNT + 1],
        numbers: [[ABSENT; COLUMNS]; COUNT],
    };
    let (mut row, mut byte, mut at) = (0, 0, 0);
    while at < TEXT.len() {
        if !starts_a_line(at) {
            at += 1;
            continue;
        }
        table.starts[row] = byte as u16;
        while TEXT[at] != b' ' {
            table.names[byte] = TEXT[at];
            byte += 1;
            at += 1;
        }
        let mut column = 0;
        while column < COLUMNS {
            at += 1;
            if TEXT[at] == b'-' {
                at += 1;
            } else {
                let mut number = 0u32;
                while TEXT[at].is_ascii_digit() {
                    number = number * 10 + (TEXT[at] - b'0') as u32;
                    at += 1;
                }
                table.numbers[row][column] = if number >= ARM_PRIVATE {
                    PRIVATE + (number - ARM_PRIVATE) as u16
                } else {
                    number as u16
                };
            }
            column += 1;
        }
        row += 1;
    }
    table.starts[COUNT] = BYTES as u16;
    table
}

static TABLE: Table = parse();

fn name_at(row: usize) -> &'static [u8] {
    match (TABLE.starts.get(row), TABLE.starts.get(row + 1)) {
        (Some(start), Some(end)) => TABLE
            .names
            .get(usize::from(*start)..usize::from(*end))
            .unwrap_or_default(),
        _ => &[],
    }
}

impl Syscall {
    /// Returns the system call with this name, if the call exists on at least one of the
    /// architectures.
    pub(crate) fn by_name(name: &str) -> Option<Syscall> {
        let (mut low, mut high) = (0, COUNT);
        while low < high {
            let middle = low.midpoint(high);
            match name_at(middle).cmp(name.as_bytes()) {
                std::cmp::Ordering::Equal => return u16::try_from(middle).ok().map(Syscall),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    pub(crate) fn name(self) -> &'static str {
        std::str::from_utf8(name_at(usize::from(self.0))).unwrap_or_default()
    }

    /// Returns the number of the call on an architecture, or `None` if the call does not exist on
    /// that architecture.
    pub(crate) fn number(self, architecture: Architecture) -> Option<u32> {
        let column = match architecture {
            Architecture::X86_64 => 0,
            Architecture::X32 => 1,
            Architecture::X86 => 2,
            Architecture::Aarch64 => 3,
            Architecture::Arm => 4,
        };
        let number = *TABLE.numbers.get(usize::from(self.0))?.get(column)?;
        match (architecture, number) {
            (_, ABSENT) => None,
            (Architecture::X32, number) => Some(u32::from(number) | X32_BIT),
            (_, number) if number >= PRIVATE => Some(u32::from(number - PRIVATE) + ARM_PRIVATE),
            (_, number) => Some(u32::from(number)),
        }
    }
}

/// Returns the multiplexing call, socketcall(2) or ipc(2), through which a 32-bit x86 program can
/// make the call `name`. Also returns the number that the program passes as the first argument of
/// the multiplexing call to select `name`. See linux/net.h and linux/ipc.h.
pub(crate) fn multiplexed(name: &str) -> Option<(&'static str, u32)> {
    const SOCKETCALL: [&str; 20] = [
        "socket",
        "bind",
        "connect",
        "listen",
        "accept",
        "getsockname",
        "getpeername",
        "socketpair",
        "send",
        "recv",
        "sendto",
        "recvfrom",
        "shutdown",
        "setsockopt",
        "getsockopt",
        "sendmsg",
        "recvmsg",
        "accept4",
        "recvmmsg",
        "sendmmsg",
    ];
    const IPC: [(&str, u32); 12] = [
        ("semop", 1),
        ("semget", 2),
        ("semctl", 3),
        ("semtimedop", 4),
        ("msgsnd", 11),
        ("msgrcv", 12),
        ("msgget", 13),
        ("msgctl", 14),
        ("shmat", 21),
        ("shmdt", 22),
        ("shmget", 23),
        ("shmctl", 24),
    ];
    if let Some(at) = SOCKETCALL.iter().position(|call| *call == name) {
        return Some(("socketcall", at as u32 + 1));
    }
    let (_, call) = IPC.iter().find(|(call, _)| *call == name)?;
    Some(("ipc", *call))
}

/// Returns the names of all calls that have this number on an architecture.
#[cfg(test)]
pub(crate) fn names_of(architecture: Architecture, number: u32) -> Vec<&'static str> {
    (0..COUNT as u16)
        .map(Syscall)
        .filter(|syscall| syscall.number(architecture) == Some(number))
        .map(Syscall::name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_found_and_the_names_are_in_order() {
        for row in 0..COUNT {
            assert!(row == 0 || name_at(row - 1) < name_at(row));
            let name = std::str::from_utf8(name_at(row)).unwrap();
            let found = Syscall::by_name(name).unwrap();
            assert_eq!((usize::from(found.0), found.name()), (row, name));
        }
        for name in ["", "zz", "reads", "READ", "a"] {
            assert_eq!(Syscall::by_name(name), None, "{name}");
        }
    }

    #[test]
    fn the_numbers_are_equal_to_the_kernels_numbers() {
        use Architecture::{Aarch64, Arm, X32, X86, X86_64};
        for (name, architecture, number) in [
            ("read", X86_64, Some(0)),
            ("read", X86, Some(3)),
            ("read", Aarch64, Some(63)),
            ("write", X32, Some(X32_BIT | 1)),
            ("ioctl", X32, Some(X32_BIT | 514)),
            ("open", Aarch64, None),
            ("set_tls", Arm, Some(0xf_0005)),
            ("socketcall", X86, Some(102)),
            ("socketcall", X86_64, None),
            ("openat2", Arm, Some(437)),
        ] {
            let syscall = Syscall::by_name(name).unwrap();
            assert_eq!(syscall.number(architecture), number, "{name}");
        }
        #[cfg(target_arch = "x86_64")]
        let native = X86_64;
        #[cfg(target_arch = "aarch64")]
        let native = Aarch64;
        for (name, number) in [
            ("execve", libc::SYS_execve),
            ("seccomp", libc::SYS_seccomp),
            ("clone3", libc::SYS_clone3),
            ("mount_setattr", libc::SYS_mount_setattr),
        ] {
            let syscall = Syscall::by_name(name).unwrap();
            assert_eq!(syscall.number(native).map(i64::from), Some(number));
        }
    }

    #[test]
    fn multiplexed_calls_have_the_right_numbers() {
        assert_eq!(multiplexed("sendmmsg"), Some(("socketcall", 20)));
        assert_eq!(multiplexed("shmctl"), Some(("ipc", 24)));
        assert_eq!(multiplexed("read"), None);
    }
}
