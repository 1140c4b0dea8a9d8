//! kill -9 at random moments: a child process attaches and detaches pods until it is killed, and
//! what it leaves is reconciled.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rrun_network::{EmbeddedNetwork, NetworkConfig, namespace};

use crate::node::{Node, TRAFFIC_TIMEOUT, open_store};

/// Tells the child what directory it works in.
const CHILD: &str = "RRUN_NETWORK_TEST_CHILD";
const PODS: usize = 4;
const ROUNDS: u32 = 40;
/// How long to go on for all rounds, on a machine that is slow to start a process.
const ENOUGH: Duration = Duration::from_secs(60);

pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

fn pods() -> Vec<String> {
    (0..PODS).map(|pod| format!("pod{pod}")).collect()
}

/// Attaches and detaches pods for ever.
pub(crate) fn child() -> ! {
    // A test that is killed takes the child along.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let dir = PathBuf::from(std::env::var_os(CHILD).unwrap_or_default());
    if let Err(error) = churn(&dir) {
        eprintln!("the child failed: {}", error.message().unwrap_or_default());
    }
    std::process::exit(1);
}

fn churn(dir: &std::path::Path) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let network = EmbeddedNetwork::open(open_store(dir)?, NetworkConfig::default())?;
    loop {
        let lives = pods().into_iter().map(|pod| {
            let (network, netns) = (network.clone(), dir.join("netns").join(&pod));
            async move {
                namespace::create(&netns)?;
                network.attach(&pod, &netns).await?;
                network.detach(&pod, Some(&netns)).await?;
                namespace::remove(&netns)
            }
        });
        for life in runtime.block_on(futures_util::future::join_all(lives)) {
            life?;
        }
    }
}

pub(crate) fn a_crash_at_any_moment_leaves_nothing(node: &Node) -> Result<(), Failed> {
    let begun = Instant::now();
    crash(node, || -> Result<(), Failed> {
        while node.pod_interfaces()?.is_empty() && begun.elapsed() < TRAFFIC_TIMEOUT {}
        Ok(())
    })?;
    let first_pod = begun.elapsed();
    let mut caught = 0;
    for round in 0..ROUNDS {
        if caught > 0 && begun.elapsed() > ENOUGH {
            break;
        }
        // Spread over the start, the bridge's making, and several lives, on a fast machine and on
        // an emulated one.
        let moment = first_pod * (round * 37 % ROUNDS) * 3 / ROUNDS;
        caught += crash(node, || {
            std::thread::sleep(moment);
            Ok(())
        })?;
    }
    if caught == 0 {
        return Err(Failed::from(
            "no crash left an interface: this tests nothing",
        ));
    }
    Ok(())
}

/// Starts a child, kills it after `wait`, and returns how many interfaces it left for reconcile.
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
        return Err(Failed::from(format!("the child ended with {status}")));
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
