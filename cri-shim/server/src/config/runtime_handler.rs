//! The OCI runtimes that pods can choose.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One `[runtime.NAME]`: an OCI runtime that a pod's RuntimeClass can choose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(crate) struct RuntimeHandler {
    /// The binary; a bare name is looked up beside rrun-cri and in PATH.
    pub path: PathBuf,
    /// Global options, before the subcommand.
    #[serde(default)]
    pub options: Vec<String>,
    /// Its containers' processes are processes of the node's kernel: a signal to them needs no
    /// help from the runtime. False for runtimes with a kernel of their own (runsc, kata).
    #[serde(default = "yes")]
    pub native: bool,
    /// Which annotations of a pod, and of a container, its runtime is told; `*` and `?` stand for
    /// any characters.
    #[serde(default)]
    pub pod_annotations: Vec<String>,
    #[serde(default)]
    pub container_annotations: Vec<String>,
}

fn yes() -> bool {
    true
}

impl RuntimeHandler {
    /// The name of the handler that is there without a section, and its binary's name.
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

    /// A sentence if the binary is not there.
    pub(crate) fn missing(&self) -> Option<String> {
        let path = self.path.display();
        (!self.path.is_file()).then(|| format!("there is no runtime at {path}"))
    }
}
