//! Tests of limits whose effect is hard to observe. Each test needs a second container, a device,
//! or several seconds of measurement.

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
    test!(unlimited_resources_require_no_cgroup_controller, Need::Rrun),
    test!(
        a_container_with_cpu_idle_yields_the_cpu_to_other_containers,
        CPU,
        Need::Controller("cpuset")
    ),
    test!(a_cpu_burst_uses_the_unused_part_of_earlier_quotas, CPU),
    test!(
        a_memory_reservation_protects_the_containers_page_cache,
        MEMORY
    ),
    test!(
        writes_to_a_disk_are_throttled,
        MEMORY,
        Need::Controller("io")
    ),
    test!(
        the_number_of_huge_pages_is_limited,
        MEMORY,
        Need::Controller("hugetlb")
    ),
    test!(pause_stops_all_processes_of_the_container, CPU),
    test!(
        an_update_of_the_swap_limit_alone_keeps_the_memory_limit,
        MEMORY,
        Need::Rrun
    ),
];

fn unlimited_resources_require_no_cgroup_controller() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let unlimited = json!({
        "memory": { "limit": -1, "swap": -1, "reservation": -1 },
        "cpu": { "quota": -1, "period": 100_000, "shares": 1024 },
        "pids": { "limit": -1 }, "blockIO": {}, "unified": { "memory.high": "max" },
    });
    bundle.set("/linux/resources", unlimited.clone());
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
                .stdin(unlimited.to_string())
                .ok()?;
            ensure_eq!(
                bundle.cgroup_file(file)?,
                "max",
                "the content of the cgroup file {file} after `update` removed the limits"
            );
        }
    }
    bundle.end()?;
    Ok(())
}

fn a_container_with_cpu_idle_yields_the_cpu_to_other_containers() -> Result {
    let part = split_of_a_cpu(json!({ "cpu": {} }), json!({ "cpu": { "idle": 1 } }))?;
    note(format!(
        "while a container with cpu.idle ran, another container got {:.1} % of the CPU",
        part * 100.0
    ));
    ensure!(
        part > 0.9,
        "while a container with cpu.idle ran, another container got only {:.1} % of the CPU",
        part * 100.0
    );
    Ok(())
}

fn a_cpu_burst_uses_the_unused_part_of_earlier_quotas() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/resources/cpu",
        json!({ "quota": 50_000, "period": 100_000, "burst": 50_000 }),
    );
    bundle.start()?;
    // The program `spin` uses the CPU without pause. On a busy machine, a single `spin` can get too
    // little CPU time to exceed the quota. Therefore, the test repeats `spin`.
    wait_for("the container to use its CPU burst", || {
        std::thread::sleep(Duration::from_millis(500));
        bundle.exec(&[], &["spin", "0.3"]).ok()?;
        Ok((bundle.cgroup_count("cpu.stat", "nr_bursts")? > 0).then_some(()))
    })?;
    bundle.end()?;
    Ok(())
}

/// A directory whose files are on a disk, and not on a tmpfs. Dropping the value removes the
/// directory.
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

/// Runs two containers that share a memory limit. The second container reads much more data than
/// this limit. Returns the fraction of the first container's page cache that then remains. `memory`
/// is the memory configuration of the first container.
fn remaining_fraction_of_the_page_cache(memory: Value) -> Result<f64> {
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
            Ok(line.ok_or("memory.stat has no line `file`")?.parse()?)
        };
        one.exec(&[], &["read", "/data/own"]).ok()?;
        let before = cached()?;
        ensure!(
            before > 30e6,
            "the page cache contains only {before} bytes of the container's file of 40 MB"
        );
        other.exec(&[], &["read", "/data/others"]).ok()?;
        let kept = cached()? / before;
        one.end()?;
        other.end()?;
        Ok(kept)
    })();
    let _ = fs::remove_dir(parent);
    result
}

fn a_memory_reservation_protects_the_containers_page_cache() -> Result {
    let without = remaining_fraction_of_the_page_cache(json!({}))?;
    let with = remaining_fraction_of_the_page_cache(json!({ "reservation": 64 << 20 }))?;
    note(format!(
        "while another container reads, a container keeps {:.0} % of its page cache \
         with a memory reservation, and {:.0} % without one",
        with * 100.0,
        without * 100.0
    ));
    ensure!(
        with > 0.9,
        "with a memory reservation, the container keeps only {:.0} % of its page cache",
        with * 100.0
    );
    ensure!(
        without < 0.9,
        "the other container caused no memory pressure: without a memory reservation, the container keeps {:.0} % of its page cache",
        without * 100.0
    );
    Ok(())
}

fn writes_to_a_disk_are_throttled() -> Result {
    let disk = OnDisk::new()?;
    let device = std::os::unix::fs::MetadataExt::dev(&fs::metadata(&disk.0)?);
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    ensure!(major != 0, "/var/tmp is not on a block device");
    let mut bundle = Bundle::new(&["fill", "/data/file", "8"])?;
    disk.mount_in(&mut bundle);
    bundle.set(
        "/linux/resources/blockIO",
        json!({ "throttleWriteBpsDevice": [{ "major": major, "minor": minor, "rate": 2 << 20 }] }),
    );
    let started = Instant::now();
    bundle.run()?;
    let took = started.elapsed();
    note(format!(
        "writing 8 MB with a limit of 2 MB/s took {took:.1?}"
    ));
    // At 2 MB/s, the write takes about four seconds. But the kernel writes up to half of the data
    // without a delay, so the test requires only two seconds.
    ensure!(
        took > Duration::from_secs(2),
        "the limit of 2 MB/s has no effect; writing 8 MB took only {took:?}"
    );
    Ok(())
}

/// A reservation of huge pages on the machine. Dropping the value restores the previous number of
/// huge pages.
struct HugePages(String);

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn new(number: &str) -> Result<HugePages> {
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

fn the_number_of_huge_pages_is_limited() -> Result {
    let _pages = HugePages::new("8")?;
    let mut bundle = Bundle::new(&["huge", "2"])?;
    bundle.set(
        "/linux/resources/hugepageLimits",
        json!([{ "pageSize": "2MB", "limit": 4 << 20 }]),
    );
    bundle.run()?.says("2 huge pages")?;
    bundle.args(&["huge", "3"]);
    // The limit allows two huge pages, so the access to the third huge page fails with SIGBUS.
    bundle.call(&["run"])?.exits(128 + 7)?;
    Ok(())
}

fn pause_stops_all_processes_of_the_container() -> Result {
    let bundle = Bundle::new(&["spin", "600"])?;
    bundle.start()?;
    let others = (0..4)
        .map(|_| bundle.exec(&["--detach"], &["spin", "600"]).ok())
        .collect::<Result<Vec<_>>>()?;
    ensure_eq!(
        others.len(),
        4,
        "the number of processes that `exec --detach` started"
    );
    let used = || bundle.cgroup_count("cpu.stat", "usage_usec");
    bundle.runtime(&["pause", bundle.id()]).ok()?;
    ensure_eq!(bundle.status()?, "paused", "the container's status");
    let before = used()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure_eq!(
        used()?,
        before,
        "the total CPU time of the paused container"
    );
    bundle.runtime(&["resume", bundle.id()]).ok()?;
    wait_for("the container to use CPU time after `resume`", || {
        Ok((used()? > before).then_some(()))
    })?;
    bundle.end()?;
    Ok(())
}

fn an_update_of_the_swap_limit_alone_keeps_the_memory_limit() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set("/linux/resources/memory", json!({ "limit": 64 << 20 }));
    bundle.start()?;
    bundle
        .runtime(&["update", "--memory-swap", "96m", bundle.id()])
        .ok()?;
    for (file, value) in [("memory.max", 64 << 20), ("memory.swap.max", 32 << 20)] {
        ensure_eq!(
            bundle.cgroup_file(file)?,
            value.to_string(),
            "the content of the cgroup file {file} after `update --memory-swap 96m`"
        );
    }
    let less = bundle
        .runtime(&["update", "--memory-swap", "32m", bundle.id()])
        .exits(1)?;
    ensure!(
        less.stderr.contains("memory.swap"),
        "the error of `update` does not name memory.swap:\n{}",
        less.told()
    );
    bundle.end()?;
    Ok(())
}
