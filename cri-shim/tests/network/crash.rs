//! kill -9 at random moments: a child process attaches and detaches pods until it is killed, and
//! what it leaves is reconciled.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use libtest_mimic::Failed;
use rrun_cri::network::{Network, NetworkConfig, namespace};

use crate::node::{Node, open_store};

/// Tells the child what directory it works in.
const CHILD: &str = "RRUN_NETWORK_TEST_CHILD";
const PODS: usize = 4;
const ROUNDS: u64 = 40;

pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

fn pods() -> Vec<String> {
    (0..PODS).map(|pod| format!("pod{pod}")).collect()
}

/// Attaches and detaches pods for ever.
pub fn child() -> ! {
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
    let network = Network::open(open_store(dir)?, NetworkConfig::default())?;
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

pub fn a_crash_at_any_moment_leaves_nothing(node: &Node) -> Result<(), Failed> {
    let mut caught = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new("/proc/self/exe")
            .env(CHILD, &node.dir)
            .stdin(Stdio::null())
            .spawn()?;
        // Spread over the first start, the bridge's making, and several lives.
        std::thread::sleep(Duration::from_millis(round * 37 % 151));
        let ended = child.try_wait()?;
        child.kill()?;
        child.wait()?;
        if let Some(status) = ended {
            return Err(Failed::from(format!("the child ended with {status}")));
        }
        caught += node.pod_interfaces()?.len();
        let network = node.network()?;
        crate::reconcile_all(node, &network, &pods())?;
        drop(network);
        node.nothing_of_pods_is_left()?;
    }
    if caught == 0 {
        return Err(Failed::from(
            "no crash ever left anything: it tests nothing",
        ));
    }
    Ok(())
}
