//! From configuration to service, and its orderly end. Containers live on without it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::config::Config;
use crate::error::{During, Error, Result};
use crate::image::{Images, Limits, Registries};
use crate::network::{Network, NetworkConfig};
use crate::node::Node;
use crate::sandbox::files::private_dir;
use crate::store::Store;
use crate::{reconcile, services};

/// How long calls under way may take to end after SIGTERM.
const LAST_CALLS: Duration = Duration::from_secs(5);

/// How long a server that was killed may hold its locks.
const LAST_BREATH: Duration = Duration::from_secs(3);

/// Serves until SIGTERM or SIGINT.
pub fn run(config: Config) -> Result<()> {
    // Two threads: one that blocks where it should not stalls nobody. What blocks by its nature
    // has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("rrun-cri")
        .enable_all()
        .build()
        .during(|| "start the async runtime".to_owned())?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> Result<()> {
    private_dir(&config.root)?;
    private_dir(&config.state)?;
    for dir in ["pods", "netns", "runtime"] {
        private_dir(&config.state.join(dir))?;
    }
    private_dir(&config.root.join("containers"))?;
    // Held until the process ends.
    let _root = lock(&config.root).await?;
    let _state = lock(&config.state).await?;
    let socket = config.socket.clone();
    let listener = listen(&socket).await?;

    let internal = |error: &dyn std::fmt::Display| Error::internal(error.to_string());
    let store = Store::open(&config.root.join("meta.redb")).map_err(|error| internal(&error))?;
    let images = Images::open(
        &config.root,
        store.clone(),
        Registries::new(&config.registry_config_path),
        Limits::default(),
    )
    .map_err(|error| internal(&error))?;
    let network =
        Network::open(store.clone(), network_config(&config)).map_err(|error| internal(&error))?;
    let node = Arc::new(Node::new(config, store, images, network));
    reconcile::run(&node).await?;

    let service = Server::builder()
        .add_service(services::runtime(Arc::clone(&node)))
        .add_service(services::image(Arc::clone(&node)));
    let mut terminate = signal(SignalKind::terminate()).during(|| "wait for SIGTERM".to_owned())?;
    let mut interrupt = signal(SignalKind::interrupt()).during(|| "wait for SIGINT".to_owned())?;
    let (end, ended) = tokio::sync::oneshot::channel();
    let serving = tokio::spawn(service.serve_with_incoming_shutdown(
        UnixListenerStream::new(listener),
        async {
            let _ = ended.await;
        },
    ));
    notify("READY=1");
    log::info!(
        "rrun-cri {} serves {} with {} pods and {} containers",
        env!("CARGO_PKG_VERSION"),
        socket.display(),
        node.sandboxes().len(),
        node.containers().len()
    );
    tokio::select! {
        _ = terminate.recv() => log::info!("SIGTERM: ends, containers live on"),
        _ = interrupt.recv() => log::info!("SIGINT: ends, containers live on"),
    }
    notify("STOPPING=1");
    let _ = end.send(());
    // Streams of events have no end of their own.
    if let Ok(Ok(Err(error))) = tokio::time::timeout(LAST_CALLS, serving).await {
        return Err(Error::internal(format!("serve the CRI: {error}")));
    }
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

fn network_config(config: &Config) -> NetworkConfig {
    let default = NetworkConfig::default();
    let given = config.network.clone();
    NetworkConfig {
        bridge: given.bridge.unwrap_or(default.bridge),
        range: given.range.unwrap_or(default.range),
        masquerade: given.masquerade.unwrap_or(default.masquerade),
        mtu: given.mtu.or(default.mtu),
    }
}

/// Keeps a second server off this directory. One that was killed is given time to end: its lock
/// goes only with the last of its memory.
async fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let what = || format!("lock {}", path.display());
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .during(what)?;
    let begin = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if begin.elapsed() < LAST_BREATH => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::internal(format!(
                    "another rrun-cri uses {}: {} is locked",
                    dir.display(),
                    path.display()
                )));
            }
            Err(errno) => return Err(errno).during(what),
        }
    }
    file.set_len(0).during(what)?;
    writeln!(file, "{}", std::process::id()).during(what)?;
    Ok(file)
}

/// Binds the CRI socket, for root only, in the place of one that nobody listens at.
async fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).during(what)?;
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(Error::internal(format!(
            "{}: another server listens there",
            what()
        )));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).during(what);
        }
        _ => {}
    }
    // Bound under another name, so that nobody can connect before the mode is right.
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let _ = std::fs::remove_file(&name);
    let listener = UnixListener::bind(&name).during(what)?;
    std::fs::set_permissions(&name, std::fs::Permissions::from_mode(0o600)).during(what)?;
    std::fs::rename(&name, path).during(what)?;
    Ok(listener)
}

/// Tells systemd how far the server is, sd_notify(3); without it, nobody.
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = UnixDatagram::unbound().and_then(|socket| {
        match path.as_encoded_bytes().strip_prefix(b"@") {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                socket.send_to_addr(state.as_bytes(), &address)
            }
            None => socket.send_to(state.as_bytes(), &path),
        }
    });
    if let Err(error) = sent {
        log::warn!("tell systemd {state}: {error}");
    }
}
