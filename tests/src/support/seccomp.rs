//! Containers with a system call filter, and a program that makes as few system calls as possible.

use nix::libc;
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::Result;
use crate::support::needs::Need;

/// A kernel for x86-64 that also supports 32-bit system calls. To check this, a shell runs the
/// command below. The parent of the shell is the test program, so the command executes the test
/// program again. Because RRUN_E2E_INSIDE is set, the test program acts as the program `inside`.
pub(crate) const CALLS_32: Need = Need::Works(
    "32-bit system calls",
    "RRUN_E2E_INSIDE=1 exec /proc/$PPID/exe call32 20",
);

/// Returns a bundle with the seccomp profile `profile`.
pub(crate) fn filtered(profile: Value, args: &[&str]) -> Result<Bundle> {
    let mut bundle = Bundle::new(args)?;
    bundle.set("/linux/seccomp", profile);
    Ok(bundle)
}

/// Returns a profile that allows all system calls without a rule in `rules`.
pub(crate) fn but(rules: Value) -> Value {
    json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules })
}

/// Returns a profile with the action `action` for getpgid(2). While a container starts, neither
/// `inside` nor runc calls getpgid(2), so only the test's own call triggers the action.
pub(crate) fn for_getpgid(action: &str) -> Value {
    but(json!([{ "names": ["getpgid"], "action": action }]))
}

/// Returns the system call number of getpgid(2).
pub(crate) fn getpgid() -> String {
    libc::SYS_getpgid.to_string()
}

/// The system calls that rrun needs to run [`LEAST_PROGRAM`]. A filter must allow these calls. rrun
/// starts the program with execve(2). The program exits with exit_group(2) or waits with ppoll(2).
/// For crun, a filter must also allow close(2) and close_range(2), and for runc it must allow many
/// more calls.
pub(crate) const LEAST: [&str; 3] = ["execve", "exit_group", "ppoll"];

/// The path of a small test program. The number of words in `process.args` selects what the program
/// does. With one word, the program exits with 0. With two words, the program exits with 7. With
/// more words, the program waits.
pub(crate) const LEAST_PROGRAM: &str = "/bin/least";

/// Returns the content of [`LEAST_PROGRAM`]: a 64-bit ELF file for this machine's architecture. The
/// program makes only the system calls in [`LEAST`].
pub(crate) fn least_program() -> Vec<u8> {
    #[cfg(target_arch = "x86_64")]
    const CODE: &[u8] = &[
        0x48, 0x8b, 0x04, 0x24, // mov (%rsp), %rax: load the number of words
        0x48, 0x83, 0xf8, 0x02, // cmp $2, %rax
        0x77, 0x0d, // ja to the wait
        0x6b, 0xf8, 0x07, // imul $7, %eax, %edi
        0x83, 0xef, 0x07, // sub $7, %edi
        0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05, // exit_group
        0x31, 0xff, 0x31, 0xf6, 0x31, 0xd2, 0x45, 0x31, 0xd2, // set four arguments to 0
        0xb8, 0x0f, 1, 0, 0, 0x0f, 0x05, // ppoll
        0xeb, 0xee, // jmp back to the arguments
    ];
    #[cfg(target_arch = "aarch64")]
    const CODE: &[u8] = &[
        0xe0, 0x03, 0x40, 0xf9, // ldr x0, [sp]: load the number of words
        0x1f, 0x08, 0x00, 0xf1, // cmp x0, #2
        0xc8, 0x00, 0x00, 0x54, // b.hi to the wait
        0x00, 0x04, 0x00, 0xd1, // sub x0, x0, #1
        0xe1, 0x00, 0x80, 0xd2, // mov x1, #7
        0x00, 0x7c, 0x01, 0x9b, // mul x0, x0, x1
        0xc8, 0x0b, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4, // exit_group
        0x00, 0x00, 0x80, 0xd2, 0x01, 0x00, 0x80, 0xd2, // x0, x1 = 0
        0x02, 0x00, 0x80, 0xd2, 0x03, 0x00, 0x80, 0xd2, // x2, x3 = 0
        0x28, 0x09, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4, // ppoll
        0xfa, 0xff, 0xff, 0x17, // b back to the arguments
    ];
    const MACHINE: u16 = if cfg!(target_arch = "x86_64") {
        62
    } else {
        183
    };
    const HEADERS: u64 = 64 + 56;
    const ADDRESS: u64 = 0x40_0000;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // The ELF header (elf(5)) contains the type ET_EXEC and the entry point. One program header
    // follows directly after the ELF header.
    file.extend([2u16, MACHINE].iter().flat_map(|it| it.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend(
        [ADDRESS + HEADERS, 64, 0]
            .iter()
            .flat_map(|it| it.to_le_bytes()),
    );
    file.extend(0u32.to_le_bytes());
    file.extend(
        [64u16, 56, 1, 0, 0, 0]
            .iter()
            .flat_map(|it| it.to_le_bytes()),
    );
    // The program header describes one PT_LOAD segment, which is readable and executable and
    // contains the whole file.
    let size = HEADERS + CODE.len() as u64;
    file.extend([1u32, 5].iter().flat_map(|it| it.to_le_bytes()));
    let load = [0, ADDRESS, ADDRESS, size, size, 0x1000];
    file.extend(load.iter().flat_map(|it| it.to_le_bytes()));
    file.extend(CODE);
    file
}

/// Returns a profile that allows only the system calls in [`LEAST`]. The action for all other
/// system calls is `default`.
pub(crate) fn least(default: &str) -> Value {
    json!({
        "defaultAction": default,
        "syscalls": [{ "names": LEAST, "action": "SCMP_ACT_ALLOW" }],
    })
}

/// Returns a bundle whose container runs [`LEAST_PROGRAM`]. `process.args` contains `words` words.
/// The root file system also contains two files that execve(2) refuses: a script with a missing
/// interpreter, and a text file.
pub(crate) fn with_least_program(profile: Value, words: usize) -> Result<Bundle> {
    let mut bundle = filtered(profile, &[])?;
    for (name, content) in [
        (LEAST_PROGRAM, least_program()),
        ("/bin/script", b"#!/bin/missing\n".to_vec()),
        ("/bin/text", b"neither program nor script\n".to_vec()),
    ] {
        let path = bundle.rootfs().join(name.trim_start_matches('/'));
        std::fs::write(&path, content)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, mode)?;
    }
    bundle.set("/process/args", json!(vec![LEAST_PROGRAM; words]));
    Ok(bundle)
}

/// Two seccomp actions that prevent a system call. With the first action the system call fails, and
/// with the second action the kernel kills the process.
pub(crate) const REFUSING: [&str; 2] = ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"];
