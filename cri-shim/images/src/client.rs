//! Builds the HTTP clients for one endpoint of a registry, with the certificates that hosts.toml
//! lists.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Client, ClientBuilder};
use rustls::pki_types::CertificateDer;

use crate::error::{ImageError, Kind};
use crate::failure::cause;
use crate::hosts::Endpoint;
use crate::identity::{self, ClientCertificates, Identity};
use crate::reach::{GuardedResolver, Reach};
use crate::request_thread::RequestThread;

/// The HTTP clients for one endpoint. They do not follow redirections. If reqwest followed a
/// redirection to another host, it would remove only the secret headers that it recognises. The
/// other host would then receive the secret headers from hosts.toml.
pub(crate) struct Clients {
    /// The client for the endpoint itself.
    pub home: Client,
    /// The client for other servers: the targets of the registry's redirections, and its token
    /// servers. This client sends no client certificate, because a certificate would identify this
    /// node to the other servers. It connects only to addresses that the registry may lead to.
    pub elsewhere: Client,
    /// The thread that sends the requests of both clients.
    pub thread: RequestThread,
}

impl Clients {
    /// Creates the clients. This call blocks on disk I/O while it reads the certificates.
    pub(crate) fn new(
        endpoint: &Endpoint,
        silence: Duration,
        reach: &Arc<Reach>,
    ) -> Result<Self, ImageError> {
        let failed = |error: &dyn std::error::Error| {
            ImageError::new(
                Kind::Internal,
                format!(
                    "prepare the HTTP client for registry {}: {}",
                    endpoint.host,
                    cause(error)
                ),
            )
        };
        let authorities = authorities(endpoint)?;
        let builder = || {
            Client::builder()
                .connect_timeout(endpoint.dial_timeout)
                .read_timeout(silence)
                .redirect(reqwest::redirect::Policy::none())
                .user_agent(concat!("rrun/", env!("CARGO_PKG_VERSION")))
        };
        let guarded = || builder().dns_resolver(Arc::new(GuardedResolver(Arc::clone(reach))));
        let (home, elsewhere) = if endpoint.base.starts_with("http:") && endpoint.client.is_empty()
        {
            // Plain HTTP does not need the system's certificate authorities, so they need not be
            // installed.
            let authorities: Vec<_> = authorities
                .iter()
                .map(|authority| reqwest::Certificate::from_der(authority))
                .collect::<Result<_, _>>()
                .map_err(|error| failed(&error))?;
            let with_tls = |builder: ClientBuilder| {
                builder
                    .tls_certs_only(authorities.clone())
                    .tls_danger_accept_invalid_certs(endpoint.skip_verify)
            };
            (with_tls(builder()), with_tls(guarded()))
        } else {
            let tls = identity::tls(authorities, endpoint.skip_verify).map_err(|e| failed(&e))?;
            let mut with_identity = tls.clone();
            if !endpoint.client.is_empty() {
                let ours = ClientCertificates::of(identities(endpoint)?);
                with_identity.client_auth_cert_resolver = Arc::new(ours);
            }
            (
                builder().tls_backend_preconfigured(with_identity),
                guarded().tls_backend_preconfigured(tls),
            )
        };
        Ok(Clients {
            home: home.build().map_err(|error| failed(&error))?,
            elsewhere: elsewhere.build().map_err(|error| failed(&error))?,
            thread: RequestThread::default(),
        })
    }
}

/// Reads the certificates of the authorities that hosts.toml lists.
fn authorities(endpoint: &Endpoint) -> Result<Vec<CertificateDer<'static>>, ImageError> {
    let mut authorities = Vec::new();
    for path in &endpoint.ca {
        let found = identity::certificates(&read(endpoint, path)?)
            .ok_or_else(|| bad(endpoint, path, "does not contain a certificate in PEM form"))?;
        authorities.extend(found);
    }
    Ok(authorities)
}

/// Reads the client certificates and keys that hosts.toml lists.
fn identities(endpoint: &Endpoint) -> Result<Vec<Identity>, ImageError> {
    let mut ours = Vec::new();
    for (certificate, key) in &endpoint.client {
        let pem = read(endpoint, certificate)?;
        let key = key.as_deref().map(|key| read(endpoint, key)).transpose()?;
        let one = Identity::new(&pem, key.as_deref().unwrap_or(&pem));
        ours.push(one.map_err(|why| bad(endpoint, certificate, why))?);
    }
    Ok(ours)
}

fn read(endpoint: &Endpoint, path: &Path) -> Result<Vec<u8>, ImageError> {
    std::fs::read(path).map_err(|error| {
        ImageError::new(
            Kind::InvalidArgument,
            format!(
                "read {} for registry {}: {error}",
                path.display(),
                endpoint.host
            ),
        )
    })
}

fn bad(endpoint: &Endpoint, path: &Path, what: &str) -> ImageError {
    ImageError::new(
        Kind::InvalidArgument,
        format!(
            "registry {}: the file {} {what}",
            endpoint.host,
            path.display()
        ),
    )
}
