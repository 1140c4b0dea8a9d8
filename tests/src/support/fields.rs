//! Fields of the JSON objects that the runtime prints.

use serde_json::Value;

/// Returns the sorted names of an object's fields.
pub(crate) fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value
        .as_object()
        .into_iter()
        .flat_map(|map| map.keys().map(String::as_str))
        .collect();
    keys.sort_unstable();
    keys
}

/// Returns whether a text is an RFC 3339 time in UTC, in Go's format RFC3339Nano.
pub(crate) fn is_time(text: &str) -> bool {
    let (date, time) = text.split_once('T').unwrap_or_default();
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    date.len() == 10
        && date.split('-').all(digits)
        && time
            .strip_suffix('Z')
            .is_some_and(|time| time.len() >= 8 && time.split([':', '.']).all(digits))
}
