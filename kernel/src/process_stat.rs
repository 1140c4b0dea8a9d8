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
    /// The exit status in the form of wait(2), after the process has exited. This field is 0 if the
    /// caller may not trace the process.
    pub exit_code: i32,
}

/// Returns the exit status of a process, in the form of wait(2), if all threads of the process have
/// exited and the process has not been reaped. Returns `None` if the process is alive or does not
/// exist.
///
/// The parent of a process can reap it only if no other process traces it or one of its threads. A
/// pidfd does not report the exit of a process if another process traces one of its exited threads.
pub fn exit_code_of_zombie(pid: i32) -> Option<i32> {
    let read = |path: &str| ProcessStat::read(path).ok().flatten();
    let process = read(&format!("/proc/{pid}/stat")).filter(|stat| stat.has_exited)?;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let path = thread.ok()?.path().join("stat");
        if read(path.to_str()?).is_some_and(|stat| !stat.has_exited) {
            return None;
        }
    }
    Some(process.exit_code)
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
            exit_code: fields.nth(29)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::Pid;

    #[test]
    fn a_program_name_cannot_forge_other_fields() {
        let mut stat =
            b"7 (a) Z 1 ) S 12 13 14 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242".to_vec();
        stat.extend(b" 9".repeat(29));
        stat.extend(b" 256\n");
        let expected = ProcessStat {
            has_exited: false,
            parent: 12,
            session: 14,
            start_time: 4242,
            exit_code: 256,
        };
        assert_eq!(ProcessStat::parse(&stat), Some(expected));
        assert_eq!(ProcessStat::parse(b"7 (a"), None);
        let own = ProcessStat::read("/proc/self/stat").unwrap().unwrap();
        assert!(own.start_time > 0 && own.parent > 0 && !own.has_exited);
        assert_eq!(ProcessStat::read("/proc/2147483647/stat"), Ok(None));
    }

    #[test]
    fn the_exit_status_of_a_zombie_can_be_read() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read line; exit 7"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        assert_eq!(exit_code_of_zombie(pid), None);
        drop(child.stdin.take());
        let zombie =
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        let id = rustix::process::WaitId::Pid(Pid::from_child(&child));
        rustix::process::waitid(id, zombie).unwrap();
        assert_eq!(exit_code_of_zombie(pid), Some(7 << 8));
        child.wait().unwrap();
        assert_eq!(exit_code_of_zombie(pid), None);
    }
}
