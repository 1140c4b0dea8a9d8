//! Tests of pulls from a docker-registry that requires TLS, a password or a token.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rrun_proto::v1::AuthConfig;
use serde_json::json;
use tonic::Code;

use crate::support::calls::Calls;
use crate::support::certificates::{OPENSSL, certificates, certificates_by};
use crate::support::images::pull;
use crate::support::images::server::{Answer, Server};
use crate::support::machine::{Directory, Result, Running, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node;
use crate::support::node::{A_NODE, Node, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

const HTPASSWD: Need = Need::Program("htpasswd");

pub(crate) const TESTS: &[Test] = &[
    test!(
        the_server_verifies_the_certificate_of_a_tls_registry,
        A_NODE,
        OPENSSL
    ),
    test!(
        a_registry_gets_the_client_certificate_that_it_requests,
        A_NODE,
        OPENSSL
    ),
    test!(hosts_toml_sets_the_connection_timeout, A_NODE),
    test!(a_registry_can_require_a_password, A_NODE, HTPASSWD),
    test!(a_registry_can_require_a_signed_token, A_NODE, OPENSSL),
    test!(
        cve_2019_10214_a_token_server_without_tls_gets_no_credentials_of_a_tls_registry,
        A_NODE,
        OPENSSL,
        Need::RrunCri
    ),
];

const PORT: u16 = 5001;
const IMAGE: &str = "127.0.0.1:5001/demo/busybox:latest";
const PASSWORD: &str = "open-sesame";

/// A second registry, which serves the images of the first registry. Dropping this value stops the
/// second registry.
struct Guarded {
    _server: Running,
    _directory: Directory,
}

impl Guarded {
    /// Starts the registry with `http` and `auth` in its configuration.
    fn start(http: &str, auth: &str) -> Result<Self> {
        let directory = Directory::new("registry")?;
        let config = directory.join("config.yml");
        let data = format!("/var/lib/registry/{}", node::PORT);
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\n\
                 storage: {{filesystem: {{rootdirectory: {data}}}}}\n\
                 http: {{addr: \"127.0.0.1:{PORT}\", secret: x{http}}}\n{auth}"
            ),
        )?;
        let mut server = command("env", ["OTEL_TRACES_EXPORTER=none"])
            .args(["docker-registry", "serve"])
            .arg(&config)
            .start()?;
        wait_for("the registry to accept connections", || {
            ensure!(
                server.lives(),
                "the registry exited; its stderr:\n{}",
                server.stderr()
            );
            Ok(std::net::TcpStream::connect(("127.0.0.1", PORT)).ok())
        })?;
        Ok(Guarded {
            _server: server,
            _directory: directory,
        })
    }
}

fn hosts(node: &Node, text: &str) -> Result {
    let dir = node.join("certs.d").join(format!("127.0.0.1:{PORT}"));
    fs::create_dir_all(&dir)?;
    Ok(fs::write(dir.join("hosts.toml"), text)?)
}

/// Checks that a pull fails, and that the secret is not in the error message. Returns the gRPC
/// status of the failed pull.
fn refused(calls: &Calls, auth: Option<AuthConfig>) -> Result<tonic::Status> {
    let status = pull(calls, IMAGE, auth)?
        .err()
        .ok_or("a pull that must fail succeeded")?;
    ensure!(
        !status.message().contains("sesame"),
        "the error message of the pull contains the secret: {status:?}"
    );
    Ok(status)
}

/// Checks that neither the server's log nor the output of inspecti contains the secret.
fn secret_is_kept(node: &mut Node) -> Result {
    let image = node.json(&["inspecti", IMAGE])?.to_string();
    let log = node.log();
    // crictl's command lines contain the secret, but the server's log does not contain these
    // command lines.
    ensure!(
        !image.contains("sesame"),
        "inspecti shows the secret: {image}"
    );
    ensure!(
        !log.contains("sesame"),
        "the server's log contains the secret:\n{log}"
    );
    ensure!(
        !log.contains("b3Blbi1zZXNhbWU"),
        "the server's log contains the secret in base64:\n{log}"
    );
    Ok(())
}

fn the_server_verifies_the_certificate_of_a_tls_registry() -> Result {
    on_a_node(|node| {
        let keys = Directory::new("keys")?;
        certificates(keys.path())?;
        let dir = keys.path().display();
        let calls = Calls::new(node)?;
        let tls = format!("certificate: {dir}/server.pem, key: {dir}/server.key");
        let server = format!("server = \"https://127.0.0.1:{PORT}\"\n");
        {
            let _registry = Guarded::start(&format!(", tls: {{{tls}}}"), "")?;
            hosts(node, &server)?;
            let status = refused(&calls, None)?;
            if is_rrun() {
                ensure_eq!(
                    status.code(),
                    Code::Unavailable,
                    "gRPC code of the failed pull (gRPC status: {status:?})"
                );
                ensure!(
                    status.message().contains("certificate"),
                    "the error message does not mention the certificate: {status:?}"
                );
            }
            hosts(node, &format!("{server}skip_verify = true\n"))?;
            node.pull(IMAGE)?;
            node.asks(&["rmi", IMAGE])?;
            hosts(node, &format!("{server}ca = \"{dir}/ca.pem\"\n"))?;
            node.pull(IMAGE)?;
            node.asks(&["rmi", IMAGE])?;
        }
        let mutual = format!(", tls: {{{tls}, clientcas: [{dir}/ca.pem]}}");
        let _registry = Guarded::start(&mutual, "")?;
        refused(&calls, None)?;
        // No program listens at the address of the first mirror. The second mirror is the registry
        // itself, with a path in its URL.
        hosts(
            node,
            &format!(
                "{server}[host.\"http://127.0.0.1:1\"]\n\
                 [host.\"https://127.0.0.1:{PORT}/v2\"]\noverride_path = true\n\
                 capabilities = [\"pull\", \"resolve\"]\nca = \"{dir}/ca.pem\"\n\
                 client = [[\"{dir}/client.pem\", \"{dir}/client.key\"]]\n"
            ),
        )?;
        node.pull(IMAGE)?;
        node.asks(&["rmi", IMAGE])?;
        // Docker's directory layout has no hosts.toml. In this layout, the file extensions mark the
        // CA certificate, the client certificates and the keys.
        let certs = node.join("certs.d").join(format!("127.0.0.1:{PORT}"));
        fs::remove_file(certs.join("hosts.toml"))?;
        for (from, to) in [
            ("ca.pem", "any.crt"),
            ("client.pem", "me.cert"),
            ("client.key", "me.key"),
        ] {
            fs::copy(keys.join(from), certs.join(to))?;
        }
        node.pull(IMAGE)?;
        Ok(())
    })
}

/// A registry accepts only client certificates from one certificate authority. If several client
/// certificates are configured, the server presents the certificate of this authority.
fn a_registry_gets_the_client_certificate_that_it_requests() -> Result {
    on_a_node(|node| {
        let keys = [Directory::new("keys")?, Directory::new("keys")?];
        certificates_by("first", keys[0].path())?;
        certificates_by("second", keys[1].path())?;
        let [first, second] = keys.each_ref().map(|keys| keys.path().display());
        let calls = Calls::new(node)?;
        let mutual = format!(
            ", tls: {{certificate: {first}/server.pem, key: {first}/server.key, \
             clientcas: [{second}/ca.pem]}}"
        );
        let _registry = Guarded::start(&mutual, "")?;
        let server = format!("server = \"https://127.0.0.1:{PORT}\"\nca = \"{first}/ca.pem\"\n");
        let first = format!("[\"{first}/client.pem\", \"{first}/client.key\"]");
        hosts(node, &format!("{server}client = [{first}]\n"))?;
        refused(&calls, None)?;
        let both = fs::read_to_string(keys[1].join("client.pem"))?
            + &fs::read_to_string(keys[1].join("client.key"))?;
        fs::write(keys[1].join("both.pem"), both)?;
        for second in [
            format!("[\"{second}/client.pem\", \"{second}/client.key\"]"),
            format!("[\"{second}/both.pem\", \"\"]"),
        ] {
            hosts(node, &format!("{server}client = [{first}, {second}]\n"))?;
            node.pull(IMAGE)?;
            node.asks(&["rmi", IMAGE])?;
        }
        if is_rrun() {
            let mixed = keys[1].join("client.pem").display().to_string();
            let wrong = format!(
                "[\"{mixed}\", \"{}\"]",
                keys[0].join("client.key").display()
            );
            hosts(node, &format!("{server}client = [{wrong}]\n"))?;
            let status = refused(&calls, None)?;
            let message = status.message();
            ensure!(
                message.contains(&mixed) && message.contains("key"),
                "the error message of the pull does not name the client certificate and its key: {message}"
            );
        }
        Ok(())
    })
}

/// A host can accept connections and then never answer. A pull waits for such a host only until the
/// timeout in hosts.toml.
fn hosts_toml_sets_the_connection_timeout() -> Result {
    on_a_node(|node| {
        // The kernel establishes TCP connections to this listener, but the test never accepts them.
        // The TLS handshake therefore gets no answer.
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let silent = format!("https://{}", listener.local_addr()?);
        let calls = Calls::new(node)?;
        hosts(
            node,
            &format!("server = \"{silent}\"\ndial_timeout = \"250ms\"\n"),
        )?;
        let status = refused(&calls, None)?;
        if is_rrun() {
            let message = status.message();
            ensure!(
                message.contains("no connection within 250ms"),
                "the error message of the pull does not name the dial timeout: {message}"
            );
        }
        Ok(())
    })
}

fn a_registry_can_require_a_password() -> Result {
    on_a_node(|node| {
        let dir = Directory::new("htpasswd")?;
        let line = command("htpasswd", ["-Bbn", "me", PASSWORD]).ok()?.stdout;
        fs::write(dir.join("htpasswd"), line)?;
        let path = dir.join("htpasswd").display().to_string();
        let _registry = Guarded::start(
            "",
            &format!("auth: {{htpasswd: {{realm: r, path: {path}}}}}\n"),
        )?;
        hosts(node, &format!("server = \"http://127.0.0.1:{PORT}\"\n"))?;
        let calls = Calls::new(node)?;
        let password = |password: &str| AuthConfig {
            username: "me".to_owned(),
            password: password.to_owned(),
            ..AuthConfig::default()
        };
        for auth in [
            None,
            Some(password("sesame-not")),
            Some(AuthConfig {
                server_address: "https://other.example".to_owned(),
                ..password(PASSWORD)
            }),
        ] {
            let status = refused(&calls, auth)?;
            if is_rrun() {
                ensure_eq!(
                    status.code(),
                    Code::Unauthenticated,
                    "gRPC code of the failed pull (gRPC status: {status:?})"
                );
            }
        }
        // With --creds, crictl sends a user name and a password. With --auth, crictl sends the
        // field `auth`.
        node.asks(&["pull", "--creds", &format!("me:{PASSWORD}"), IMAGE])?;
        node.asks(&["rmi", IMAGE])?;
        node.asks(&["pull", "--auth", "bWU6b3Blbi1zZXNhbWU=", IMAGE])?;
        node.asks(&["rmi", IMAGE])?;
        let here = AuthConfig {
            server_address: format!("http://127.0.0.1:{PORT}/v2/"),
            ..password(PASSWORD)
        };
        pull(&calls, IMAGE, Some(here))??;
        secret_is_kept(node)
    })
}

/// Returns a token for pulls of demo/busybox. The token is signed with the server's key (RFC 7519,
/// RS256) and contains the certificate of this key.
fn signed(keys: &Path) -> Result<String> {
    let text = |script: &str| -> Result<String> {
        Ok(command("sh", ["-ec", script])
            .dir(keys)
            .ok()?
            .text()
            .to_owned())
    };
    let certificate = text("openssl x509 -in server.pem -outform DER | base64 -w0")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [certificate]});
    let claims = json!({
        "iss": "test-issuer", "sub": "me", "aud": "test-registry", "jti": "1",
        "iat": now, "nbf": now - 60, "exp": now + 600,
        "access": [{"type": "repository", "name": "demo/busybox", "actions": ["pull"]}],
    });
    fs::write(keys.join("header"), header.to_string())?;
    fs::write(keys.join("claims"), claims.to_string())?;
    text(
        "url() { base64 -w0 | tr '+/' '-_' | tr -d =; }
        signed=$(url <header).$(url <claims)
        printf %s \"$signed\" | openssl dgst -sha256 -sign server.key -binary >signature
        echo \"$signed.$(url <signature)\"",
    )
}

fn a_registry_can_require_a_signed_token() -> Result {
    on_a_node(|node| {
        let keys = Directory::new("keys")?;
        certificates(keys.path())?;
        let token = signed(keys.path())?;
        let served = token.clone();
        // The token server requires the right user name and password, or the right refresh token.
        let tokens = Server::start(&[], move |request| {
            let by_password =
                request.authorization.as_deref() == Some("Basic bWU6b3Blbi1zZXNhbWU=");
            let by_identity = request.body.contains("refresh_token=open-sesame");
            Some(if by_password || by_identity {
                Answer::new(
                    200,
                    format!("{{\"token\":\"{served}\",\"access_token\":\"{served}\"}}"),
                )
            } else {
                Answer::new(
                    401,
                    r#"{"errors":[{"code":"DENIED","message":"who are you"}]}"#,
                )
            })
        })
        .map_err(|error| error.to_string())?;
        let auth = format!(
            "auth: {{token: {{realm: \"http://{}/token\", service: test-registry, \
             issuer: test-issuer, rootcertbundle: {}}}}}\n",
            tokens.host(),
            keys.join("ca.pem").display()
        );
        let _registry = Guarded::start("", &auth)?;
        hosts(node, &format!("server = \"http://127.0.0.1:{PORT}\"\n"))?;
        let calls = Calls::new(node)?;
        let status = refused(&calls, None)?;
        if is_rrun() {
            ensure_eq!(
                status.code(),
                Code::Unauthenticated,
                "gRPC code of the failed pull (gRPC status: {status:?})"
            );
            ensure!(
                status.message().contains("token server"),
                "the error message does not mention the token server: {status:?}"
            );
        }
        let mut credentials = vec![
            AuthConfig {
                username: "me".to_owned(),
                password: PASSWORD.to_owned(),
                ..AuthConfig::default()
            },
            AuthConfig {
                identity_token: PASSWORD.to_owned(),
                ..AuthConfig::default()
            },
        ];
        if is_rrun() {
            // containerd ignores the field `registry_token`, so the test sends this field only to
            // rrun-cri.
            credentials.push(AuthConfig {
                registry_token: token.clone(),
                ..AuthConfig::default()
            });
        }
        for auth in credentials {
            pull(&calls, IMAGE, Some(auth))??;
            secret_is_kept(node)?;
            ensure!(
                !node.log().contains(&token),
                "the server's log contains the token"
            );
            node.asks(&["rmi", IMAGE])?;
        }
        Ok(())
    })
}

fn cve_2019_10214_a_token_server_without_tls_gets_no_credentials_of_a_tls_registry() -> Result {
    on_a_node(|node| {
        let keys = Directory::new("keys")?;
        certificates(keys.path())?;
        let dir = keys.path().display();
        let tokens = Server::start(&[], |_| Some(Answer::new(200, r#"{"token":"x"}"#)))
            .map_err(|error| error.to_string())?;
        let auth = format!(
            "auth: {{token: {{realm: \"http://{}/token\", service: test-registry, \
             issuer: test-issuer, rootcertbundle: {dir}/ca.pem}}}}\n",
            tokens.host(),
        );
        let tls = format!(", tls: {{certificate: {dir}/server.pem, key: {dir}/server.key}}");
        let _registry = Guarded::start(&tls, &auth)?;
        hosts(
            node,
            &format!("server = \"https://127.0.0.1:{PORT}\"\nca = \"{dir}/ca.pem\"\n"),
        )?;
        let calls = Calls::new(node)?;
        for auth in [
            AuthConfig {
                username: "me".to_owned(),
                password: PASSWORD.to_owned(),
                ..AuthConfig::default()
            },
            AuthConfig {
                identity_token: PASSWORD.to_owned(),
                ..AuthConfig::default()
            },
        ] {
            let status = refused(&calls, Some(auth))?;
            ensure!(
                status.message().contains("without TLS"),
                "the error message does not mention the missing TLS: {status:?}"
            );
        }
        ensure_eq!(
            tokens.seen().len(),
            0,
            "number of requests that the token server without TLS received"
        );
        Ok(())
    })
}
