//! Chooses the client certificate for a registry that requests one (RFC 8446, 4.3.2); hosts.toml
//! may name several.

use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

/// All certificates of a PEM file; `None` if there is none, or one is broken.
pub(crate) fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    all.ok().filter(|all| !all.is_empty())
}

/// A certificate with its key.
#[derive(Debug)]
pub(crate) struct Identity {
    certified: Arc<CertifiedKey>,
    /// Who vouches for it, and for each certificate of its chain: distinguished names in DER.
    issuers: Vec<DistinguishedName>,
}

impl Identity {
    /// `pem` has the certificate and perhaps its chain, `key` the key.
    pub(crate) fn new(pem: &[u8], key: &[u8]) -> Result<Self, &'static str> {
        const NEITHER: &str = "holds no certificate and key in PEM form";
        let chain = certificates(pem).ok_or(NEITHER)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| NEITHER)?;
        let key = ring::sign::any_supported_type(&key)
            .map_err(|_| "comes with a key of a kind that is not known")?;
        // One whose issuer can't be read is shown where no other fits.
        let issuers = chain.iter().filter_map(|certificate| {
            let read = webpki::EndEntityCert::try_from(certificate).ok()?;
            Some(DistinguishedName::in_sequence(read.issuer()))
        });
        let issuers = issuers.collect();
        let certified = CertifiedKey::new(chain, key);
        if let Err(Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) =
            certified.keys_match()
        {
            return Err("holds a certificate that its key does not belong to");
        }
        Ok(Identity {
            certified: Arc::new(certified),
            issuers,
        })
    }
}

/// The certificates that may be shown, in the order of hosts.toml.
#[derive(Debug)]
pub(crate) struct ClientCertificates(Vec<Identity>);

impl ClientCertificates {
    pub(crate) fn of(identities: Vec<Identity>) -> Self {
        ClientCertificates(identities)
    }
}

impl ResolvesClientCert for ClientCertificates {
    /// The first one that an authority vouches for whom the server names, else the first: a server
    /// need not name all whom it trusts.
    fn resolve(&self, named: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let usable = || {
            let all = self.0.iter();
            all.filter(|one| one.certified.key.choose_scheme(schemes).is_some())
        };
        let vouched = |one: &&Identity| {
            let mut issuers = one.issuers.iter();
            issuers.any(|issuer| named.contains(&issuer.as_ref()))
        };
        let chosen = usable().find(vouched).or_else(|| usable().next())?;
        Some(Arc::clone(&chosen.certified))
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

/// TLS that shows one of `ours`, and trusts `authorities` and the system's, or everybody.
pub(crate) fn tls(
    ours: ClientCertificates,
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
        .with_client_cert_resolver(Arc::new(ours));
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

/// `skip_verify`: any certificate will do. That its holder has the key is still made sure of.
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
