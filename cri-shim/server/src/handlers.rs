//! The features of the runtime handlers and of the kernel. A runtime reports its features with the
//! command `features`, which the runtime specification's features.md defines.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::process::Command;
use tokio::sync::Mutex;

use crate::config::Config;
use crate::container::idmap;
use rrun_calls::wait::blocking;

/// The time limit for a runtime's `features` command.
const FEATURES_TIMEOUT: Duration = Duration::from_secs(20);

/// The optional runtime features that rrun-cri uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    /// True if the runtime supports the mount option `rro`.
    pub recursive_read_only: bool,
    /// True if the runtime supports user namespaces.
    pub users: bool,
    /// True if the runtime supports `uidMappings` and `gidMappings` of mounts.
    pub mapped_mounts: bool,
    /// True if the runtime supports `create --after PIPE`. With this option, the runtime first
    /// reads a byte from PIPE, and then reads the bundle. The server can therefore write the bundle
    /// while the runtime starts. Some wrappers change the bundle and then execute rrun. Such a
    /// wrapper does not support this option, because it reads the bundle without waiting for the
    /// byte. For runc, nvidia-container-runtime is a wrapper of this kind.
    pub after: bool,
}

/// The time after which a failed query is repeated. A query can fail for a reason that passes, for
/// example because the node has no process ids left.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// The handlers' features. The server queries a handler once, at the first use of the handler's
/// features.
pub(crate) struct Handlers {
    features: BTreeMap<String, Answer<Features>>,
    users: Answer<bool>,
}

/// The answer to a query. A successful query is never repeated. After a failed query, the default
/// value is the answer until [`RETRY_INTERVAL`] has passed.
#[derive(Default)]
struct Answer<T>(Mutex<Known<T>>);

#[derive(Clone, Copy, Default)]
enum Known<T> {
    #[default]
    Nothing,
    Found(T),
    Failed(Instant),
}

impl<T: Copy + Default> Answer<T> {
    async fn found(&self) -> Option<T> {
        match *self.0.lock().await {
            Known::Found(value) => Some(value),
            Known::Nothing | Known::Failed(_) => None,
        }
    }

    /// Returns the known answer, or the answer of `query`. An error of `query` is logged only the
    /// first time.
    async fn get(&self, query: impl Future<Output = Result<T, String>>) -> T {
        let mut known = self.0.lock().await;
        match *known {
            Known::Found(value) => return value,
            Known::Failed(at) if at.elapsed() < RETRY_INTERVAL => return T::default(),
            Known::Nothing | Known::Failed(_) => {}
        }
        match query.await {
            Ok(value) => {
                *known = Known::Found(value);
                value
            }
            Err(sentence) => {
                if matches!(*known, Known::Nothing) {
                    log::info!("{sentence}");
                }
                *known = Known::Failed(Instant::now());
                T::default()
            }
        }
    }
}

impl Handlers {
    pub(crate) fn new(config: &Config) -> Self {
        let names = config.runtimes.keys();
        Handlers {
            features: names
                .map(|name| (name.clone(), Answer::default()))
                .collect(),
            users: Answer::default(),
        }
    }

    /// Returns the features of the runtime handler with the name `handler`. An empty name selects
    /// the default handler.
    pub(crate) async fn features(&self, config: &Config, handler: &str) -> Features {
        let name = config.handler_name(handler);
        let (Some(known), Some(runtime)) = (self.features.get(name), config.runtimes.get(name))
        else {
            return Features::default();
        };
        if let Some(found) = known.found().await {
            return found;
        }
        // A missing runtime is not queried, so its features are known as soon as an administrator
        // has installed it.
        if runtime.missing().is_some() {
            return Features::default();
        }
        known.get(query(name, runtime.path.clone())).await
    }

    /// Returns whether pods can have user namespaces, which requires id-mapped mounts of the image
    /// layers.
    pub(crate) async fn users(&self, config: &Config) -> bool {
        let root = config.root.clone();
        let probe = move || idmap::probe(&root, &rrun_images::empty_layer(&root));
        let what = "test whether the node supports user namespaces for pods";
        let query = async {
            let probed = blocking(what, probe).await;
            probed.map(|()| true).map_err(|error| {
                format!("this node does not support user namespaces for pods: {error}")
            })
        };
        self.users.get(query).await
    }
}

async fn query(name: &str, path: PathBuf) -> Result<Features, String> {
    let output = Command::new(&path)
        .arg("features")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let failed = |why: String| {
        Err(format!(
            "the runtime handler {name:?} does not report its features (\"{} features\" failed: {why}); rrun-cri assumes that the runtime has no optional features",
            path.display()
        ))
    };
    match tokio::time::timeout(FEATURES_TIMEOUT, output).await {
        Ok(Ok(output)) if output.status.success() => match serde_json::from_slice(&output.stdout) {
            Ok(value) => Ok(read(&value, identity(&path).as_deref())),
            Err(error) => failed(error.to_string()),
        },
        Ok(Ok(output)) => failed(output.status.to_string()),
        Ok(Err(error)) => failed(rrun_kernel::errno::describe(&error)),
        Err(_) => failed(format!(
            "the command did not exit within {} s",
            FEATURES_TIMEOUT.as_secs()
        )),
    }
}

/// Returns the device and inode numbers of a binary as `DEVICE:INODE`. `rrun features` reports the
/// numbers of rrun's binary in the same form. If these numbers differ from the numbers of the
/// handler's binary, the handler's binary is a wrapper that executes rrun.
fn identity(path: &Path) -> Option<String> {
    let file = std::fs::metadata(path).ok()?;
    Some(format!("{}:{}", file.dev(), file.ino()))
}

/// Reads a runtime's features from the JSON output of the command `features`. `identity` contains
/// the device and inode numbers of the handler's binary, as [`identity()`] returns them.
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
    fn features_are_read_from_the_fields_of_the_specification() {
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
