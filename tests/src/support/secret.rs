//! A file of the host's that no container may see or change.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::machine::{Directory, Output, Result};
use crate::{ensure, ensure_eq};

pub(crate) struct Secret(Directory);

pub(crate) const SECRET: &str = "the host's secret\n";

impl Secret {
    pub(crate) fn new() -> Result<Self> {
        let dir = Directory::new("secret")?;
        fs::write(dir.join("file"), SECRET)?;
        Ok(Secret(dir))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.join("file")
    }

    pub(crate) fn directory(&self) -> &Path {
        self.0.path()
    }

    /// From any directory of the host's.
    pub(crate) fn upwards(&self) -> String {
        format!("../../../../../../../..{}", self.path().display())
    }

    pub(crate) fn unseen(&self, output: &Output) -> Result {
        ensure!(
            !output.stdout.contains(SECRET.trim()),
            "it was read:\n{}",
            output.told()
        );
        Ok(())
    }

    pub(crate) fn unchanged(&self) -> Result {
        ensure_eq!(fs::read_to_string(self.path())?, SECRET, "the host's file");
        let names = fs::read_dir(self.0.path())?.count();
        ensure_eq!(names, 1, "files in the host's directory");
        Ok(())
    }
}
