//! Certificates that openssl creates for a test.

use std::path::Path;

use crate::support::machine::{Result, command};
use crate::support::needs::Need;

pub(crate) const OPENSSL: Need = Need::Program("openssl");

/// Creates a certificate authority, a certificate for 127.0.0.1 and a client certificate.
pub(crate) fn certificates(dir: &Path) -> Result {
    certificates_by("test-ca", dir)
}

/// Like [`certificates`], but the certificate authority has the name `authority`.
pub(crate) fn certificates_by(authority: &str, dir: &Path) -> Result {
    let script = r#"
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=$1" \
            -keyout ca.key -out ca.pem
        echo subjectAltName=IP:127.0.0.1 > ext
        for name in server client; do
            openssl req -newkey rsa:2048 -nodes -subj /CN=$name -keyout $name.key -out req.pem
            openssl x509 -req -in req.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                -extfile ext -out $name.pem
        done"#;
    let made = command("sh", ["-ec", script, "sh", authority])
        .dir(dir)
        .ok();
    made.map(|_| ())
}
