//! Finds the line and the key of a mistake in a configuration file.

/// Returns the number of the line that contains the byte at the offset `at`. The first line has the
/// number 1.
pub fn line(text: &str, at: usize) -> usize {
    let before = text.get(..at.min(text.len())).unwrap_or(text);
    before.matches('\n').count() + 1
}

/// Finds the line with the byte at the offset `at`. Returns the number of this line, and the key at
/// its beginning.
pub fn of(text: &str, at: usize) -> (usize, String) {
    let line = line(text, at);
    let found = text.lines().nth(line - 1).unwrap_or_default();
    let key = found.split('=').next().unwrap_or_default().trim();
    (line, key.to_owned())
}
