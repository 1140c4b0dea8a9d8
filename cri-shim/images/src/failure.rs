//! Errors of requests to a registry.

use std::time::Duration;

use crate::error::ImageError;

/// The error of a request to a registry, and whether a retry can succeed.
#[derive(Debug)]
pub(crate) struct RequestFailure {
    pub error: ImageError,
    pub retry: bool,
    /// The delay that the registry requested with `Retry-After`, limited to a maximum.
    pub wait: Option<Duration>,
    /// True if the endpoint was too slow. The pull must then not use the endpoint again.
    pub slow: bool,
}

impl From<ImageError> for RequestFailure {
    fn from(error: ImageError) -> Self {
        RequestFailure {
            error,
            retry: false,
            wait: None,
            slow: false,
        }
    }
}

/// Returns the message of an error's innermost source. The innermost source is usually an error of
/// the kernel or of the TLS library.
pub(crate) fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    if std::ptr::eq(innermost, error) {
        return "unknown cause".into();
    }
    let message = clean(&innermost.to_string());
    // rustls reports InvalidContentType if the peer's answer is not TLS.
    if message.contains("InvalidContentType") {
        return "the server does not speak TLS; for plain HTTP, the registry's hosts.toml must contain server = \"http://…\""
            .into();
    }
    message
}

/// Returns the first 200 characters of untrusted text as one line without control characters. The
/// result is safe in a message.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .take(200)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
