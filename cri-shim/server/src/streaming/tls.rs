//! TLS for the streaming server.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// Loads the configured certificate and key, if they are set. An error consists of the
/// configuration key with the invalid value, and the reason.
pub(crate) fn acceptor(
    cert: Option<&PathBuf>,
    key: Option<&PathBuf>,
) -> Result<Option<TlsAcceptor>, (&'static str, String)> {
    let (Some(cert), Some(key)) = (cert, key) else {
        return Ok(None);
    };
    let bad = |key, path: &Path, why: &dyn std::fmt::Display| {
        let reason = format!("{}: {why}", path.display());
        (key, reason)
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
