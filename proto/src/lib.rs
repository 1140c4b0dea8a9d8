//! The messages, the client and the server of the Kubernetes Container Runtime Interface (CRI),
//! version 1, as of Kubernetes 1.36.
//!
//! The definition is in `proto/cri/v1`, which has one file per subject. `build.rs` compiles the
//! definition. `tests/cri_api.rs` compares the definition with the Go module from which Kubernetes
//! itself is built.

/// The protobuf package `runtime.v1`. The package name must not change, because it is part of every
/// gRPC method's path.
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

use std::fmt;

/// The trait with which messages are encoded and decoded.
pub use prost::Message;

/// The CRI definition marks the secret fields of AuthConfig with `debug_redact`, an option that
/// prost ignores. Without this implementation of `Debug`, a log message with `{request:?}` would
/// contain the password for a registry.
impl fmt::Debug for v1::AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn redacted(secret: &str) -> &'static str {
            if secret.is_empty() { "" } else { "[redacted]" }
        }
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("password", &redacted(&self.password))
            .field("auth", &redacted(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &redacted(&self.identity_token))
            .field("registry_token", &redacted(&self.registry_token))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::v1::{AuthConfig, PullImageRequest};

    #[test]
    fn the_debug_output_of_a_pull_request_contains_no_secret() {
        let request = PullImageRequest {
            auth: Some(AuthConfig {
                username: "name".into(),
                password: "s3cret".into(),
                auth: "s3cret".into(),
                server_address: "registry".into(),
                identity_token: "s3cret".into(),
                registry_token: "s3cret".into(),
            }),
            ..Default::default()
        };
        let shown = format!("{request:?}");
        assert!(shown.contains("name") && shown.contains("registry"));
        assert!(!shown.contains("s3cret"), "{shown}");
    }
}
