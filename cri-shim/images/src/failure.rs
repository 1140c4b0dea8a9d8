//! Why a request to a registry failed.

use std::time::Duration;

use crate::error::ImageError;

/// Why a request failed, and whether the same may succeed later.
#[derive(Debug)]
pub(crate) struct RequestFailure {
    pub error: ImageError,
    pub retry: bool,
    /// What the registry asks for by `Retry-After`, bounded.
    pub wait: Option<Duration>,
    /// The endpoint is too slow to be used again.
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

/// The innermost reason, which is the kernel's or the TLS library's.
pub(crate) fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    if std::ptr::eq(innermost, error) {
        return "it can't be done".into();
    }
    let said = clean(&innermost.to_string());
    // rustls' word for an answer that is no TLS.
    if said.contains("InvalidContentType") {
        return "it does not speak TLS; for plain HTTP its hosts.toml says server = \"http://…\""
            .into();
    }
    said
}

/// A stranger's text for a message: one short line.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .take(200)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
