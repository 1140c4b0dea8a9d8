//! Tests of published vulnerabilities of other CRI servers that no other file covers.
//! docs/security.md lists the vulnerabilities. A test whose name begins with the number of a
//! vulnerability runs the published attack, and checks that the attack fails.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rrun_proto::v1::{CreateContainerRequest, KeyValue, Mount, PodSandboxConfig};
use serde_json::{Value, json};

use crate::support::calls::{self, Calls};
use crate::support::images::build::{Archive, Image, digest};
use crate::support::images::server::{Answer, Server};
use crate::support::images::{pull_built, with_one_layer};
use crate::support::machine::{Result, note};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::secret::{SECRET, Secret};
use crate::support::user_namespace;
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
    test!(
        cve_2022_0811_a_sysctl_changes_nothing_outside_the_pod,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2023_25173_the_primary_group_is_a_supplementary_group,
        A_NODE
    ),
    test!(
        cve_2021_20188_a_user_in_a_privileged_container_has_no_capabilities,
        A_NODE
    ),
    test!(
        cve_2021_21334_containers_share_no_environment_variables,
        A_NODE
    ),
    test!(
        cve_2026_57231_a_container_gets_no_variable_of_the_server,
        A_NODE,
        Need::RrunCri
    ),
    test!(cve_2022_4318_the_variable_home_adds_no_user, A_NODE),
    test!(
        cve_2020_8557_files_in_etc_do_not_fill_the_disk_of_the_node,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2020_15257_no_socket_of_the_server_is_abstract,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2025_47291_only_the_containers_are_in_the_cgroup_of_a_pod,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2023_2431_an_empty_name_of_a_seccomp_profile_is_refused,
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

/// In CVE-2022-0811, the value of a sysctl set other sysctls of the node in CRI-O. In
/// CVE-2022-0532, the sysctls of a pod without separate namespaces changed the node.
fn cve_2022_0811_a_sysctl_changes_nothing_outside_the_pod() -> Result {
    const OF_THE_NODE: [&str; 3] = [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/shm_rmid_forced",
        "/proc/sys/net/ipv4/ip_forward",
    ];
    on_a_node(|node| {
        let read = || OF_THE_NODE.map(|path| fs::read_to_string(path).unwrap_or_default());
        // The first pod can change the node's ip_forward, because rrun's network needs forwarding.
        let first = node.runp(&node.pod("first"))?;
        let before = read();
        let value = "1+kernel.core_pattern=|/evil";
        for (name, value) in [
            ("kernel.shm_rmid_forced", value),
            ("kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/evil"),
            ("kernel.shm_rmid_forced+kernel.core_pattern", "|/evil"),
            ("kernel.shm/../core_pattern", "|/evil"),
            ("kernel/shm/../core_pattern", "|/evil"),
            ("net/../kernel/core_pattern", "|/evil"),
            ("net.ipv4/../../kernel/core_pattern", "|/evil"),
            ("kernel.core_pattern", "|/evil"),
        ] {
            let mut pod = node.pod("sysctl");
            pod["linux"]["sysctls"] = json!({ name: value });
            // Only the value with a newline is accepted. The kernel ignores the text after the newline.
            let output = node.try_runp(&pod)?;
            ensure!(
                output.code != 0 || value.contains('\n'),
                "the server accepts the sysctl {name} with the value {value:?}"
            );
            if output.code == 0 {
                node.asks(&["rmp", "--force", output.text()])?;
            }
            ensure_eq!(
                read(),
                before,
                "the node's sysctls after the attack {name}={value:?}"
            );
        }
        for (name, value, namespace) in [
            ("kernel.shm_rmid_forced", "1", "ipc"),
            ("net.ipv4.ip_forward", "0", "network"),
        ] {
            let mut pod = node.pod("of-the-node");
            pod["linux"]["sysctls"] = json!({ name: value });
            pod["linux"]["security_context"]["namespace_options"][namespace] = json!(2);
            let output = node.try_runp(&pod)?;
            output.fails_with("does not belong to one of the pod's own namespaces")?;
            ensure_eq!(
                read(),
                before,
                "the node's sysctls after the attack with {name}"
            );
        }
        node.asks(&["rmp", "--force", &first])?;
        Ok(())
    })
}

/// In CVE-2022-2995, CVE-2022-36109, CVE-2023-25173 and similar vulnerabilities, the primary group
/// was not in the list of supplementary groups. A program could then drop the primary group, and
/// with it the restrictions that a file has for the members of this group.
fn cve_2023_25173_the_primary_group_is_a_supplementary_group() -> Result {
    on_a_node(|node| {
        let pod = node.pod("groups");
        let pod_id = node.runp(&pod)?;
        let archive = Archive::new()
            .file("etc/passwd", "root:x:0:0::/:/\napp:x:1000:1001::/:/\n")
            .file("etc/group", "app:x:1001:\nother:x:1002:app\n");
        let reference = pull_built(
            node,
            "groups",
            &with_one_layer(archive, json!({ "User": "app" })),
        )?;
        for (name, context, expected) in [
            ("image", json!({}), json!([1001, 1002])),
            (
                "request",
                json!({ "run_as_user": { "value": 7 }, "run_as_group": { "value": 8 } }),
                json!([8]),
            ),
            (
                "supplemental",
                json!({
                    "run_as_user": { "value": 1000 }, "run_as_group": { "value": 8 },
                    "supplemental_groups": [9],
                }),
                json!([8, 9, 1002]),
            ),
        ] {
            let mut container = node.container(name, &["/inside", "sleep", "600"]);
            container["image"]["image"] = json!(reference);
            for (field, value) in context.as_object().into_iter().flatten() {
                container["linux"]["security_context"][field] = value.clone();
            }
            let id = node.run(&pod_id, &pod, &container)?;
            let report = node.asks(&["exec", "-s", &id, "/inside", "report"])?;
            let of_exec: Value = serde_json::from_str(&report)?;
            let status = fs::read_to_string(format!("/proc/{}/status", node.pid(&id)?))?;
            let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
            let groups: BTreeSet<u32> = groups
                .unwrap_or_default()
                .split_whitespace()
                .map(str::parse)
                .collect::<std::result::Result<_, _>>()?;
            ensure_eq!(json!(groups), expected, "groups of the container {name}");
            ensure_eq!(
                json!(sorted(&of_exec["groups"])),
                expected,
                "groups of a program that exec starts in the container {name}"
            );
        }
        Ok(())
    })
}

fn sorted(groups: &Value) -> BTreeSet<u64> {
    let all = groups.as_array().into_iter().flatten();
    all.filter_map(Value::as_u64).collect()
}

fn cve_2021_20188_a_user_in_a_privileged_container_has_no_capabilities() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("privileged");
        pod["linux"]["security_context"]["privileged"] = json!(true);
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("privileged", &["/inside", "report"]);
        let context = &mut container["linux"]["security_context"];
        context["privileged"] = json!(true);
        context["run_as_user"] = json!({ "value": 1000 });
        let report = node.report(&pod_id, &pod, &container)?;
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            ensure_eq!(
                report["status"][set],
                "0000000000000000",
                "the capability set {set} of a user in a privileged container"
            );
        }
        Ok(())
    })
}

/// In CVE-2021-21334 (containerd) and CVE-2020-14370 (Podman), a container got environment
/// variables of another container that was created from the same image at the same time.
fn cve_2021_21334_containers_share_no_environment_variables() -> Result {
    on_a_node(|node| {
        let config = json!({ "Env": ["SHARED=image"] });
        let reference = pull_built(node, "shared", &with_one_layer(Archive::new(), config))?;
        let inside = std::env::temp_dir().join("rrun-e2e-inside");
        let inside = inside.display().to_string();
        let pod = node.pod("shared");
        let pod_id = node.runp(&pod)?;
        let calls = Calls::new(node)?;
        let creations = (0..8).map(|number| {
            let mut config = calls::container(&format!("c{number}"), &["/inside", "report"]);
            config.image = Some(calls::image(&reference));
            config.mounts = vec![Mount {
                container_path: "/inside".into(),
                host_path: inside.clone(),
                readonly: true,
                ..Mount::default()
            }];
            config.envs = vec![KeyValue {
                key: format!("SECRET_{number}"),
                value: b"hidden".to_vec(),
            }];
            config.log_path = format!("c{number}.log");
            let request = CreateContainerRequest {
                pod_sandbox_id: pod_id.clone(),
                config: Some(config),
                sandbox_config: Some(PodSandboxConfig::default()),
            };
            let mut runtime = calls.runtime();
            async move { runtime.create_container(request).await }
        });
        // The results are in the order in which the calls ended.
        let mut seen = BTreeSet::new();
        for created in calls.together(creations)? {
            let id = &created?.into_inner().container_id;
            node.asks(&["start", id])?;
            node.exited(id)?;
            let name = node.status(id)?["metadata"]["name"].clone();
            let report: Value = serde_json::from_str(&node.asks(&["logs", id])?)?;
            let names = report["env"].as_object().into_iter().flatten();
            let secrets: Vec<&String> = names
                .map(|(name, _)| name)
                .filter(|name| name.starts_with("SECRET_"))
                .collect();
            let number = name.as_str().unwrap_or_default().trim_start_matches('c');
            ensure_eq!(
                secrets,
                [&format!("SECRET_{number}")],
                "names of the secret variables in the container {name}"
            );
            seen.insert(secrets[0].clone());
        }
        ensure_eq!(seen.len(), 8, "number of containers");
        Ok(())
    })
}

/// In CVE-2026-57231, Podman took the value of a variable from its own environment if the image
/// listed only the variable's name. In CVE-2021-3602, Buildah passed on its whole environment.
fn cve_2026_57231_a_container_gets_no_variable_of_the_server() -> Result {
    const VARIABLE: &str = "RRUN_TEST_VIEW";
    on_a_node(|node| {
        let environment = fs::read(format!("/proc/{}/environ", node.server_pid()?))?;
        let own: Vec<String> = String::from_utf8_lossy(&environment)
            .split_terminator('\0')
            .filter_map(|pair| Some(pair.split_once('=')?.0.to_owned()))
            .collect();
        ensure!(
            own.iter().any(|name| name == VARIABLE),
            "the server's environment lacks {VARIABLE}: {own:?}"
        );
        let pod = node.pod("named");
        let pod_id = node.runp(&pod)?;
        let config = json!({ "Env": [VARIABLE], "Cmd": ["/inside", "report"] });
        let reference = pull_built(node, "named", &with_one_layer(Archive::new(), config))?;
        let mut container = node.container("named", &[]);
        container["image"]["image"] = json!(reference);
        let output = node.try_create(&pod_id, &pod, &container)?;
        output.fails_with("has no = sign")?;
        let config = json!({ "Env": ["A=b"], "Cmd": ["/inside", "report"] });
        let reference = pull_built(node, "plain", &with_one_layer(Archive::new(), config))?;
        let mut container = node.container("plain", &[]);
        container["image"]["image"] = json!(reference);
        let report = node.report(&pod_id, &pod, &container)?;
        let names: Vec<String> = report["env"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect();
        ensure_eq!(
            names,
            ["A", "HOME", "HOSTNAME", "PATH"],
            "names of the environment variables of the container"
        );
        Ok(())
    })
}

/// In CVE-2022-4318 and CVE-2026-15809, CRI-O wrote the value of HOME to the container's
/// /etc/passwd. A newline in the value added a line for another user.
fn cve_2022_4318_the_variable_home_adds_no_user() -> Result {
    const PASSWD: &str = "root:x:0:0::/:/bin/sh\n";
    on_a_node(|node| {
        let archive = Archive::new().file("etc/passwd", PASSWD);
        let reference = pull_built(node, "home", &with_one_layer(archive, json!({})))?;
        let pod = node.pod("home");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("home", &["/inside", "cat", "/etc/passwd"]);
        container["image"]["image"] = json!(reference);
        // The value is base64 for "/root\nevil:x:0:0::/:/bin/sh".
        container["envs"] =
            json!([{ "key": "HOME", "value": "L3Jvb3QKZXZpbDp4OjA6MDo6LzovYmluL3No" }]);
        container["linux"]["security_context"]["run_as_user"] = json!({ "value": 1000 });
        let output = node.try_create(&pod_id, &pod, &container)?;
        if output.code == 0 {
            let id = output.text();
            node.asks(&["start", id])?;
            node.exited(id)?;
            ensure_eq!(
                node.asks(&["logs", id])?.trim_end(),
                PASSWD.trim_end(),
                "content of /etc/passwd in the container"
            );
        }
        Ok(())
    })
}

/// In CVE-2020-8557, a container could write to its /etc/hosts without a limit, and no statistics
/// of the pod counted the file.
fn cve_2020_8557_files_in_etc_do_not_fill_the_disk_of_the_node() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("filling");
        let pod_id = node.runp(&pod)?;
        for name in ["hosts", "hostname", "resolv.conf"] {
            let path = format!("/etc/{name}");
            let mut container = node.container(name, &["/inside", "fill", &path, "64"]);
            container["log_path"] = json!("filling.log");
            let id = node.run(&pod_id, &pod, &container)?;
            let status = node.exited(&id)?;
            ensure!(
                status["exitCode"] != 0,
                "the container can write 64 MiB to {path}"
            );
            let log = node.log_of("filling", "filling")?;
            ensure!(
                log.contains("No space left on device"),
                "writing to {path} failed for another reason: {log}"
            );
        }
        let used = bytes_below(&node.join("state"))?;
        ensure!(
            used < 16 << 20,
            "the files in the server's state directory have {used} bytes"
        );
        // The pod can still be used.
        let id = node.run(&pod_id, &pod, &node.container("later", &["true"]))?;
        ensure_eq!(
            node.exited(&id)?["exitCode"],
            0,
            "exit code of a later container of the pod"
        );
        Ok(())
    })
}

/// Returns the size of the regular files below `dir`. Does not enter the root file systems of
/// containers.
fn bytes_below(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() && entry.file_name() != "rootfs" {
            sum += bytes_below(&entry.path())?;
        } else if metadata.is_file() {
            sum += metadata.len();
        }
    }
    Ok(sum)
}

/// The sockets of the process: the inodes in the links of `/proc/PID/fd`.
fn sockets(pid: i32) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let Ok(target) = fs::read_link(entry?.path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        if let Some(inode) = target.strip_prefix("socket:[") {
            all.insert(inode.trim_end_matches(']').to_owned());
        }
    }
    Ok(all)
}

/// In CVE-2020-15257, the sockets of containerd's shims were abstract. A container in the node's
/// network namespace could connect to them.
fn cve_2020_15257_no_socket_of_the_server_is_abstract() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("sockets");
        pod["linux"]["security_context"]["namespace_options"]["network"] = json!(2);
        let pod_id = node.runp(&pod)?;
        let container = node.container("sockets", &["sleep", "600"]);
        let id = node.run(&pod_id, &pod, &container)?;
        // The container sees the same file as a process of the node.
        let seen = node.asks(&["exec", "-s", &id, "cat", "/proc/net/unix"])?;
        let mut own = sockets(node.server_pid()?)?;
        own.extend(sockets(node.monitor(&pod_id)?.as_raw())?);
        let mut named = 0;
        for line in seen.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [.., inode, path] = words.as_slice() else {
                continue;
            };
            if own.contains(*inode) {
                named += 1;
                ensure!(
                    !path.starts_with('@'),
                    "a socket of the server or of a monitor is abstract: {line}"
                );
            }
        }
        ensure!(
            named >= 2,
            "the container sees {named} sockets with names, but the server and the monitor have one each:\n{seen}"
        );
        Ok(())
    })
}

/// In CVE-2025-47291, containerd did not put containers with a user namespace into the pod's
/// cgroup. In CVE-2019-14891, CRI-O's monitor was in the pod's cgroup, so that the container could
/// cause the monitor to be killed for lack of memory.
fn cve_2025_47291_only_the_containers_are_in_the_cgroup_of_a_pod() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let cgroup_of = |pid: i32| -> Result<String> {
            let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
            let path = text.lines().find_map(|line| line.strip_prefix("0::"));
            Ok(path.unwrap_or_default().to_owned())
        };
        for (name, users) in [("plain", false), ("users", true)] {
            let (mut pod, container) = if users {
                (
                    user_namespace::pod(node, name, 1),
                    user_namespace::container(node, name, 1, &["sleep", "600"]),
                )
            } else {
                (node.pod(name), node.container(name, &["sleep", "600"]))
            };
            let parent = format!("/rrun/e2e-{name}");
            pod["linux"]["cgroup_parent"] = json!(parent);
            let pod_id = node.runp(&pod)?;
            let id = node.run(&pod_id, &pod, &container)?;
            let own = cgroup_of(node.pid(&id)?)?;
            ensure!(
                own.contains(&format!("{parent}/")),
                "the container {name} is in the cgroup {own}, which is not below {parent}"
            );
            let monitor = cgroup_of(node.monitor(&pod_id)?.as_raw())?;
            ensure!(
                !monitor.contains(&parent),
                "the monitor of the pod {name} is in the pod's cgroup {monitor}"
            );
            node.asks(&["rmp", "--force", &pod_id])?;
        }
        Ok(())
    })
}

/// In CVE-2023-2431, a pod with a local seccomp profile whose name was empty ran without a profile.
fn cve_2023_2431_an_empty_name_of_a_seccomp_profile_is_refused() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("seccomp");
        let pod_id = node.runp(&pod)?;
        for name in ["", "localhost/", "relative.json"] {
            let mut container = node.container("seccomp", &["true"]);
            container["linux"]["security_context"]["seccomp"] =
                json!({ "profile_type": 2, "localhost_ref": name });
            let output = node.try_create(&pod_id, &pod, &container)?;
            output.fails_with("is not an absolute path")?;
        }
        Ok(())
    })
}
