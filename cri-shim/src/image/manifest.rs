//! Manifests, indexes and configurations: OCI's and Docker's schema 2, which are of one shape.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::error::{ImageError, Kind};
use super::record::ImageConfig;
use super::reference::is_digest;
use crate::layer::Promise;

/// What is asked for under a tag or a digest.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// The most bytes of a manifest, an index or a configuration, each.
pub const DOCUMENT_BYTES: u64 = 8 << 20;

/// overlayfs takes 500 lower directories.
const LAYERS: usize = 500;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    pub digest: String,
    pub size: u64,
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    variant: Option<String>,
}

#[derive(Debug)]
pub struct Manifest {
    pub config: Descriptor,
    /// Lowest first.
    pub layers: Vec<Descriptor>,
}

#[derive(Debug)]
pub enum Document {
    Image(Manifest),
    /// The digest of the manifest for this machine.
    Index(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: Option<u32>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

fn broken(what: impl Into<String>) -> ImageError {
    ImageError::new(Kind::DataLoss, what)
}

/// Reads a manifest or an index by its content, for media types are often wrong.
pub fn parse(bytes: &[u8]) -> Result<Document, ImageError> {
    let raw: Raw = serde_json::from_slice(bytes)
        .map_err(|error| broken(format!("the manifest can't be read: {error}")))?;
    if raw.schema_version == Some(1) {
        return Err(ImageError::new(
            Kind::Unimplemented,
            "the image has a manifest of Docker's schema 1, which was given up in 2019: push it again with a current tool",
        ));
    }
    match raw {
        Raw {
            config: Some(config),
            layers: Some(layers),
            ..
        } => {
            if layers.len() > LAYERS {
                return Err(broken(format!(
                    "the image has {} layers, of which overlayfs takes {LAYERS}",
                    layers.len()
                )));
            }
            for descriptor in layers.iter().chain([&config]) {
                check_digest(&descriptor.digest)?;
            }
            Ok(Document::Image(Manifest { config, layers }))
        }
        Raw {
            manifests: Some(manifests),
            ..
        } => choose(&manifests, architecture()).map(Document::Index),
        _ => Err(broken(
            "the manifest names neither a configuration with layers nor other manifests",
        )),
    }
}

fn check_digest(digest: &str) -> Result<(), ImageError> {
    if is_digest(digest) {
        return Ok(());
    }
    Err(broken(format!(
        "the digest {:?} in the manifest is not sha256: and 64 hexadecimal digits",
        digest.chars().take(100).collect::<String>()
    )))
}

/// Go's name of the architecture that this program was built for.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The manifest for this machine. Attestations stand in an index as `unknown/unknown` and are
/// never it; a CPU variant is welcome only if it is the one that all such machines have.
fn choose(manifests: &[Descriptor], architecture: &str) -> Result<String, ImageError> {
    let fits = |descriptor: &&Descriptor| {
        descriptor
            .platform
            .as_ref()
            .is_some_and(|platform| platform.os == "linux" && platform.architecture == architecture)
    };
    let plain = |descriptor: &&Descriptor| {
        matches!(
            descriptor
                .platform
                .as_ref()
                .and_then(|platform| platform.variant.as_deref()),
            None | Some("" | "v8" | "v1")
        )
    };
    let chosen = manifests
        .iter()
        .filter(fits)
        .find(plain)
        .or_else(|| manifests.iter().find(fits))
        // An index of one image that nobody told the platform of.
        .or_else(|| match manifests {
            [only] if only.platform.is_none() => Some(only),
            _ => None,
        });
    match chosen {
        Some(chosen) => {
            check_digest(&chosen.digest)?;
            Ok(chosen.digest.clone())
        }
        None => Err(ImageError::new(
            Kind::NotFound,
            format!("the image is not built for linux/{architecture}"),
        )),
    }
}

/// What a configuration says, as far as it matters here.
#[derive(Debug)]
pub struct Configuration {
    pub config: ImageConfig,
    pub created: Option<String>,
    pub diff_ids: Vec<String>,
}

#[derive(Deserialize)]
struct RawConfiguration {
    created: Option<String>,
    os: Option<String>,
    config: Option<RawConfig>,
    rootfs: Option<RawRootfs>,
}

#[derive(Deserialize)]
struct RawRootfs {
    diff_ids: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

pub fn parse_configuration(bytes: &[u8]) -> Result<Configuration, ImageError> {
    let raw: RawConfiguration = serde_json::from_slice(bytes)
        .map_err(|error| broken(format!("the image's configuration can't be read: {error}")))?;
    if let Some(os) = raw.os.as_deref().filter(|os| !matches!(*os, "" | "linux")) {
        return Err(ImageError::new(
            Kind::NotFound,
            format!("the image is built for {os:?}, not for linux"),
        ));
    }
    let config = raw.config.unwrap_or_default();
    let diff_ids = raw
        .rootfs
        .and_then(|rootfs| rootfs.diff_ids)
        .unwrap_or_default();
    for diff_id in &diff_ids {
        check_digest(diff_id)?;
    }
    Ok(Configuration {
        config: ImageConfig {
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            env: config.env.unwrap_or_default(),
            user: config.user.unwrap_or_default(),
            working_dir: config.working_dir.unwrap_or_default(),
            volumes: config.volumes.unwrap_or_default().into_keys().collect(),
            stop_signal: config.stop_signal.filter(|signal| !signal.is_empty()),
            labels: config.labels.unwrap_or_default(),
        },
        created: raw.created,
        diff_ids,
    })
}

/// Brings the manifest's layers and the configuration's diff IDs together.
pub fn promises(manifest: &Manifest, diff_ids: &[String]) -> Result<Vec<Promise>, ImageError> {
    if manifest.layers.len() != diff_ids.len() {
        return Err(broken(format!(
            "the manifest has {} layers and the configuration {}: the image was built wrongly, or is none that can be run",
            manifest.layers.len(),
            diff_ids.len()
        )));
    }
    Ok(manifest
        .layers
        .iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| Promise {
            digest: layer.digest.clone(),
            size: layer.size,
            diff_id: diff_id.clone(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(c: &str) -> String {
        format!("sha256:{}", c.repeat(64))
    }

    fn entry(c: &str, os: &str, architecture: &str, variant: Option<&str>) -> serde_json::Value {
        serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest(c), "size": 1,
            "platform": {"os": os, "architecture": architecture, "variant": variant},
        })
    }

    fn chosen(entries: &[serde_json::Value], architecture: &str) -> Option<String> {
        let entries: Vec<Descriptor> =
            serde_json::from_value(serde_json::Value::from(entries.to_vec())).ok()?;
        choose(&entries, architecture).ok()
    }

    #[test]
    fn an_index_yields_the_manifest_of_this_machine_and_never_an_attestation() {
        let index = [
            entry("a", "unknown", "unknown", None),
            entry("b", "windows", "amd64", None),
            entry("c", "linux", "amd64", Some("v3")),
            entry("d", "linux", "amd64", None),
            entry("e", "linux", "arm64", Some("v8")),
        ];
        assert_eq!(chosen(&index, "amd64"), Some(digest("d")));
        assert_eq!(chosen(&index, "arm64"), Some(digest("e")));
        assert_eq!(chosen(&index, "riscv64"), None);
    }

    #[test]
    fn digests_of_other_forms_are_refused() {
        let manifest = serde_json::json!({"schemaVersion": 2,
            "config": {"digest": "sha256:../../x", "size": 1}, "layers": []});
        assert!(parse(manifest.to_string().as_bytes()).is_err());
    }

    #[test]
    fn dockers_nulls_are_empty() -> Result<(), ImageError> {
        let text = serde_json::json!({"os": "linux", "architecture": "amd64",
            "config": {"Entrypoint": null, "Cmd": ["sh"], "Env": null, "Volumes": null,
                       "Labels": null, "User": ""},
            "rootfs": {"type": "layers", "diff_ids": null}});
        let parsed = parse_configuration(text.to_string().as_bytes())?;
        assert_eq!(parsed.config.cmd, ["sh"]);
        assert!(parsed.diff_ids.is_empty());
        Ok(())
    }
}
