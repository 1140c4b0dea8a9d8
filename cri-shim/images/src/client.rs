//! The HTTP client for one endpoint of a registry: its certificates and ours, as hosts.toml has them.

use std::path::Path;
use std::time::Duration;

use reqwest::Client;

use super::error::{ImageError, Kind};
use super::hosts::Endpoint;
use super::identity::{self, Choice, Identity};
use super::registry::cause;

/// A client that follows no redirection by itself: the library would strip the headers that it
/// knows to be secret from a request to another host, and send those of hosts.toml along.
pub(crate) fn build(
    endpoint: &Endpoint,
    silence: Duration,
    with_identity: bool,
) -> Result<Client, ImageError> {
    let read = |path: &Path| {
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
    };
    let bad = |path: &Path, what: &str| {
        ImageError::new(
            Kind::InvalidArgument,
            format!("{} for registry {}: {what}", path.display(), endpoint.host),
        )
    };
    let mut builder = Client::builder()
        .connect_timeout(endpoint.dial_timeout)
        .read_timeout(silence)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("rrun/", env!("CARGO_PKG_VERSION")));
    let failed = |error: &dyn std::error::Error| {
        ImageError::new(
            Kind::Internal,
            format!("prepare for registry {}: {}", endpoint.host, cause(error)),
        )
    };
    let mut authorities = Vec::new();
    for path in &endpoint.ca {
        let found = identity::certificates(&read(path)?)
            .ok_or_else(|| bad(path, "holds no certificate in PEM form"))?;
        authorities.extend(found);
    }
    if with_identity && !endpoint.client.is_empty() {
        let mut ours = Vec::new();
        for (certificate, key) in &endpoint.client {
            let pem = read(certificate)?;
            let key = key.as_deref().map(read).transpose()?;
            let one = Identity::new(&pem, key.as_deref().unwrap_or(&pem));
            ours.push(one.map_err(|why| bad(certificate, why))?);
        }
        let tls = identity::tls(Choice::of(ours), authorities, endpoint.skip_verify)
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
        // No TLS, no need for the system's authorities, which may not be there.
        builder = builder.tls_certs_only(authorities);
    } else if !authorities.is_empty() {
        builder = builder.tls_certs_merge(authorities);
    }
    if endpoint.skip_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    builder.build().map_err(|error| failed(&error))
}
