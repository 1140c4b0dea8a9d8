//! Chooses the client certificate for a registry that requests one (RFC 8446, 4.3.2). hosts.toml
//! can list several certificates.

use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

/// Parses all certificates of a PEM file. Returns `None` if the file contains no certificate or an
/// invalid certificate.
pub(crate) fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    all.ok().filter(|all| !all.is_empty())
}

/// A client certificate with its private key.
#[derive(Debug)]
pub(crate) struct Identity {
    certified: Arc<CertifiedKey>,
    /// The issuers of the certificate and of the other certificates in its chain, as distinguished
    /// names in DER.
    issuers: Vec<DistinguishedName>,
}

impl Identity {
    /// Creates an identity. `pem` contains the certificate and optionally its chain, and `key`
    /// contains the private key.
    pub(crate) fn new(pem: &[u8], key: &[u8]) -> Result<Self, &'static str> {
        const NOT_PEM: &str = "does not contain a certificate and a key in PEM form";
        let chain = certificates(pem).ok_or(NOT_PEM)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| NOT_PEM)?;
        let key =
            ring::sign::any_supported_type(&key).map_err(|_| "has a key of an unsupported type")?;
        // A certificate whose issuer can't be parsed adds no entry to `issuers`. An identity
        // without issuers can still be chosen: `resolve` returns the first identity if no identity
        // has an issuer from the server's list.
        let issuers = chain.iter().filter_map(|certificate| {
            let read = webpki::EndEntityCert::try_from(certificate).ok()?;
            Some(DistinguishedName::in_sequence(read.issuer()))
        });
        let issuers = issuers.collect();
        let certified = CertifiedKey::new(chain, key);
        if let Err(Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) =
            certified.keys_match()
        {
            return Err("has a key that does not belong to the certificate");
        }
        Ok(Identity {
            certified: Arc::new(certified),
            issuers,
        })
    }
}

/// The client certificates for the registry, in the same order as in hosts.toml.
#[derive(Debug)]
pub(crate) struct ClientCertificates(Vec<Identity>);

impl ClientCertificates {
    pub(crate) fn of(identities: Vec<Identity>) -> Self {
        ClientCertificates(identities)
    }
}

impl ResolvesClientCert for ClientCertificates {
    /// Returns the first certificate whose issuer the server lists as trusted. If no certificate
    /// has a listed issuer, returns the first certificate. The server can still accept this
    /// certificate, because it need not list every issuer that it trusts.
    fn resolve(&self, trusted: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let usable = || {
            let all = self.0.iter();
            all.filter(|one| one.certified.key.choose_scheme(schemes).is_some())
        };
        let issuer_is_listed = |one: &&Identity| {
            let mut issuers = one.issuers.iter();
            issuers.any(|issuer| trusted.contains(&issuer.as_ref()))
        };
        let chosen = usable()
            .find(issuer_is_listed)
            .or_else(|| usable().next())?;
        Some(Arc::clone(&chosen.certified))
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

/// Creates a TLS configuration without a client certificate. If `skip_verify` is set, the
/// configuration accepts the certificate of any server. Otherwise, it trusts `authorities` and the
/// system's authorities.
pub(crate) fn tls(
    authorities: Vec<CertificateDer<'static>>,
    skip_verify: bool,
) -> Result<ClientConfig, Error> {
    let provider = Arc::new(ring::default_provider());
    let verifier: Arc<dyn ServerCertVerifier> = if skip_verify {
        Arc::new(AnyServer(Arc::clone(&provider)))
    } else {
        let provider = Arc::clone(&provider);
        Arc::new(rustls_platform_verifier::Verifier::new_with_extra_roots(
            authorities,
            provider,
        )?)
    };
    let mut tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

/// The verifier for the setting `skip_verify`. This verifier accepts any certificate, but verifies
/// that the server has the certificate's private key.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, signed, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
