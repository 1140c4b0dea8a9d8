//! The environment of a process (`process.env`). This module checks the variables, and adds the
//! variables that rrun can determine only in the container's root, such as HOME.

use std::collections::BTreeSet;
use std::ffi::CString;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use crate::error::{Error, Result, refuse};
use rrun_kernel::regular_file;

/// The maximum number of bytes that rrun reads from a container's /etc/passwd. The container
/// controls this file, so the file can have any size.
const PASSWD_BYTES_MAX: u64 = 4 << 20;

/// Checks the entries of an environment.
///
/// # Errors
/// Fails if an entry does not have the form `NAME=value`, or if it contains NUL. The error contains
/// the index of the entry in `process.env`.
pub(crate) fn from_spec(env: &[String]) -> Result<Vec<CString>> {
    env.iter()
        .enumerate()
        .map(|(index, entry)| {
            match entry.split_once('=') {
                None => refuse!("process.env[{index}]: {entry:?} has no = sign"),
                Some(("", _)) => {
                    refuse!("process.env[{index}]: {entry:?} has no name before the = sign")
                }
                Some(_) => {}
            }
            CString::new(entry.as_str())
                .map_err(|_| Error::new(format!("process.env[{index}]: {entry:?} contains NUL")))
        })
        .collect()
}

/// Completes an environment. If the environment does not set HOME, this function adds HOME with the
/// value from /etc/passwd in the current root. If /proc is not mounted in the container, rrun
/// cannot open /etc/passwd safely, and sets HOME to /.
///
/// If `listen_fds` is not 0, this function adds LISTEN_FDS and LISTEN_PID, as systemd does for the
/// sockets that it passes to a program. If a variable occurs several times, this function keeps
/// only the last entry. `exec --env` appends entries, but programs use the first entry of a
/// variable.
pub(crate) fn complete(env: &mut Vec<CString>, uid: u32, listen_fds: u32) {
    let has_home = env
        .iter()
        .rfind(|entry| name_of(entry) == b"HOME")
        .is_some_and(|entry| entry.to_bytes() != b"HOME=");
    if !has_home {
        let home = home_of_user(uid).unwrap_or_else(|| "/".to_owned());
        env.extend(CString::new(format!("HOME={home}")).ok());
    }
    if listen_fds > 0 {
        let pid = rustix::process::getpid().as_raw_nonzero();
        env.extend(CString::new(format!("LISTEN_FDS={listen_fds}")).ok());
        env.extend(CString::new(format!("LISTEN_PID={pid}")).ok());
    }
    keep_last(env);
}

fn name_of(entry: &CString) -> &[u8] {
    let bytes = entry.to_bytes();
    let end = bytes.iter().position(|byte| *byte == b'=');
    bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default()
}

fn keep_last(env: &mut Vec<CString>) {
    let mut later = BTreeSet::new();
    let kept: Vec<bool> = env
        .iter()
        .rev()
        .map(|entry| later.insert(name_of(entry)))
        .collect();
    if kept.iter().all(|kept| *kept) {
        return;
    }
    let mut kept = kept.into_iter().rev();
    env.retain(|_| kept.next().unwrap_or(true));
}

fn home_of_user(uid: u32) -> Option<String> {
    use std::io::Read as _;
    // The container controls /etc/passwd, so this path can lead to any type of file.
    // `regular_file::reopen` opens the file only if it is a regular file. `reopen` opens the file
    // through /proc. The container also controls /proc, so `Procfs::open` checks that /proc is a
    // real procfs. Without /proc, `reopen` fails, and HOME becomes `/`.
    let found = rustix::fs::openat2(
        CWD,
        "/etc/passwd",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    )
    .ok()?;
    let file = regular_file::reopen(found, OFlags::RDONLY).ok()?;
    let mut text = Vec::new();
    file.take(PASSWD_BYTES_MAX).read_to_end(&mut text).ok()?;
    home_in_passwd(&String::from_utf8_lossy(&text), uid)
}

pub(crate) fn home_in_passwd(text: &str, uid: u32) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let own = fields.nth(2)?.parse::<u32>().ok()? == uid;
        let home = fields.nth(2)?;
        (own && !home.is_empty() && !home.contains('\0')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(env: &[&str]) -> Vec<String> {
        env.iter().map(|&entry| entry.to_owned()).collect()
    }

    #[test]
    fn home_is_read_from_the_passwd_line_with_the_users_id() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\n";
        assert_eq!(home_in_passwd(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(home_in_passwd(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_in_passwd(passwd, 1).as_deref(), None);
    }

    #[test]
    fn the_last_value_of_a_variable_is_kept() {
        let given = ["A=1", "PATH=/a", "AB=1", "A=2", "HOME=/h", "PATH=/b", "A="];
        let mut env = from_spec(&strings(&given)).unwrap();
        complete(&mut env, 0, 0);
        let texts: Vec<&str> = env.iter().filter_map(|entry| entry.to_str().ok()).collect();
        assert_eq!(texts, ["AB=1", "HOME=/h", "PATH=/b", "A="]);
    }

    #[test]
    fn an_error_names_the_position_of_a_malformed_entry() {
        for entry in ["NAME", "", "=value", "A=\0"] {
            let error = from_spec(&strings(&["A=b", entry])).unwrap_err();
            assert!(error.to_string().contains("process.env[1]"), "{error}");
        }
    }
}
