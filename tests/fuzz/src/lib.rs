//! The fuzz targets of all crates, and an engine that changes inputs at random.
//!
//! A fuzz target is a function that passes the bytes of one input to a parser. The target panics if
//! the parser panics, or if the result contradicts a property that the target checks. Each crate
//! exports its targets in a module `fuzz`, which exists only with the crate's feature `fuzz`.
//! `corpus/TARGET/` contains the initial inputs of a target, and the inputs that found a mistake.

mod change;
mod run;

use std::path::{Path, PathBuf};

pub use run::{Report, run};

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    pub function: fn(&[u8]),
}

/// Returns all fuzz targets, sorted by name.
pub fn targets() -> Vec<Target> {
    let mut all: Vec<Target> = [
        rrun::fuzz::TARGETS,
        rrun_cri::fuzz::TARGETS,
        rrun_images::fuzz::TARGETS,
        rrun_monitor::fuzz::TARGETS,
        rrun_network::fuzz::TARGETS,
        rrun_streams::fuzz::TARGETS,
        &[("container-request", container_request)],
    ]
    .concat()
    .into_iter()
    .map(|(name, function)| Target { name, function })
    .collect();
    all.sort_by_key(|target| target.name);
    all
}

/// Builds config.json from a request of the CRI, and passes the result to the runtime. The runtime
/// can refuse a value, but not the format.
fn container_request(input: &[u8]) {
    if let Some(text) = rrun_cri::fuzz::container_request(input) {
        rrun::fuzz::bundle_of_server(text.as_bytes());
    }
}

/// Returns the target with this name.
pub fn target(name: &str) -> Option<Target> {
    targets().into_iter().find(|target| target.name == name)
}

impl Target {
    /// The directory with the target's corpus in the source tree.
    pub fn corpus_dir(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(self.name)
    }

    /// Reads the target's corpus, sorted by file name.
    ///
    /// # Errors
    /// An error means that the directory or one of its files cannot be read.
    pub fn corpus(&self) -> std::io::Result<Vec<Vec<u8>>> {
        let mut paths = std::fs::read_dir(self.corpus_dir())?
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()?;
        paths.sort();
        paths.iter().map(std::fs::read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::targets;

    #[test]
    fn every_target_has_its_own_name_and_a_corpus() {
        let mut names: Vec<&str> = targets().iter().map(|target| target.name).collect();
        names.dedup();
        assert_eq!(names.len(), targets().len());
        for target in targets() {
            let corpus = target.corpus().unwrap_or_default();
            assert!(!corpus.is_empty(), "{} has no corpus", target.name);
        }
    }
}
