//! The resource usage of a cgroup's processes, in the JSON format of `runc events`. Times are in
//! nanoseconds and sizes in bytes. The value "unlimited" is written as the largest 64-bit number.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::directory::{open, read};
use crate::error::Result;

/// Returns the resource usage that the cgroup's controllers report. The values from a missing
/// controller are zero or absent.
pub(crate) fn stats(path: &Path) -> Result<Value> {
    // `open` returns an error if the cgroup does not exist. The functions below return no error for
    // missing files.
    open(path)?;
    Ok(json!({
        "cpu": cpu(path),
        "cpuset": {},
        "memory": memory(path),
        "pids": pids(path),
        "blkio": io(path),
        "hugetlb": hugetlb(path),
        "rdma": rdma(path),
        "intel_rdt": {},
        "network_interfaces": null,
    }))
}

fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

fn file(path: &Path, name: &str) -> Option<u64> {
    read(path, name).ok().map(|text| number(&text))
}

/// Reads a cgroup file that consists of lines such as `anon 4096`.
fn table(path: &Path, name: &str) -> Map<String, Value> {
    let text = read(path, name).unwrap_or_default();
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
    count(&table(path, "memory.events"), "oom_kill")
}

/// Returns the pressure stall information (PSI) from a cgroup file, or `null` if the file does not
/// exist.
fn pressure(path: &Path, name: &str) -> Value {
    let Ok(text) = read(path, name) else {
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

fn cpu(path: &Path) -> Value {
    let stat = table(path, "cpu.stat");
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
    with_pressure(stats, pressure(path, "cpu.pressure"))
}

fn memory(path: &Path) -> Value {
    let stat = table(path, "memory.stat");
    let used = file(path, "memory.current").unwrap_or(0);
    let limit = file(path, "memory.max").unwrap_or(0);
    let failed = count(&table(path, "memory.events"), "max");
    // In runc's format, as in cgroup v1, the swap values are the sum of memory and swap.
    let swap = json!({
        "limit": file(path, "memory.swap.max").map_or(0, |swap| swap.saturating_add(limit)),
        "usage": file(path, "memory.swap.current").map_or(0, |swap| swap.saturating_add(used)),
        "failcnt": count(&table(path, "memory.swap.events"), "fail"),
    });
    let stats = json!({
        "cache": count(&stat, "file"),
        "usage": {
            "limit": limit,
            "usage": used,
            "max": file(path, "memory.peak").unwrap_or(0),
            "failcnt": failed,
        },
        "swap": swap,
        "kernel": { "limit": 0, "usage": count(&stat, "kernel"), "failcnt": 0 },
        "kernelTCP": { "limit": 0, "usage": count(&stat, "sock"), "failcnt": 0 },
        "raw": stat,
    });
    with_pressure(stats, pressure(path, "memory.pressure"))
}

fn pids(path: &Path) -> Value {
    // Without the pids controller, `current` and `limit` are zero. As with runc, `limit` is also
    // zero if the number of processes is unlimited.
    let pids = libcgroups::stats::pid_stats(path).unwrap_or_default();
    json!({ "current": pids.current, "limit": pids.limit })
}

/// Reads io.stat, which has lines such as `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn io(path: &Path) -> Value {
    let text = read(path, "io.stat").unwrap_or_default();
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
    with_pressure(Value::Object(stats), pressure(path, "io.pressure"))
}

/// Returns the usage of huge pages, with an entry for each page size such as `2MB`.
fn hugetlb(path: &Path) -> Value {
    let mut stats = Map::new();
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let size = name
            .to_str()
            .and_then(|name| name.strip_prefix("hugetlb.")?.strip_suffix(".current"))
            .filter(|size| !size.contains('.'));
        if let Some(size) = size {
            let events = table(path, &format!("hugetlb.{size}.events"));
            let usage = file(path, &format!("hugetlb.{size}.current")).unwrap_or(0);
            stats.insert(
                size.to_owned(),
                json!({ "usage": usage, "failcnt": count(&events, "max") }),
            );
        }
    }
    Value::Object(stats)
}

/// Reads rdma.current and rdma.max, which have lines such as `mlx4_0 hca_handle=2 hca_object=2000`.
fn rdma(path: &Path) -> Value {
    let mut stats = Map::new();
    for name in ["current", "max"] {
        let text = read(path, &format!("rdma.{name}")).unwrap_or_default();
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
