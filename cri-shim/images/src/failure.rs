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

/// Describes why a JSON document from a registry can't be read. The parser's message can contain a
/// value of the document. This value is omitted: after a redirection, the document can come from
/// another host, and the error must not show the contents of that host's documents.
pub(crate) fn unreadable_json(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let kinds = ["invalid type", "invalid value", "invalid length"];
    match kinds.iter().find(|kind| message.starts_with(**kind)) {
        Some(kind) => format!("{kind}{place}"),
        None => clean(&message),
    }
}

/// Returns the first 200 characters of untrusted text as one line without control characters. The
/// result is safe in a message.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .take(200)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_about_a_json_document_contains_no_value_of_the_document() {
        for (text, expected) in [
            (r#"{"n": "hunter2"}"#, "invalid type at line 1 column 15"),
            ("{\"n\":\n 300}", "invalid value at line 2 column 4"),
            ("<html>", "expected value at line 1 column 1"),
            ("{}", "missing field `n` at line 1 column 2"),
        ] {
            #[derive(Debug, serde::Deserialize)]
            struct Document {
                #[expect(dead_code, reason = "the test needs only the error")]
                n: u8,
            }
            let error = serde_json::from_str::<Document>(text);
            assert_eq!(
                error
                    .map_err(|error| unreadable_json(&error))
                    .err()
                    .as_deref(),
                Some(expected),
                "{text}"
            );
        }
    }
}
