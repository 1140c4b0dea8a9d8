//! Fields of the JSON objects that the runtime writes.

use serde_json::Value;

/// The names of an object's fields, sorted.
pub(crate) fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value
        .as_object()
        .into_iter()
        .flat_map(|map| map.keys().map(String::as_str))
        .collect();
    keys.sort_unstable();
    keys
}

/// RFC 3339 in UTC, as Go's RFC3339Nano writes it.
pub(crate) fn is_time(text: &str) -> bool {
    let (date, time) = text.split_once('T').unwrap_or_default();
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    date.len() == 10
        && date.split('-').all(digits)
        && time
            .strip_suffix('Z')
            .is_some_and(|time| time.len() >= 8 && time.split([':', '.']).all(digits))
}
