//! Measures the CPU time and the memory of an idle node, whose pods only answer their probes. The
//! memory does not include the workload and kubelet.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::report::{Table, figure, ratio};
use crate::{Result, cri, memory};

/// The programs whose memory is not counted. The pods and their probes run the first three
/// programs. The memory of kubelet is not counted, because kubelet is the same for all servers.
const WORKLOAD: &[&str] = &["web", "httpd", "true", KUBELET];

const KUBELET: &str = "kubelet";

/// The number of memory measurements. Many measurements are needed, because an exec uses memory
/// only briefly.
const SAMPLES: usize = 20;

#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// The CPU usage of all processes except this program, as a number of CPUs.
    cpu: f64,
    /// The CPU usage of kubelet, as a number of CPUs.
    kubelet: f64,
    /// The average proportional set size of each program, in MB.
    memory: BTreeMap<String, f64>,
}

pub(crate) fn table(pods: usize) -> Table {
    Table::new(
        format!("a node with {pods} probed pods, all Ready"),
        &[
            "",
            "CPU, % of one",
            "× first",
            "kubelet",
            "except kubelet",
            "× first",
            "memory, MB",
            "× first",
            "by program",
        ],
    )
}

/// Measures the node's load for `seconds` seconds.
pub(crate) fn watch(seconds: u64) -> Result<Load> {
    // During this pause, the processes that started the pods exit.
    sleep(Duration::from_secs(5));
    let (began, all, kubelet) = (Instant::now(), cri::cpu_of_others()?, kubelet_ticks()?);
    sleep(Duration::from_secs(seconds));
    let milliseconds = began.elapsed().as_secs_f64() * 1e3;
    let cpu = (cri::cpu_of_others()? - all) / milliseconds;
    // A tick takes ten milliseconds. USER_HZ is 100 on all architectures that rrun supports.
    let kubelet = (kubelet_ticks()? - kubelet) * 10.0 / milliseconds;
    let mut sum = BTreeMap::<String, f64>::new();
    for _ in 0..SAMPLES {
        for (name, kilobytes) in memory::without(WORKLOAD)? {
            *sum.entry(name).or_default() += kilobytes / 1024.0 / SAMPLES as f64;
        }
        sleep(Duration::from_millis(50));
    }
    Ok(Load {
        cpu,
        kubelet,
        memory: sum,
    })
}

/// Returns kubelet's CPU time in ticks, the sum of `utime` and `stime` in proc_pid_stat(5).
fn kubelet_ticks() -> Result<f64> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        let Some((name, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        if name.ends_with(&format!("({KUBELET}")) {
            let fields = rest.split(' ').skip(11).take(2);
            return Ok(fields.filter_map(|field| field.parse::<f64>().ok()).sum());
        }
    }
    Err("kubelet is not running".into())
}

impl Load {
    fn megabytes(&self) -> f64 {
        self.memory.values().sum()
    }

    pub(crate) fn row(&self, table: &mut Table, name: &str, first: &Load) {
        let percent = |cpus: f64| figure(Some(cpus * 100.0));
        let times = |of: fn(&Load) -> f64| ratio(Some(of(self)), Some(of(first)));
        let mut programs: Vec<_> = self.memory.iter().collect();
        programs.sort_by(|one, other| other.1.total_cmp(one.1));
        programs.truncate(5);
        let programs = programs
            .iter()
            .map(|(name, megabytes)| format!("{name} {megabytes:.1}"))
            .collect::<Vec<_>>();
        table.row(
            name,
            [
                percent(self.cpu),
                times(|load| load.cpu),
                percent(self.kubelet),
                percent(self.cpu - self.kubelet),
                times(|load| load.cpu - load.kubelet),
                figure(Some(self.megabytes())),
                times(Load::megabytes),
                programs.join(", "),
            ],
        );
    }

    pub(crate) fn raw(&self) -> Value {
        json!({ "cpus": self.cpu, "kubelet_cpus": self.kubelet, "memory_mb": self.memory })
    }
}
