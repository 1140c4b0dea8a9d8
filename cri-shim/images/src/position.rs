//! Where in a file a mistake is.

/// The line, from 1 on, that the byte at `at` is in.
pub fn line(text: &str, at: usize) -> usize {
    let before = text.get(..at.min(text.len())).unwrap_or(text);
    before.matches('\n').count() + 1
}

/// The same, and the key there.
pub fn of(text: &str, at: usize) -> (usize, String) {
    let line = line(text, at);
    let found = text.lines().nth(line - 1).unwrap_or_default();
    let key = found.split('=').next().unwrap_or_default().trim();
    (line, key.to_owned())
}
