//! Finds the line and the key of a mistake in a configuration file.

/// Returns the number of the line that contains the byte at the offset `at`. The first line has the
/// number 1.
pub fn line(text: &str, at: usize) -> usize {
    let before = text.get(..at.min(text.len())).unwrap_or(text);
    before.matches('\n').count() + 1
}

/// The lines of a text, for a caller that looks up many offsets.
pub(crate) struct Lines {
    /// The offsets of the newlines.
    newlines: Vec<usize>,
}

impl Lines {
    pub(crate) fn new(text: &str) -> Self {
        Lines {
            newlines: text.match_indices('\n').map(|(at, _)| at).collect(),
        }
    }

    /// Returns the same number as [`line`].
    pub(crate) fn at(&self, at: usize) -> usize {
        self.newlines.partition_point(|newline| *newline < at) + 1
    }
}

/// Finds the line with the byte at the offset `at`. Returns the number of this line, and the key at
/// its beginning.
pub fn of(text: &str, at: usize) -> (usize, String) {
    let line = line(text, at);
    let found = text.lines().nth(line - 1).unwrap_or_default();
    let key = found.split('=').next().unwrap_or_default().trim();
    (line, key.to_owned())
}
