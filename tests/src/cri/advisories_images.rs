//! Tests of published vulnerabilities of other CRI servers in which an image or a registry was
//! hostile. Other files cover further vulnerabilities. docs/security.md lists all of them. A test
//! whose name begins with the number of a vulnerability runs the published attack, and checks that
//! the attack fails.

use std::fs;

use serde_json::{Value, json};

use crate::support::images::build::{Archive, Image, digest};
use crate::support::images::server::{Answer, Server};
use crate::support::images::{pull_built, with_one_layer};
use crate::support::machine::{Result, note};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, Node, on_a_node};
use crate::support::secret::{SECRET, Secret};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        cve_2024_5154_links_in_an_image_change_nothing_on_the_node,
        A_NODE
    ),
    test!(
        cve_2026_53488_labels_and_annotations_of_an_image_have_no_effect,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2026_53493_an_index_that_refers_to_an_index_is_refused,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2026_95839_a_manifest_with_a_malformed_digest_is_refused,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2026_95838_whiteouts_count_as_files_of_a_layer,
        A_NODE,
        Need::RrunCri
    ),
];

/// In CVE-2024-5154 (CRI-O), CVE-2026-55686 (Podman) and CVE-2022-23648 (containerd), a server
/// followed links of an image on the node. With these links, it created files on the node, or
/// copied files of the node into the container.
fn cve_2024_5154_links_in_an_image_change_nothing_on_the_node() -> Result {
    on_a_node(|node| {
        let secret = Secret::new()?;
        let path = secret.directory().display().to_string();
        let pod = node.pod("links");
        let pod_id = node.runp(&pod)?;
        for (number, target) in [path.clone(), format!("../../../../../../..{path}")]
            .into_iter()
            .enumerate()
        {
            for (link, config) in [
                ("etc", json!({})),
                ("dev", json!({})),
                ("sys", json!({})),
                ("etc/mtab", json!({})),
                ("work", json!({ "WorkingDir": "/work/new/directory" })),
                ("volume", json!({ "Volumes": { "/volume": {} } })),
                ("volume", json!({ "Volumes": { "/volume/new": {} } })),
                ("parent", json!({ "Volumes": { "/parent/../volume": {} } })),
            ] {
                let attack = format!("the link {link} -> {target} and the configuration {config}");
                let archive = Archive::new().symlink(link, &target);
                let built = with_one_layer(archive, config);
                let reference = pull_built(node, &format!("links{number}"), &built)?;
                let command = ["/inside", "cat", "/volume/file", "/etc/file", "/work/file"];
                let mut container = node.container("links", &command);
                container["image"]["image"] = json!(reference);
                let output = node.try_create(&pod_id, &pod, &container)?;
                if output.code == 0 {
                    let id = output.text();
                    // The start fails if the runtime refuses the link.
                    if node.crictl(&["start", id]).end()?.code == 0 {
                        node.exited(id)?;
                    }
                    let log = node.log_of("links", "links")?;
                    ensure!(
                        !log.contains(SECRET.trim()),
                        "the container read a file of the node through {attack}: {log}"
                    );
                    node.asks(&["rm", "--force", id])?;
                }
                secret.unchanged()?;
                node.asks(&["rmi", &reference])?;
            }
        }
        Ok(())
    })
}

/// Returns the image with annotations in its manifest.
fn with_annotations(mut image: Image, annotations: &Value) -> Result<Image> {
    let manifest = image.blobs.pop().ok_or("the image has no manifest")?;
    let mut manifest: Value = serde_json::from_slice(&manifest)?;
    manifest["annotations"] = annotations.clone();
    let manifest = manifest.to_string().into_bytes();
    image.manifest = digest(&manifest);
    image.blobs.push(manifest);
    Ok(image)
}

/// In CVE-2026-53488 (containerd) and CVE-2026-94603 (Podman), labels and annotations of an image
/// changed how its containers were run. In CVE-2026-50195 and CVE-2026-95837 (containerd) and
/// CVE-2026-92574 (CRI-O), an annotation made an image a checkpoint. The server then restored the
/// container from the files in the image.
fn cve_2026_53488_labels_and_annotations_of_an_image_have_no_effect() -> Result {
    on_a_node(|node| {
        let settings = json!({
            "containerd.io/restart.status": "running",
            "containerd.io/restart.loguri": "binary:///inside?x=y",
            "io.cri-containerd.kind": "sandbox",
            "io.podman.annotations.privileged": "TRUE",
            "io.podman.annotations.seccomp": "unconfined",
            "io.kubernetes.cri-o.annotations.checkpoint.name": "checkpoint",
            "org.criu.checkpoint.container.name": "checkpoint",
            "org.systemd.property.SuccessAction": "'poweroff-force'",
            "run.oci.keep_original_groups": "1",
            "cdi.k8s.io/device": "vendor.com/device=all",
        });
        let spec = json!({ "process": { "args": ["/inside", "exit", "77"] } }).to_string();
        let archive = Archive::new()
            .file("spec.dump", &spec)
            .file("config.dump", "{}");
        let config = json!({ "Labels": settings, "Cmd": ["/inside", "report"] });
        let image = with_annotations(with_one_layer(archive, config), &settings)?;
        let reference = pull_built(node, "annotated", &image)?;
        let pod = node.pod("annotated");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("annotated", &[]);
        container["image"]["image"] = json!(reference);
        let id = node.run(&pod_id, &pod, &container)?;
        let status = node.exited(&id)?;
        ensure_eq!(
            status["exitCode"],
            0,
            "exit code of the container of an annotated image"
        );
        let info = node.json(&["inspect", &id])?;
        ensure_eq!(
            info.pointer("/info/runtimeSpec/annotations"),
            None,
            "annotations in the container's runtime spec"
        );
        for field in ["labels", "annotations"] {
            ensure_eq!(
                status[field],
                json!({}),
                "the container's {field} in its status"
            );
        }
        let report: Value = serde_json::from_str(&node.asks(&["logs", &id])?)?;
        ensure!(
            report["status"]["CapEff"] != "000001ffffffffff",
            "the container is privileged: {}",
            report["status"]
        );
        Ok(())
    })
}

/// Checks that the pull of `reference` fails, that the error contains `words`, and that the server
/// still answers.
fn pull_fails(node: &Node, reference: &str, words: &str) -> Result {
    let output = node.crictl(&["pull", reference]).end()?;
    ensure!(
        output.code != 0 && output.stderr.contains(words),
        "the pull of {reference} must fail with an error that contains {words:?}:\n{}",
        output.told()
    );
    ensure_eq!(
        node.asks(&["images", "--quiet"])?,
        "",
        "ids of the images after the failed pull of {reference}"
    );
    Ok(())
}

/// In CVE-2026-53493, containerd followed each reference of an index to another index. A few small
/// documents could then refer to each other in so many ways that a pull never ended.
fn cve_2026_53493_an_index_that_refers_to_an_index_is_refused() -> Result {
    on_a_node(|node| {
        let index = |child: &str| {
            let entry = |architecture: &str| {
                json!({
                    "mediaType": "application/vnd.oci.image.index.v1+json",
                    "digest": child, "size": 1000,
                    "platform": { "os": "linux", "architecture": architecture },
                })
            };
            let manifests: Vec<Value> = (0..500)
                .flat_map(|_| [entry("amd64"), entry("arm64")])
                .collect();
            json!({ "schemaVersion": 2, "manifests": manifests }).to_string()
        };
        let mut documents = vec![index(&digest(b"missing"))];
        for level in 0..5 {
            documents.push(index(&digest(documents[level].as_bytes())));
        }
        let top = documents.last().cloned().unwrap_or_default();
        let server = Server::start(&[], move |request| {
            let document = documents
                .iter()
                .find(|document| request.path.ends_with(&digest(document.as_bytes())));
            let document = document.unwrap_or(&top).clone();
            let kind = "application/vnd.oci.image.index.v1+json";
            request
                .path
                .contains("/manifests/")
                .then(|| Answer::new(200, document).header("Content-Type", kind))
        })
        .map_err(|error| error.to_string())?;
        let reference = format!("{}/nested:1", server.host());
        pull_fails(node, &reference, "refers to another index")?;
        let requests = server.count("/manifests/");
        note(format!(
            "CVE-2026-53493: the server sent {requests} requests"
        ));
        ensure!(
            requests < 10,
            "the server sent {requests} requests for the manifests of one image"
        );
        Ok(())
    })
}

/// In CVE-2026-95839, containerd panicked because of a malformed digest. In CVE-2024-3727
/// (containers/image), a malformed digest became a part of a path or of an URL. In CVE-2021-21285,
/// the Docker daemon crashed because of a malformed manifest.
fn cve_2026_95839_a_manifest_with_a_malformed_digest_is_refused() -> Result {
    on_a_node(|node| {
        for (number, malformed) in [
            "",
            "sha256",
            "sha256:",
            "sha256:..",
            "sha256:../../../../../../etc/passwd",
            "sha256:ABCDEF",
            "sha512:00",
            ":",
            "é",
        ]
        .into_iter()
        .enumerate()
        {
            let descriptor = json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar", "size": 1,
                "digest": malformed,
                "annotations": { "io.containerd.manifest.subject": malformed },
            });
            let platform = json!({ "os": "linux", "architecture": "amd64" });
            for (kind, document) in [
                (
                    "layer",
                    json!({ "config": descriptor, "layers": [descriptor] }),
                ),
                (
                    "index",
                    json!({ "manifests": [{ "digest": malformed, "size": 1 }] }),
                ),
                (
                    "platform",
                    json!({ "manifests": [{ "digest": malformed, "size": 1, "platform": platform }] }),
                ),
            ] {
                let text = document.to_string();
                let server = Server::start(&[], move |request| {
                    let wanted = request.path.ends_with("/manifests/1");
                    wanted.then(|| Answer::new(200, text.clone()))
                })
                .map_err(|error| error.to_string())?;
                let reference = format!("{}/malformed-{kind}-{number}:1", server.host());
                pull_fails(node, &reference, "digest")?;
                ensure!(
                    server
                        .seen()
                        .iter()
                        .all(|request| !request.path.contains("passwd")),
                    "the server sent a request for the path in a malformed digest"
                );
            }
        }
        Ok(())
    })
}

/// In CVE-2026-95838, containerd read a directory again for each of many opaque whiteouts in it.
fn cve_2026_95838_whiteouts_count_as_files_of_a_layer() -> Result {
    on_a_node(|node| {
        fs::write(
            node.join("config.d/files.toml"),
            "[image]\nlayer_files = 100\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        for whiteout in [
            "directory/.wh..wh..opq",
            ".wh..wh..opq",
            "directory/.wh.file",
        ] {
            let archive = (0..200).fold(Archive::new().dir("directory/", 0o755), |archive, _| {
                archive.file(whiteout, "")
            });
            let built = with_one_layer(archive, json!({}));
            let server = Server::start(&[("whiteouts", &built)], |_| None)
                .map_err(|error| error.to_string())?;
            let reference = format!("{}/whiteouts:1", server.host());
            pull_fails(node, &reference, "100 files")?;
        }
        Ok(())
    })
}
