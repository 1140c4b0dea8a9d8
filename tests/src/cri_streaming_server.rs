//! The streaming server itself: TLS, idle clients, long messages, the node's ports.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use nix::sys::signal::Signal;

use crate::cri_calls::Calls;
use crate::cri_images_registries::{OPENSSL, certificates};
use crate::cri_streaming::{
    TRANSPORTS, count_processes, exec_url, message, reads, waiting, websocket,
};
use crate::machine::{Result, command, deadline, rounds, wait_for};
use crate::needs::Test;
use crate::node::{CRICTL, IMAGES, Node, REGISTRY, SERVER, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[
    test!(streams_over_tls, CRICTL, SERVER, REGISTRY, IMAGES, OPENSSL),
    test!(an_idle_stream_is_closed, CRICTL, SERVER, REGISTRY, IMAGES),
    test!(a_long_message_is_refused, CRICTL, SERVER, REGISTRY, IMAGES),
    test!(
        the_node_s_ports_are_forwarded,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        a_gigabyte_goes_both_ways,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
        OPENSSL
    ),
];

/// Starts the server again with these lines in its configuration.
fn configure(node: &mut Node, lines: &str) -> Result {
    node.kill_server()?;
    let file = node.join("config.toml");
    let text = fs::read_to_string(&file)?;
    fs::write(&file, format!("{lines}\n{text}"))?;
    node.start_server()
}

fn streams_over_tls() -> Result {
    on_a_node(|node| {
        if !is_rrun() {
            return Ok(());
        }
        certificates(&node.join(""))?;
        let [cert, key] = ["server.pem", "server.key"].map(|name| node.join(name));
        let lines = format!("stream_tls_cert = {cert:?}\nstream_tls_key = {key:?}");
        configure(node, &lines)?;
        let id = waiting(node, "tls")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["true"])?;
        ensure!(url.starts_with("https://127.0.0.1:"), "URL {url}");
        // crictl wants a certificate of its own, and the server none.
        let [ca, cert, key] = ["ca.pem", "client.pem", "client.key"]
            .map(|name| node.join(name).display().to_string());
        for transport in TRANSPORTS {
            let exec = |name: &str| {
                node.crictl(&["exec", "--transport", transport, "--tls-ca", &ca])
                    .args(["--tls-cert", &cert, "--tls-key", &key, "--tls-sni", name])
                    .args(["-i", &id, "cat"])
                    .stdin("typed")
            };
            ensure_eq!(exec("127.0.0.1").ok()?.stdout, "typed", "over {transport}");
            let other = exec("other.example").end()?;
            ensure!(
                other.code != 0 && other.told().contains("certificate"),
                "another's certificate over {transport}: {}",
                other.told()
            );
        }
        // Who speaks no TLS gets nothing.
        let host = url.trim_start_matches("https://");
        let mut plain = TcpStream::connect(host.split('/').next().unwrap_or_default())?;
        plain.set_read_timeout(Some(deadline()))?;
        write!(plain, "GET /exec/x HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut answer = Vec::new();
        let _ = plain.read_to_end(&mut answer);
        ensure!(!answer.starts_with(b"HTTP"), "answered {answer:?}");
        Ok(())
    })
}

fn an_idle_stream_is_closed() -> Result {
    on_a_node(|node| {
        if !is_rrun() {
            return Ok(());
        }
        configure(node, "stream_idle_timeout = 1")?;
        let id = waiting(node, "idle")?;
        let cgroup = node.cgroup(&id)?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["cat"])?;
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        stream.write_all(&message(0, b"hello\n"))?;
        reads(&mut stream, b"\x01hello\n")?;
        // Nobody says anything any more.
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(format!("not closed within {:?}", deadline()).into());
            }
            _ => {}
        }
        wait_for("its command to end", || {
            Ok((count_processes(&cgroup)? == 1).then_some(()))
        })?;
        wait_for("the log to tell", || {
            Ok(node.log().contains("nothing moved for 1 s").then_some(()))
        })?;
        Ok(())
    })
}

fn a_long_message_is_refused() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "long")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["cat"])?;
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        // The head of a message of 64 MiB: nobody waits for the rest, or keeps room for it.
        let mut head = vec![0x82, 0x80 | 127];
        head.extend_from_slice(&(64_u64 << 20).to_be_bytes());
        head.extend_from_slice(&[0; 4]);
        stream.write_all(&head)?;
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Err(format!("not closed within {:?}", deadline()).into())
            }
            _ => Ok(()),
        }
    })
}

fn the_node_s_ports_are_forwarded() -> Result {
    on_a_node(|node| {
        let mut pod = node.pod("host");
        pod["linux"]["security_context"]["namespace_options"]["network"] = 2.into();
        if let Some(pod) = pod.as_object_mut() {
            // It would be the node's.
            pod.remove("hostname");
        }
        let pod_id = node.runp(&pod)?;
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = stream.and_then(|mut stream| stream.write_all(b"the node's"));
            }
        });
        for (local, transport) in (18100_u16..).zip(TRANSPORTS) {
            let mut forward = node
                .crictl(&["port-forward", "--transport", transport, &pod_id])
                .arg(format!("{local}:{port}"))
                .start()?;
            let said = wait_for("the forwarded port", || {
                ensure!(forward.lives(), "it ended: {}", forward.stderr());
                let Ok(mut stream) = TcpStream::connect(("127.0.0.1", local)) else {
                    return Ok(None);
                };
                stream.set_read_timeout(Some(deadline()))?;
                let mut said = String::new();
                stream.read_to_string(&mut said)?;
                Ok(Some(said))
            });
            forward.signal(Signal::SIGKILL);
            ensure_eq!(said?, "the node's", "what came over {transport}");
        }
        Ok(())
    })
}

/// 1 GB with RRUN_TEST_FULL.
fn a_gigabyte_goes_both_ways() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "gigabyte")?;
        let bytes = rounds(32 << 20, 1 << 30);
        let (file, back) = (node.join("sent"), node.join("back"));
        let make =
            "openssl enc -aes-128-ctr -K 00 -iv 00 -in /dev/zero 2>/dev/null | head -c $0 >$1";
        command("sh", ["-c", make, &bytes.to_string()])
            .arg(&file)
            .ok()?;
        let endpoint = format!("unix://{}", node.socket().display());
        for transport in TRANSPORTS {
            let script = "crictl --runtime-endpoint $0 exec --transport $1 -i $2 cat <$3 >$4; \
                          cmp $3 $4";
            command("sh", ["-c", script, &endpoint, transport, &id])
                .arg(&file)
                .arg(&back)
                .within(deadline() * 20)
                .ok()?;
        }
        Ok(())
    })
}
