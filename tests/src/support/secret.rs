//! A secret file of the host, which no container must be able to read or change.

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

    /// Returns a relative path that leads to the secret file from any directory of the host.
    pub(crate) fn upwards(&self) -> String {
        format!("../../../../../../../..{}", self.path().display())
    }

    pub(crate) fn unseen(&self, output: &Output) -> Result {
        ensure!(
            !output.stdout.contains(SECRET.trim()),
            "the container read the host's secret file:\n{}",
            output.told()
        );
        Ok(())
    }

    pub(crate) fn unchanged(&self) -> Result {
        ensure_eq!(
            fs::read_to_string(self.path())?,
            SECRET,
            "the content of the host's secret file"
        );
        let names = fs::read_dir(self.0.path())?.count();
        ensure_eq!(
            names,
            1,
            "the number of files in the host's secret directory"
        );
        Ok(())
    }
}
