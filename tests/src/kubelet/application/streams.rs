//! Checks of exec, attach, port-forward and logs through kubelet's own endpoint, over WebSocket and
//! SPDY.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;

use serde_json::Value;

use crate::support::application::tells;
use crate::support::kubelet::{Kubelet, logs, url};
use crate::support::machine::Result;
use crate::support::spdy::{FIN, SpdyClient};
use crate::support::websocket::{message, reads, websocket};
use crate::{ensure, ensure_eq};

fn by_websocket(path: &str, pod: &Value, rest: &str) -> Result<TcpStream> {
    websocket(&url(path, pod, rest), "v4.channel.k8s.io")
}

fn by_spdy(path: &str, pod: &Value, rest: &str) -> Result<SpdyClient> {
    let protocol = match path {
        "portForward" => "portforward.k8s.io",
        _ => "v4.channel.k8s.io",
    };
    SpdyClient::upgraded(&url(path, pod, rest), protocol)
}

/// Returns the part of an exec URL that names the container `container` and the command `words`.
fn query(container: &str, words: &[&str]) -> String {
    let escaped = |word: &str| {
        word.bytes()
            .map(|byte| format!("%{byte:02X}"))
            .collect::<String>()
    };
    let words = words
        .iter()
        .map(|word| format!("&command={}", escaped(word)));
    format!(
        "/{container}?input=1&output=1&error=1{}",
        words.collect::<String>()
    )
}

/// Runs a command in this container over SPDY, and returns the data of each stream. The stream
/// `error` contains the command's status.
pub(crate) fn exec(
    pod: &Value,
    container: &str,
    words: &[&str],
    input: &[u8],
) -> Result<BTreeMap<&'static str, String>> {
    let mut exec = by_spdy("exec", pod, &query(container, words))?;
    for kind in ["error", "stdin", "stdout", "stderr"] {
        exec.open(kind)?;
    }
    exec.sends("stdin", FIN, input)?;
    exec.all()
}

pub(crate) fn streams_work_through_kubelet(pod: &Value) -> Result {
    over_websockets(pod)?;
    over_spdy(pod)?;
    let log = logs(pod, "web")?;
    ensure!(
        log.contains("POST /fail/nothing"),
        "the container's log lacks the request that the test sent during the WebSocket attach: {log}"
    );
    ensure!(
        log.contains("POST /fail/nobody"),
        "the container's log lacks the request that the test sent during the SPDY attach: {log}"
    );
    Ok(())
}

fn over_websockets(pod: &Value) -> Result {
    let words = ["cat", "/config/greeting"];
    let mut exec = by_websocket("exec", pod, &query("web", &words))?;
    reads(&mut exec, b"hello from a file")?;
    let mut attach = by_websocket("attach", pod, "/web?output=1&error=1")?;
    // The readiness probe causes this log line every two seconds. Once the client receives this
    // line, it is attached to the container.
    reads(&mut attach, b"GET /ready")?;
    tells(pod, "/fail/nothing")?;
    reads(&mut attach, b"POST /fail/nothing")?;
    let mut port = by_websocket("portForward", pod, "?port=5000")?;
    port.write_all(&message(0, b"GET /ready HTTP/1.0\r\n\r\n"))?;
    reads(&mut port, b"ok\n")
}

fn over_spdy(pod: &Value) -> Result {
    let script = "cat; echo err >&2; exit 3";
    let streams = exec(pod, "web", &["sh", "-c", script], b"typed")?;
    let of = |kind| streams.get(kind).map(String::as_str).unwrap_or_default();
    ensure_eq!(of("stdout"), "typed", "stdout of the command that exec ran");
    ensure_eq!(of("stderr"), "err\n", "stderr of the command that exec ran");
    let status: Value = serde_json::from_str(of("error"))?;
    let code = status.pointer("/details/causes/0/message").cloned();
    ensure_eq!(
        code,
        Some("3".into()),
        "the exit code of the command, in the status {status} from the stream `error`"
    );

    let mut attach = by_spdy("attach", pod, "/web?output=1&error=1")?;
    for kind in ["error", "stdout", "stderr"] {
        attach.open(kind)?;
    }
    let mut shows = |line: &str| -> Result {
        let output = attach.until(|streams| streams.values().any(|text| text.contains(line)));
        output.map(drop)
    };
    shows("GET /ready")?;
    tells(pod, "/fail/nobody")?;
    shows("POST /fail/nobody")?;

    let mut port = by_spdy("portForward", pod, "")?;
    for kind in ["error", "data"] {
        port.open_with(kind, &[("port", "5000"), ("requestid", "1")])?;
    }
    port.sends("error", FIN, b"")?;
    port.sends("data", FIN, b"GET /ready HTTP/1.0\r\n\r\n")?;
    let streams = port.all()?;
    let page = streams.get("data").map(String::as_str).unwrap_or_default();
    ensure!(
        page.ends_with("ok\n"),
        "the forwarded port returned a wrong page: {streams:?}"
    );
    Ok(())
}

/// Checks that kubelet is connected to the CRI server's stream of container events.
pub(crate) fn kubelet_receives_events(kubelet: &Kubelet) -> Result {
    let metrics = kubelet.reads("/metrics")?;
    let count = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(' ').nth(1)?.parse::<f64>().ok())
    };
    let connected = count("kubelet_evented_pleg_connection_success_count");
    let failed = count("kubelet_evented_pleg_connection_error_count");
    ensure!(
        connected >= Some(1.0) && failed.unwrap_or(0.0) < 1.0,
        "kubelet does not use the event stream: {connected:?} connections succeeded, {failed:?} failed"
    );
    Ok(())
}
