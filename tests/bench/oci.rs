//! Compares OCI runtimes with each other, and with the minimum time that floor.c needs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};

use crate::bundle::{self, Variant};
use crate::launch::{Launch, Usage};
use crate::report::{self, Table, figure, ratio};
use crate::samples::Samples;
use crate::{Error, Result};

#[derive(clap::Args)]
pub(crate) struct OciOptions {
    /// Number of measurements of each operation with each runtime
    #[arg(long, default_value_t = 100)]
    rounds: usize,
    /// Number of warm-up rounds, whose figures are ignored
    #[arg(long, default_value_t = 3)]
    warm_up: usize,
    /// Names or paths of the runtimes; the table compares each runtime with floor and crun
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "floor,rrun,crun,runc,youki"
    )]
    runtimes: Vec<String>,
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "run,lifecycle,exec"
    )]
    operations: Vec<Operation>,
    /// Configuration of the containers
    #[arg(long, value_enum, default_value = "plain")]
    config: Variant,
    /// Length of the pause after each measurement, in milliseconds; the kernel removes network
    /// namespaces during the pause
    #[arg(long, default_value_t = 10)]
    settle: u64,
    /// Measure without real-time priority; launch.c describes the purpose of this priority
    #[arg(long)]
    no_realtime: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Operation {
    Run,
    Lifecycle,
    Exec,
}

impl Operation {
    fn title(self) -> &'static str {
        match self {
            Operation::Run => {
                "run: a container whose program does nothing, from creation to removal"
            }
            Operation::Lifecycle => "create + start + delete --force of a container that waits",
            Operation::Exec => "exec of a program that does nothing in a running container",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Operation::Run => "run",
            Operation::Lifecycle => "create+start+delete",
            Operation::Exec => "exec",
        }
    }

    /// Returns the names of the commands if the operation consists of several commands.
    fn steps(self) -> &'static [&'static str] {
        match self {
            Operation::Lifecycle => &["create", "start", "delete"],
            Operation::Run | Operation::Exec => &[],
        }
    }
}

struct Runtime {
    name: String,
    program: PathBuf,
}

impl Runtime {
    fn is_floor(&self) -> bool {
        self.name == "floor"
    }
}

/// A directory that is deleted when this value is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Bench<'a> {
    options: &'a OciOptions,
    programs: &'a Path,
    scratch: Scratch,
    /// The bundle of a container that exits immediately.
    once: PathBuf,
    /// The bundle of a container that waits to be killed.
    waits: PathBuf,
    /// The number of containers that were created so far. The number is part of each container's
    /// id.
    count: u64,
    /// The first process and the cgroup of the container that floor's exec enters.
    exec_target: Option<(u64, PathBuf)>,
    /// The measurements that failed, each with the reason.
    skipped: Vec<String>,
}

type Measured = BTreeMap<Operation, BTreeMap<String, Vec<Usage>>>;

pub(crate) fn run(options: &OciOptions, programs: &Path, results: &Path) -> Result {
    let scratch = Scratch(std::env::temp_dir().join(format!("rrun-bench-{}", std::process::id())));
    fs::create_dir_all(&scratch.0)?;
    let nothing = programs.join("nothing");
    let once = bundle::make(&scratch.0.join("once"), &nothing, &[], options.config)?;
    let waits = bundle::make(
        &scratch.0.join("waits"),
        &nothing,
        &["wait"],
        options.config,
    )?;
    let skipped = Vec::new();
    let mut bench = Bench {
        options,
        programs,
        scratch,
        once,
        waits,
        count: 0,
        exec_target: None,
        skipped,
    };
    let runtimes = bench.find_runtimes();
    let mut measured = Measured::new();
    for &operation in &options.operations {
        let usages = bench.measure(operation, &runtimes)?;
        show(results, operation, &usages, options)?;
        measured.insert(operation, usages);
    }
    bench.print_conditions(&runtimes);
    let name = format!("oci-{:?}.json", options.config).to_lowercase();
    report::write_json(&results.join(name), &raw(&measured, &runtimes, &bench))
}

impl Bench<'_> {
    fn find_runtimes(&mut self) -> Vec<Runtime> {
        let mut found = Vec::new();
        for name in &self.options.runtimes {
            let program = match name.as_str() {
                "floor" => Some(self.programs.join("floor")).filter(|path| path.exists()),
                name => find_program(name),
            };
            let short = name.rsplit('/').next().unwrap_or(name);
            match program {
                Some(program) => found.push(Runtime {
                    name: short.to_owned(),
                    program,
                }),
                None => self.skip(short, "the program is not installed"),
            }
        }
        found
    }

    fn skip(&mut self, what: &str, why: &str) {
        println!("SKIPPED: {what}: {why}");
        self.skipped.push(format!("{what}: {why}"));
    }

    /// Measures an operation with all runtimes that support it. The runtimes run alternately. Slow
    /// changes of the machine's speed then affect all runtimes equally. The order is random in each
    /// round, because the previous runtime can influence the figures of the next one.
    fn measure(
        &mut self,
        operation: Operation,
        runtimes: &[Runtime],
    ) -> Result<BTreeMap<String, Vec<Usage>>> {
        let mut participants = Vec::new();
        for runtime in runtimes {
            if runtime.is_floor() && operation == Operation::Lifecycle {
                continue;
            }
            match self.warm_up(operation, runtime) {
                Ok(()) => participants.push(runtime),
                Err(error) => {
                    self.skip(
                        &format!("{} {}", runtime.name, operation.name()),
                        &error.to_string(),
                    );
                    self.clean_up(runtime);
                }
            }
        }
        let mut measured: BTreeMap<String, Vec<Usage>> = BTreeMap::new();
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut outcome = Ok(());
        'rounds: for _ in 0..self.options.rounds {
            random.shuffle(&mut participants);
            for runtime in &participants {
                match self.once(operation, runtime) {
                    Ok(usage) => measured
                        .entry(runtime.name.clone())
                        .or_default()
                        .push(usage),
                    Err(error) => {
                        outcome = Err(error);
                        break 'rounds;
                    }
                }
                sleep(Duration::from_millis(self.options.settle));
            }
        }
        if operation == Operation::Exec {
            for runtime in &participants {
                self.clean_up(runtime);
            }
        }
        outcome.map(|()| measured)
    }

    /// If the operation is an exec, starts the container that the exec enters. Runs the operation a
    /// few times, and ignores the measured times.
    fn warm_up(&mut self, operation: Operation, runtime: &Runtime) -> Result {
        if operation == Operation::Exec {
            self.start_exec_container(runtime)?;
        }
        for _ in 0..self.options.warm_up.max(1) {
            self.once(operation, runtime)?;
        }
        if operation == Operation::Lifecycle {
            // An exit status alone does not prove that the runtime has started a container. For
            // this reason, `start_exec_container` also checks the container's state.
            self.start_exec_container(runtime)?;
            self.clean_up(runtime);
        }
        Ok(())
    }

    fn once(&mut self, operation: Operation, runtime: &Runtime) -> Result<Usage> {
        self.count += 1;
        let id = format!("bench-{}", self.count);
        let commands = match operation {
            Operation::Run if runtime.is_floor() => {
                let cgroup = format!("/sys/fs/cgroup/{id}");
                let rootfs = self.once.join("rootfs");
                vec![command(
                    runtime,
                    &["run", &cgroup, text(&rootfs)?, "/bin/nothing"],
                )]
            }
            Operation::Run => {
                vec![self.command(runtime, &["run", "--bundle", text(&self.once)?, &id])?]
            }
            Operation::Lifecycle => vec![
                self.command(runtime, &["create", "--bundle", text(&self.waits)?, &id])?,
                self.command(runtime, &["start", &id])?,
                self.command(runtime, &["delete", "--force", &id])?,
            ],
            Operation::Exec if runtime.is_floor() => {
                let (pid, cgroup) = self
                    .exec_target
                    .as_ref()
                    .ok_or("no container for exec was started")?;
                vec![command(
                    runtime,
                    &["exec", &pid.to_string(), text(cgroup)?, "/bin/nothing"],
                )]
            }
            Operation::Exec => {
                vec![self.command(runtime, &["exec", &exec_container(runtime), "/bin/nothing"])?]
            }
        };
        let launch = Launch {
            programs: self.programs,
            scratch: &self.scratch.0,
            realtime: !self.options.no_realtime,
        };
        launch.run(
            &commands,
            if operation == Operation::Lifecycle {
                0
            } else {
                NOTHING
            },
        )
    }

    fn command(&self, runtime: &Runtime, args: &[&str]) -> Result<Vec<String>> {
        let root = self.state_root(runtime);
        let mut all = vec!["--root", text(&root)?];
        all.extend(args);
        Ok(command(runtime, &all))
    }

    /// Returns the directory for the runtime's option --root.
    fn state_root(&self, runtime: &Runtime) -> PathBuf {
        PathBuf::from(format!(
            "/run/rrun-bench-{}-{}",
            std::process::id(),
            runtime.name
        ))
    }

    /// Starts the container that exec enters. `launch` is not used here, because it would wait
    /// until the container's processes exit.
    fn start_exec_container(&mut self, runtime: &Runtime) -> Result {
        let host = self.creator_of(runtime).ok_or(
            "neither crun nor runc is installed, and floor needs one of them to create a container",
        )?;
        let id = exec_container(runtime);
        self.output_of(&host, &["create", "--bundle", text(&self.waits)?, &id])?;
        self.output_of(&host, &["start", &id])?;
        let pid = self.running(&host, &id)?;
        if runtime.is_floor() {
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
            let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
            let group = group.ok_or("the container's process is not in a cgroup v2 cgroup")?;
            self.exec_target = Some((pid, Path::new("/sys/fs/cgroup").join(group)));
        }
        Ok(())
    }

    /// Returns the process id of a container's first process. Returns an error unless the container
    /// is running.
    fn running(&self, runtime: &Runtime, id: &str) -> Result<u64> {
        let state: Value = serde_json::from_str(&self.output_of(runtime, &["state", id])?)
            .map_err(|error| {
                format!("the output of the command `state {id}` is not JSON: {error}")
            })?;
        let pid = state.get("pid").and_then(Value::as_u64);
        let status = state.get("status").and_then(Value::as_str);
        let pid = pid.filter(|_| status == Some("running"));
        pid.ok_or_else(|| {
            format!("the container {id} is not running; the output of `state {id}`: {state}").into()
        })
    }

    /// Returns the runtime that creates the container for an exec with `runtime`. Usually `runtime`
    /// itself creates the container. The program floor cannot create a container that keeps
    /// running. For floor, crun or runc creates the container.
    fn creator_of(&self, runtime: &Runtime) -> Option<Runtime> {
        let program = if !runtime.is_floor() {
            runtime.program.clone()
        } else {
            ["crun", "runc"].into_iter().find_map(find_program)?
        };
        Some(Runtime {
            name: runtime.name.clone(),
            program,
        })
    }

    fn output_of(&self, runtime: &Runtime, args: &[&str]) -> Result<String> {
        let stderr = self.scratch.0.join("stderr");
        let line = self.command(runtime, args)?;
        let (program, args) = line.split_first().ok_or("the command is empty")?;
        // The output is written to a file. The container would keep a pipe open, and this program
        // would never reach the end of the output.
        let out = self.scratch.0.join("stdout");
        let status = Command::new(program)
            .args(args)
            .stdin(std::process::Stdio::null())
            .stdout(fs::File::create(&out)?)
            .stderr(fs::File::create(&stderr)?)
            .status()
            .map_err(|error| format!("cannot start {program}: {error}"))?;
        if !status.success() {
            let stderr = fs::read_to_string(&stderr).unwrap_or_default();
            return Err(format!(
                "`{}` failed with {status}; its error output: {}",
                line.join(" "),
                stderr.trim()
            )
            .into());
        }
        Ok(fs::read_to_string(&out)?)
    }

    fn clean_up(&mut self, runtime: &Runtime) {
        if let Some(host) = self.creator_of(runtime) {
            for id in [exec_container(runtime), format!("bench-{}", self.count)] {
                let _ = self.output_of(&host, &["delete", "--force", &id]);
            }
        }
        let _ = fs::remove_dir_all(self.state_root(runtime));
    }

    fn print_conditions(&self, runtimes: &[Runtime]) {
        println!();
        for runtime in runtimes.iter().filter(|runtime| !runtime.is_floor()) {
            println!("  {}", version(runtime));
        }
        println!(
            "  {} rounds, with alternating runtimes; config.json: {}; {}; load {}",
            self.options.rounds,
            match self.options.config {
                Variant::Plain => "from runc spec, without device rules; no seccomp filter",
                Variant::Devices => "from runc spec; no seccomp filter",
                Variant::Userns => "from runc spec, without device rules, in a user namespace",
                Variant::Seccomp =>
                    "from runc spec, without device rules, with a default seccomp profile",
            },
            if self.options.no_realtime {
                "ordinary priority"
            } else {
                "real-time priority"
            },
            fs::read_to_string("/proc/loadavg")
                .unwrap_or_default()
                .trim(),
        );
        println!(
            "  CPU: the CPU time of all processes, without kernel threads; peak: the memory of the runtime's largest process"
        );
        match self.skipped.as_slice() {
            [] => println!("  nothing skipped"),
            skipped => println!(
                "  {} SKIPPED:\n    {}",
                skipped.len(),
                skipped.join("\n    ")
            ),
        }
    }
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        for name in self.options.runtimes.clone() {
            let name = name.rsplit('/').next().unwrap_or(&name).to_owned();
            let runtime = Runtime {
                name,
                program: PathBuf::new(),
            };
            let _ = fs::remove_dir_all(self.state_root(&runtime));
        }
    }
}

/// The exit status of the program `nothing`. If a measured command exits with this status, the
/// program has run.
const NOTHING: i32 = 42;

/// Returns the id of the container that `exec` enters.
fn exec_container(runtime: &Runtime) -> String {
    format!("bench-entered-{}", runtime.name)
}

fn command(runtime: &Runtime, args: &[&str]) -> Vec<String> {
    let mut command = vec![runtime.program.to_string_lossy().into_owned()];
    command.extend(args.iter().map(|&arg| arg.to_owned()));
    command
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| Error::from(format!("the path {} is not valid UTF-8", path.display())))
}

fn find_program(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

fn version(runtime: &Runtime) -> String {
    let output = Command::new(&runtime.program).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let line = text
        .unwrap_or_default()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned();
    let size = fs::metadata(&runtime.program).map_or(0, |file| file.len());
    let line = if line.is_empty() {
        &runtime.name
    } else {
        &line
    };
    format!("{line} ({:.1} MB on disk)", size as f64 / 1048576.0)
}

/// Returns the values of one quantity in all measurements.
fn samples(usages: Option<&Vec<Usage>>, quantity: impl Fn(&Usage) -> f64) -> Samples {
    Samples::new(usages.into_iter().flatten().map(quantity).collect())
}

fn wall(usage: &Usage) -> f64 {
    usage.wall.iter().sum()
}

fn show(
    results: &Path,
    operation: Operation,
    measured: &BTreeMap<String, Vec<Usage>>,
    options: &OciOptions,
) -> Result {
    let mut columns = vec![
        "", "wall ms", "p90", "× floor", "× crun", "CPU ms", "× floor", "× crun", "peak MB",
    ];
    columns.extend(operation.steps());
    let title = match options.config {
        Variant::Plain => operation.title().to_owned(),
        config => format!("{} ({config:?})", operation.title()),
    };
    let mut table = Table::new(&title, &columns);
    let median =
        |name: &str, quantity: fn(&Usage) -> f64| samples(measured.get(name), quantity).median();
    for name in &options.runtimes {
        let name = name.rsplit('/').next().unwrap_or(name);
        let Some(usages) = measured.get(name) else {
            continue;
        };
        let walls = samples(Some(usages), wall);
        let cpu = samples(Some(usages), |usage| usage.cpu).median();
        let mut cells = vec![
            figure(walls.median()),
            figure(walls.quantile(0.9)),
            ratio(walls.median(), median("floor", wall)),
            ratio(walls.median(), median("crun", wall)),
            figure(cpu),
            ratio(cpu, median("floor", |usage| usage.cpu)),
            ratio(cpu, median("crun", |usage| usage.cpu)),
            figure(samples(Some(usages), |usage| usage.peak).median()),
        ];
        for step in 0..operation.steps().len() {
            let of_step = |usage: &Usage| usage.wall.get(step).copied().unwrap_or(f64::NAN);
            cells.push(figure(samples(Some(usages), of_step).median()));
        }
        table.row(name, cells);
    }
    report::show(results, &table)
}

fn raw(measured: &Measured, runtimes: &[Runtime], bench: &Bench) -> Value {
    let of = |usages: &Vec<Usage>| {
        json!({
            "wall_ms": usages.iter().map(|usage| usage.wall.clone()).collect::<Vec<_>>(),
            "cpu_ms": usages.iter().map(|usage| usage.cpu).collect::<Vec<_>>(),
            "peak_mb": usages.iter().map(|usage| usage.peak).collect::<Vec<_>>(),
        })
    };
    let operations: BTreeMap<_, BTreeMap<_, _>> = measured
        .iter()
        .map(|(operation, all)| {
            (
                operation.name(),
                all.iter()
                    .map(|(name, usages)| (name.clone(), of(usages)))
                    .collect(),
            )
        })
        .collect();
    json!({
        "machine": report::machine(),
        "config": format!("{:?}", bench.options.config),
        "runtimes": runtimes.iter().map(version).collect::<Vec<_>>(),
        "operations": operations,
        "skipped": bench.skipped,
    })
}

/// The random generator xorshift. Its start value is constant. Each run of the benchmark therefore
/// uses the same order of runtimes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn shuffle<T>(&mut self, all: &mut [T]) {
        for end in (1..all.len()).rev() {
            let other = usize::try_from(self.next() % (end as u64 + 1)).unwrap_or(0);
            all.swap(end, other);
        }
    }
}
