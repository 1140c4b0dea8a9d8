//! Negotiates the protocol of exec, attach and port-forward, based on the headers of the client's
//! HTTP request.

use hyper::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use hyper::{Response, StatusCode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::websocket::Codec;

const STREAM_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_VERSIONS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-versions");
const WS_PROTOCOL: HeaderName = HeaderName::from_static("sec-websocket-protocol");
const WS_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const WS_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
const WS_VERSION: HeaderName = HeaderName::from_static("sec-websocket-version");

const SPDY: &str = "SPDY/3.1";

/// The maximum number of protocols in a client's offer that the server considers.
const MAX_OFFERED: usize = 32;

/// The purpose of a streaming connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The connection serves exec or attach.
    Command,
    PortForward,
}

/// The negotiated protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subprotocol {
    Command(CommandProtocol),
    PortForward(PortForwardProtocol),
}

/// The protocol of exec and attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandProtocol {
    Spdy(Version),
    WebSocket(Version, Codec),
}

/// The version of the remotecommand subprotocol, over SPDY or WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V1,
    V2,
    V3,
    V4,
    V5,
}

/// The protocol of port-forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortForwardProtocol {
    Spdy,
    /// SPDY tunnelled in a WebSocket.
    Tunnel,
    /// A pair of channels for each requested port.
    WebSocket(Codec),
}

/// A protocol that the server supports, and the protocol's name in the headers of clients. A client
/// that offers no protocol gets the protocol with the empty name.
type Named = (&'static str, Subprotocol);

const BINARY: Codec = Codec::Binary { close: false };

const COMMAND_SPDY: [Named; 5] = {
    const fn spdy(version: Version) -> Subprotocol {
        Subprotocol::Command(CommandProtocol::Spdy(version))
    }
    [
        ("v4.channel.k8s.io", spdy(Version::V4)),
        ("v3.channel.k8s.io", spdy(Version::V3)),
        ("v2.channel.k8s.io", spdy(Version::V2)),
        ("channel.k8s.io", spdy(Version::V1)),
        ("", spdy(Version::V1)),
    ]
};

const COMMAND_WEBSOCKET: [Named; 6] = {
    const fn websocket(version: Version, codec: Codec) -> Subprotocol {
        Subprotocol::Command(CommandProtocol::WebSocket(version, codec))
    }
    [
        (
            "v5.channel.k8s.io",
            websocket(Version::V5, Codec::Binary { close: true }),
        ),
        ("v4.channel.k8s.io", websocket(Version::V4, BINARY)),
        (
            "v4.base64.channel.k8s.io",
            websocket(Version::V4, Codec::Base64),
        ),
        ("channel.k8s.io", websocket(Version::V1, BINARY)),
        (
            "base64.channel.k8s.io",
            websocket(Version::V1, Codec::Base64),
        ),
        ("", websocket(Version::V1, BINARY)),
    ]
};

const PORT_FORWARD_SPDY: [Named; 2] = {
    const SPDY: Subprotocol = Subprotocol::PortForward(PortForwardProtocol::Spdy);
    [("portforward.k8s.io", SPDY), ("", SPDY)]
};

const PORT_FORWARD_WEBSOCKET: [Named; 5] = {
    const TUNNEL: Subprotocol = Subprotocol::PortForward(PortForwardProtocol::Tunnel);
    const fn websocket(codec: Codec) -> Subprotocol {
        Subprotocol::PortForward(PortForwardProtocol::WebSocket(codec))
    }
    [
        ("SPDY/3.1+portforward.k8s.io", TUNNEL),
        ("v4.channel.k8s.io", websocket(BINARY)),
        ("v4.base64.channel.k8s.io", websocket(Codec::Base64)),
        ("portforward.k8s.io", websocket(BINARY)),
        ("", websocket(BINARY)),
    ]
};

impl Purpose {
    fn over_spdy(self) -> &'static [Named] {
        match self {
            Purpose::Command => &COMMAND_SPDY,
            Purpose::PortForward => &PORT_FORWARD_SPDY,
        }
    }

    fn over_websocket(self) -> &'static [Named] {
        match self {
            Purpose::Command => &COMMAND_WEBSOCKET,
            Purpose::PortForward => &PORT_FORWARD_WEBSOCKET,
        }
    }
}

/// The response that refuses a request. A refused request has no effect.
pub type Refusal = Response<String>;

/// Negotiates a protocol that the client and the server support for this purpose. Returns the
/// protocol, and the response that accepts it.
pub fn negotiate(
    purpose: Purpose,
    headers: &HeaderMap,
) -> Result<(Subprotocol, Response<String>), Box<Refusal>> {
    let upgrade = text(headers, &UPGRADE).to_ascii_lowercase();
    if !list(headers, &CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade")) {
        let sentence = "this request requires a connection upgrade to SPDY/3.1 or to a WebSocket";
        return Err(refuse(StatusCode::BAD_REQUEST, sentence));
    }
    match upgrade.as_str() {
        "websocket" => websocket(purpose, headers),
        "spdy/3.1" => spdy(purpose, headers),
        _ => {
            let sentence =
                format!("the upgrade to {upgrade:?} is not supported; use SPDY/3.1 or websocket");
            Err(refuse(StatusCode::BAD_REQUEST, &sentence))
        }
    }
}

/// Returns the first offered protocol that the server supports.
fn choose(supported: &[Named], offered: &[&str]) -> Option<Named> {
    let known = |name: &str| supported.iter().find(|(known, _)| *known == name).copied();
    if offered.is_empty() {
        return known("");
    }
    offered.iter().find_map(|name| known(name))
}

fn spdy(
    purpose: Purpose,
    headers: &HeaderMap,
) -> Result<(Subprotocol, Response<String>), Box<Refusal>> {
    let supported = purpose.over_spdy();
    let offered: Vec<&str> = list(headers, &STREAM_VERSION).take(MAX_OFFERED).collect();
    let Some((name, subprotocol)) = choose(supported, &offered) else {
        let sentence = format!("the server supports none of the protocols {offered:?}");
        let mut refusal = refuse(StatusCode::FORBIDDEN, &sentence);
        for (name, _) in supported.iter().filter(|(name, _)| !name.is_empty()) {
            let value = HeaderValue::from_static(name);
            refusal.headers_mut().append(ACCEPTED_VERSIONS, value);
        }
        return Err(refusal);
    };
    let mut response = switching(SPDY);
    if !name.is_empty() {
        let value = HeaderValue::from_static(name);
        response.headers_mut().insert(STREAM_VERSION, value);
    }
    Ok((subprotocol, response))
}

fn websocket(
    purpose: Purpose,
    headers: &HeaderMap,
) -> Result<(Subprotocol, Response<String>), Box<Refusal>> {
    let key = text(headers, &WS_KEY);
    if text(headers, &WS_VERSION) != "13" || key.len() != 24 {
        let sentence = "the WebSocket handshake must have version 13 and a key of 16 bytes";
        return Err(refuse(StatusCode::BAD_REQUEST, sentence));
    }
    let offered: Vec<&str> = list(headers, &WS_PROTOCOL).take(MAX_OFFERED).collect();
    let Some((name, subprotocol)) = choose(purpose.over_websocket(), &offered) else {
        let sentence = format!("the server supports none of the WebSocket protocols {offered:?}");
        return Err(refuse(StatusCode::FORBIDDEN, &sentence));
    };
    let mut response = switching("websocket");
    if let Ok(value) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        response.headers_mut().insert(WS_ACCEPT, value);
    }
    if !name.is_empty() {
        let value = HeaderValue::from_static(name);
        response.headers_mut().insert(WS_PROTOCOL, value);
    }
    Ok((subprotocol, response))
}

fn switching(to: &'static str) -> Response<String> {
    let mut response = Response::new(String::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(to));
    response
}

/// Returns the response that refuses a request with this status. The body of the response is
/// `sentence`.
pub fn refuse(status: StatusCode, sentence: &str) -> Box<Refusal> {
    let mut response = Response::new(format!("{sentence}\n"));
    *response.status_mut() = status;
    Box::new(response)
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> &'a str {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().trim()
}

/// Returns the members of a header whose value is a comma-separated list. A request can contain the
/// header several times.
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

    fn supported(
        purpose: Purpose,
        pairs: &[(&'static str, &'static str)],
    ) -> Result<Subprotocol, u16> {
        match negotiate(purpose, &headers(pairs)) {
            Ok((subprotocol, response)) => {
                assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
                Ok(subprotocol)
            }
            Err(refusal) => Err(refusal.status().as_u16()),
        }
    }

    #[test]
    fn the_clients_first_supported_protocol_is_chosen() {
        let exec = Purpose::Command;
        let up = ("connection", "keep-alive, Upgrade");
        let spdy = ("upgrade", "SPDY/3.1");
        let version = "x-stream-protocol-version";
        assert_eq!(
            supported(
                exec,
                &[
                    up,
                    spdy,
                    (version, "v5.channel.k8s.io"),
                    (version, "v4.channel.k8s.io")
                ]
            ),
            Ok(Subprotocol::Command(CommandProtocol::Spdy(Version::V4)))
        );
        assert_eq!(
            supported(exec, &[up, spdy, (version, "v9.x, v2.channel.k8s.io")]),
            Ok(Subprotocol::Command(CommandProtocol::Spdy(Version::V2)))
        );
        assert_eq!(
            supported(exec, &[up, spdy]),
            Ok(Subprotocol::Command(CommandProtocol::Spdy(Version::V1)))
        );
        assert_eq!(supported(exec, &[up, spdy, (version, "v9.x")]), Err(403));
        assert_eq!(supported(exec, &[spdy]), Err(400));
        assert_eq!(supported(exec, &[up, ("upgrade", "h2c")]), Err(400));
        let ports = Purpose::PortForward;
        assert_eq!(
            supported(ports, &[up, spdy, (version, "portforward.k8s.io")]),
            Ok(Subprotocol::PortForward(PortForwardProtocol::Spdy))
        );
    }

    #[test]
    fn websocket_protocols_are_chosen_in_the_clients_order() {
        let exec = Purpose::Command;
        let common = [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let with = |protocols| [&common[..], &[("sec-websocket-protocol", protocols)]].concat();
        assert_eq!(
            supported(exec, &with("v5.channel.k8s.io, v4.channel.k8s.io")),
            Ok(Subprotocol::Command(CommandProtocol::WebSocket(
                Version::V5,
                Codec::Binary { close: true }
            )))
        );
        assert_eq!(
            supported(exec, &with("x, v4.base64.channel.k8s.io")),
            Ok(Subprotocol::Command(CommandProtocol::WebSocket(
                Version::V4,
                Codec::Base64
            )))
        );
        assert_eq!(supported(exec, &with("x")), Err(403));
        assert_eq!(supported(exec, &common[..3]), Err(400));
        let ports = Purpose::PortForward;
        assert_eq!(
            supported(ports, &with("SPDY/3.1+portforward.k8s.io")),
            Ok(Subprotocol::PortForward(PortForwardProtocol::Tunnel))
        );
        assert_eq!(
            supported(ports, &common),
            Ok(Subprotocol::PortForward(PortForwardProtocol::WebSocket(
                BINARY
            )))
        );
    }
}
