//! A test with a child process that attaches and detaches pods. The test kills the child process at
//! different times. After each kill, `reconcile` must remove all network objects that the child
//! process created.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rrun_network::{EmbeddedNetwork, HostPort, NetworkConfig, Protocol, namespace};
use rrun_store::{Change, Table};
use serde_json::{Value, json};

use crate::expect;
use crate::node::{Node, TRAFFIC_TIMEOUT, open_store, program};

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

/// If the server dies soon after it gave a removed pod's host port to another pod, the store
/// contains the host port twice. This test creates such a store. The names of the two removed pods
/// are before and after the name of the other pod, because the store has this order.
pub(crate) fn a_host_port_that_the_store_contains_twice_belongs_to_the_live_pod(
    node: &Node,
) -> Result<(), Failed> {
    let port = || {
        vec![HostPort {
            protocol: Protocol::Tcp,
            address: None,
            host: 8080,
            container: 80,
        }]
    };
    let network = node.network()?;
    namespace::create(&node.netns("pod"))?;
    node.wait(network.reserve("pod", "pod", port(), true))?;
    node.wait(network.attach("pod", &node.netns("pod")))?;
    drop(network);
    let add_dead_pods = || -> Result<(), Failed> {
        let store = node.store()?;
        let entries: Vec<(String, Value)> = store.load(Table::ADDRESSES)?;
        let found = entries.iter().find(|(key, _)| key == "ports/pod");
        let (_, ports) = found.ok_or("the store lacks the host ports")?;
        let mut changes = Vec::new();
        for (dead, address) in [("dead", "10.88.0.200"), ("removed", "10.88.0.201")] {
            let mut ports = ports.clone();
            ports["pod"] = json!(dead);
            changes.push(Change::put(
                Table::ADDRESSES,
                address,
                &json!({ "pod": dead }),
            )?);
            changes.push(Change::put(
                Table::ADDRESSES,
                &format!("ports/{dead}"),
                &ports,
            )?);
        }
        Ok(node.wait(store.commit(changes))?)
    };
    add_dead_pods()?;
    let network = node.network()?;
    let live = HashSet::from(["pod".to_owned()]);
    network.free_ports_except(&live);
    node.wait(network.detach("dead", None))?;
    node.wait(network.reconcile(&live))?;
    let map = program("nft", &["list", "map", "inet", "rrun0", "host_ports4"])?;
    expect(map.matches(". 8080 : 10.88.0.2 ").count() == 1, &map)?;
    let second = node.wait(network.reserve("other", "other", port(), true));
    expect(second.is_err(), "two pods have the same host port")?;
    drop(network);
    add_dead_pods()?;
    let network = node.network()?;
    network.free_ports_except(&HashSet::new());
    node.wait(network.detach("removed", None))?;
    node.remove(&network, "pod")?;
    node.wait(network.reconcile(&HashSet::new()))?;
    drop(network);
    node.nothing_of_pods_is_left()
}
