//! Runs a CRI call once for each fault, and checks the server after each fault.
//!
//! The driver first runs the call without a fault and records the system calls and the effects of
//! the call. Then it runs the call with one fault at a time. The server must answer with a success
//! or with an error of one sentence. After an error, nothing may be left. After a success, the
//! effects must be those of the call without a fault. A repeated call must succeed, as kubelet
//! expects. After the removal of all pods, nothing may be left.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tonic::{Code, Status};

use crate::ensure;
use crate::support::calls::Calls;
use crate::support::cri_calls::{Answer, CriCall, Stage, Subject};
use crate::support::inventory::{Differences, Inventory};
use crate::support::machine::{Dice, Result, full, note, seed_of_the_day, tail, wait_for};
use crate::support::needs::Need;
use crate::support::node::{Node, on_a_supervised_node};
use crate::support::supervisor::{Action, Fault, Place, Seen};

/// The time after the answer to a call in which the driver still waits for the fault. The store
/// writes some records within 50 ms after the answer, and layers are removed in the background.
const SETTLE_TIME: Duration = Duration::from_millis(400);

/// The time after which the server has noticed the loss of a monitor.
const MONITOR_LOSS_TIME: Duration = Duration::from_millis(500);

/// The number of faults of a scenario in a run of `make test`, and in the guest machine.
const SAMPLE: usize = 5;

/// The number of calls at one place that fail. Some loops make hundreds of equal calls, for example
/// for the hard links of an image.
const MAX_OCCURRENCES: usize = 25;

/// The number of failed faults after which a scenario ends.
const MAX_FAILURES: usize = 40;

/// A CRI call in certain circumstances.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// The stage of the pod before the call.
    pub(crate) before: Stage,
    pub(crate) call: CriCall,
    /// Returns the configuration of the pod and of its container.
    pub(crate) subject: fn(&Node) -> Result<Subject>,
}

/// The effects of a call without a fault.
struct Reference {
    seen: Vec<Seen>,
    /// The inventory of the node before the pod was created.
    empty: Inventory,
    before: Inventory,
    after: Inventory,
    /// True if no pod is ready after the call.
    ends_pod: bool,
}

/// The number of faults, by their result.
#[derive(Default)]
struct Counts {
    errors: usize,
    successes: usize,
    kills: usize,
    missed: usize,
    new_pods: usize,
}

/// The faults that failed in the first attempt of a test, by scenario. The harness repeats a test that
/// failed. The second attempt runs only these faults.
static FAILED: Mutex<BTreeMap<&str, Vec<Fault>>> = Mutex::new(BTreeMap::new());

/// Runs the scenario once for each of its faults, or for a sample of the faults.
pub(crate) fn each_fault(scenario: &Scenario) -> Result {
    let mut counts = Counts::default();
    let mut failures: Vec<String> = Vec::new();
    let mut failed_faults = Vec::new();
    let known = |failed: &mut BTreeMap<&str, Vec<Fault>>| failed.remove(scenario.name);
    let mut queue: Option<Vec<Fault>> = FAILED.lock().ok().as_deref_mut().and_then(known);
    let (mut all, seed) = (queue.as_ref().map_or(0, Vec::len), seed_of_the_day());
    let started = Instant::now();
    while queue.as_ref().is_none_or(|queue| !queue.is_empty()) && failures.len() < MAX_FAILURES {
        let mut running = None;
        let result = on_a_supervised_node(|node| {
            let mut world = World::new(node, scenario)?;
            let reference = world.reference()?;
            let queue = queue.get_or_insert_with(|| {
                let (drawn, possible) = drawn(scenario, &reference.seen, seed);
                all = possible;
                drawn
            });
            while let Some(fault) = queue.pop() {
                running = Some(fault.clone());
                world.one(&reference, &fault, &mut counts)?;
                running = None;
            }
            Ok(())
        });
        if let Err(failed) = result {
            let message = failed.message().unwrap_or_default();
            let Some(fault) = running else {
                return Err(format!("{}: {message}", scenario.name).into());
            };
            let (what, log) = message.split_once("\n$ crictl").unwrap_or((message, ""));
            let failure = format!("{fault}: {what}\n[…]{}", tail(log, 2000));
            logged(scenario, &format!("FAILED {failure}"));
            failures.push(failure);
            failed_faults.push(fault);
        }
    }
    if let Ok(mut failed) = FAILED.lock()
        && !failed_faults.is_empty()
    {
        failed.insert(scenario.name, failed_faults);
    }
    let Counts {
        errors,
        successes,
        kills,
        missed,
        new_pods,
    } = counts;
    note(format!(
        "{}: {} of {all} faults in {:.0} s, drawn with RRUN_TEST_SEED={seed}: {errors} errors, {successes} successes, {kills} killed processes; {missed} not reached; {new_pods} needed a new pod",
        scenario.name,
        errors + successes + kills,
        started.elapsed().as_secs_f64(),
    ));
    ensure!(
        failures.is_empty(),
        "{} of the faults in {} failed, drawn with RRUN_TEST_SEED={seed}:\n\n{}",
        failures.len(),
        scenario.name,
        failures.join("\n\n")
    );
    Ok(())
}

/// Returns the faults to run in random order, and the number of all faults. If RRUN_TEST_FAULT is set,
/// returns only the faults whose descriptions contain its value.
fn drawn(scenario: &Scenario, seen: &[Seen], seed: u64) -> (Vec<Fault>, usize) {
    let mix = |sum: u64, byte: u8| sum.wrapping_mul(31) + u64::from(byte);
    let salt = scenario.name.bytes().fold(0, mix);
    let mut dice = Dice::from_seed(seed ^ salt);
    let mut all = Vec::new();
    for seen in seen {
        logged(
            scenario,
            &format!("seen {} times: {}", seen.times, seen.place),
        );
        // If its test call of openat2(2) fails once, the library pathrs never uses openat2(2) again.
        let tests_openat2 = seen.place.call == "openat2" && seen.place.object == ".";
        // A debug build checks each descriptor with fcntl(2) before it closes the descriptor.
        let checks = seen.place.call == "fcntl" && seen.errnos.is_empty();
        let ours = ["rrun-cri", "rrun-monitor", "rrun"].contains(&seen.place.program.as_str());
        if ours && !tests_openat2 && !checks {
            let starts = scenario.call == CriCall::StartServer;
            let faults = faults_at(seen, &mut dice).into_iter();
            all.extend(faults.filter(|fault| !(starts && fault.stops_tokio())));
        }
    }
    // In the guest machine, all faults would take days.
    let is_complete = full() && Need::OwnMachine.lacking().is_some();
    let most = if is_complete { usize::MAX } else { SAMPLE };
    if let Ok(chosen) = std::env::var("RRUN_TEST_FAULT") {
        all.retain(|fault| fault.to_string().contains(&chosen));
    }
    let possible = all.len();
    let drawn = dice.draw(all, most);
    logged(scenario, &format!("{} faults", drawn.len()));
    (drawn, possible)
}

/// Returns the faults at a place. Each call fails with two of its errnos, which are drawn at random.
fn faults_at(seen: &Seen, dice: &mut Dice) -> Vec<Fault> {
    // The tests in runtime::faults cause the other faults of the runtime.
    let runtime = seen.place.program == "rrun";
    let errnos = if runtime { 1 } else { 2 };
    let (end, most) = if runtime {
        (1, 1)
    } else {
        (seen.times, MAX_OCCURRENCES)
    };
    let mut all = Vec::new();
    for occurrence in dice.draw((1..=end).collect(), most) {
        let mut likely = seen.errnos.clone();
        // With EPERM, the runtime assumes that the pod's user namespace does not own a namespace. With
        // EPIPE and ECONNRESET, it assumes that the container's process has exited, and waits for
        // the end of this process.
        let lies = [Errno::EPERM, Errno::EPIPE, Errno::ECONNRESET];
        likely.retain(|errno| !runtime || !lies.contains(errno));
        let errnos = dice.draw(likely, errnos);
        let kill = (!runtime).then_some(Action::Kill);
        let actions = errnos.into_iter().map(Action::Fail).chain(kill);
        all.extend(actions.map(|action| Fault {
            place: seen.place.clone(),
            occurrence,
            action,
        }));
    }
    all
}

impl Fault {
    /// Returns whether tokio panics after this fault at the start of the server. tokio cannot start
    /// without its sockets and its first three threads.
    fn stops_tokio(&self) -> bool {
        let starts = match self.place.call {
            "socketpair" => true,
            "clone3" => self.occurrence <= 3,
            _ => false,
        };
        starts && self.place.program == "rrun-cri" && self.action != Action::Kill
    }
}

/// Adds a line to the scenario's file in /out.
fn logged(scenario: &Scenario, line: &str) {
    let path = format!("/out/faults-{}.log", scenario.name);
    if let Ok(mut file) = std::fs::File::options()
        .append(true)
        .create(true)
        .open(path)
    {
        let _ = writeln!(file, "{line}");
    }
}

struct World<'a> {
    node: &'a mut Node,
    calls: Calls,
    scenario: &'a Scenario,
}

/// The result of a call with a fault.
struct Outcome {
    answer: Answer,
    /// True if the call reached the fault.
    hit: bool,
    /// True if the fault killed the server or disconnected the client. In both cases, the answer
    /// does not come from the server.
    lost: bool,
    took: Duration,
}

impl<'a> World<'a> {
    fn new(node: &'a mut Node, scenario: &'a Scenario) -> Result<Self> {
        let calls = Calls::new(node)?;
        Ok(World {
            node,
            calls,
            scenario,
        })
    }

    /// Runs the call twice without a fault. The first run creates objects that outlive the pods,
    /// such as the bridge.
    fn reference(&mut self) -> Result<Reference> {
        let mut subject = (self.scenario.subject)(self.node)?;
        self.arrange(&mut subject)?;
        self.run(&mut subject)?.map_err(refused)?;
        subject.remove(&self.calls)?;

        let mut subject = (self.scenario.subject)(self.node)?;
        let empty = Inventory::settled(self.node)?;
        self.arrange(&mut subject)?;
        let before = Inventory::settled(self.node)?;
        self.node.supervisor()?.record();
        self.run(&mut subject)?.map_err(refused)?;
        std::thread::sleep(SETTLE_TIME);
        let seen = self.node.supervisor()?.recorded();
        let after = Inventory::settled(self.node)?;
        let ends_pod = !subject.is_ready(&self.calls)?;
        subject.remove(&self.calls)?;
        let reference = Reference {
            seen,
            ends_pod,
            empty,
            before,
            after,
        };
        self.is_empty(&reference)?;
        Ok(reference)
    }

    /// Brings the pod to the stage before the call.
    fn arrange(&mut self, subject: &mut Subject) -> Result {
        subject.reach(&self.calls, self.scenario.before)?;
        if self.scenario.call != CriCall::StartServer {
            return Ok(());
        }
        // The server was killed while it created another pod, which it must remove at its start.
        let mut partial = subject.clone();
        partial.rename("partial");
        self.node.supervisor()?.inject(Fault {
            place: Place {
                program: "rrun-cri".to_owned(),
                call: "rename",
                object: "NODE/state/pods/ID/pod.json.new".to_owned(),
            },
            occurrence: 2,
            action: Action::Kill,
        });
        let _ = CriCall::RunPodSandbox.run(&self.calls, &mut partial)?;
        let killed = self.node.supervisor()?.end();
        ensure!(killed.is_some(), "the server did not reach the fault");
        wait_for("the killed server to exit", || {
            Ok((!self.node.server_lives()).then_some(()))
        })
    }

    /// Makes the call.
    fn run(&mut self, subject: &mut Subject) -> Result<Answer> {
        if self.scenario.call != CriCall::StartServer {
            return self.scenario.call.run(&self.calls, subject);
        }
        if self.node.server_lives() {
            self.node.kill_server()?;
        }
        if let Err(failed) = self.node.start_server() {
            let message = failed.message().unwrap_or_default();
            let last = message.trim_end().lines().next_back().unwrap_or_default();
            return Ok(Err(Status::internal(last)));
        }
        // The fault can also close the first connection of a client.
        match Calls::new(self.node) {
            Ok(calls) => self.calls = calls,
            Err(_) => return Ok(Err(Status::unknown("the server closed the connection"))),
        }
        Ok(Ok(()))
    }

    /// Runs the call with a fault, and checks the result.
    fn one(&mut self, reference: &Reference, fault: &Fault, counts: &mut Counts) -> Result {
        let call = self.scenario.call;
        let mut subject = (self.scenario.subject)(self.node)?;
        self.arrange(&mut subject)?;
        let outcome = self.run_with(fault, &mut subject)?;
        counts.add(&outcome, fault);
        logged(self.scenario, &outcome.line(fault));
        // A killed monitor leaves the exit code 137, which the driver reports as Aborted.
        if let Err(status) = &outcome.answer
            && !outcome.lost
            && (status.code() != Code::Aborted || fault.action != Action::Kill)
        {
            is_a_sentence(status)?;
        }
        let ready = subject.is_ready(&self.calls)?;
        if outcome.answer.is_err() && !outcome.lost && ready && call.rolls_back() {
            self.matches(&reference.before, Differences::All, "after the error")?;
        }
        let new_pod = self.repeat(&mut subject, fault)?;
        if new_pod {
            counts.new_pods += 1;
            logged(self.scenario, "  needed a new pod");
        }
        // After the loss of its monitor, a pod cannot have the same effects.
        let differences = if call.ends() {
            Differences::AllButState
        } else {
            Differences::All
        };
        let lost_monitor = fault.place.program == "rrun-monitor" && fault.action == Action::Kill;
        if !call.ends() || !lost_monitor && !new_pod && (ready || reference.ends_pod) {
            self.matches(&reference.after, differences, "after the repeated call")?;
        }
        subject.remove(&self.calls)?;
        self.is_empty(reference)
    }

    fn run_with(&mut self, fault: &Fault, subject: &mut Subject) -> Result<Outcome> {
        self.node.supervisor()?.inject(fault.clone());
        let started = Instant::now();
        let answer = self.run(subject)?;
        let took = started.elapsed();
        let settled = Instant::now();
        while self.node.supervisor()?.hit().is_none() && settled.elapsed() < SETTLE_TIME {
            std::thread::sleep(Duration::from_millis(5));
        }
        let hit = self.node.supervisor()?.end();
        if let (Some(pid), Action::Kill) = (hit, fault.action) {
            self.wait_for_death(pid, subject)?;
        }
        let killed = self.revive(fault)?;
        let disconnected = answer
            .as_ref()
            .is_err_and(|status| status.code() == Code::Unknown);
        Ok(Outcome {
            answer,
            hit: hit.is_some(),
            lost: killed || disconnected,
            took,
        })
    }

    /// Waits until the killed process has exited. If the process was a pod's monitor, also waits
    /// until the server has noticed the exit.
    fn wait_for_death(&mut self, pid: i32, subject: &Subject) -> Result {
        if pid == self.node.server_pid()? {
            return wait_for("the killed server to exit", || {
                Ok((!self.node.server_lives()).then_some(()))
            });
        }
        wait_for("the killed process to exit", || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
            Ok((state.is_empty() || state.starts_with(['Z', 'X'])).then_some(()))
        })?;
        let killed = Instant::now();
        while subject.is_ready(&self.calls)? && killed.elapsed() < MONITOR_LOSS_TIME {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Starts the server again if it is not running. Returns whether the fault killed the server.
    fn revive(&mut self, fault: &Fault) -> Result<bool> {
        let log = tail(&self.node.log(), 64 << 10);
        if let Some((_, panic)) = log.split_once("panicked at") {
            let lines: Vec<&str> = panic.lines().take(40).collect();
            return Err(format!("the server panicked at {}", lines.join("\n")).into());
        }
        if self.node.server_lives() {
            return Ok(false);
        }
        let killed = fault.action == Action::Kill;
        ensure!(
            killed || self.scenario.call == CriCall::StartServer,
            "the server exited after a failed system call"
        );
        self.node.start_server()?;
        self.calls = Calls::new(self.node)?;
        Ok(killed)
    }

    /// Repeats the call as kubelet does. If the pod is not ready any more, removes it and runs it
    /// again. Returns whether that was necessary.
    fn repeat(&mut self, subject: &mut Subject, fault: &Fault) -> Result<bool> {
        let call = self.scenario.call;
        match self.run(subject)? {
            Ok(()) if call.ends() || subject.is_ready(&self.calls)? => return Ok(false),
            Ok(()) => {}
            Err(status) => {
                ensure!(!call.ends(), "the repeated call failed, too: {status:?}");
                if subject.is_ready(&self.calls)? {
                    ensure!(
                        matches!(call, CriCall::StartContainer | CriCall::Exit),
                        "the repeated call failed, too, and the pod is ready: {status:?}"
                    );
                    subject.remove_container(&self.calls)?.map_err(refused)?;
                    subject.reach(&self.calls, self.scenario.before)?;
                    self.run(subject)?.map_err(refused)?;
                    return Ok(false);
                }
            }
        }
        ensure!(
            fault.place.program == "rrun-monitor" || fault.action == Action::Kill,
            "the pod is not ready after a failed system call of the server"
        );
        subject.remove(&self.calls)?;
        subject.reach(&self.calls, self.scenario.before)?;
        self.run(subject)?.map_err(refused)?;
        Ok(true)
    }

    fn is_empty(&self, reference: &Reference) -> Result {
        let when = "after the removal of the pods";
        self.matches(&reference.empty, Differences::Added, when)
    }

    fn matches(&self, inventory: &Inventory, differences: Differences, when: &str) -> Result {
        let left = inventory.becomes(self.node, differences)?;
        ensure!(
            left.is_empty(),
            "the node differs {when} ({} lines):\n  {}",
            left.len(),
            left.iter()
                .take(12)
                .cloned()
                .collect::<Vec<_>>()
                .join("\n  ")
        );
        Ok(())
    }
}

impl Counts {
    fn add(&mut self, outcome: &Outcome, fault: &Fault) {
        let count = if !outcome.hit {
            &mut self.missed
        } else if fault.action == Action::Kill {
            &mut self.kills
        } else if outcome.answer.is_ok() {
            &mut self.successes
        } else {
            &mut self.errors
        };
        *count += 1;
    }
}

impl Outcome {
    fn line(&self, fault: &Fault) -> String {
        let missed = if self.hit { "" } else { "not reached; " };
        let answer = match &self.answer {
            Ok(()) => "success".to_owned(),
            Err(status) => format!("{:?}: {}", status.code(), status.message()),
        };
        format!(
            "{fault}: {:.2} s: {missed}{answer}",
            self.took.as_secs_f64()
        )
    }
}

fn refused(status: Status) -> String {
    format!("a call without a fault failed: {status:?}")
}

/// Checks that the error has a code that kubelet can handle and a message of one sentence.
fn is_a_sentence(status: &Status) -> Result {
    let text = status.message();
    let codes = [
        Code::Internal,
        Code::FailedPrecondition,
        Code::ResourceExhausted,
        Code::Unavailable,
        Code::NotFound,
        Code::DeadlineExceeded,
        Code::DataLoss,
    ];
    ensure!(
        codes.contains(&status.code()),
        "the error has the code {:?}: {text}",
        status.code()
    );
    ensure!(
        text.contains(' ') && !text.contains('\n') && !text.contains("Os {") && text.len() < 1500,
        "the error is not one sentence: {text:?}"
    );
    Ok(())
}
