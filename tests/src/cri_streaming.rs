//! Exec, attach and port-forward, as people use them: by crictl over SPDY and over WebSocket, in a
//! real terminal; and clients that behave badly.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use rrun_proto::v1::{AttachRequest, ExecRequest, ReopenContainerLogRequest};

use crate::cri_calls::Calls;
use crate::machine::{Result, Running, command, deadline, wait_for};
use crate::needs::{Need, Test};
use crate::node::{BUSYBOX, CRICTL, IMAGES, Node, REGISTRY, SERVER, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub const TMUX: Need = Need::Program("tmux");
const SOCAT: Need = Need::Program("socat");
const CRITEST: Need = Need::Program("critest");

pub const TESTS: &[Test] = &[
    test!(
        an_exec_has_streams_and_an_exit_code,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        an_exec_carries_much_both_ways,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        a_terminal_is_resized,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
        TMUX
    ),
    test!(
        a_client_that_goes_takes_its_command_along,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        many_attach_and_one_detaches,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        an_attach_works_after_the_server_was_killed,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        stdin_once_ends_with_its_first_client,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        a_log_is_rotated_while_clients_follow,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        a_slow_client_does_not_slow_the_container,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(ports_are_forwarded, CRICTL, SERVER, REGISTRY, IMAGES, SOCAT),
    test!(
        a_stream_s_request_is_checked,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        garbage_and_slow_heads_are_closed,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        two_hundred_sessions_at_once,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        critest_s_streaming_tests_pass,
        CRITEST,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
];

/// critest's own tests, over SPDY and with each WebSocket flag.
fn critest_s_streaming_tests_pass() -> Result {
    on_a_node(|node| {
        let endpoint = format!("unix://{}", node.socket().display());
        for flag in [
            None,
            Some("-websocket-exec"),
            Some("-websocket-attach"),
            Some("-websocket-portforward"),
        ] {
            command("critest", ["-ginkgo.focus", "Streaming"])
                .args(["-runtime-endpoint", &endpoint])
                .args(flag)
                .within(deadline() * 4)
                .ok()?;
        }
        Ok(())
    })
}

pub const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// A container that waits, in a pod of its own.
pub fn waiting(node: &Node, name: &str) -> Result<String> {
    node.pull(BUSYBOX)?;
    let pod = node.pod(name);
    let pod_id = node.runp(&pod)?;
    node.run(&pod_id, &pod, &node.container("c", &["/inside", "wait"]))
}

fn an_exec_has_streams_and_an_exit_code() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "exec")?;
        for transport in TRANSPORTS {
            let exec = |options: &[&str], command: &[&str]| {
                node.crictl(&["exec", "--transport", transport])
                    .args(options)
                    .arg(&id)
                    .args(command)
            };
            let both = exec(&[], &["sh", "-c", "echo out; echo err >&2"]).ok()?;
            ensure_eq!(both.stdout, "out\n", "stdout over {transport}");
            ensure_eq!(both.stderr, "err\n", "stderr over {transport}");
            let failed = exec(&[], &["sh", "-c", "exit 3"]).end()?;
            ensure!(
                failed.code != 0 && failed.told().contains('3'),
                "over {transport}: {}",
                failed.told()
            );
            let cat = exec(&["-i"], &["cat"]).stdin("typed").ok()?;
            ensure_eq!(cat.stdout, "typed", "stdin and stdout over {transport}");
            // Without -i nothing is there to read, and cat ends.
            let none = exec(&[], &["cat"]).stdin("typed").ok()?;
            ensure_eq!(none.stdout, "", "output without stdin over {transport}");
            let nothing = exec(&[], &["/no/such/program"]).end()?;
            ensure!(
                nothing.code != 0 && nothing.stderr.contains("/no/such/program"),
                "over {transport}: {}",
                nothing.told()
            );
            // One that leaves a child behind with its output open is not waited for.
            exec(&[], &["sh", "-c", "sleep 1000 & echo done"])
                .ok()?
                .says("done")?;
        }
        Ok(())
    })
}

fn an_exec_carries_much_both_ways() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "much")?;
        let line = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n";
        let text = line.repeat((24 << 20) / line.len());
        let file = node.join("text");
        fs::write(&file, &text)?;
        let sum = command("sha256sum", ["-b"]).stdin(text.clone()).ok()?;
        let sum = sum.stdout.split(' ').next().unwrap_or_default().to_owned();
        for transport in TRANSPORTS {
            let exec = ["exec", "--transport", transport, "-i", &id];
            let there = node
                .crictl(&exec)
                .arg("sha256sum")
                .stdin(text.clone())
                .ok()?;
            ensure!(
                there.stdout.starts_with(&sum),
                "over {transport} there came {}, not {sum}",
                there.stdout
            );
            let back = node.crictl(&exec).arg("cat").stdin(text.clone()).ok()?;
            ensure!(
                back.stdout == text,
                "over {transport} {} of {} bytes came back, or others",
                back.stdout.len(),
                text.len()
            );
        }
        Ok(())
    })
}

/// A terminal that somebody could sit at.
pub struct Terminal(PathBuf);

impl Terminal {
    /// Its server listens on a socket next to this path: one that is on its way out takes no more
    /// sessions, and nothing tells when it has gone.
    pub fn open(socket: PathBuf, shell_command: &str) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let terminal = Terminal(socket.with_extension(number.to_string()));
        terminal.tmux(&["new-session", "-d", "-x", "80", "-y", "24", shell_command])?;
        Ok(terminal)
    }

    pub fn tmux(&self, args: &[&str]) -> Result<String> {
        let run = command("tmux", ["-f", "/dev/null", "-S"])
            .arg(&self.0)
            .args(args);
        Ok(run.ok()?.stdout)
    }

    pub fn types(&self, line: &str) -> Result {
        self.tmux(&["send-keys", line, "Enter"]).map(|_| ())
    }

    pub fn shows(&self, what: &str) -> Result {
        wait_for(&format!("{what:?} on the terminal"), || {
            let screen = self.tmux(&["capture-pane", "-p"])?;
            ensure!(screen.lines().any(|line| line.trim() == what), "{screen}");
            Ok(Some(()))
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

fn a_terminal_is_resized() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("terminal");
        let pod_id = node.runp(&pod)?;
        let mut shell = node.container("shell", &["sh"]);
        for option in ["tty", "stdin"] {
            shell[option] = true.into();
        }
        let id = node.run(&pod_id, &pod, &shell)?;
        let crictl = format!(
            "crictl --runtime-endpoint unix://{}",
            node.socket().display()
        );
        for transport in TRANSPORTS {
            for what in [
                format!("exec --transport {transport} -it {id} sh"),
                format!("attach --transport {transport} -it {id}"),
            ] {
                let terminal = Terminal::open(node.join("tmux"), &format!("{crictl} {what}"))?;
                // Until somebody reads it.
                wait_for("a prompt", || {
                    terminal.types("echo pro''mpt")?;
                    std::thread::sleep(Duration::from_millis(200));
                    let screen = terminal.tmux(&["capture-pane", "-p"])?;
                    Ok(screen
                        .lines()
                        .any(|line| line.trim() == "prompt")
                        .then_some(()))
                })?;
                terminal.types("clear; stty size")?;
                terminal.shows("24 80")?;
                terminal.tmux(&["resize-window", "-x", "101", "-y", "31"])?;
                wait_for("the new size", || {
                    terminal.types("clear; stty size")?;
                    std::thread::sleep(Duration::from_millis(200));
                    let screen = terminal.tmux(&["capture-pane", "-p"])?;
                    Ok(screen
                        .lines()
                        .any(|line| line.trim() == "31 101")
                        .then_some(()))
                })?;
            }
        }
        Ok(())
    })
}

/// The processes in a cgroup and in those right below it, where execs are.
pub fn count_processes(cgroup: &Path) -> Result<usize> {
    let mut count = fs::read_to_string(cgroup.join("cgroup.procs"))?
        .lines()
        .count();
    for entry in fs::read_dir(cgroup)? {
        // One may go meanwhile, when it is empty.
        let inner = fs::read_to_string(entry?.path().join("cgroup.procs"));
        count += inner.map_or(0, |all| all.lines().count());
    }
    Ok(count)
}

fn a_client_that_goes_takes_its_command_along() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "gone")?;
        let cgroup = node.cgroup(&id)?;
        let processes = || count_processes(&cgroup);
        ensure_eq!(processes()?, 1, "processes before");
        for transport in TRANSPORTS {
            for script in [
                // With a child, and one that nothing but SIGKILL ends. Neither reads what it is
                // sent, which is more than a pipe holds. (More than the sockets hold, too, and
                // nobody can see past it that the client has gone, before TCP gives up.)
                "sleep 1000 & sleep 1001",
                "trap '' HUP; exec sleep 1000",
            ] {
                let exec = [
                    "exec",
                    "--transport",
                    transport,
                    "-i",
                    &id,
                    "sh",
                    "-c",
                    script,
                ];
                let client = node.crictl(&exec).stdin(vec![b'x'; 150_000]).start()?;
                wait_for(
                    "the command to run",
                    || Ok((processes()? > 1).then_some(())),
                )?;
                client.signal(Signal::SIGKILL);
                wait_for("the command to end", || {
                    Ok((processes()? == 1).then_some(()))
                })?;
            }
        }
        Ok(())
    })
}

/// A container whose shell answers each line.
fn answering(node: &Node, name: &str, once: bool) -> Result<String> {
    node.pull(BUSYBOX)?;
    let pod = node.pod(name);
    let pod_id = node.runp(&pod)?;
    let script = "while read line; do echo got $line; done; echo end";
    let mut container = node.container("c", &["sh", "-c", script]);
    container["stdin"] = true.into();
    container["stdin_once"] = once.into();
    node.run(&pod_id, &pod, &container)
}

/// An attached crictl that types what is written to a file of its own.
fn attached(node: &Node, transport: &str, id: &str) -> Result<Running> {
    let endpoint = format!("unix://{}", node.socket().display());
    // The pipe stays open until the client is ended.
    let script = "mkfifo \"$3\"; exec 3<>\"$3\"; exec crictl --runtime-endpoint $0 attach --transport $1 -i $2 <\"$3\"";
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let fifo = node.join(&format!("typed-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
    command("sh", ["-c", script, &endpoint, transport, id])
        .arg(&fifo)
        .start()
}

fn says(client: &mut Running, what: &str) -> Result {
    wait_for(&format!("a client to get {what:?}"), || {
        ensure!(client.lives(), "it ended: {}", client.stderr());
        Ok(client.stdout().contains(what).then_some(()))
    })
}

/// Types a line by a client of its own, which goes with the end of what it types.
fn types(node: &Node, transport: &str, id: &str, line: &str) -> Result {
    let attach = ["attach", "--transport", transport, "-i", id];
    node.crictl(&attach).stdin(format!("{line}\n")).ok()?;
    Ok(())
}

fn many_attach_and_one_detaches() -> Result {
    on_a_node(|node| {
        let id = answering(node, "many", false)?;
        let mut clients = Vec::new();
        for transport in TRANSPORTS {
            for _ in 0..2 {
                clients.push(attached(node, transport, &id)?);
            }
        }
        // Whoever is attached late has missed what was said early.
        for (round, transport) in ["spdy", "websocket"].into_iter().enumerate() {
            let line = format!("line{round}");
            wait_for("all clients to be attached", || {
                types(node, transport, &id, &line)?;
                let all = clients
                    .iter_mut()
                    .all(|client| client.stdout().contains(&line));
                Ok(all.then_some(()))
            })?;
        }
        let first = clients.remove(0);
        first.signal(Signal::SIGKILL);
        first.end()?;
        types(node, "spdy", &id, "later")?;
        for client in &mut clients {
            says(client, "got later")?;
        }
        ensure_eq!(
            node.status(&id)?["state"],
            "CONTAINER_RUNNING",
            "state after a client has gone"
        );
        // The container's end is the clients' end.
        node.asks(&["stop", "--timeout", "0", &id])?;
        for client in clients {
            client.end()?;
        }
        Ok(())
    })
}

fn an_attach_works_after_the_server_was_killed() -> Result {
    on_a_node(|node| {
        let id = answering(node, "restart", false)?;
        types(node, "spdy", &id, "before")?;
        node.kill_server()?;
        node.start_server()?;
        let mut client = attached(node, "spdy", &id)?;
        wait_for("the container to answer", || {
            types(node, "websocket", &id, "after")?;
            Ok(client.stdout().contains("got after").then_some(()))
        })?;
        client.signal(Signal::SIGKILL);
        ensure!(
            node.log_of("restart", "c")?.contains("got before"),
            "the log lacks what was said before"
        );
        Ok(())
    })
}

fn stdin_once_ends_with_its_first_client() -> Result {
    on_a_node(|node| {
        for (name, transport) in [("once-spdy", "spdy"), ("once-websocket", "websocket")] {
            let id = answering(node, name, true)?;
            let attach = ["attach", "--transport", transport, "-i", &id];
            let client = node.crictl(&attach).stdin("one\ntwo\n").ok()?;
            ensure_eq!(
                client.stdout,
                "got one\ngot two\nend\n",
                "what {transport} got"
            );
            ensure_eq!(node.exited(&id)?["exitCode"], 0, "exit code");
        }
        Ok(())
    })
}

fn a_log_is_rotated_while_clients_follow() -> Result {
    on_a_node(|node| {
        let id = answering(node, "rotated", false)?;
        let mut client = attached(node, "spdy", &id)?;
        wait_for("the client to be attached", || {
            types(node, "spdy", &id, "hello")?;
            Ok(client.stdout().contains("got hello").then_some(()))
        })?;
        let mut follows = node.crictl(&["logs", "--follow", &id]).start()?;
        says(&mut follows, "got hello")?;
        let log = node.join("logs/rotated/c.log");
        fs::rename(&log, node.join("logs/rotated/c.log.1"))?;
        let calls = Calls::new(node)?;
        let mut runtime = calls.runtime();
        let request = ReopenContainerLogRequest {
            container_id: id.clone(),
        };
        calls.wait(async move { runtime.reopen_container_log(request).await })??;
        types(node, "spdy", &id, "rotated")?;
        says(&mut client, "got rotated")?;
        says(&mut follows, "got rotated")?;
        ensure!(
            fs::read_to_string(&log)?.contains("got rotated"),
            "the new log lacks the new line"
        );
        follows.signal(Signal::SIGKILL);
        client.signal(Signal::SIGKILL);
        Ok(())
    })
}

/// A client by hand: a WebSocket whose handshake is done.
pub fn websocket(url: &str, protocol: &str) -> Result<TcpStream> {
    let (host, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or(format!("not a URL: {url}"))?;
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(deadline()))?;
    write!(
        stream,
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
    )?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    ensure!(head.starts_with("HTTP/1.1 101"), "the handshake: {head}");
    ensure!(
        head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        "RFC 6455's example has another answer: {head}"
    );
    Ok(stream)
}

/// Reads messages until one has this in it; each is a channel's number and data.
pub fn reads(stream: &mut TcpStream, what: &[u8]) -> Result {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    let mut from = 0;
    while !all[from..].windows(what.len()).any(|window| window == what) {
        from = all.len().saturating_sub(what.len());
        let count = stream.read(&mut buffer)?;
        ensure!(
            count > 0,
            "closed after {:?}",
            String::from_utf8_lossy(&all)
        );
        all.extend_from_slice(&buffer[..count]);
    }
    Ok(())
}

/// A client's message, masked with zeros.
pub fn message(channel: u8, data: &[u8]) -> Vec<u8> {
    let length = u8::try_from(data.len() + 1).unwrap_or(0);
    let mut message = vec![0x82, 0x80 | length, 0, 0, 0, 0, channel];
    message.extend_from_slice(data);
    message
}

pub fn exec_url(calls: &Calls, id: &str, words: &[&str]) -> Result<String> {
    let mut runtime = calls.runtime();
    let request = ExecRequest {
        container_id: id.to_owned(),
        cmd: words.iter().map(ToString::to_string).collect(),
        stdin: true,
        stdout: true,
        ..ExecRequest::default()
    };
    let answer = calls.wait(async move { runtime.exec(request).await })??;
    Ok(answer.into_inner().url)
}

fn a_slow_client_does_not_slow_the_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("slow");
        let pod_id = node.runp(&pod)?;
        let script = "read line; yes 0123456789abcdef | head -n 1000000; echo all written";
        let mut container = node.container("c", &["sh", "-c", script]);
        container["stdin"] = true.into();
        let id = node.run(&pod_id, &pod, &container)?;
        let calls = Calls::new(node)?;
        let mut runtime = calls.runtime();
        let request = AttachRequest {
            container_id: id.clone(),
            stdin: true,
            stdout: true,
            ..AttachRequest::default()
        };
        let answer = calls.wait(async move { runtime.attach(request).await })??;
        let mut client = websocket(&answer.into_inner().url, "v4.channel.k8s.io")?;
        // By itself the kernel might find room for everything.
        setsockopt(&client, sockopt::RcvBuf, &(64 << 10))?;
        client.write_all(&message(0, b"go\n"))?;
        // 17 MB, and nobody reads: the container ends all the same.
        ensure_eq!(node.exited(&id)?["exitCode"], 0, "exit code");
        ensure!(
            node.log_of("slow", "c")?.ends_with("all written\n"),
            "the log is not whole"
        );
        if is_rrun() {
            reads(&mut client, b"this client reads too slowly")?;
        }
        Ok(())
    })
}

fn ports_are_forwarded() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        node.pull(BUSYBOX)?;
        let pod = node.pod("ports");
        let pod_id = node.runp(&pod)?;
        let mut web = node.container("web", &[]);
        web["image"]["image"] = WEB.into();
        node.run(&pod_id, &pod, &web)?;
        // One that listens on IPv6 only, and answers when all has been said: half-close is kept.
        let script =
            "while true; do nc -l -p 6000 -s ::1 -e sh -c 'sum=$(sha256sum); echo $sum'; done";
        let sums = node.container("sums", &["sh", "-c", script]);
        node.run(&pod_id, &pod, &sums)?;
        let text = "x".repeat(3 << 20);
        let sum = command("sha256sum", ["-b"])
            .stdin(text.clone())
            .ok()?
            .stdout;
        let sum = sum.split(' ').next().unwrap_or_default().to_owned();
        for (number, transport) in TRANSPORTS.into_iter().enumerate() {
            let (first, second, third) = (18000 + number, 18010 + number, 18020 + number);
            let mut forward = node
                .crictl(&["port-forward", "--transport", transport, &pod_id])
                .args([format!("{first}:5000"), format!("{second}:6000")])
                .start()?;
            let url = format!("http://127.0.0.1:{first}/");
            let page = wait_for("the page by a forwarded port", || {
                ensure!(forward.lives(), "it ended: {}", forward.stderr());
                command("curl", ["-fsS", &url]).ok().map(Some)
            })?;
            ensure_eq!(page.text(), "hello from rrun", "page over {transport}");
            let many: Vec<_> = (0..20)
                .map(|_| command("curl", ["-fsS", &url]).start())
                .collect::<Result<_>>()?;
            for one in many {
                let page = one.end()?;
                ensure_eq!(
                    page.text(),
                    "hello from rrun",
                    "one of many: {}",
                    page.told()
                );
            }
            forward.signal(Signal::SIGTERM);
            forward.end()?;
            // A port at which nobody listens: the client is told.
            let mut refused = node
                .crictl(&["port-forward", "--transport", transport, &pod_id])
                .arg(format!("{third}:81"))
                .start()?;
            wait_for("the refusal", || {
                let _ = command(
                    "curl",
                    ["-sS", "-m", "2", &format!("http://127.0.0.1:{third}/")],
                )
                .end()?;
                let said = refused.stderr() + &refused.stdout();
                Ok(said.contains("refused").then_some(()))
            })?;
            refused.signal(Signal::SIGKILL);
            let mut forward = node
                .crictl(&["port-forward", "--transport", transport, &pod_id])
                .arg(format!("{second}:6000"))
                .start()?;
            let address = format!("TCP:127.0.0.1:{second}");
            let answer = wait_for("the sum by a forwarded port", || {
                ensure!(forward.lives(), "it ended: {}", forward.stderr());
                let socat = command("socat", ["-t", "20", "-", &address]);
                let answer = socat.stdin(text.clone()).ok()?;
                Ok(answer.stdout.contains(&sum).then_some(()))
            });
            forward.signal(Signal::SIGKILL);
            answer?;
        }
        Ok(())
    })
}

fn a_stream_s_request_is_checked() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "checked")?;
        let calls = Calls::new(node)?;
        let ask = |change: &dyn Fn(&mut ExecRequest)| {
            let mut request = ExecRequest {
                container_id: id.clone(),
                cmd: vec!["true".to_owned()],
                stdout: true,
                ..ExecRequest::default()
            };
            change(&mut request);
            let mut runtime = calls.runtime();
            let answer = calls.wait(async move { runtime.exec(request).await })?;
            Ok::<_, crate::machine::Failed>(match answer {
                Ok(answer) => answer.into_inner().url,
                Err(status) => format!("{:?}", status.code()),
            })
        };
        let url = ask(&|_| {})?;
        ensure!(url.starts_with("http://127.0.0.1:"), "URL {url}");
        ensure_eq!(
            ask(&|request| request.stdout = false)?,
            "InvalidArgument",
            "no stream"
        );
        let both = |request: &mut ExecRequest| (request.tty, request.stderr) = (true, true);
        ensure_eq!(ask(&both)?, "InvalidArgument", "a terminal with stderr");
        if is_rrun() {
            ensure_eq!(
                ask(&|request| request.container_id = "nosuch".to_owned())?,
                "NotFound",
                "no such container"
            );
        }
        // A token is good once.
        drop(websocket(&url, "v5.channel.k8s.io")?);
        ensure!(
            websocket(&url, "v5.channel.k8s.io").is_err(),
            "a token was good twice"
        );
        node.asks(&["stop", "--timeout", "0", &id])?;
        if is_rrun() {
            ensure_eq!(
                ask(&|_| {})?,
                "FailedPrecondition",
                "exec in what has ended"
            );
        }
        Ok(())
    })
}

fn garbage_and_slow_heads_are_closed() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "garbage")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["cat"])?;
        let host = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split('/').next());
        let host = host.ok_or(format!("not a URL: {url}"))?.to_owned();
        let closed = |mut stream: TcpStream| -> Result {
            stream.set_read_timeout(Some(deadline()))?;
            let mut rest = Vec::new();
            match stream.read_to_end(&mut rest) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    Err(format!("not closed within {:?}", deadline()).into())
                }
                _ => Ok(()),
            }
        };
        let mut garbage = TcpStream::connect(&host)?;
        garbage
            .write_all(&[0x80; 100_000])
            .or(Ok::<_, std::io::Error>(()))?;
        closed(garbage)?;
        if is_rrun() {
            // Nothing, and half a head.
            let silent = TcpStream::connect(&host)?;
            let mut half = TcpStream::connect(&host)?;
            write!(half, "GET /exec/x HTTP/1.1\r\nHost: x\r\n")?;
            closed(silent)?;
            closed(half)?;
        }
        // Garbage after the upgrade.
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        stream.write_all(&[0xff; 100])?;
        closed(stream)?;
        // The server is well.
        let url = exec_url(&calls, &id, &["cat"])?;
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        stream.write_all(&message(0, b"hello\n"))?;
        reads(&mut stream, b"\x01hello\n")
    })
}

fn two_hundred_sessions_at_once() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "sessions")?;
        let calls = Calls::new(node)?;
        let mut sessions = Vec::new();
        for _ in 0..200 {
            let url = exec_url(&calls, &id, &["cat"])?;
            sessions.push(websocket(&url, "v5.channel.k8s.io")?);
        }
        for (number, session) in sessions.iter_mut().enumerate() {
            let line = format!("hello {number}\n");
            session.write_all(&message(0, line.as_bytes()))?;
        }
        for (number, session) in sessions.iter_mut().enumerate() {
            reads(session, format!("\x01hello {number}\n").as_bytes())?;
        }
        // The clients go; so do the commands.
        drop(sessions);
        let cgroup = node.cgroup(&id)?;
        wait_for("all commands to end", || {
            Ok((count_processes(&cgroup)? == 1).then_some(()))
        })?;
        Ok(())
    })
}
