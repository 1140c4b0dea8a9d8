//! The processes in the cgroup of this process.

use std::path::Path;

/// Returns the ids of the processes that are in the same cgroup as this process. Monitors and CNI
/// plugins run in the server's cgroup, but containers do not.
///
/// A container can make a read of its command line or environment in /proc hang. The container only
/// needs to put this memory into a mapped file of a file system that does not respond. The server
/// must therefore read these files only for the processes that this function returns.
pub fn processes() -> Vec<i32> {
    // The kernel's files: opening them by path is safe.
    let cgroup = |process: &Path| std::fs::read(process.join("cgroup")).ok();
    let Some(own) = cgroup(Path::new("/proc/self")) else {
        return Vec::new();
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((entry.path(), entry.file_name().to_str()?.parse().ok()?)))
        .filter(|(process, _)| cgroup(process).as_ref() == Some(&own))
        .map(|(_, pid)| pid)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_in_its_own_cgroup() {
        let pid = std::process::id();
        assert!(
            processes()
                .into_iter()
                .any(|other| other.cast_unsigned() == pid)
        );
    }
}
