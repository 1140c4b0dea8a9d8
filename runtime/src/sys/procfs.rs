//! Functions that read information about processes from /proc.

use rrun_kernel::process_stat::ProcessStat;

use crate::error::{Context, Result};

/// Returns the properties of a process, or `None` if the process does not exist.
pub(crate) fn process_stat(pid: i32) -> Result<Option<ProcessStat>> {
    let path = format!("/proc/{pid}/stat");
    ProcessStat::read(&path).doing(|| format!("read {path}"))
}

/// Returns the properties of a thread of the process, or `None` if the process has no such thread.
pub(crate) fn thread_stat(pid: i32, thread: i32) -> Result<Option<ProcessStat>> {
    let path = format!("/proc/{pid}/task/{thread}/stat");
    ProcessStat::read(&path).doing(|| format!("read {path}"))
}

/// Returns the id of a thread of the process that has not exited. Returns `None` if the process has
/// no such thread.
pub(crate) fn running_thread(pid: i32) -> Result<Option<i32>> {
    let path = format!("/proc/{pid}/task");
    let entries = match std::fs::read_dir(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        entries => entries.doing(|| format!("read {path}"))?,
    };
    for entry in entries {
        // The read fails if the process no longer exists.
        let Ok(entry) = entry else { return Ok(None) };
        let name = entry.file_name();
        if let Some(thread) = name.to_str().and_then(|name| name.parse().ok())
            && thread_stat(pid, thread)?.is_some_and(|stat| !stat.has_exited)
        {
            return Ok(Some(thread));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_exists_has_a_running_thread() {
        let own = std::process::id() as i32;
        assert!(running_thread(own).unwrap().is_some());
        assert_eq!(running_thread(i32::MAX).unwrap(), None);
        assert_eq!(process_stat(i32::MAX).unwrap(), None);
    }
}
