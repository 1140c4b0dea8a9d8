//! Tests of registries that send the server's requests to services of the node, by a redirection or
//! by the address of a token server.

use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::support::calls::Calls;
use crate::support::images::build::{Archive, Compression, Image, image};
use crate::support::images::pull;
use crate::support::images::server::{Answer, Request, Server};
use crate::support::machine::{Result, command};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[test!(
    a_registry_of_another_host_leads_to_no_service_of_the_node,
    A_NODE,
    Need::RrunCri
)];

/// An address of this machine that is not a loopback address (RFC 5737).
const ADDRESS: &str = "198.51.100.7";

/// A name that resolves to a loopback address.
const NAME: &str = "internal.test";

/// The address [`ADDRESS`] on the loopback interface, and the name [`NAME`] in /etc/hosts. Dropping
/// this value removes both.
struct Names {
    hosts: Vec<u8>,
}

impl Names {
    const FILE: &str = "/etc/hosts";

    fn new() -> Result<Self> {
        command("ip", ["address", "add", ADDRESS, "dev", "lo"]).ok()?;
        let hosts = fs::read(Self::FILE).unwrap_or_default();
        let names = Names { hosts };
        let mut text = names.hosts.clone();
        text.extend(format!("\n127.0.0.1 {NAME}\n").into_bytes());
        fs::write(Self::FILE, text)?;
        Ok(names)
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, &self.hosts);
        let _ = command("ip", ["address", "del", ADDRESS, "dev", "lo"]).ok();
    }
}

/// Starts a registry at [`ADDRESS`] and returns the reference of its image `app`.
fn registry(
    node: &Node,
    image: &Image,
    answer: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
) -> Result<String> {
    let server = Server::at(ADDRESS, &[("app", image)], answer).map_err(|e| e.to_string())?;
    let host = server.host();
    let dir = node.join("certs.d").join(&host);
    fs::create_dir_all(&dir)?;
    fs::write(
        dir.join("hosts.toml"),
        format!("server = \"http://{host}\"\n"),
    )?;
    Ok(format!("{host}/app:1"))
}

fn redirecting(to: String) -> impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static {
    move |request| {
        let to = format!("http://{to}{}", request.path);
        let hit = request.path.contains("/blobs/");
        hit.then(|| Answer::new(307, "").header("Location", to))
    }
}

fn challenging(to: String) -> impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static {
    move |request| {
        if request.authorization.is_some() {
            return None;
        }
        let challenge = format!("Bearer realm=\"http://{to}/token\"");
        Some(Answer::new(401, "").header("WWW-Authenticate", challenge))
    }
}

fn a_registry_of_another_host_leads_to_no_service_of_the_node() -> Result {
    on_a_node(|node| {
        let _names = Names::new()?;
        let layer = Archive::new().file("file", "content").end();
        let image = image(&[(layer, Compression::Gzip)], json!({}));
        let internal = Server::start(&[("app", &image)], |request| {
            let token = request.path.starts_with("/token");
            token.then(|| Answer::new(200, r#"{"token":"good"}"#))
        });
        let internal = internal.map_err(|error| error.to_string())?;
        let port = internal
            .host()
            .split(':')
            .next_back()
            .unwrap_or_default()
            .to_owned();
        let calls = Calls::new(node)?;
        let hosts = ["127.0.0.1", "localhost", "0", NAME].map(|host| format!("{host}:{port}"));
        let mut references = Vec::new();
        for host in hosts {
            references.push(registry(node, &image, redirecting(host.clone()))?);
            references.push(registry(node, &image, challenging(host))?);
        }
        for reference in &references {
            let error = pull(&calls, reference, None)?.err();
            let error = error.ok_or("the server followed the registry to a service of the node")?;
            let words = "an address of this node itself, and image.local_redirects is not set";
            ensure!(
                error.message().contains(words),
                "the error of the pull does not contain {words:?}: {error:?}"
            );
        }
        ensure_eq!(
            internal.seen().len(),
            0,
            "number of requests to the service of the node"
        );
        let drop_ins: PathBuf = node.join("config.d");
        fs::create_dir_all(&drop_ins)?;
        fs::write(
            drop_ins.join("local.toml"),
            "[image]\nlocal_redirects = true\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        let calls = Calls::new(node)?;
        for reference in &references {
            pull(&calls, reference, None)??;
            node.asks(&["rmi", reference])?;
        }
        Ok(())
    })
}
