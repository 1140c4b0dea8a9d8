//! The HTTP client for one endpoint of a registry: its certificates and ours, as hosts.toml has them.

use std::path::Path;
use std::time::Duration;

use reqwest::Client;

use super::error::{ImageError, Kind};
use super::hosts::Endpoint;
use super::registry::cause;

pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A client that follows no redirection by itself: the library would strip the headers that it
/// knows to be secret from a request to another host, and send those of hosts.toml along.
pub fn build(
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
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(silence)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("rrun/", env!("CARGO_PKG_VERSION")));
    let mut authorities = Vec::new();
    for path in &endpoint.ca {
        let bundle = reqwest::Certificate::from_pem_bundle(&read(path)?)
            .map_err(|_| bad(path, "holds no certificate in PEM form"))?;
        authorities.extend(bundle);
    }
    if endpoint.base.starts_with("http:") {
        // No TLS, no need for the system's authorities, which may not be there.
        builder = builder.tls_certs_only(authorities);
    } else if !authorities.is_empty() {
        builder = builder.tls_certs_merge(authorities);
    }
    if endpoint.skip_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    if let Some((certificate, key)) = endpoint.client.first().filter(|_| with_identity) {
        let mut pem = read(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        let identity = reqwest::Identity::from_pem(&pem)
            .map_err(|_| bad(certificate, "holds no certificate and key in PEM form"))?;
        builder = builder.identity(identity);
    }
    builder.build().map_err(|error| {
        ImageError::new(
            Kind::Internal,
            format!("prepare for registry {}: {}", endpoint.host, cause(&error)),
        )
    })
}
