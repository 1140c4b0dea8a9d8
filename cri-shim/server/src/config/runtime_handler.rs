//! The OCI runtimes that pods can choose.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One section `[runtime.NAME]`: an OCI runtime that a pod's RuntimeClass can choose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(crate) struct RuntimeHandler {
    /// The runtime's binary. If the path contains no slash, the server searches for the binary in
    /// its own directory and in PATH.
    pub path: PathBuf,
    /// The runtime's global options, which precede the subcommand.
    #[serde(default)]
    pub options: Vec<String>,
    /// True if the container's processes run on the node's kernel. rrun-cri can then send signals
    /// to them directly. False for runtimes that run containers under a separate kernel (runsc,
    /// kata).
    #[serde(default = "yes")]
    pub native: bool,
    /// Patterns of the pod annotations that are passed to the runtime. In a pattern, `*` and `?`
    /// are wildcards.
    #[serde(default)]
    pub pod_annotations: Vec<String>,
    /// Patterns of the container annotations that are passed to the runtime.
    #[serde(default)]
    pub container_annotations: Vec<String>,
}

fn yes() -> bool {
    true
}

impl RuntimeHandler {
    /// The name of the built-in handler and of its binary. The built-in handler needs no section in
    /// the configuration.
    pub(super) const BUILT_IN: &str = "rrun";

    pub(super) fn built_in() -> Self {
        RuntimeHandler {
            path: Self::BUILT_IN.into(),
            options: Vec::new(),
            native: true,
            pod_annotations: Vec::new(),
            container_annotations: Vec::new(),
        }
    }

    /// Returns an error text if the binary does not exist or cannot be found.
    pub(crate) fn missing(&self) -> Option<String> {
        super::missing("the runtime", &self.path)
    }
}
