//! The properties of a process or thread in /proc/PID/stat. See proc_pid_stat(5).

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessStat {
    /// True if the thread has exited. In /proc/PID/stat, this thread is the main thread of the
    /// process. Other threads of the process can still run.
    pub has_exited: bool,
    /// The process id of the parent.
    pub parent: i32,
    /// The session id.
    pub session: i32,
    /// The time at which the process or thread started, in clock ticks after boot.
    pub start_time: u64,
}

impl ProcessStat {
    /// Reads the file at `path`, which is /proc/PID/stat or /proc/PID/task/TID/stat. Returns `None`
    /// if the process or thread does not exist.
    pub fn read(path: &str) -> Result<Option<Self>, Errno> {
        // The file is shorter than this buffer: it contains 52 numbers and a name of at most 64
        // bytes.
        let mut buffer = [0; 1280];
        let read = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::io::read(&file, &mut buffer));
        match read {
            Ok(length) => Ok(ProcessStat::parse(buffer.get(..length).unwrap_or_default())),
            Err(Errno::NOENT | Errno::SRCH) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    fn parse(stat: &[u8]) -> Option<Self> {
        // The second field is the program's name in parentheses. The name can contain any
        // character, so the last closing parenthesis ends the field.
        let name_end = stat.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let has_exited = matches!(fields.next()?, "Z" | "X" | "x");
        Some(ProcessStat {
            has_exited,
            parent: fields.next()?.parse().ok()?,
            session: fields.nth(1)?.parse().ok()?,
            start_time: fields.nth(15)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_cannot_forge_other_fields() {
        let stat = b"7 (a) Z 1 ) S 12 13 14 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9\n";
        let expected = ProcessStat {
            has_exited: false,
            parent: 12,
            session: 14,
            start_time: 4242,
        };
        assert_eq!(ProcessStat::parse(stat), Some(expected));
        assert_eq!(ProcessStat::parse(b"7 (a"), None);
        let own = ProcessStat::read("/proc/self/stat").unwrap().unwrap();
        assert!(own.start_time > 0 && own.parent > 0 && !own.has_exited);
        assert_eq!(ProcessStat::read("/proc/2147483647/stat"), Ok(None));
    }
}
