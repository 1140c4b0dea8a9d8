//! From an HTTP request to what both sides will speak.

use hyper::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use hyper::{Response, StatusCode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::remotecommand::Version;
use super::websocket::Codec;

const STREAM_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_VERSIONS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-versions");
const WS_PROTOCOL: HeaderName = HeaderName::from_static("sec-websocket-protocol");
const WS_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const WS_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
const WS_VERSION: HeaderName = HeaderName::from_static("sec-websocket-version");

const SPDY: &str = "SPDY/3.1";
const PORT_FORWARD: &str = "portforward.k8s.io";
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// The most protocols that a client may offer.
const MAX_OFFERED: usize = 32;

/// What will be spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// Exec and attach.
    Spdy(Version),
    WebSocket(Version, Codec),
    /// Port-forward.
    SpdyPorts,
    /// The same in a WebSocket.
    TunnelledPorts,
    /// A pair of channels for each port of the request.
    WebSocketPorts(Codec),
}

/// A refusal: what the client gets, and nothing has happened.
pub type Refused = Response<String>;

/// What a client and we can both speak for this, and the answer that says so.
pub fn negotiate(
    port_forward: bool,
    headers: &HeaderMap,
) -> Result<(Spoken, Response<String>), Box<Refused>> {
    let upgrade = text(headers, &UPGRADE).to_ascii_lowercase();
    if !list(headers, &CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade")) {
        let sentence = "this wants a connection upgrade to SPDY/3.1 or to a WebSocket";
        return Err(refuse(StatusCode::BAD_REQUEST, sentence));
    }
    match upgrade.as_str() {
        "websocket" => websocket(port_forward, headers),
        "spdy/3.1" => spdy(port_forward, headers),
        _ => {
            let sentence = format!("no upgrade to {upgrade:?}: SPDY/3.1 and websocket are served");
            Err(refuse(StatusCode::BAD_REQUEST, &sentence))
        }
    }
}

fn spdy(
    port_forward: bool,
    headers: &HeaderMap,
) -> Result<(Spoken, Response<String>), Box<Refused>> {
    let accepted: &[&str] = match port_forward {
        true => &[PORT_FORWARD],
        false => &[
            "v4.channel.k8s.io",
            "v3.channel.k8s.io",
            "v2.channel.k8s.io",
            "channel.k8s.io",
        ],
    };
    let offered: Vec<&str> = list(headers, &STREAM_VERSION).take(MAX_OFFERED).collect();
    let mut common = offered.iter().filter(|name| accepted.contains(name));
    // The first clients offered nothing.
    let name = match (common.next(), offered.is_empty()) {
        (Some(name), _) => name,
        (None, true) => "",
        (None, false) => {
            let sentence = format!("none of the protocols {offered:?} is spoken here");
            let mut refused = refuse(StatusCode::FORBIDDEN, &sentence);
            for name in accepted {
                let value = HeaderValue::from_static(name);
                refused.headers_mut().append(ACCEPTED_VERSIONS, value);
            }
            return Err(refused);
        }
    };
    let spoken = match (port_forward, name) {
        (true, _) => Spoken::SpdyPorts,
        (false, "v4.channel.k8s.io") => Spoken::Spdy(Version::V4),
        (false, "v3.channel.k8s.io") => Spoken::Spdy(Version::V3),
        (false, "v2.channel.k8s.io") => Spoken::Spdy(Version::V2),
        (false, _) => Spoken::Spdy(Version::V1),
    };
    let mut response = switching(SPDY);
    if let Ok(value) = HeaderValue::from_str(name)
        && !name.is_empty()
    {
        response.headers_mut().insert(STREAM_VERSION, value);
    }
    Ok((spoken, response))
}

fn websocket(
    port_forward: bool,
    headers: &HeaderMap,
) -> Result<(Spoken, Response<String>), Box<Refused>> {
    let key = text(headers, &WS_KEY);
    if text(headers, &WS_VERSION) != "13" || key.len() != 24 {
        let sentence = "a WebSocket of version 13 with a key of 16 bytes is wanted";
        return Err(refuse(StatusCode::BAD_REQUEST, sentence));
    }
    let binary = Codec::Binary { close: false };
    let known = |name: &str| {
        Some(match (port_forward, name) {
            (false, "v5.channel.k8s.io") => {
                Spoken::WebSocket(Version::V5, Codec::Binary { close: true })
            }
            (false, "v4.channel.k8s.io") => Spoken::WebSocket(Version::V4, binary),
            (false, "v4.base64.channel.k8s.io") => Spoken::WebSocket(Version::V4, Codec::Base64),
            (false, "channel.k8s.io" | "") => Spoken::WebSocket(Version::V1, binary),
            (false, "base64.channel.k8s.io") => Spoken::WebSocket(Version::V1, Codec::Base64),
            (true, TUNNEL) => Spoken::TunnelledPorts,
            (true, "v4.channel.k8s.io" | PORT_FORWARD | "") => Spoken::WebSocketPorts(binary),
            (true, "v4.base64.channel.k8s.io") => Spoken::WebSocketPorts(Codec::Base64),
            _ => return None,
        })
    };
    let offered: Vec<&str> = list(headers, &WS_PROTOCOL).take(MAX_OFFERED).collect();
    let mut candidates = offered
        .iter()
        .filter_map(|name| Some((*name, known(name)?)));
    let chosen = candidates.next();
    let chosen = match offered.is_empty() {
        true => known("").map(|spoken| ("", spoken)),
        false => chosen,
    };
    let Some((name, spoken)) = chosen else {
        let sentence = format!("none of the WebSocket protocols {offered:?} is spoken here");
        return Err(refuse(StatusCode::FORBIDDEN, &sentence));
    };
    let mut response = switching("websocket");
    if let Ok(value) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        response.headers_mut().insert(WS_ACCEPT, value);
    }
    if let Ok(value) = HeaderValue::from_str(name)
        && !name.is_empty()
    {
        response.headers_mut().insert(WS_PROTOCOL, value);
    }
    Ok((spoken, response))
}

fn switching(to: &'static str) -> Response<String> {
    let mut response = Response::new(String::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(to));
    response
}

/// An answer with a sentence.
pub fn refuse(status: StatusCode, sentence: &str) -> Box<Refused> {
    let mut response = Response::new(format!("{sentence}\n"));
    *response.status_mut() = status;
    Box::new(response)
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> &'a str {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().trim()
}

/// The members of a header that is a list, which may come in several lines.
fn list<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|member| !member.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            let name = HeaderName::from_static(name);
            headers.append(name, HeaderValue::from_static(value));
        }
        headers
    }

    fn spoken(port_forward: bool, pairs: &[(&'static str, &'static str)]) -> Result<Spoken, u16> {
        match negotiate(port_forward, &headers(pairs)) {
            Ok((spoken, response)) => {
                assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
                Ok(spoken)
            }
            Err(refused) => Err(refused.status().as_u16()),
        }
    }

    #[test]
    fn the_client_s_first_choice_that_we_speak_is_taken() {
        let exec = false;
        let up = ("connection", "keep-alive, Upgrade");
        let spdy = ("upgrade", "SPDY/3.1");
        let version = "x-stream-protocol-version";
        assert_eq!(
            spoken(
                exec,
                &[
                    up,
                    spdy,
                    (version, "v5.channel.k8s.io"),
                    (version, "v4.channel.k8s.io")
                ]
            ),
            Ok(Spoken::Spdy(Version::V4))
        );
        assert_eq!(
            spoken(exec, &[up, spdy, (version, "v9.x, v2.channel.k8s.io")]),
            Ok(Spoken::Spdy(Version::V2))
        );
        assert_eq!(spoken(exec, &[up, spdy]), Ok(Spoken::Spdy(Version::V1)));
        assert_eq!(spoken(exec, &[up, spdy, (version, "v9.x")]), Err(403));
        assert_eq!(spoken(exec, &[spdy]), Err(400));
        assert_eq!(spoken(exec, &[up, ("upgrade", "h2c")]), Err(400));
        let ports = true;
        assert_eq!(
            spoken(ports, &[up, spdy, (version, "portforward.k8s.io")]),
            Ok(Spoken::SpdyPorts)
        );
    }

    #[test]
    fn a_websocket_s_protocols_are_weighed_in_their_order() {
        let exec = false;
        let common = [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let with = |protocols| [&common[..], &[("sec-websocket-protocol", protocols)]].concat();
        assert_eq!(
            spoken(exec, &with("v5.channel.k8s.io, v4.channel.k8s.io")),
            Ok(Spoken::WebSocket(
                Version::V5,
                Codec::Binary { close: true }
            ))
        );
        assert_eq!(
            spoken(exec, &with("x, v4.base64.channel.k8s.io")),
            Ok(Spoken::WebSocket(Version::V4, Codec::Base64))
        );
        assert_eq!(spoken(exec, &with("x")), Err(403));
        assert_eq!(spoken(exec, &common[..3]), Err(400));
        let ports = true;
        assert_eq!(
            spoken(ports, &with("SPDY/3.1+portforward.k8s.io")),
            Ok(Spoken::TunnelledPorts)
        );
        assert_eq!(
            spoken(ports, &common),
            Ok(Spoken::WebSocketPorts(Codec::Binary { close: false }))
        );
    }
}
