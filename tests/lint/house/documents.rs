//! Checks whether the files and tests that documents name exist.

use std::collections::BTreeSet;
use std::path::Path;

use crate::Result;
use crate::sentences::tracked_files;

/// Endings of file names. If a document contains a name with one of these endings, a file with this
/// name must exist in the repository.
const ENDINGS: &[&str] = &[".rs", ".md", ".sh"];
/// The folders of end-to-end tests in tests/src.
const KINDS: &[&str] = &["runtime", "cri", "network", "kubelet", "cluster"];

/// Returns one error message for each missing file or test that a document names.
pub(crate) fn complaints(checkout: &Path) -> Result<Vec<String>> {
    let files: BTreeSet<String> = tracked_files(checkout)?.into_iter().collect();
    let mut complaints = Vec::new();
    for document in files.iter().filter(|file| file.ends_with(".md")) {
        // The changelog is not checked, because it names files and tests that no longer exist.
        if document == "CHANGELOG.md" {
            continue;
        }
        let text = std::fs::read_to_string(checkout.join(document))?;
        for (number, line) in text.lines().enumerate() {
            for name in in_backticks(line) {
                if !exists(name, &files, checkout) {
                    complaints.push(format!(
                        "{document}:{}: the file or test {name} does not exist",
                        number + 1
                    ));
                }
            }
        }
    }
    Ok(complaints)
}

/// Returns the texts between backticks.
fn in_backticks(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Returns whether the file or the end-to-end test `name` exists. Returns true for every other
/// name. A path can lack its first folders, as in `lifecycle/create.rs`.
fn exists(name: &str, files: &BTreeSet<String>, checkout: &Path) -> bool {
    if let Some((kind, test)) = name.split_once("::")
        && KINDS.contains(&kind)
    {
        return test_exists(kind, test, checkout);
    }
    let is_path = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    if !is_path || name.starts_with('/') || !ENDINGS.iter().any(|end| name.ends_with(end)) {
        return true;
    }
    let end = format!("/{}", name.trim_start_matches("../"));
    files
        .iter()
        .any(|file| format!("/{file}").ends_with(end.as_str()))
}

/// Returns whether a test exists. `test` is empty, or has one of the forms `SUBJECT`, `SUBJECT::`
/// and `SUBJECT::FUNCTION`.
fn test_exists(kind: &str, test: &str, checkout: &Path) -> bool {
    let (subject, function) = test.split_once("::").unwrap_or((test, ""));
    let folder = checkout.join("tests/src").join(kind);
    if subject.is_empty() {
        return folder.is_dir();
    }
    let Ok(text) = std::fs::read_to_string(folder.join(subject).with_extension("rs")) else {
        return false;
    };
    function.is_empty() || text.contains(&format!("fn {function}("))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_can_lack_its_first_folders() {
        let files = ["runtime/src/main.rs".to_owned(), "README.md".to_owned()].into();
        let exists = |name| exists(name, &files, Path::new("/nonexistent"));
        for name in [
            "main.rs",
            "src/main.rs",
            "README.md",
            "cargo build",
            "/etc/x.sh",
            "::",
        ] {
            assert!(exists(name), "{name}");
        }
        for name in [
            "ain.rs",
            "source/main.rs",
            "docs/README.md",
            "cri::pods::a_test",
        ] {
            assert!(!exists(name), "{name}");
        }
    }
}
