//! Builds the HTTP client for one endpoint of a registry, with the certificates that hosts.toml
//! lists.

use std::path::Path;
use std::time::Duration;

use reqwest::Client;
use rustls::pki_types::CertificateDer;

use crate::error::{ImageError, Kind};
use crate::failure::cause;
use crate::hosts::Endpoint;
use crate::identity::{self, ClientCertificates, Identity};

/// Builds an HTTP client that does not follow redirections. If reqwest followed a redirection to
/// another host, it would remove only the secret headers that it recognises. The other host would
/// then receive the secret headers from hosts.toml.
pub(crate) fn build(
    endpoint: &Endpoint,
    silence: Duration,
    with_identity: bool,
) -> Result<Client, ImageError> {
    let mut builder = Client::builder()
        .connect_timeout(endpoint.dial_timeout)
        .read_timeout(silence)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("rrun/", env!("CARGO_PKG_VERSION")));
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
    if with_identity && !endpoint.client.is_empty() {
        let ours = ClientCertificates::of(identities(endpoint)?);
        let tls = identity::tls(ours, authorities, endpoint.skip_verify)
            .map_err(|error| failed(&error))?;
        return builder
            .tls_backend_preconfigured(tls)
            .build()
            .map_err(|error| failed(&error));
    }
    let authorities: Vec<_> = authorities
        .iter()
        .map(|authority| reqwest::Certificate::from_der(authority))
        .collect::<Result<_, _>>()
        .map_err(|error| failed(&error))?;
    if endpoint.base.starts_with("http:") {
        // Plain HTTP does not need the system's certificate authorities, so they need not be
        // installed.
        builder = builder.tls_certs_only(authorities);
    } else if !authorities.is_empty() {
        builder = builder.tls_certs_merge(authorities);
    }
    if endpoint.skip_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    builder.build().map_err(|error| failed(&error))
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
