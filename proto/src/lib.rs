//! The Kubernetes Container Runtime Interface, version 1, as Kubernetes 1.36 has it: messages,
//! client and server.
//!
//! The definition is in `proto/cri/v1`, one file per concern; `build.rs` compiles it, and
//! `tests/cri_api.rs` holds it against the Go module that Kubernetes itself is built from.

/// Package `runtime.v1`, the name that travels in every gRPC method's path.
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

use std::fmt;

/// The definition marks these fields `debug_redact`, which prost passes over: without this a
/// `{request:?}` in a log would carry a registry's password.
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
    fn debug_output_of_a_pull_carries_no_secret() {
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
