//! A test with a child process that attaches and detaches pods. The test kills the child process at
//! different times. After each kill, `reconcile` must remove all network objects that the child
//! process created.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rrun_network::{EmbeddedNetwork, NetworkConfig, namespace};

use crate::node::{Node, TRAFFIC_TIMEOUT, open_store};

/// The environment variable that passes the path of the node's directory to the child process.
const CHILD: &str = "RRUN_NETWORK_TEST_CHILD";
const PODS: usize = 4;
const ROUNDS: u32 = 40;
/// The time after which the test starts no further round. This limit keeps the test short on slow
/// machines.
const ROUNDS_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

fn pods() -> Vec<String> {
    (0..PODS).map(|pod| format!("pod{pod}")).collect()
}

/// Attaches and detaches pods until the test kills this child process.
pub(crate) fn child() -> ! {
    // If the test process exits, the kernel kills this child process, too.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let dir = PathBuf::from(std::env::var_os(CHILD).unwrap_or_default());
    if let Err(error) = churn(&dir) {
        eprintln!(
            "the child process could not attach or detach pods: {}",
            error.message().unwrap_or_default()
        );
    }
    std::process::exit(1);
}

fn churn(dir: &std::path::Path) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let network = EmbeddedNetwork::open(open_store(dir)?, NetworkConfig::default())?;
    loop {
        let life_cycles = pods().into_iter().map(|pod| {
            let (network, netns) = (network.clone(), dir.join("netns").join(&pod));
            async move {
                namespace::create(&netns)?;
                network.attach(&pod, &netns).await?;
                network.detach(&pod, Some(&netns)).await?;
                namespace::remove(&netns)
            }
        });
        for result in runtime.block_on(futures_util::future::join_all(life_cycles)) {
            result?;
        }
    }
}

pub(crate) fn reconcile_removes_everything_after_a_crash_at_any_time(
    node: &Node,
) -> Result<(), Failed> {
    let begun = Instant::now();
    crash(node, || -> Result<(), Failed> {
        while node.pod_interfaces()?.is_empty() && begun.elapsed() < TRAFFIC_TIMEOUT {}
        Ok(())
    })?;
    let first_pod = begun.elapsed();
    let mut caught = 0;
    for round in 0..ROUNDS {
        if caught > 0 && begun.elapsed() > ROUNDS_TIMEOUT {
            break;
        }
        // The child is killed during its start, during the creation of the bridge, or during an
        // attach or a detach. The time of the kill is proportional to the time until the first pod
        // was attached. The test therefore suits both fast machines and slow, emulated machines.
        let moment = first_pod * (round * 37 % ROUNDS) * 3 / ROUNDS;
        caught += crash(node, || {
            std::thread::sleep(moment);
            Ok(())
        })?;
    }
    if caught == 0 {
        return Err(Failed::from(
            "no killed child left an interface, so reconcile was not tested",
        ));
    }
    Ok(())
}

/// Starts a child process, kills it when `wait` returns, and runs `reconcile`. Returns the number
/// of pod interfaces between the kill and `reconcile`.
fn crash(node: &Node, wait: impl FnOnce() -> Result<(), Failed>) -> Result<usize, Failed> {
    let mut child = Command::new("/proc/self/exe")
        .env(CHILD, &node.dir)
        .stdin(Stdio::null())
        .spawn()?;
    let waited = wait();
    let ended = child.try_wait()?;
    child.kill()?;
    child.wait()?;
    waited?;
    if let Some(status) = ended {
        return Err(Failed::from(format!(
            "the child process exited before the test killed it: {status}"
        )));
    }
    let left = node.pod_interfaces()?.len();
    let network = node.network()?;
    node.wait(network.reconcile(&HashSet::new()))?;
    drop(network);
    for pod in pods() {
        namespace::remove(&node.netns(&pod))?;
    }
    node.nothing_of_pods_is_left()?;
    Ok(left)
}
