//! The certificate with which streams are served.

use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use super::error::ConfigError;
use super::table::Config;

/// The certificate and key of the configuration, if it has them.
pub(crate) fn tls(config: &Config) -> Result<Option<TlsAcceptor>, ConfigError> {
    let (Some(cert), Some(key)) = (&config.stream_tls_cert, &config.stream_tls_key) else {
        return Ok(None);
    };
    let bad = |key, path: &Path, why: &dyn std::fmt::Display| ConfigError::Value {
        key,
        reason: format!("{}: {why}", path.display()),
    };
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| bad("stream_tls_cert", cert, &error))?;
    let private =
        PrivateKeyDer::from_pem_file(key).map_err(|error| bad("stream_tls_key", key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad("stream_tls_cert", cert, &error))?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| bad("stream_tls_cert", cert, &error))?;
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}
