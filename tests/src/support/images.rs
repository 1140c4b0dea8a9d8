//! Images for the tests, a misbehaving registry, and a function that pulls images from this
//! registry.

use std::fs;

use rrun_proto::v1::{AuthConfig, ImageSpec, PullImageRequest};
use serde_json::{Value, json};

use crate::support::calls::Calls;
use crate::support::images::build::{Archive, Compression, Image, image};
use crate::support::images::server::Server;
use crate::support::machine::{Result, command};
use crate::support::node::{Node, PORT};

// The tests of the library `rrun-images` use the same modules `build` and `server`.
#[allow(
    dead_code,
    reason = "only the tests of rrun-images use the other items"
)]
#[path = "../../../cri-shim/images/tests/images/build.rs"]
pub(crate) mod build;
#[allow(
    dead_code,
    reason = "only the tests of rrun-images use the other items"
)]
#[path = "../../../cri-shim/images/tests/images/server.rs"]
pub(crate) mod server;

/// Returns an image with the configuration `config` and one layer.
pub(crate) fn with_one_layer(archive: Archive, config: Value) -> Image {
    image(&[(archive.end(), Compression::Gzip)], config)
}

/// Starts a registry with the image, pulls the image from this registry, and returns the image's
/// reference.
pub(crate) fn pull_built(node: &Node, name: &str, image: &Image) -> Result<String> {
    let server = Server::start(&[(name, image)], |_| None).map_err(|error| error.to_string())?;
    let reference = format!("{}/{name}:1", server.host());
    node.pull(&reference)?;
    Ok(reference)
}

/// Sends a PullImage request, as kubelet does. Returns the image's reference, or the error that the
/// server returned.
pub(crate) fn pull(
    calls: &Calls,
    image: &str,
    auth: Option<AuthConfig>,
) -> Result<std::result::Result<String, tonic::Status>> {
    let mut client = calls.image();
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: image.to_owned(),
            ..ImageSpec::default()
        }),
        auth,
        ..PullImageRequest::default()
    };
    let answer = calls.wait(async move { client.pull_image(request).await })?;
    Ok(answer.map(|answer| answer.into_inner().image_ref))
}

/// Pushes a copy of demo/busybox with the additional key `key` in its configuration, and returns
/// the copy's reference.
pub(crate) fn push_with(node: &Node, name: &str, key: &str, value: Value) -> Result<String> {
    let url = |rest: &str| format!("http://127.0.0.1:{PORT}/v2/demo/{rest}");
    let accept = "Accept: application/vnd.oci.image.manifest.v1+json";
    let manifest = command(
        "curl",
        ["-fsS", "-H", accept, &url("busybox/manifests/latest")],
    )
    .ok()?;
    let mut manifest: Value = serde_json::from_str(manifest.text())?;
    let digest = manifest["config"]["digest"].as_str().unwrap_or_default();
    let config = command("curl", ["-fsSL", &url(&format!("busybox/blobs/{digest}"))]).ok()?;
    let mut config: Value = serde_json::from_str(config.text())?;
    config["config"][key] = value;
    let file = node.join(name);
    fs::write(&file, config.to_string())?;
    let sum = command("sha256sum", [&file]).ok()?;
    let digest = format!(
        "sha256:{}",
        sum.text().split(' ').next().unwrap_or_default()
    );
    let upload = command(
        "curl",
        [
            "-fsS",
            "-X",
            "POST",
            "-D",
            "-",
            &url("busybox/blobs/uploads/"),
        ],
    )
    .ok()?;
    let place = upload.stdout.lines().find_map(|line| {
        let (header, value) = line.split_once(": ")?;
        header
            .eq_ignore_ascii_case("location")
            .then(|| value.trim().to_owned())
    });
    let place = place.ok_or("the registry returned no upload location")?;
    let to = format!("{place}&digest={digest}");
    let data = format!("@{}", file.display());
    let binary = "Content-Type: application/octet-stream";
    command(
        "curl",
        [
            "-fsS",
            "-X",
            "PUT",
            "-H",
            binary,
            "--data-binary",
            &data,
            &to,
        ],
    )
    .ok()?;
    manifest["config"]["digest"] = json!(digest);
    manifest["config"]["size"] = json!(fs::metadata(&file)?.len());
    fs::write(&file, manifest.to_string())?;
    let kind = "Content-Type: application/vnd.oci.image.manifest.v1+json";
    let to = url(&format!("busybox/manifests/{name}"));
    command(
        "curl",
        ["-fsS", "-X", "PUT", "-H", kind, "--data-binary", &data, &to],
    )
    .ok()?;
    Ok(format!("127.0.0.1:{PORT}/demo/busybox:{name}"))
}
