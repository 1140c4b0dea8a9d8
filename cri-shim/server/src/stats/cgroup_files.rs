//! Converts the files of a cgroup v2 directory, which cgroup-v2.rst describes, to CRI messages.

use std::io::ErrorKind;
use std::path::Path;

use rrun_proto::v1::{CpuUsage, IoUsage, MemoryUsage, PsiData, PsiStats, SwapUsage};

use super::value;
use crate::cgroup::{keyed, number, read};
use crate::clock::now;

/// Returns the CPU usage of a cgroup. The file cpu.stat contains the usage even without the CPU
/// controller.
pub(super) fn cpu(dir: &Path) -> Option<CpuUsage> {
    let stat = read(dir, "cpu.stat")?;
    let used = keyed(&stat, "usage_usec")?;
    Some(CpuUsage {
        timestamp: now(),
        usage_core_nano_seconds: value(used.saturating_mul(1000)),
        usage_nano_cores: None,
        psi: pressure(dir, "cpu.pressure"),
    })
}

/// Returns the memory usage of a cgroup. If the memory controller is not enabled, the result
/// contains only the timestamp, because clients expect a timestamp.
pub(super) fn memory(dir: &Path) -> MemoryUsage {
    let Some(usage) = number(dir, "memory.current") else {
        return MemoryUsage {
            timestamp: now(),
            ..MemoryUsage::default()
        };
    };
    let stat = read(dir, "memory.stat").unwrap_or_default();
    let counted = |name| keyed(&stat, name).unwrap_or_default();
    // The working set is an estimate of the memory that the kernel can't reclaim without disk
    // writes or swapping. cAdvisor defines the working set in the same way.
    let working_set = usage.saturating_sub(counted("inactive_file"));
    let major = counted("pgmajfault");
    MemoryUsage {
        timestamp: now(),
        working_set_bytes: value(working_set),
        available_bytes: number(dir, "memory.max")
            .and_then(|limit| value(limit.saturating_sub(working_set))),
        usage_bytes: value(usage),
        rss_bytes: value(counted("anon")),
        page_faults: value(counted("pgfault").saturating_sub(major)),
        major_page_faults: value(major),
        psi: pressure(dir, "memory.pressure"),
    }
}

pub(super) fn swap(dir: &Path) -> Option<SwapUsage> {
    let usage = number(dir, "memory.swap.current")?;
    Some(SwapUsage {
        timestamp: now(),
        swap_available_bytes: number(dir, "memory.swap.max")
            .and_then(|limit| value(limit.saturating_sub(usage))),
        swap_usage_bytes: value(usage),
    })
}

pub(super) fn io(dir: &Path) -> Option<IoUsage> {
    Some(IoUsage {
        timestamp: now(),
        psi: Some(pressure(dir, "io.pressure")?),
    })
}

/// The maximum number of processes that are listed for one cgroup.
pub(super) const MAX_PROCESSES: usize = 1 << 16;

/// The processes in a cgroup and in its descendants.
pub(super) struct Processes {
    pub ids: Vec<i32>,
    /// False if the cgroup has more descendants or processes than the server lists.
    pub complete: bool,
}

impl Processes {
    /// Lists the processes in at most `limit` cgroups. A container with a writable cgroup can create
    /// any number of cgroups at any depth. This call blocks.
    pub(super) fn of(dir: &Path, limit: usize) -> Self {
        let mut ids = Vec::new();
        let mut complete = true;
        let mut cgroups = vec![dir.to_owned()];
        let mut room = limit.saturating_sub(1);
        while let Some(dir) = cgroups.pop() {
            // The function `read` has a buffer of 16 KiB, and cgroup.procs can be longer.
            match rrun_kernel::cgroup::read_file(&dir.join("cgroup.procs")) {
                Ok(listed) => ids.extend(listed.lines().filter_map(|id| id.parse::<i32>().ok())),
                // The path is too long (ENAMETOOLONG).
                Err(error) if error.kind() == ErrorKind::InvalidFilename => complete = false,
                // A process of the container holds a lease on the file.
                Err(error) if error.kind() == ErrorKind::WouldBlock => complete = false,
                // The cgroup was removed, or its processes are listed in its ancestor (threaded).
                Err(_) => {}
            }
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                if room == 0 {
                    complete = false;
                    break;
                }
                room -= 1;
                cgroups.push(entry.path());
            }
            if ids.len() > MAX_PROCESSES {
                complete = false;
                ids.truncate(MAX_PROCESSES);
                break;
            }
        }
        Processes { ids, complete }
    }

    /// Returns the number of processes in the cgroup `dir`. If some processes were not listed, the
    /// result is the number of threads, which is at least as high. If the node has too few process
    /// ids, kubelet evicts the pods with the highest numbers.
    pub(super) fn count(&self, dir: &Path) -> u64 {
        let listed = u64::try_from(self.ids.len()).unwrap_or(u64::MAX);
        if self.complete {
            return listed;
        }
        listed.max(number(dir, "pids.current").unwrap_or_default())
    }
}

/// Parses a pressure file, which the kernel's psi.rst describes. Returns `None` if the kernel does
/// not provide the file.
pub(super) fn pressure(dir: &Path, file: &str) -> Option<PsiStats> {
    parse_pressure(&read(dir, file)?)
}

fn parse_pressure(text: &str) -> Option<PsiStats> {
    let line = |kind: &str| {
        let line = text.lines().find(|line| line.starts_with(kind))?;
        let mut data = PsiData::default();
        for pair in line.split_ascii_whitespace().skip(1) {
            let (name, number) = pair.split_once('=')?;
            match name {
                "avg10" => data.avg10 = number.parse().ok()?,
                "avg60" => data.avg60 = number.parse().ok()?,
                "avg300" => data.avg300 = number.parse().ok()?,
                // The pressure file contains microseconds, and the CRI message contains
                // nanoseconds.
                "total" => data.total = number.parse::<u64>().ok()?.saturating_mul(1000),
                _ => {}
            }
        }
        Some(data)
    };
    let some = line("some")?;
    Some(PsiStats {
        full: line("full"),
        some: Some(some),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_listed_cgroups_is_limited() -> std::io::Result<()> {
        let name = format!("rrun-cgroups-{}", std::process::id());
        let top = std::env::temp_dir().join(name);
        let deep = top.join("1/2/3/4/5/6");
        std::fs::create_dir_all(&deep)?;
        for dir in deep.ancestors().take(7) {
            std::fs::write(dir.join("cgroup.procs"), "7\n")?;
        }
        std::fs::write(top.join("pids.current"), "40\n")?;
        for (limit, listed, complete, count) in [(7, 7, true, 7), (6, 6, false, 40)] {
            let processes = Processes::of(&top, limit);
            assert_eq!(
                (processes.ids.len(), processes.complete),
                (listed, complete)
            );
            assert_eq!(processes.count(&top), count);
        }
        std::fs::remove_dir_all(&top)
    }

    #[test]
    fn pressure_is_reported_in_nanoseconds() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=12\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=3\n";
        let Some(psi) = parse_pressure(text) else {
            panic!("the pressure file was not parsed");
        };
        assert_eq!(
            psi.some.map(|data| (data.avg10, data.total)),
            Some((1.5, 12_000))
        );
        assert_eq!(psi.full.map(|data| data.total), Some(3_000));
        assert_eq!(parse_pressure(""), None);
    }
}
