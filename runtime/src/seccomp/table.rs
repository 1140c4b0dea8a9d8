//! Names of system calls and their numbers, for every architecture whose programs an x86-64
//! or an arm64 kernel runs.
//!
//! `syscalls.tbl` is for people; what the program carries is made of it at compile time,
//! without pointers, so that a container without seccomp does not pay for them at start.

use super::architecture::Architecture;

const TEXT: &[u8] = include_bytes!("syscalls.tbl");
const COLUMNS: usize = 5;
const ABSENT: u16 = u16::MAX;
/// Arm's private calls start at 0x0f0000 (`__ARM_NR_BASE`); they are kept from here on.
const PRIVATE: u16 = 0xf000;
pub(crate) const ARM_PRIVATE: u32 = 0x0f_0000;
/// Marks the number of an x32 call (`__X32_SYSCALL_BIT`).
pub(crate) const X32_BIT: u32 = 0x4000_0000;

/// A system call's place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Syscall(u16);

const fn starts_a_line(at: usize) -> bool {
    let first = TEXT[at];
    (at == 0 || TEXT[at - 1] == b'\n') && first != b'#' && first != b'\n'
}

/// How many calls there are, and how many bytes their names have together.
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
    /// Where each name starts, and where the last one ends.
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
    /// The call of that name on any of the architectures.
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

    /// Its number where a program of that architecture calls the kernel.
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

/// On 32-bit x86, the calls that socketcall(2) and ipc(2) can stand for, each by the name of
/// the one it comes through and the value of its first argument (linux/net.h, linux/ipc.h).
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

/// Every name of a number.
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
    fn numbers_are_the_kernels() {
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
    fn what_is_multiplexed_is_in_the_table() {
        assert_eq!(multiplexed("sendmmsg"), Some(("socketcall", 20)));
        assert_eq!(multiplexed("shmctl"), Some(("ipc", 24)));
        assert_eq!(multiplexed("read"), None);
    }
}
