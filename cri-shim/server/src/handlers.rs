//! What the runtime handlers can do, as their own `features` say (the runtime specification's
//! features.md), and what this kernel can.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::config::Config;
use crate::container::idmap;
use rrun_calls::wait::blocking;

/// How long a runtime may take to tell.
const FEATURES_TIMEOUT: Duration = Duration::from_secs(20);

/// What is asked of a handler besides running containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    /// The mount option `rro`.
    pub recursive_read_only: bool,
    /// It knows user namespaces.
    pub users: bool,
    /// `uidMappings` and `gidMappings` of mounts.
    pub mapped_mounts: bool,
    /// `create --after PIPE`: it can be started before the bundle is written. Not so a program that
    /// changes the bundle before it becomes rrun (nvidia-container-runtime does that to runc).
    pub after: bool,
}

/// Asked once, when somebody first wants to know.
pub(crate) struct Handlers {
    features: BTreeMap<String, OnceCell<Features>>,
    users: OnceCell<bool>,
}

impl Handlers {
    pub(crate) fn new(config: &Config) -> Self {
        let names = config.runtimes.keys();
        Handlers {
            features: names.map(|name| (name.clone(), OnceCell::new())).collect(),
            users: OnceCell::new(),
        }
    }

    /// Of a handler by its name; empty is the default one.
    pub(crate) async fn features(&self, config: &Config, handler: &str) -> Features {
        let name = config.handler_name(handler);
        let (Some(cell), Some(runtime)) = (self.features.get(name), config.runtimes.get(name))
        else {
            return Features::default();
        };
        // One that is installed later has not been asked.
        if runtime.missing().is_some() {
            return Features::default();
        }
        *cell.get_or_init(|| ask(name, runtime.path.clone())).await
    }

    /// Whether the node can give pods user namespaces: the kernel must map the ids of layers.
    pub(crate) async fn users(&self, config: &Config) -> bool {
        let root = config.root.clone();
        *self
            .users
            .get_or_init(|| async move {
                let probe = move || idmap::probe(&root, &rrun_images::empty_layer(&root));
                match blocking("try a user namespace", probe).await {
                    Ok(()) => true,
                    Err(error) => {
                        log::info!("pods get no user namespaces of their own: {error}");
                        false
                    }
                }
            })
            .await
    }
}

async fn ask(name: &str, path: PathBuf) -> Features {
    let output = Command::new(&path)
        .arg("features")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let failed = |why: String| {
        log::info!(
            "the runtime handler {name:?} does not tell its features ({} features: {why}); it is taken to have none",
            path.display()
        );
        Features::default()
    };
    match tokio::time::timeout(FEATURES_TIMEOUT, output).await {
        Ok(Ok(output)) if output.status.success() => match serde_json::from_slice(&output.stdout) {
            Ok(value) => read(&value, identity(&path).as_deref()),
            Err(error) => failed(error.to_string()),
        },
        Ok(Ok(output)) => failed(output.status.to_string()),
        Ok(Err(error)) => failed(rrun_kernel::errno::describe(&error)),
        Err(_) => failed(format!("no answer within {} s", FEATURES_TIMEOUT.as_secs())),
    }
}

/// As rrun has it among its features.
fn identity(path: &Path) -> Option<String> {
    let file = std::fs::metadata(path).ok()?;
    Some(format!("{}:{}", file.dev(), file.ino()))
}

/// `identity` is that of the file which told them.
fn read(features: &Value, identity: Option<&str>) -> Features {
    let has = |pointer: &str, word: &str| {
        let list = features.pointer(pointer).and_then(Value::as_array);
        list.is_some_and(|list| list.iter().any(|one| one == word))
    };
    let idmap = features.pointer("/linux/mountExtensions/idmap/enabled");
    let after = features.pointer("/annotations/io.rrun.create.after");
    Features {
        recursive_read_only: has("/mountOptions", "rro"),
        users: has("/linux/namespaces", "user"),
        mapped_mounts: idmap.and_then(Value::as_bool).unwrap_or_default(),
        after: identity.is_some() && after.and_then(Value::as_str) == identity,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn features_are_where_the_specification_has_them() {
        let features = json!({
            "mountOptions": ["ro", "rro"],
            "linux": {
                "namespaces": ["pid", "user"],
                "mountExtensions": { "idmap": { "enabled": true } },
            },
            "annotations": { "io.rrun.create.after": "8:77" },
        });
        let all = Features {
            recursive_read_only: true,
            users: true,
            mapped_mounts: true,
            after: true,
        };
        assert_eq!(read(&features, Some("8:77")), all);
        let before_the_bundle = Features {
            after: false,
            ..all
        };
        for other in [Some("8:78"), None] {
            assert_eq!(read(&features, other), before_the_bundle);
        }
        assert_eq!(read(&json!({}), None), Features::default());
    }
}
