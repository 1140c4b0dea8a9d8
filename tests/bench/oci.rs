//! OCI runtimes side by side, and the floor below them.

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
    /// How often each is measured
    #[arg(long, default_value_t = 100)]
    rounds: usize,
    /// Rounds before these that do not count
    #[arg(long, default_value_t = 3)]
    warm_up: usize,
    /// Runtimes by name or path; the first is the one that others are compared with after floor
    /// and crun
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
    /// What the containers are made of
    #[arg(long, value_enum, default_value = "plain")]
    config: Variant,
    /// Pause after each measurement, for what the kernel still has to do (milliseconds): it takes
    /// network namespaces down on its own time
    #[arg(long, default_value_t = 10)]
    settle: u64,
    /// Measure without real-time priority (launch.c says what it is for)
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
            Operation::Run => "run: a container that does nothing, from its making to its end",
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

    /// The commands, where they are more than one.
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

/// A directory that goes at the end.
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
    /// The bundle of a container that ends at once, and of one that waits.
    once: PathBuf,
    waits: PathBuf,
    /// Counts containers: each gets an id of its own.
    count: u64,
    /// The container that floor's exec enters: its first process and its cgroup.
    entered: Option<(u64, PathBuf)>,
    /// What could not be measured and why.
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
        entered: None,
        skipped,
    };
    let runtimes = bench.find_runtimes();
    let mut measured = Measured::new();
    for &operation in &options.operations {
        let of_all = bench.measure(operation, &runtimes)?;
        show(results, operation, &of_all, options)?;
        measured.insert(operation, of_all);
    }
    bench.tell_conditions(&runtimes);
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
                None => self.skip(short, "is not here"),
            }
        }
        found
    }

    fn skip(&mut self, what: &str, why: &str) {
        println!("SKIPPED: {what}: {why}");
        self.skipped.push(format!("{what}: {why}"));
    }

    /// Measures an operation with all runtimes that can do it, in turns and in another order each
    /// time: what drifts hits all alike, and none always follows the same other.
    fn measure(
        &mut self,
        operation: Operation,
        runtimes: &[Runtime],
    ) -> Result<BTreeMap<String, Vec<Usage>>> {
        let mut taking_part = Vec::new();
        for runtime in runtimes {
            if runtime.is_floor() && operation == Operation::Lifecycle {
                continue;
            }
            match self.warm_up(operation, runtime) {
                Ok(()) => taking_part.push(runtime),
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
            random.shuffle(&mut taking_part);
            for runtime in &taking_part {
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
            for runtime in &taking_part {
                self.clean_up(runtime);
            }
        }
        outcome.map(|()| measured)
    }

    /// Everything that is to be there before the first measurement, and some that don't count.
    fn warm_up(&mut self, operation: Operation, runtime: &Runtime) -> Result {
        if operation == Operation::Exec {
            self.start_entered(runtime)?;
        }
        for _ in 0..self.options.warm_up.max(1) {
            self.once(operation, runtime)?;
        }
        if operation == Operation::Lifecycle {
            // Exit statuses alone do not say that there was a container.
            self.start_entered(runtime)?;
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
                let (pid, cgroup) = self.entered.as_ref().ok_or("no container to enter")?;
                vec![command(
                    runtime,
                    &["exec", &pid.to_string(), text(cgroup)?, "/bin/nothing"],
                )]
            }
            Operation::Exec => {
                vec![self.command(runtime, &["exec", &entered(runtime), "/bin/nothing"])?]
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

    /// The runtime's --root.
    fn state_root(&self, runtime: &Runtime) -> PathBuf {
        PathBuf::from(format!(
            "/run/rrun-bench-{}-{}",
            std::process::id(),
            runtime.name
        ))
    }

    /// A container to exec into. Not under `launch`, which waits until nobody is left.
    fn start_entered(&mut self, runtime: &Runtime) -> Result {
        let host = self
            .host_of(runtime)
            .ok_or("no runtime to make a container with")?;
        let id = entered(runtime);
        self.say(&host, &["create", "--bundle", text(&self.waits)?, &id])?;
        self.say(&host, &["start", &id])?;
        let pid = self.running(&host, &id)?;
        if runtime.is_floor() {
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
            let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
            let group = group.ok_or("a process outside of cgroup v2")?;
            self.entered = Some((pid, Path::new("/sys/fs/cgroup").join(group)));
        }
        Ok(())
    }

    /// The first process of a container, which must be running.
    fn running(&self, runtime: &Runtime, id: &str) -> Result<u64> {
        let state: Value = serde_json::from_str(&self.say(runtime, &["state", id])?)
            .map_err(|error| format!("`state {id}`: {error}"))?;
        let pid = state.get("pid").and_then(Value::as_u64);
        let status = state.get("status").and_then(Value::as_str);
        let pid = pid.filter(|_| status == Some("running"));
        pid.ok_or_else(|| format!("`state {id}` says {state}, not running").into())
    }

    /// What makes the container that a runtime's exec enters. floor can make none that stays, so
    /// it borrows a peer.
    fn host_of(&self, runtime: &Runtime) -> Option<Runtime> {
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

    fn say(&self, runtime: &Runtime, args: &[&str]) -> Result<String> {
        let said = self.scratch.0.join("stderr");
        let line = self.command(runtime, args)?;
        let (program, args) = line.split_first().ok_or("no command")?;
        // A pipe would be held open by the container.
        let out = self.scratch.0.join("stdout");
        let status = Command::new(program)
            .args(args)
            .stdin(std::process::Stdio::null())
            .stdout(fs::File::create(&out)?)
            .stderr(fs::File::create(&said)?)
            .status()
            .map_err(|error| format!("{program}: {error}"))?;
        if !status.success() {
            let said = fs::read_to_string(&said).unwrap_or_default();
            return Err(format!("`{}`: {status}: {}", line.join(" "), said.trim()).into());
        }
        Ok(fs::read_to_string(&out)?)
    }

    fn clean_up(&mut self, runtime: &Runtime) {
        if let Some(host) = self.host_of(runtime) {
            for id in [entered(runtime), format!("bench-{}", self.count)] {
                let _ = self.say(&host, &["delete", "--force", &id]);
            }
        }
        let _ = fs::remove_dir_all(self.state_root(runtime));
    }

    fn tell_conditions(&self, runtimes: &[Runtime]) {
        println!();
        for runtime in runtimes.iter().filter(|runtime| !runtime.is_floor()) {
            println!("  {}", version(runtime));
        }
        println!(
            "  {} rounds in turns; config.json: {}; {}; load {}",
            self.options.rounds,
            match self.options.config {
                Variant::Plain => "runc spec's, without device rules; no seccomp filter",
                Variant::Devices => "runc spec's; no seccomp filter",
                Variant::Userns => "runc spec's, without device rules, in a user namespace",
                Variant::Seccomp =>
                    "runc spec's, without device rules, with a default seccomp profile",
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
            "  CPU: of all processes, the kernel's own threads excepted; peak: the runtime's largest process"
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

/// The exit status of the program that does nothing: it says that it has run.
const NOTHING: i32 = 42;

/// The id of the container that `exec` enters.
fn entered(runtime: &Runtime) -> String {
    format!("bench-entered-{}", runtime.name)
}

fn command(runtime: &Runtime, args: &[&str]) -> Vec<String> {
    let mut command = vec![runtime.program.to_string_lossy().into_owned()];
    command.extend(args.iter().map(|&arg| arg.to_owned()));
    command
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| Error::from(format!("{} is not UTF-8", path.display())))
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
    let said = Command::new(&runtime.program).arg("--version").output();
    let said = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned());
    let line = said
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

/// One quantity of all measurements.
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

/// xorshift: the order of turns, the same each time.
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
