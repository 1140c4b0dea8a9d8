//! Kernel keys, with which `inside keys …` attacks other containers. See keyctl(2).

use std::ffi::CString;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::errno::Errno;
use nix::libc;

use super::InsideError;

const SESSION_KEYRING: i64 = -3;
const GET_KEYRING_ID: i64 = 0;
const JOIN_SESSION_KEYRING: i64 = 1;
const SETPERM: i64 = 5;
const DESCRIBE: i64 = 6;
const LINK: i64 = 8;
const SEARCH: i64 = 10;
const READ: i64 = 11;
const SESSION_TO_PARENT: i64 = 18;

/// The content of the key that `inside keys hide` creates.
pub(crate) const SECRET: &str = "the secret of the victim";
const NAME: &std::ffi::CStr = c"secret";

pub(crate) fn main(args: &[&str]) -> Result<(), InsideError> {
    match args {
        ["session"] => say(&session()?.to_string()),
        ["hide"] => {
            let key = hide()?;
            say(&format!("{} {key}", session()?))?;
            forever()
        }
        // The process takes the permissions away from its session keyring, except the permission to
        // find it.
        ["restrict"] => {
            let ring = session()?;
            keyctl(SETPERM, [ring, 0x0808_0000, 0, 0])?;
            say(&ring.to_string())?;
            forever()
        }
        // The process creates keys until the kernel refuses another key.
        ["exhaust"] => {
            let refused = (0..).find_map(|number| fill(number).err());
            say(&format!("{refused:?}"))?;
            forever()
        }
        // The process leaves its session keyring for a new one without a name.
        ["leave"] => {
            keyctl(JOIN_SESSION_KEYRING, [0; 4])?;
            say("left")?;
            forever()
        }
        // The process creates a keyring that all processes can use.
        ["occupy", name] => {
            let ring = join(name)?;
            keyctl(SETPERM, [ring, 0x3f3f_3f3f, 0, 0])?;
            say(&ring.to_string())?;
            forever()
        }
        // The process gives its session keyring to its parent. The kernel does so when the parent
        // next returns from a system call.
        ["to-parent"] => {
            let given = keyctl(SESSION_TO_PARENT, [0; 4]);
            say(&format!("{given:?}"))
        }
        // Executes a program in the session keyring `name`.
        ["join", name, program, args @ ..] => {
            join(name)?;
            Err(Command::new(program).args(args).exec().into())
        }
        ["steal", name, ring, key] => steal(name, ring.parse()?, key.parse()?),
        _ => Err("unknown operation".into()),
    }
}

/// Tries to reach the keyring `ring` and the key `key` of another container, in each way in which a
/// process without the possession of a key can try it. Prints a line for each way that succeeds.
fn steal(name: &str, ring: i64, key: i64) -> Result<(), InsideError> {
    let mut text = [0u8; 256];
    let place = text.as_mut_ptr() as i64;
    let length = text.len() as i64;
    let by_number = [
        (
            "describe the keyring",
            keyctl(DESCRIBE, [ring, place, length, 0]),
        ),
        ("read the keyring", keyctl(READ, [ring, place, length, 0])),
        ("find a key in the keyring", search(ring)),
        (
            "link the keyring",
            keyctl(LINK, [ring, SESSION_KEYRING, 0, 0]),
        ),
        ("link the key", keyctl(LINK, [key, SESSION_KEYRING, 0, 0])),
        ("read the key", keyctl(READ, [key, place, length, 0])),
        (
            "open the keyring to all",
            keyctl(SETPERM, [ring, 0x3f3f_3f3f, 0, 0]),
        ),
    ];
    for (way, result) in by_number {
        if result.is_ok() {
            say(way)?;
        }
    }
    if join(name)? == ring {
        say("join the keyring")?;
    }
    say("tried")
}

fn search(ring: i64) -> Result<i64, Errno> {
    keyctl(
        SEARCH,
        [ring, c"user".as_ptr() as i64, NAME.as_ptr() as i64, 0],
    )
}

fn session() -> Result<i64, Errno> {
    keyctl(GET_KEYRING_ID, [SESSION_KEYRING, 0, 0, 0])
}

fn join(name: &str) -> Result<i64, InsideError> {
    let name = CString::new(name)?;
    Ok(keyctl(
        JOIN_SESSION_KEYRING,
        [name.as_ptr() as i64, 0, 0, 0],
    )?)
}

/// Creates a key in the session keyring, and returns its number.
fn hide() -> Result<i64, Errno> {
    // SAFETY: the pointers refer to strings that outlive the call, and the kernel reads only as many
    // bytes as the length of the secret.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            NAME.as_ptr(),
            SECRET.as_ptr(),
            SECRET.len(),
            SESSION_KEYRING,
        )
    })
}

/// Creates a key named `number` with a content of 4 bytes in the session keyring.
fn fill(number: u64) -> Result<i64, Errno> {
    let name = CString::new(number.to_string()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the pointers refer to strings that outlive the call, and the kernel reads only as many
    // bytes as the length of the content.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            name.as_ptr(),
            c"full".as_ptr(),
            4,
            SESSION_KEYRING,
        )
    })
}

fn keyctl(operation: i64, [a, b, c, d]: [i64; 4]) -> Result<i64, Errno> {
    // SAFETY: an argument that is a pointer refers to memory that outlives the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_keyctl, operation, a, b, c, d) })
}

fn say(line: &str) -> Result<(), InsideError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

fn forever() -> Result<(), InsideError> {
    loop {
        std::thread::park();
    }
}
