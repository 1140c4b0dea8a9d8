//! Functions that read information about processes from /proc.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Context, Result};

/// Returns the start time of a process, in clock ticks since the boot, and whether the process is a
/// zombie. Returns `None` if the process does not exist.
pub(crate) fn process_stat(pid: i32) -> Result<Option<(u64, bool)>> {
    let path = format!("/proc/{pid}/stat");
    let mut buffer = [0u8; 1024];
    let read = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::read(&file, &mut buffer));
    match read {
        Ok(length) => Ok(parse_stat(buffer.get(..length).unwrap_or_default())),
        Err(Errno::NOENT | Errno::SRCH) => Ok(None),
        Err(errno) => Err(errno).doing(|| format!("read {path}")),
    }
}

fn parse_stat(stat: &[u8]) -> Option<(u64, bool)> {
    // The second field of /proc/PID/stat is the program's name in parentheses. The name can contain
    // any character, so the last closing parenthesis ends the field.
    let after_name = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = stat
        .get(after_name + 1..)?
        .trim_ascii()
        .split(|byte| *byte == b' ');
    let state = fields.next()?;
    let start_time = std::str::from_utf8(fields.nth(18)?).ok()?.parse().ok()?;
    Some((start_time, matches!(state, b"Z" | b"X" | b"x")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_cannot_forge_other_fields_of_proc_stat() {
        let stat = b"7 (a) Z 1 ) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9\n";
        assert_eq!(parse_stat(stat), Some((4242, false)));
        let own = process_stat(std::process::id() as i32).unwrap().unwrap();
        assert!(own.0 > 0 && !own.1);
        assert_eq!(process_stat(i32::MAX).unwrap(), None);
    }
}
