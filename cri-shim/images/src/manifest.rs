//! Parses manifests, indexes and configurations in the formats of OCI and of Docker's schema 2,
//! which have the same structure.

use serde::Deserialize;

use crate::error::{ImageError, Kind};
use crate::failure::{clean, unreadable_json};
use crate::layer::LayerDescriptor;
use crate::limited::{LimitedKeys, LimitedList};
use crate::record::ImageConfig;
use crate::reference::is_digest;

/// The `Accept` header of a request for a manifest or an index.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// The maximum number of layers in an image. An overlay mount supports 500 lower directories. Two
/// of these directories are reserved: a directory with the mount points at the bottom, and the
/// directory layer at the top.
pub(crate) const MAX_LAYERS: usize = 498;

/// The maximum number of entries of an index.
const MAX_MANIFESTS: usize = 1 << 14;

/// The maximum number of arguments, environment variables and volumes in an image's
/// configuration together. The server keeps them in memory as long as the image is on the node.
const MAX_STRINGS: usize = 1 << 16;

/// The maximum number of bytes of the user in an image's configuration. ListImages returns the users
/// of all images in one message of at most 16 MiB. On Linux, a name has at most 256 bytes,
/// useradd(8), and the user can consist of the names of a user and a group.
const MAX_USER_BYTES: usize = 1024;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub digest: String,
    pub size: u64,
    #[serde(default)]
    media_type: String,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<NameAnnotations>,
}

/// The annotations that contain the name of an image.
#[derive(Debug, Deserialize)]
struct NameAnnotations {
    #[serde(rename = "io.containerd.image.name")]
    containerd: Option<String>,
    #[serde(rename = "org.opencontainers.image.ref.name")]
    specified: Option<String>,
}

impl Descriptor {
    /// Returns the name of the image in an image layout. containerd and Docker write an annotation
    /// with the full name. Other programs write the annotation that the specification defines for
    /// the reference name (OCI image-spec, annotations.md).
    pub(crate) fn name(&self) -> Option<&str> {
        let annotations = self.annotations.as_ref()?;
        let name = annotations.containerd.as_ref();
        name.or(annotations.specified.as_ref()).map(String::as_str)
    }

    /// Returns false if the image's platform names another operating system or architecture. An
    /// image without a platform can be for any machine.
    pub(crate) fn may_fit(&self) -> bool {
        let machine = architecture();
        self.platform.as_ref().is_none_or(|platform| {
            let (os, architecture) = (platform.os.as_str(), platform.architecture.as_str());
            matches!(os, "" | "linux") && (architecture.is_empty() || architecture == machine)
        })
    }

    /// Drops the texts of any length that a pull no longer needs. The pull keeps the descriptor while
    /// it receives other documents.
    fn without_texts(self) -> Self {
        Descriptor {
            digest: self.digest,
            size: self.size,
            media_type: String::new(),
            platform: None,
            annotations: None,
        }
    }

    /// Returns whether the layer is a foreign layer (Docker's schema 2) or a non-distributable
    /// layer (OCI). Foreign and non-distributable layers are base layers of Windows, which must be
    /// fetched from Microsoft.
    fn is_foreign(&self) -> bool {
        self.media_type.contains(".foreign.") || self.media_type.contains(".nondistributable.")
    }
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
pub(crate) struct Manifest {
    pub config: Descriptor,
    /// The image's layers, lowest first.
    pub layers: Vec<Descriptor>,
}

#[derive(Debug)]
pub(crate) enum Document {
    Image(Manifest),
    /// The digest of the manifest for this machine.
    Index(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    schema_version: Option<u32>,
    config: Option<Descriptor>,
    layers: Option<LimitedList<Descriptor, MAX_LAYERS>>,
    manifests: Option<LimitedList<Descriptor, MAX_MANIFESTS>>,
}

fn broken(what: impl Into<String>) -> ImageError {
    ImageError::new(Kind::DataLoss, what)
}

/// Parses a manifest or an index. The content determines whether a document is a manifest or an
/// index, because media types are often wrong.
pub(crate) fn parse(bytes: &[u8]) -> Result<Document, ImageError> {
    let raw: RawManifest = serde_json::from_slice(bytes).map_err(|error| {
        broken(format!(
            "the manifest can't be read: {}",
            unreadable_json(&error)
        ))
    })?;
    if raw.schema_version == Some(1) {
        return Err(ImageError::new(
            Kind::Unimplemented,
            "the image has a manifest of Docker's schema 1, which has been obsolete since 2019: push the image again with a current tool",
        ));
    }
    match raw {
        // A document must not be both a manifest and an index. Such a document could refer to one
        // image if it is parsed as a manifest, and to another image if it is parsed as an index
        // (CVE-2021-41190).
        RawManifest {
            manifests: Some(_),
            layers: Some(_),
            ..
        } => Err(broken(
            "the manifest claims to be both an image and an index of images",
        )),
        RawManifest {
            config: Some(config),
            layers: Some(layers),
            ..
        } => {
            let (layers, count) = (layers.entries, layers.count);
            if layers.iter().any(Descriptor::is_foreign) {
                return Err(ImageError::new(
                    Kind::Unimplemented,
                    "the image has a foreign layer, which is not stored in the image's registry; only Windows images have foreign layers, and rrun runs Linux images",
                ));
            }
            if count > MAX_LAYERS {
                return Err(broken(format!(
                    "the image has {count} layers, and the limit is {MAX_LAYERS} layers"
                )));
            }
            for descriptor in layers.iter().chain([&config]) {
                check_digest(&descriptor.digest)?;
            }
            Ok(Document::Image(Manifest {
                config: config.without_texts(),
                layers: layers.into_iter().map(Descriptor::without_texts).collect(),
            }))
        }
        RawManifest {
            manifests: Some(manifests),
            ..
        } => choose(&entries(manifests)?, &Machine::this()).map(Document::Index),
        _ => Err(broken(
            "the manifest lists neither a configuration with layers nor other manifests",
        )),
    }
}

/// Returns the entries of an index. Refuses an index with too many entries.
fn entries(
    manifests: LimitedList<Descriptor, MAX_MANIFESTS>,
) -> Result<Vec<Descriptor>, ImageError> {
    if manifests.count > MAX_MANIFESTS {
        return Err(broken(format!(
            "the index lists {} manifests, and the limit is {MAX_MANIFESTS} manifests",
            manifests.count
        )));
    }
    Ok(manifests.entries)
}

fn check_digest(digest: &str) -> Result<(), ImageError> {
    if is_digest(digest) {
        return Ok(());
    }
    Err(broken(format!(
        "the digest {:?} in the manifest is not sha256: followed by 64 hexadecimal digits",
        digest.chars().take(100).collect::<String>()
    )))
}

/// Returns Go's name for the architecture that this program was built for.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The platforms whose images this machine can run.
struct Machine {
    architecture: &'static str,
    /// The levels of x86-64 (`v1` to `v4`, psABI) or the versions of ARM that this machine
    /// supports. The highest level or version is first.
    variants: &'static [&'static str],
    /// The older architecture whose programs this machine can also run.
    compatible: &'static str,
}

impl Machine {
    fn this() -> Self {
        match architecture() {
            "amd64" => Machine {
                architecture: "amd64",
                variants: x86_64_levels(),
                compatible: "386",
            },
            "arm64" => Machine {
                architecture: "arm64",
                variants: &["v8"],
                compatible: "arm",
            },
            other => Machine {
                architecture: other,
                variants: &[],
                compatible: "",
            },
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn x86_64_levels() -> &'static [&'static str] {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("sse4.2") && has!("ssse3") && has!("popcnt") && has!("cmpxchg16b");
    let v3 = v2 && has!("avx2") && has!("bmi1") && has!("bmi2") && has!("fma") && has!("movbe");
    match (v2, v3) {
        (_, true) => &["v3", "v2", "v1"],
        (true, false) => &["v2", "v1"],
        (false, false) => &["v1"],
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn x86_64_levels() -> &'static [&'static str] {
    &[]
}

/// Chooses the manifest for this machine. Some variants of an architecture run on all its machines,
/// and newer variants run on only some of these machines. A manifest for all machines takes
/// precedence over a manifest for a newer variant. Attestations have the platform `unknown/unknown`
/// in an index and are never chosen.
fn choose(manifests: &[Descriptor], machine: &Machine) -> Result<String, ImageError> {
    let of = |architecture: &'static str| {
        manifests.iter().filter_map(move |descriptor| {
            let platform = descriptor.platform.as_ref()?;
            let fits = platform.os == "linux" && platform.architecture == architecture;
            let variant = platform.variant.as_deref().unwrap_or_default();
            fits.then_some((descriptor, variant))
        })
    };
    let plain = |(_, variant): &(&Descriptor, &str)| matches!(*variant, "" | "v8" | "v1");
    let of_variant =
        |wanted: &&'static str| of(machine.architecture).find(|(_, variant)| variant == wanted);
    let chosen = of(machine.architecture)
        .find(plain)
        .or_else(|| machine.variants.iter().find_map(of_variant))
        .or_else(|| of(machine.compatible).max_by_key(|(_, variant)| *variant))
        .map(|(descriptor, _)| descriptor)
        // An index with a single image can omit the platform.
        .or(match manifests {
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
            format!("the image is not built for linux/{}", machine.architecture),
        )),
    }
}

/// Parses an image layout's index.json. Returns the descriptor of each image.
pub(crate) fn parse_layout(bytes: &[u8]) -> Result<Vec<Descriptor>, ImageError> {
    let raw: RawManifest = serde_json::from_slice(bytes).map_err(|error| {
        broken(format!(
            "the archive's index.json can't be read: {}",
            unreadable_json(&error)
        ))
    })?;
    let manifests = entries(raw.manifests.unwrap_or_default())?;
    for descriptor in &manifests {
        check_digest(&descriptor.digest)?;
    }
    Ok(manifests)
}

/// The parts of an image's configuration that rrun-cri uses.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub config: ImageConfig,
    pub diff_ids: Vec<String>,
}

#[derive(Deserialize)]
struct RawConfiguration {
    os: Option<String>,
    config: Option<RawConfig>,
    rootfs: Option<RawRootfs>,
}

#[derive(Deserialize)]
struct RawRootfs {
    diff_ids: Option<LimitedList<String, MAX_LAYERS>>,
}

type Strings = LimitedList<String, MAX_STRINGS>;

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    entrypoint: Option<Strings>,
    cmd: Option<Strings>,
    env: Option<Strings>,
    user: Option<String>,
    working_dir: Option<String>,
    volumes: Option<LimitedKeys<MAX_STRINGS>>,
    stop_signal: Option<String>,
}

impl RawConfig {
    /// Returns the number of arguments, environment variables and volumes.
    fn strings(&self) -> usize {
        let lists = [&self.entrypoint, &self.cmd, &self.env];
        let listed: usize = lists.into_iter().flatten().map(|list| list.count).sum();
        listed + self.volumes.as_ref().map_or(0, |volumes| volumes.count)
    }
}

pub(crate) fn parse_configuration(bytes: &[u8]) -> Result<Configuration, ImageError> {
    let raw: RawConfiguration = serde_json::from_slice(bytes).map_err(|error| {
        broken(format!(
            "the image's configuration can't be read: {}",
            unreadable_json(&error)
        ))
    })?;
    if let Some(os) = raw.os.as_deref().filter(|os| !matches!(*os, "" | "linux")) {
        return Err(ImageError::new(
            Kind::NotFound,
            format!("the image is built for {:?}, not for linux", clean(os)),
        ));
    }
    let config = raw.config.unwrap_or_default();
    let count = config.strings();
    if count > MAX_STRINGS {
        return Err(broken(format!(
            "the image's configuration has {count} arguments, variables and volumes, and the limit is {MAX_STRINGS}"
        )));
    }
    let user = config.user.unwrap_or_default();
    if user.len() > MAX_USER_BYTES {
        return Err(broken(format!(
            "the user in the image's configuration has {} bytes, and the limit is {MAX_USER_BYTES} bytes",
            user.len()
        )));
    }
    let diff_ids = raw
        .rootfs
        .and_then(|rootfs| rootfs.diff_ids)
        .unwrap_or_default();
    if diff_ids.count > MAX_LAYERS {
        return Err(broken(format!(
            "the image's configuration has {} layers, and the limit is {MAX_LAYERS} layers",
            diff_ids.count
        )));
    }
    let diff_ids = diff_ids.entries;
    for diff_id in &diff_ids {
        check_digest(diff_id)?;
    }
    let strings = |list: Option<Strings>| list.unwrap_or_default().entries;
    let volumes = config.volumes.map(|volumes| volumes.keys);
    Ok(Configuration {
        config: ImageConfig {
            entrypoint: strings(config.entrypoint),
            cmd: strings(config.cmd),
            env: strings(config.env),
            user,
            working_dir: config.working_dir.unwrap_or_default(),
            volumes: volumes.unwrap_or_default().into_iter().collect(),
            stop_signal: config.stop_signal.filter(|signal| !signal.is_empty()),
        },
        diff_ids,
    })
}

/// Combines the manifest's layers with the configuration's diff IDs.
pub(crate) fn layer_descriptors(
    manifest: &Manifest,
    diff_ids: &[String],
) -> Result<Vec<LayerDescriptor>, ImageError> {
    if manifest.layers.len() != diff_ids.len() {
        return Err(broken(format!(
            "the manifest has {} layers, but the configuration has {}: the image was built incorrectly, or it is not a container image",
            manifest.layers.len(),
            diff_ids.len()
        )));
    }
    Ok(manifest
        .layers
        .iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| LayerDescriptor {
            digest: layer.digest.clone(),
            size: layer.size,
            diff_id: diff_id.clone(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value, json};

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

    fn chosen(
        entries: &[serde_json::Value],
        architecture: &'static str,
        variants: &'static [&'static str],
    ) -> Option<String> {
        let entries: Vec<Descriptor> =
            serde_json::from_value(serde_json::Value::from(entries.to_vec())).ok()?;
        let machine = Machine {
            architecture,
            variants,
            compatible: match architecture {
                "amd64" => "386",
                _ => "arm",
            },
        };
        choose(&entries, &machine).ok()
    }

    #[test]
    fn a_parsed_manifest_contains_no_texts_of_any_length() {
        let mut blob = entry("a", "linux", "amd64", None);
        blob["mediaType"] = json!("x".repeat(1 << 20));
        blob["annotations"] = json!({ "org.opencontainers.image.ref.name": "x".repeat(1 << 20) });
        let manifest = json!({ "config": blob, "layers": [blob] }).to_string();
        let Ok(Document::Image(parsed)) = parse(manifest.as_bytes()) else {
            panic!("the manifest was not parsed");
        };
        let kept = format!("{parsed:?}");
        assert!(kept.len() < 1000, "{kept}");
    }

    #[test]
    fn an_index_yields_the_manifest_for_this_machine_and_never_an_attestation() {
        let index = [
            entry("a", "unknown", "unknown", None),
            entry("b", "windows", "amd64", None),
            entry("c", "linux", "amd64", Some("v3")),
            entry("d", "linux", "amd64", None),
            entry("e", "linux", "arm64", Some("v8")),
        ];
        let amd64: &[&str] = &["v3", "v2", "v1"];
        assert_eq!(chosen(&index, "amd64", amd64), Some(digest("d")));
        assert_eq!(chosen(&index, "arm64", &["v8"]), Some(digest("e")));
        assert_eq!(chosen(&index, "riscv64", &[]), None);
    }

    #[test]
    fn a_variant_is_chosen_only_if_the_machine_runs_it() {
        let index = [
            entry("a", "linux", "amd64", Some("v4")),
            entry("b", "linux", "amd64", Some("v2")),
            entry("c", "linux", "amd64", Some("v3")),
            entry("d", "linux", "386", None),
        ];
        let levels: &[&str] = &["v3", "v2", "v1"];
        assert_eq!(chosen(&index, "amd64", levels), Some(digest("c")));
        assert_eq!(chosen(&index, "amd64", &["v2", "v1"]), Some(digest("b")));
        assert_eq!(chosen(&index, "amd64", &["v1"]), Some(digest("d")));
        assert_eq!(chosen(&index[..1], "amd64", levels), None);
    }

    fn refusal(manifest: &serde_json::Value) -> Option<String> {
        let parsed = parse(manifest.to_string().as_bytes());
        parsed.err().map(|error| error.to_string())
    }

    #[test]
    fn a_document_that_is_both_a_manifest_and_an_index_is_refused() {
        let manifest = serde_json::json!({"schemaVersion": 2, "layers": [], "manifests": [],
            "config": {"digest": digest("a"), "size": 1}});
        assert!(refusal(&manifest).is_some_and(|why| why.contains("both")));
    }

    #[test]
    fn foreign_layers_are_refused() {
        for kind in [
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        ] {
            let manifest = serde_json::json!({"schemaVersion": 2,
                "config": {"digest": digest("a"), "size": 1},
                "layers": [{"digest": digest("b"), "size": 1, "mediaType": kind,
                            "urls": ["https://elsewhere.example/layer"]}]});
            assert!(refusal(&manifest).is_some_and(|why| why.contains("foreign layer")));
        }
    }

    #[test]
    fn malformed_digests_are_refused() {
        let manifest = serde_json::json!({"schemaVersion": 2,
            "config": {"digest": "sha256:../../x", "size": 1}, "layers": []});
        assert!(parse(manifest.to_string().as_bytes()).is_err());
    }

    #[test]
    fn a_configuration_with_too_many_strings_is_refused() {
        let volumes: BTreeMap<String, Value> = (0..40_000)
            .map(|number| (format!("/{number}"), json!({})))
            .collect();
        let of = |env: usize| {
            let config = json!({ "Env": vec!["A=1"; env], "Volumes": volumes });
            parse_configuration(json!({ "config": config }).to_string().as_bytes())
        };
        assert!(of(20_000).is_ok());
        let error = of(30_000);
        assert!(error.is_err_and(|e| e.to_string().contains("70000 arguments, variables")));
    }

    #[test]
    fn a_document_with_too_many_entries_is_refused() {
        let descriptor = json!({ "digest": digest("a"), "size": 1 });
        let index = |count| json!({ "manifests": vec![&descriptor; count] });
        let why = refusal(&index(MAX_MANIFESTS + 1));
        assert!(why.is_some_and(|why| why.contains("lists 16385 manifests")));
        let why = refusal(&index(MAX_MANIFESTS));
        assert!(why.is_some_and(|why| why.contains("not built for")));
        let manifest = json!({ "config": &descriptor, "layers": vec![&descriptor; 1000] });
        assert!(refusal(&manifest).is_some_and(|why| why.contains("has 1000 layers")));
        let layers = json!({ "rootfs": { "diff_ids": vec![digest("a"); 1000] } });
        let error = parse_configuration(layers.to_string().as_bytes());
        assert!(error.is_err_and(|e| e.to_string().contains("has 1000 layers")));
    }

    #[test]
    fn a_configuration_with_a_too_long_user_is_refused() {
        let of = |length| {
            let config = json!({ "config": { "User": "u".repeat(length) } });
            parse_configuration(config.to_string().as_bytes())
        };
        assert!(of(MAX_USER_BYTES).is_ok());
        let error = of(7 << 20);
        assert!(error.is_err_and(|e| e.to_string().contains("7340032 bytes")));
    }

    #[test]
    fn null_fields_in_a_configuration_of_docker_count_as_empty() -> Result<(), ImageError> {
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
