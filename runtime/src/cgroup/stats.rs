//! The resource usage of a cgroup's processes, in the JSON format of `runc events`. Times are in
//! nanoseconds and sizes in bytes. The value "unlimited" is written as the largest 64-bit number.

use std::cell::Cell;
use std::path::Path;

use rustix::io::Errno;
use serde_json::{Map, Value, json};

use super::directory::{open, read};
use crate::error::{Error, Reason as _, Result};

/// Returns the resource usage that the cgroup's controllers report. The values from a missing
/// controller are zero or absent.
pub(crate) fn stats(path: &Path) -> Result<Value> {
    // `open` returns an error if the cgroup does not exist. The functions below return no error for
    // missing files.
    open(path)?;
    let files = Files {
        path,
        failed: Cell::new(None),
    };
    let stats = json!({
        "cpu": cpu(&files),
        "cpuset": {},
        "memory": memory(&files),
        "pids": pids(&files),
        "blkio": io(&files),
        "hugetlb": hugetlb(&files),
        "rdma": rdma(&files),
        "intel_rdt": {},
        "network_interfaces": null,
    });
    files.failed.take().map_or(Ok(stats), Err)
}

/// The files of a cgroup.
struct Files<'a> {
    path: &'a Path,
    /// The error of the last file that exists but could not be read.
    failed: Cell<Option<Error>>,
}

impl Files<'_> {
    /// Returns the content of a file. Returns `None` if the file cannot be read.
    fn read(&self, name: &str) -> Option<String> {
        self.note(name, read(self.path, name))
    }

    /// Records the error of a file, unless the file does not exist.
    fn note<T>(&self, name: &str, read: std::io::Result<T>) -> Option<T> {
        match read {
            Ok(value) => Some(value),
            Err(error) => {
                // EOPNOTSUPP means that the kernel does not collect these values. If the kernel has no
                // such file, the container can create a cgroup with the same name (EISDIR).
                let missing = matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::NOENT | Errno::NODEV | Errno::OPNOTSUPP | Errno::ISDIR)
                );
                if !missing {
                    let doing = format!("read {name} of cgroup {}", self.path.display());
                    let error = Error::new(error.reason()).while_doing(doing);
                    self.failed.set(Some(error));
                }
                None
            }
        }
    }
}

fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

fn file(files: &Files<'_>, name: &str) -> Option<u64> {
    files.read(name).map(|text| number(&text))
}

/// Reads a cgroup file that consists of lines such as `anon 4096`.
fn table(files: &Files<'_>, name: &str) -> Map<String, Value> {
    entries(&files.read(name).unwrap_or_default())
}

fn entries(text: &str) -> Map<String, Value> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(key, value)| (key.to_owned(), json!(number(value))))
        .collect()
}

fn count(table: &Map<String, Value>, key: &str) -> u64 {
    table.get(key).and_then(Value::as_u64).unwrap_or(0)
}

/// Returns the number of processes in the cgroup that the kernel killed for lack of memory.
pub(crate) fn oom_kills(path: &Path) -> u64 {
    let text = read(path, "memory.events").unwrap_or_default();
    count(&entries(&text), "oom_kill")
}

/// Returns the pressure stall information (PSI) from a cgroup file, or `null` if the file does not
/// exist.
fn pressure(files: &Files<'_>, name: &str) -> Value {
    let Some(text) = files.read(name) else {
        return Value::Null;
    };
    let mut all = Map::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let kind = words.next().unwrap_or_default().to_owned();
        let values = words
            .filter_map(|word| word.split_once('='))
            .map(|(key, value)| {
                let value = match key {
                    "total" => json!(number(value)),
                    _ => json!(value.parse::<f64>().unwrap_or(0.0)),
                };
                (key.to_owned(), value)
            });
        all.insert(kind, Value::Object(values.collect()));
    }
    Value::Object(all)
}

fn with_pressure(mut value: Value, pressure: Value) -> Value {
    if let (Value::Object(all), false) = (&mut value, pressure.is_null()) {
        all.insert("psi".to_owned(), pressure);
    }
    value
}

fn cpu(files: &Files<'_>) -> Value {
    let stat = table(files, "cpu.stat");
    let nanoseconds = |key| count(&stat, key).saturating_mul(1000);
    let stats = json!({
        "usage": {
            "total": nanoseconds("usage_usec"),
            "kernel": nanoseconds("system_usec"),
            "user": nanoseconds("user_usec"),
        },
        "throttling": {
            "periods": count(&stat, "nr_periods"),
            "throttledPeriods": count(&stat, "nr_throttled"),
            "throttledTime": nanoseconds("throttled_usec"),
        },
    });
    with_pressure(stats, pressure(files, "cpu.pressure"))
}

fn memory(files: &Files<'_>) -> Value {
    let stat = table(files, "memory.stat");
    let used = file(files, "memory.current").unwrap_or(0);
    let limit = file(files, "memory.max").unwrap_or(0);
    let failed = count(&table(files, "memory.events"), "max");
    // In runc's format, as in cgroup v1, the swap values are the sum of memory and swap.
    let swap = json!({
        "limit": file(files, "memory.swap.max").map_or(0, |swap| swap.saturating_add(limit)),
        "usage": file(files, "memory.swap.current").map_or(0, |swap| swap.saturating_add(used)),
        "failcnt": count(&table(files, "memory.swap.events"), "fail"),
    });
    let stats = json!({
        "cache": count(&stat, "file"),
        "usage": {
            "limit": limit,
            "usage": used,
            "max": file(files, "memory.peak").unwrap_or(0),
            "failcnt": failed,
        },
        "swap": swap,
        "kernel": { "limit": 0, "usage": count(&stat, "kernel"), "failcnt": 0 },
        "kernelTCP": { "limit": 0, "usage": count(&stat, "sock"), "failcnt": 0 },
        "raw": stat,
    });
    with_pressure(stats, pressure(files, "memory.pressure"))
}

fn pids(files: &Files<'_>) -> Value {
    // Without the pids controller, `current` and `limit` are zero. As with runc, `limit` is also
    // zero if the number of processes is unlimited.
    let number = |name| {
        file(files, name)
            .filter(|number| *number != u64::MAX)
            .unwrap_or(0)
    };
    json!({ "current": number("pids.current"), "limit": number("pids.max") })
}

/// Reads io.stat, which has lines such as `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn io(files: &Files<'_>) -> Value {
    let text = files.read("io.stat").unwrap_or_default();
    let (mut bytes, mut operations) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split(' ');
        let Some((major, minor)) = words.next().and_then(|device| device.split_once(':')) else {
            continue;
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut bytes, "Read"),
                "wbytes" => (&mut bytes, "Write"),
                "dbytes" => (&mut bytes, "Discard"),
                "rios" => (&mut operations, "Read"),
                "wios" => (&mut operations, "Write"),
                "dios" => (&mut operations, "Discard"),
                _ => continue,
            };
            list.push(json!({
                "major": number(major), "minor": number(minor), "op": op, "value": number(value),
            }));
        }
    }
    let mut stats = Map::new();
    for (name, list) in [
        ("ioServiceBytesRecursive", bytes),
        ("ioServicedRecursive", operations),
    ] {
        if !list.is_empty() {
            stats.insert(name.to_owned(), Value::Array(list));
        }
    }
    with_pressure(Value::Object(stats), pressure(files, "io.pressure"))
}

/// Returns the usage of huge pages, with an entry for each page size such as `2MB`.
fn hugetlb(files: &Files<'_>) -> Value {
    let mut stats = Map::new();
    let listed =
        std::fs::read_dir(files.path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    for entry in files
        .note("the list of files", listed)
        .into_iter()
        .flatten()
    {
        let name = entry.file_name();
        let size = name
            .to_str()
            .and_then(|name| name.strip_prefix("hugetlb.")?.strip_suffix(".current"))
            .filter(|size| !size.contains('.'));
        if let Some(size) = size {
            let events = table(files, &format!("hugetlb.{size}.events"));
            let usage = file(files, &format!("hugetlb.{size}.current")).unwrap_or(0);
            stats.insert(
                size.to_owned(),
                json!({ "usage": usage, "failcnt": count(&events, "max") }),
            );
        }
    }
    Value::Object(stats)
}

/// Reads rdma.current and rdma.max, which have lines such as `mlx4_0 hca_handle=2 hca_object=2000`.
fn rdma(files: &Files<'_>) -> Value {
    let mut stats = Map::new();
    for name in ["current", "max"] {
        let text = files.read(&format!("rdma.{name}")).unwrap_or_default();
        let entries: Vec<Value> = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(device, rest)| {
                let mut entry = Map::from_iter([("device".to_owned(), json!(device))]);
                for (key, value) in rest.split(' ').filter_map(|word| word.split_once('=')) {
                    let key = match key {
                        "hca_handle" => "hcaHandles",
                        _ => "hcaObjects",
                    };
                    entry.insert(key.to_owned(), json!(number(value)));
                }
                Value::Object(entry)
            })
            .collect();
        if !entries.is_empty() {
            stats.insert(name.to_owned(), Value::Array(entries));
        }
    }
    Value::Object(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_files_are_converted_to_the_json_of_runc_events() {
        let path = std::env::temp_dir().join(format!("rrun-stats-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        for (name, text) in [
            (
                "cpu.stat",
                "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 7\n",
            ),
            (
                "cpu.pressure",
                "some avg10=0.50 avg60=0.00 avg300=0.00 total=12\n",
            ),
            ("memory.current", "100\n"),
            ("memory.max", "max\n"),
            ("memory.swap.current", "20\n"),
            ("memory.swap.max", "30\n"),
            ("memory.stat", "anon 60\nfile 40\n"),
            ("memory.events", "max 4\noom_kill 1\n"),
            ("pids.current", "2\n"),
            ("pids.max", "max\n"),
            ("io.stat", "8:16 rbytes=1 wbytes=2 rios=3 wios=4\n253:0 \n"),
            ("hugetlb.2MB.current", "4096\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
        ] {
            std::fs::write(path.join(name), text).unwrap();
        }
        let figures = stats(&path).unwrap();
        for (pointer, value) in [
            ("/cpu/usage/total", json!(5000)),
            ("/cpu/throttling/periods", json!(7)),
            ("/cpu/psi/some/avg10", json!(0.5)),
            ("/cpu/psi/some/total", json!(12)),
            ("/memory/cache", json!(40)),
            ("/memory/usage/limit", json!(u64::MAX)),
            ("/memory/usage/failcnt", json!(4)),
            ("/memory/swap/usage", json!(120)),
            ("/memory/raw/anon", json!(60)),
            ("/pids/current", json!(2)),
            ("/pids/limit", json!(0)),
            ("/blkio/ioServiceBytesRecursive/1/value", json!(2)),
            ("/blkio/ioServicedRecursive/0/major", json!(8)),
            (
                "/hugetlb",
                json!({ "2MB": { "usage": 4096, "failcnt": 0 } }),
            ),
            ("/network_interfaces", Value::Null),
        ] {
            assert_eq!(figures.pointer(pointer), Some(&value), "{pointer}");
        }
        assert_eq!(oom_kills(&path), 1);
        std::fs::remove_dir_all(&path).unwrap();
        assert!(stats(&path).is_err());
    }
}
