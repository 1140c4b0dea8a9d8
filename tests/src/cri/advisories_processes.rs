//! Tests of published vulnerabilities of other CRI servers in which a process had the wrong user,
//! groups, capabilities, environment or seccomp profile. Other files cover further vulnerabilities.
//! docs/security.md lists all of them. A test whose name begins with the number of a vulnerability
//! runs the published attack, and checks that the attack fails.

use std::collections::BTreeSet;
use std::fs;

use rrun_proto::v1::{CreateContainerRequest, KeyValue, Mount, PodSandboxConfig};
use serde_json::{Value, json};

use crate::support::calls::{self, Calls};
use crate::support::images::build::Archive;
use crate::support::images::{pull_built, with_one_layer};
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
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
        cve_2023_2431_an_empty_name_of_a_seccomp_profile_is_refused,
        A_NODE,
        Need::RrunCri
    ),
];

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
