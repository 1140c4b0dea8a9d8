//! Measures pods' networks. The first figure is the traffic from pod to pod on one node. The second
//! figure is the time of RunPodSandbox, with and without the run time of CNI plugins.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use rrun_proto::v1::PodSandboxStatusRequest;
use serde_json::Value;

use crate::Result;
use crate::cri::{CriOptions, Network, Server, call_error, pod_config, timed};
use crate::report::{self, Comparison};
use crate::service::Service;

const RATE: &str = "TCP from pod to pod, MB/s";
const RATE6: &str = "TCP from pod to pod by IPv6, MB/s";
const ROUND_TRIP: &str = "round trip of one byte, us";
const PLUGINS: &str = "RunPodSandbox with the CNI plugins bridge + portmap, ms";
const SHARE: &str = "RunPodSandbox without the run time of these plugins, ms";
const NAMESPACE: &str = "creating and pinning a network namespace without a server, ms";

/// The amount of data that each measurement of the data rate sends, in MB.
const MEGABYTES: usize = 1024;
const ROUND_TRIPS: u32 = 10_000;
/// The number of times that the data rate and the round-trip time are measured.
const ROUNDS: usize = 5;
const SOCKET_TIMEOUT: Duration = Duration::from_secs(60);

/// The file to which the wrapper plugin.c writes the run time of each CNI plugin.
const TIMES: &str = "/run/rrun-bench-plugins";

pub(crate) async fn run(
    options: &CriOptions,
    servers: &mut [Server],
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let names: Vec<String> = servers.iter().map(|server| server.name.clone()).collect();
    let quantities = [RATE, RATE6, ROUND_TRIP, PLUGINS, SHARE, NAMESPACE];
    let mut comparison = Comparison::new("pods' networks", &names, &quantities);
    let mut skipped = Vec::new();
    for round in 0..=ROUNDS {
        for server in servers.iter_mut() {
            match traffic(server).await {
                // The first round loads files into memory, so its figures are ignored.
                Ok(found) if round > 0 => {
                    for (quantity, value) in found {
                        comparison.add_one(&server.name, quantity, value);
                    }
                }
                Ok(_) => {}
                Err(error) => skipped.push(format!("{} traffic: {error}", server.name)),
            }
        }
    }
    if let Some(ours) = names.iter().find(|name| name.as_str() == "rrun-cri")
        && let Err(error) = with_plugins(options, ours, &mut comparison).await
    {
        skipped.push(format!("{ours} with CNI: {error}"));
    }
    report::show(results, &comparison.table())?;
    Ok((comparison.raw(), skipped))
}

/// Measures the traffic between two pods. The benchmark itself creates the sockets, in the network
/// namespaces of the pods.
async fn traffic(server: &mut Server) -> Result<Vec<(&'static str, f64)>> {
    let mut pods = Vec::new();
    for _ in 0..2 {
        let config = pod_config(Network::Own)?;
        let id = server.run_pod(&config).await;
        pods.push((id?, config.log_directory));
    }
    let measured = async {
        let (from, _) = namespace_of(server, &pods[0].0).await?;
        let (to, addresses) = namespace_of(server, &pods[1].0).await?;
        let mut found = Vec::new();
        for address in addresses {
            let (rate, turn) = measure_traffic(&from, &to, address)?;
            match address {
                IpAddr::V4(_) => found.extend([(RATE, rate), (ROUND_TRIP, turn)]),
                IpAddr::V6(_) => found.push((RATE6, rate)),
            }
        }
        Ok(found)
    };
    let measured = measured.await;
    for (id, logs) in &pods {
        server.stop_pod(id).await?;
        server.remove_pod(id).await?;
        fs::remove_dir_all(logs)?;
    }
    measured
}

/// Returns the path of the pod's network namespace, and the pod's addresses.
async fn namespace_of(server: &mut Server, pod: &str) -> Result<(PathBuf, Vec<IpAddr>)> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.to_owned(),
        verbose: true,
    };
    let answer = server.runtime.pod_sandbox_status(request).await;
    let answer = answer
        .map_err(|status| call_error("PodSandboxStatus", &status))?
        .into_inner();
    let info: Value = serde_json::from_str(
        answer
            .info
            .get("info")
            .ok_or("the response to PodSandboxStatus contains no verbose status")?,
    )?;
    let by_spec = || {
        let all = info.pointer("/runtimeSpec/linux/namespaces")?.as_array()?;
        all.iter().find(|one| one["type"] == "network")?["path"].as_str()
    };
    let path = info["networkNamespace"].as_str().or_else(by_spec);
    let path = path.ok_or("the pod's verbose status contains no path of its network namespace")?;
    let network = answer.status.and_then(|status| status.network);
    let network = network.ok_or("the pod's status contains no IP addresses")?;
    let more = network.additional_ips.iter().map(|one| one.ip.as_str());
    let all = std::iter::once(network.ip.as_str()).chain(more);
    let addresses: std::result::Result<_, _> = all.map(str::parse).collect();
    Ok((path.into(), addresses?))
}

/// Returns the data rate in megabytes per second, and the round-trip time in microseconds.
fn measure_traffic(from: &Path, to: &Path, address: IpAddr) -> Result<(f64, f64)> {
    let listener = in_namespace(to, move || Ok(TcpListener::bind((address, 0))?))?;
    let to = SocketAddr::new(address, listener.local_addr()?.port());
    let serving = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut bulk, _) = listener.accept()?;
        bulk.set_read_timeout(Some(SOCKET_TIMEOUT))?;
        let mut block = vec![0; 1 << 20];
        while bulk.read(&mut block)? > 0 {}
        bulk.write_all(b"!")?;
        let (mut turns, _) = listener.accept()?;
        turns.set_nodelay(true)?;
        turns.set_read_timeout(Some(SOCKET_TIMEOUT))?;
        let mut byte = [0];
        while turns.read(&mut byte)? > 0 {
            turns.write_all(&byte)?;
        }
        Ok(())
    });
    let found = in_namespace(from, move || {
        let mut bulk = TcpStream::connect_timeout(&to, SOCKET_TIMEOUT)?;
        bulk.set_read_timeout(Some(SOCKET_TIMEOUT))?;
        let block = vec![1; 1 << 20];
        let mut byte = [1];
        let started = Instant::now();
        for _ in 0..MEGABYTES {
            bulk.write_all(&block)?;
        }
        bulk.shutdown(std::net::Shutdown::Write)?;
        bulk.read_exact(&mut byte)?;
        let rate = MEGABYTES as f64 / started.elapsed().as_secs_f64();
        let mut turns = TcpStream::connect_timeout(&to, SOCKET_TIMEOUT)?;
        turns.set_nodelay(true)?;
        turns.set_read_timeout(Some(SOCKET_TIMEOUT))?;
        let started = Instant::now();
        for _ in 0..ROUND_TRIPS {
            turns.write_all(&byte)?;
            turns.read_exact(&mut byte)?;
        }
        let turn = started.elapsed().as_secs_f64() * 1e6 / f64::from(ROUND_TRIPS);
        Ok((rate, turn))
    })?;
    serving
        .join()
        .map_err(|_| "the server's thread panicked")??;
    Ok(found)
}

/// Runs `work` on a thread that has entered the network namespace at `path`.
fn in_namespace<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> std::result::Result<T, Box<dyn std::error::Error>> + Send + 'static,
) -> Result<T> {
    let namespace = fs::File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let thread = std::thread::spawn(move || {
        let entered = setns(namespace, CloneFlags::CLONE_NEWNET);
        entered.map_err(|errno| format!("setns: {errno}"))?;
        work().map_err(|error| error.to_string())
    });
    let found: std::result::Result<T, String> = thread.join().map_err(|_| "a thread panicked")?;
    Ok(found?)
}

/// Measures a second rrun-cri process that uses CNI plugins. A wrapper records the run time of each
/// plugin.
async fn with_plugins(options: &CriOptions, name: &str, comparison: &mut Comparison) -> Result {
    let service = Service::start("rrun-cri-cni")?;
    let mut server = Server::open(name, &service.address).await?;
    for round in 0..options.rounds + 2 {
        let config = pod_config(Network::Own)?;
        let _ = fs::remove_file(TIMES);
        let (took, pod) = timed(server.run_pod(&config)).await?;
        let times = fs::read_to_string(TIMES).map_err(|error| format!("{TIMES}: {error}"))?;
        let plugins = times.lines().map(|line| Ok(line.parse::<f64>()? / 1e3));
        let plugins = plugins.collect::<Result<Vec<f64>>>()?;
        server.stop_pod(&pod).await?;
        server.remove_pod(&pod).await?;
        fs::remove_dir_all(&config.log_directory)?;
        let by_hand = namespace()?;
        if plugins.len() != 2 {
            return Err(format!(
                "number of CNI plugins that RunPodSandbox started: {}, expected: 2",
                plugins.len()
            )
            .into());
        }
        if round >= 2 {
            comparison.add_one(name, PLUGINS, took);
            comparison.add_one(name, SHARE, took - plugins.iter().sum::<f64>());
            comparison.add_one(name, NAMESPACE, by_hand);
        }
    }
    Ok(())
}

/// Returns the time for creating and pinning a network namespace, in milliseconds. A server that
/// prepared namespaces in advance could save at most this time for each pod.
fn namespace() -> Result<f64> {
    let pin = "/run/rrun-bench-netns";
    fs::write(pin, "")?;
    let started = Instant::now();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let none = None::<&str>;
        let own = Some("/proc/thread-self/ns/net");
        nix::mount::mount(own, pin, none, nix::mount::MsFlags::MS_BIND, none)
    });
    thread.join().map_err(|_| "a thread panicked")??;
    let took = started.elapsed().as_secs_f64() * 1e3;
    nix::mount::umount2(pin, nix::mount::MntFlags::MNT_DETACH)?;
    fs::remove_file(pin)?;
    Ok(took)
}
