//! Startup and orderly shutdown of the server. Containers continue to run while the server is
//! stopped.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use rustix::fs::{FlockOperation, Mode, flock};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tonic::Status;
use tonic::service::Routes;

use crate::config::{Config, ConfigSource};
use crate::container::rootfs::make_mount_points;
use crate::node::Node;
use crate::reload::Reload;
use crate::selinux::Selinux;
use crate::streaming::{self, Shutdown};
use crate::{directories, metrics, preflight, reconcile, services};
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::{blocking, keep_one_thread};
use rrun_images::{Images, Registries};
use rrun_kernel::errno::describe;
use rrun_kernel::{descriptor_limit, heap};
use rrun_network::{Cni, EmbeddedNetwork, Listener, PodNetwork};
use rrun_store::Store;

/// The time limit after SIGTERM for CRI calls in progress.
const CALLS_GRACE: Duration = Duration::from_secs(5);

/// The time to wait for the locks of a previous server that was killed.
const LOCK_TIMEOUT: Duration = Duration::from_secs(3);

/// The limit on threads for work that blocks. A file system that hangs, such as a container's
/// volume, occupies a thread until it responds. The limit is therefore much higher than the number
/// of threads that a node normally needs.
const MAX_BLOCKING_THREADS: usize = 4096;

/// Runs the server until it receives SIGTERM or SIGINT.
pub(crate) fn run(source: ConfigSource, config: Config) -> Result<()> {
    // With this mask, only root can write to the server's files, and the users of containers can
    // read resolv.conf. Monitors, runtimes and CNI plugins inherit the mask.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    heap::one_heap();
    descriptor_limit::raise();
    // With two worker threads, a task that blocks by mistake does not stop the tasks that are ready to
    // run. The tasks that wait for a socket or a timer can wait for its end nevertheless, because one
    // of the threads polls them for both. So work that is known to block or to compute for long runs in
    // separate threads.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .thread_stack_size(heap::THREAD_STACK_BYTES)
        .thread_name("rrun-cri")
        .enable_all()
        .build()
        .during(|| "start the async runtime".to_owned())?;
    let served = runtime.block_on(async {
        keep_one_thread().await;
        serve(source, config).await
    });
    // Work that blocks, such as the deletion of a writable layer or the count of its files, can take
    // minutes. The server does not wait for its end. The next start of the server repeats the work
    // or removes its remains.
    runtime.shutdown_timeout(CALLS_GRACE);
    served
}

async fn serve(source: ConfigSource, config: Config) -> Result<()> {
    directories::make(&config)?;
    // The locks on the root directory and the state directory are held until the process exits.
    let _root = lock(&config.root).await?;
    let _state = lock(&config.state).await?;
    make_mount_points(&config.root)?;
    let socket = config.socket().to_owned();
    let listener = listen(&socket).await?;
    let metrics_listener = match config.metrics_listen {
        Some(address) => Some(metrics::listener::listen(address).await?),
        None => None,
    };
    let node = open_node(config)?;
    let streams = listen_for_streams(&node, metrics_listener.as_ref()).await?;
    reconcile::run(&node).await?;
    let (end, ending) = watch::channel(false);
    tokio::spawn(streams.serve(Arc::clone(&node), Shutdown::of_server(ending.clone())));

    let routes = Routes::new(services::runtime(Arc::clone(&node)))
        .add_service(services::image(Arc::clone(&node)))
        .prepare();
    let mut terminate = signal(SignalKind::terminate()).during(|| "wait for SIGTERM".to_owned())?;
    let mut interrupt = signal(SignalKind::interrupt()).during(|| "wait for SIGINT".to_owned())?;
    let hangup = signal(SignalKind::hangup()).during(|| "wait for SIGHUP".to_owned())?;
    let reloads = signal(SignalKind::hangup()).during(|| "wait for SIGHUP".to_owned())?;
    let reloading = tokio::spawn(reload(Reload::new(source, &node), reloads));
    let scraping = metrics_listener
        .map(|listener| tokio::spawn(metrics::listener::serve(Arc::clone(&node), listener)));
    let accepting = tokio::spawn(accept(listener, routes, ending));
    notify("READY=1");
    log::info!(
        "rrun-cri {} serves {} with {} pods and {} containers",
        env!("CARGO_PKG_VERSION"),
        socket.display(),
        node.sandboxes().len(),
        node.containers().len()
    );
    let preload = tokio::spawn(preload(Arc::clone(&node), hangup));
    tokio::select! {
        _ = terminate.recv() => log::info!("received SIGTERM: the server stops; containers continue to run"),
        _ = interrupt.recv() => log::info!("received SIGINT: the server stops; containers continue to run"),
    }
    preload.abort();
    reloading.abort();
    if let Some(scraping) = scraping {
        scraping.abort();
    }
    notify("STOPPING=1");
    let _ = std::fs::remove_file(&socket);
    let _ = end.send(true);
    // `closed` returns after all connections and sessions have ended and dropped their receivers of
    // the channel `end`. The timeout is needed because the event streams of GetContainerEvents
    // never end by themselves.
    let _ = tokio::time::timeout(CALLS_GRACE, async {
        let _ = accepting.await;
        end.closed().await;
    })
    .await;
    Ok(())
}

/// Opens the store, the images, the network and SELinux. This call blocks on disk I/O. The call
/// delays no client, because the server does not serve clients yet.
fn open_node(config: Config) -> Result<Arc<Node>> {
    let store = Store::open(&config.root.join("meta.redb"))?;
    let registries = Registries::new(&config.registry_config_path);
    let images = Images::open(
        &config.root,
        store.clone(),
        registries,
        config.image.clone(),
    )?;
    images.on_pull_end(metrics::pull_ended);
    preflight::warn(&config);
    let network = network(&config, &store)?;
    let selinux = Selinux::open(config.enable_selinux, config.selinux_category_range)?;
    Ok(Arc::new(Node::new(config, store, images, network, selinux)))
}

/// Listens for streams. Ensures that no pod receives the connections to the server's own listeners.
async fn listen_for_streams(
    node: &Node,
    metrics: Option<&TcpListener>,
) -> Result<streaming::server::Server> {
    let streams = streaming::server::Server::listen(node).await?;
    let mut listeners = vec![streams.listener()?];
    if let Some(metrics) = metrics {
        let address = metrics.local_addr();
        listeners.push(Listener {
            key: "metrics_listen",
            address: address.during(|| "read the address of the metrics listener".to_owned())?,
        });
    }
    node.network.protect(listeners);
    Ok(streams)
}

/// Accepts connections until `ending` becomes true, and serves each connection in a separate task.
///
/// The server of the crate tonic is not used, because tonic cancels a call at the client's deadline
/// (`grpc-timeout`). If tonic cancels the call before the client does, the client receives the
/// status Cancelled instead of DeadlineExceeded.
async fn accept(listener: UnixListener, routes: Routes, mut ending: watch::Receiver<bool>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = wait_until_true(&mut ending) => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // The most likely cause is a lack of file descriptors. Other connections free
                // descriptors when they are closed. The server therefore pauses, and then accepts
                // the next connection.
                log::error!(
                    "accept a connection on the CRI socket: {}",
                    describe(&error)
                );
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let routes = TowerToHyperService::new(routes.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let call = metrics::Call::begin(request.uri().path());
            let answer = routes.call(request);
            async move {
                let answer = answer.await?;
                // The response of a failed call contains the call's gRPC status in the headers. If
                // a response stream fails later, the call still counts as a success.
                call.answered(Status::from_header_map(answer.headers()));
                Ok::<_, std::convert::Infallible>(answer)
            }
        });
        let mut ending = ending.clone();
        tokio::spawn(async move {
            let stream = TokioIo::new(services::Connection::new(stream));
            let connection =
                http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service);
            let mut connection = std::pin::pin!(connection);
            let result = tokio::select! {
                result = connection.as_mut() => result,
                () = wait_until_true(&mut ending) => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = result {
                log::debug!("a client's connection to the CRI socket failed: {error}");
            }
        });
    }
}

/// Waits until the value of `ending` is true or its sender is dropped.
async fn wait_until_true(ending: &mut watch::Receiver<bool>) {
    let _ = ending.wait_for(|ending| *ending).await;
}

/// Imports the image archives in `ROOT/preload` at startup, and again at each SIGHUP.
async fn preload(node: Arc<Node>, mut hangup: Signal) {
    loop {
        node.images.preload().await;
        blocking("return free memory to the kernel", heap::give_back).await;
        if hangup.recv().await.is_none() {
            return;
        }
        log::info!("SIGHUP: searching for image archives to import and for CNI configurations");
        node.network.reload().await;
    }
}

/// Reads the configuration again at each SIGHUP.
async fn reload(mut reload: Reload, mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        let since_boot = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let microseconds = since_boot.tv_sec * 1_000_000 + since_boot.tv_nsec / 1000;
        notify(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
        let work = move || (reload.run(), reload);
        let wrong;
        (wrong, reload) = blocking("read the configuration again", work).await;
        // `systemctl status` displays the text after `STATUS=`. This text can have only one line,
        // sd_notify(3).
        let status = wrong.unwrap_or_default().replace('\n', " ");
        notify(&format!("READY=1\nSTATUS={status}"));
    }
}

fn network(config: &Config, store: &Store) -> Result<PodNetwork> {
    let namespaces = config.namespaces();
    let embedded = EmbeddedNetwork::open(store.clone(), config.network.clone())?;
    let cni = Cni::open(
        store.clone(),
        config.cni.clone(),
        config.cni_conf_dir.clone(),
        config.cni_bin_dirs(),
        namespaces.clone(),
    )?;
    let mode = config.network.mode;
    Ok(PodNetwork::new(mode, embedded, cni, namespaces))
}

/// Locks the directory against use by a second server. A killed server keeps its lock until the
/// kernel has freed the server's memory. This function therefore waits up to `LOCK_TIMEOUT` for the
/// lock.
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
            Err(rustix::io::Errno::WOULDBLOCK) if begin.elapsed() < LOCK_TIMEOUT => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::internal(format!(
                    "another rrun-cri process uses {}: it has locked {}",
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

/// Binds the CRI socket with access for root only, and replaces a socket file on which no server
/// listens.
async fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).during(what)?;
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(Error::internal(format!(
            "{}: another server already listens on this socket",
            what()
        )));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).during(what);
        }
        _ => {}
    }
    // The socket first gets a temporary name. Clients therefore can't connect before the server has
    // set the socket's mode.
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let _ = std::fs::remove_file(&name);
    let listener = UnixListener::bind(&name).during(what)?;
    std::fs::set_permissions(&name, std::fs::Permissions::from_mode(0o600)).during(what)?;
    std::fs::rename(&name, path).during(what)?;
    Ok(listener)
}

/// Reports the server's state to systemd, see sd_notify(3). If systemd did not start the server,
/// nothing is sent.
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
        log::warn!("report {state} to systemd: {error}");
    }
}
