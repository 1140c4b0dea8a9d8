//! A node for the tests. The node is a network namespace with an uplink to another network
//! namespace, `outside`.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use rrun_network::{Attachment, EmbeddedNetwork, NetworkConfig, NetworkError, namespace};
use rrun_store::{Store, Table};

/// The node's address on its uplink.
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// The address of the machine at the other end of the uplink. This machine has no route to the
/// pods. Its replies reach a pod only if the node masquerades the pod's packets.
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The MTU of the uplink. The value differs from the default MTU. A test can therefore check
/// whether pods get the MTU of the uplink.
pub(crate) const UPLINK_MTU: &str = "1400";

/// The timeout for network traffic. It is long enough for a busy machine.
pub(crate) const TRAFFIC_TIMEOUT: Duration = Duration::from_secs(20);

/// Moves the process into a new network namespace and a new mount namespace. The mount namespace
/// has its own /run, because ip(8) expects network namespaces in /run/netns. The process must have
/// only one thread, because unshare(2) moves only the calling thread.
pub(crate) fn leave_the_host() -> Result<(), String> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |errno: nix::Error| format!("cannot {what}: {} ({errno:?})", errno.desc())
    };
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .map_err(failed("leave the host's mount and network namespaces"))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(failed("make the mount / private"))?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)
        .map_err(failed("mount a tmpfs on /run"))?;
    std::fs::create_dir("/run/netns").map_err(|error| error.to_string())?;
    ip("link set lo up")
        .map(drop)
        .map_err(|_| "ip(8) of iproute2 cannot set the loopback interface up".to_owned())
}

/// The timeout for a whole test.
const DEADLINE: Duration = Duration::from_secs(300);

pub(crate) struct Node {
    pub dir: PathBuf,
    outside: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Node {
    /// Runs `test` on a thread that has moved into the network namespace of a new node. Threads and
    /// processes that the test starts are in the same network namespace.
    pub(crate) fn run(test: fn(&Node) -> Result<(), Failed>) -> Result<(), Failed> {
        let (done, result) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let run = || {
                unshare(CloneFlags::CLONE_NEWNET)?;
                test(&Node::new()?)
            };
            let _ = done.send(run());
        });
        match result.recv_timeout(DEADLINE) {
            Ok(result) => result,
            Err(error) => Err(format!(
                "the test panicked or did not finish within {DEADLINE:?}: {error}"
            )
            .into()),
        }
    }

    fn new() -> Result<Node, Failed> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = PathBuf::from(format!("/run/node{count}"));
        std::fs::create_dir_all(dir.join("netns"))?;
        let outside = PathBuf::from(format!("/run/netns/outside{count}"));
        namespace::create(&outside)?;
        ip("link set lo up")?;
        let mtu = UPLINK_MTU;
        ip(&format!(
            "link add up0 mtu {mtu} type veth peer name up1 mtu {mtu} netns outside{count}"
        ))?;
        ip(&format!("address add {NODE}/24 dev up0"))?;
        ip("link set up0 up")?;
        ip(&format!("route add default via {OUTSIDE}"))?;
        inside(&outside, || {
            ip(&format!("address add {OUTSIDE}/24 dev up1"))?;
            ip("link set up1 up").map(drop)
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Node {
            dir,
            outside,
            runtime,
        })
    }

    pub(crate) fn outside(&self) -> &Path {
        &self.outside
    }

    pub(crate) fn store(&self) -> Result<Store, Failed> {
        open_store(&self.dir)
    }

    pub(crate) fn network(&self) -> Result<EmbeddedNetwork, Failed> {
        self.network_with(NetworkConfig::default())
    }

    pub(crate) fn network_with(&self, config: NetworkConfig) -> Result<EmbeddedNetwork, Failed> {
        Ok(EmbeddedNetwork::open(self.store()?, config)?)
    }

    pub(crate) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub(crate) fn netns(&self, pod: &str) -> PathBuf {
        self.dir.join("netns").join(pod)
    }

    /// Creates a network namespace for the pod `pod`, and attaches the pod.
    pub(crate) fn pod(
        &self,
        network: &EmbeddedNetwork,
        pod: &str,
    ) -> Result<Attachment, NetworkError> {
        namespace::create(&self.netns(pod))?;
        self.wait(network.attach(pod, &self.netns(pod)))
    }

    /// Detaches a pod and removes its network namespace.
    pub(crate) fn remove(&self, network: &EmbeddedNetwork, pod: &str) -> Result<(), NetworkError> {
        self.wait(network.detach(pod, Some(&self.netns(pod))))?;
        self.wait(network.settled());
        namespace::remove(&self.netns(pod))
    }

    /// Returns the names of the node's veth interfaces except the uplink.
    pub(crate) fn pod_interfaces(&self) -> Result<Vec<String>, Failed> {
        let links = ip("-oneline link show type veth")?;
        Ok(links
            .lines()
            .filter_map(|line| line.split(": ").nth(1))
            .filter(|name| !name.starts_with("up0"))
            .map(str::to_owned)
            .collect())
    }

    /// Returns the pods' addresses in the store. The caller must first drop the `EmbeddedNetwork`,
    /// which locks the store.
    pub(crate) fn stored_addresses(&self) -> Result<Vec<String>, Failed> {
        let entries = self
            .store()?
            .load::<serde_json::Value>(Table::ADDRESSES)?
            .into_iter()
            .filter(|(_, value)| value.get("pod").is_some());
        Ok(entries.map(|(address, _)| address).collect())
    }

    pub(crate) fn nothing_of_pods_is_left(&self) -> Result<(), Failed> {
        let interfaces = self.pod_interfaces()?;
        let addresses = self.stored_addresses()?;
        let namespaces = std::fs::read_dir(self.dir.join("netns"))?.count();
        if !interfaces.is_empty() || !addresses.is_empty() || namespaces != 0 {
            return Err(Failed::from(format!(
                "all pods were removed, but the interfaces {interfaces:?}, the addresses \
                 {addresses:?} and {namespaces} network namespaces still exist"
            )));
        }
        Ok(())
    }
}

/// Opens the store of a node. `dir` is the node's directory.
pub(crate) fn open_store(dir: &Path) -> Result<Store, Failed> {
    let end = Instant::now() + TRAFFIC_TIMEOUT;
    loop {
        // The loop retries the open, because the writer thread of the previous `Store` may not have
        // closed the file yet.
        match Store::open(&dir.join("meta.redb")) {
            Ok(store) => return Ok(store),
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Runs ip(8) in the network namespace of the calling thread, and returns the output.
pub(crate) fn ip(arguments: &str) -> Result<String, Failed> {
    program("ip", &arguments.split(' ').collect::<Vec<_>>())
}

pub(crate) fn program(program: &str, arguments: &[&str]) -> Result<String, Failed> {
    let output = Command::new(program).args(arguments).output()?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Failed::from(format!("{program} {arguments:?}: {error}")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `work` in the network namespace that is pinned at `path`.
pub(crate) fn inside<T: Send>(
    path: &Path,
    work: impl FnOnce() -> Result<T, Failed> + Send,
) -> Result<T, Failed> {
    let namespace = std::fs::File::open(path)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread
            .join()
            .map_err(|_| Failed::from("the thread in the network namespace panicked"))?
    })
}
