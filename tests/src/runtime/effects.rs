//! Limits whose effect shows only beside a neighbour, over time, or on a device.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::cgroup_use::split_of_a_cpu;
use crate::support::machine::{Result, note, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

const CPU: Need = Need::Controller("cpu");
const MEMORY: Need = Need::Controller("memory");

pub(crate) const TESTS: &[Test] = &[
    test!(no_limit_needs_no_controller, Need::Rrun),
    test!(
        an_idle_container_runs_when_nothing_else_does,
        CPU,
        Need::Controller("cpuset")
    ),
    test!(what_was_not_used_of_a_quota_can_be_used_later, CPU),
    test!(a_reservation_keeps_the_page_cache, MEMORY),
    test!(writes_to_a_disk_are_slowed, MEMORY, Need::Controller("io")),
    test!(huge_pages_are_limited, MEMORY, Need::Controller("hugetlb")),
    test!(a_pause_stops_all_that_run, CPU),
    test!(
        a_limit_on_swap_alone_counts_from_the_one_on_memory,
        MEMORY,
        Need::Rrun
    ),
];

fn no_limit_needs_no_controller() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let none = json!({
        "memory": { "limit": -1, "swap": -1, "reservation": -1 },
        "cpu": { "quota": -1, "period": 100_000, "shares": 1024 },
        "pids": { "limit": -1 }, "blockIO": {}, "unified": { "memory.high": "max" },
    });
    bundle.set("/linux/resources", none.clone());
    bundle.start()?;
    for (controller, file) in [("pids", "pids.max"), ("memory", "memory.max")] {
        if Need::Controller(controller).lacking().is_none() {
            bundle
                .runtime(&[
                    "update",
                    "--pids-limit",
                    "7",
                    "--memory",
                    "64m",
                    bundle.id(),
                ])
                .ok()?;
            bundle
                .runtime(&["update", "-r", "-", bundle.id()])
                .stdin(none.to_string())
                .ok()?;
            ensure_eq!(bundle.cgroup_file(file)?, "max", "{file}");
        }
    }
    bundle.end()?;
    Ok(())
}

fn an_idle_container_runs_when_nothing_else_does() -> Result {
    let part = split_of_a_cpu(json!({ "cpu": {} }), json!({ "cpu": { "idle": 1 } }))?;
    note(format!(
        "beside an idle one: {:.1} % of the CPU",
        part * 100.0
    ));
    ensure!(part > 0.9, "it got {:.1} % only", part * 100.0);
    Ok(())
}

fn what_was_not_used_of_a_quota_can_be_used_later() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/resources/cpu",
        json!({ "quota": 50_000, "period": 100_000, "burst": 50_000 }),
    );
    bundle.start()?;
    // A busy machine may not give it enough of a CPU to need more than its quota at once.
    wait_for("what was saved up to be used", || {
        std::thread::sleep(Duration::from_millis(500));
        bundle.exec(&[], &["spin", "0.3"]).ok()?;
        Ok((bundle.cgroup_count("cpu.stat", "nr_bursts")? > 0).then_some(()))
    })?;
    bundle.end()?;
    Ok(())
}

/// A directory on a disk, not in memory.
struct OnDisk(PathBuf);

impl OnDisk {
    fn new() -> Result<OnDisk> {
        let path = nix::unistd::mkdtemp("/var/tmp/rrun-e2e-disk-XXXXXX")?;
        Ok(OnDisk(path))
    }

    fn mount_in(&self, bundle: &mut Bundle) {
        bundle.add(
            "/mounts",
            json!({ "destination": "/data", "source": self.0, "options": ["rbind", "rw"] }),
        );
    }
}

impl Drop for OnDisk {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Which part of a container's page cache is left after its neighbour has read much more than
/// both may have together.
fn kept_beside_a_reader(memory: Value) -> Result<f64> {
    let disk = OnDisk::new()?;
    for (name, megabytes) in [("own", 40u64), ("others", 400)] {
        fs::File::create(disk.0.join(name))?.set_len(megabytes << 20)?;
    }
    let parent = Path::new("/sys/fs/cgroup/e2e-reserved");
    fs::create_dir(parent)?;
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory")?;
    fs::write(parent.join("cgroup.subtree_control"), "+memory")?;
    fs::write(parent.join("memory.max"), (96u64 << 20).to_string())?;
    let result = (|| {
        let make = |name: &str, memory: Value| -> Result<Bundle> {
            let mut bundle = Bundle::new(&["sleep", "600"])?;
            disk.mount_in(&mut bundle);
            bundle.set("/linux/cgroupsPath", json!(format!("/e2e-reserved/{name}")));
            bundle.set("/linux/resources", json!({ "memory": memory }));
            bundle.start()?;
            Ok(bundle)
        };
        let (one, other) = (make("one", memory)?, make("other", json!({}))?);
        let cached = || -> Result<f64> {
            let stat = fs::read_to_string(parent.join("one/memory.stat"))?;
            let line = stat.lines().find_map(|line| line.strip_prefix("file "));
            Ok(line.ok_or("memory.stat has no file")?.parse()?)
        };
        one.exec(&[], &["read", "/data/own"]).ok()?;
        let before = cached()?;
        ensure!(before > 30e6, "only {before} bytes of 40 MB are cached");
        other.exec(&[], &["read", "/data/others"]).ok()?;
        let kept = cached()? / before;
        one.end()?;
        other.end()?;
        Ok(kept)
    })();
    let _ = fs::remove_dir(parent);
    result
}

fn a_reservation_keeps_the_page_cache() -> Result {
    let without = kept_beside_a_reader(json!({}))?;
    let with = kept_beside_a_reader(json!({ "reservation": 64 << 20 }))?;
    note(format!(
        "page cache kept beside a reader: {:.0} % with a reservation, {:.0} % without",
        with * 100.0,
        without * 100.0
    ));
    ensure!(
        with > 0.9,
        "with a reservation, {:.0} % are kept",
        with * 100.0
    );
    ensure!(
        without < 0.9,
        "there was no pressure: {:.0} % are kept",
        without * 100.0
    );
    Ok(())
}

fn writes_to_a_disk_are_slowed() -> Result {
    let disk = OnDisk::new()?;
    let device = std::os::unix::fs::MetadataExt::dev(&fs::metadata(&disk.0)?);
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    ensure!(major != 0, "/var/tmp is on no block device");
    let mut bundle = Bundle::new(&["fill", "/data/file", "8"])?;
    disk.mount_in(&mut bundle);
    bundle.set(
        "/linux/resources/blockIO",
        json!({ "throttleWriteBpsDevice": [{ "major": major, "minor": minor, "rate": 2 << 20 }] }),
    );
    let started = Instant::now();
    bundle.run()?;
    let took = started.elapsed();
    note(format!("8 MB at 2 MB/s took {took:.1?}"));
    // Four seconds; what the kernel lets through at once is less than half of it.
    ensure!(
        took > Duration::from_secs(2),
        "8 MB at 2 MB/s took {took:?}"
    );
    Ok(())
}

/// Gives the machine so many huge pages for as long as it lives.
struct HugePages(String);

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn have(number: &str) -> Result<HugePages> {
        let before = fs::read_to_string(HUGE_PAGES)?;
        fs::write(HUGE_PAGES, number)?;
        Ok(HugePages(before))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HUGE_PAGES, self.0.trim());
    }
}

fn huge_pages_are_limited() -> Result {
    let _pages = HugePages::have("8")?;
    let mut bundle = Bundle::new(&["huge", "2"])?;
    bundle.set(
        "/linux/resources/hugepageLimits",
        json!([{ "pageSize": "2MB", "limit": 4 << 20 }]),
    );
    bundle.run()?.says("2 huge pages")?;
    bundle.args(&["huge", "3"]);
    // SIGBUS: the third is not to be had.
    bundle.call(&["run"])?.exits(128 + 7)?;
    Ok(())
}

fn a_pause_stops_all_that_run() -> Result {
    let bundle = Bundle::new(&["spin", "600"])?;
    bundle.start()?;
    let others = (0..4)
        .map(|_| bundle.exec(&["--detach"], &["spin", "600"]).ok())
        .collect::<Result<Vec<_>>>()?;
    ensure_eq!(others.len(), 4, "others");
    let used = || bundle.cgroup_count("cpu.stat", "usage_usec");
    bundle.runtime(&["pause", bundle.id()]).ok()?;
    ensure_eq!(bundle.status()?, "paused", "status");
    let before = used()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure_eq!(used()?, before, "CPU time of a paused container");
    bundle.runtime(&["resume", bundle.id()]).ok()?;
    wait_for("CPU time after the pause", || {
        Ok((used()? > before).then_some(()))
    })?;
    bundle.end()?;
    Ok(())
}

fn a_limit_on_swap_alone_counts_from_the_one_on_memory() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set("/linux/resources/memory", json!({ "limit": 64 << 20 }));
    bundle.start()?;
    bundle
        .runtime(&["update", "--memory-swap", "96m", bundle.id()])
        .ok()?;
    for (file, value) in [("memory.max", 64 << 20), ("memory.swap.max", 32 << 20)] {
        ensure_eq!(bundle.cgroup_file(file)?, value.to_string(), "{file}");
    }
    let less = bundle
        .runtime(&["update", "--memory-swap", "32m", bundle.id()])
        .exits(1)?;
    ensure!(less.stderr.contains("memory.swap"), "{}", less.told());
    bundle.end()?;
    Ok(())
}
