//! Tests in which one system call of the server, of a monitor or of the runtime fails during a CRI
//! call, or kills its process. `make test` runs a sample of the faults, which differs each day.
//! `make test-full` runs all faults. `tests/src/support/cri_faults.rs` describes the checks.

use rrun_proto::v1::{
    Capability, DnsConfig, IdMapping, KeyValue, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount,
    NamespaceMode, NamespaceOption, PortMapping, SecurityProfile, UserNamespace,
    security_profile::ProfileType,
};

use serde_json::json;

use crate::support::calls::{container, pod};
use crate::support::cri_calls::{CriCall, EXIT_CODE, LINE, Stage, Subject};
use crate::support::cri_faults::{Scenario, each_fault};
use crate::support::images::push_with;
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, Node, PORT, WEB};
use crate::support::user_namespace::FIRST;
use crate::test;

pub(crate) const TESTS: &[Test] = &[
    test!(run_pod_sandbox_survives_each_fault, A_NODE, Need::RrunCri),
    test!(create_container_survives_each_fault, A_NODE, Need::RrunCri),
    test!(
        run_pod_sandbox_with_users_survives_each_fault,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        create_container_with_users_survives_each_fault,
        A_NODE,
        Need::RrunCri
    ),
    test!(start_container_survives_each_fault, A_NODE, Need::RrunCri),
    test!(
        the_exit_of_a_container_survives_each_fault,
        A_NODE,
        Need::RrunCri
    ),
    test!(exec_sync_survives_each_fault, A_NODE, Need::RrunCri),
    test!(stop_container_survives_each_fault, A_NODE, Need::RrunCri),
    test!(remove_container_survives_each_fault, A_NODE, Need::RrunCri),
    test!(stop_pod_sandbox_survives_each_fault, A_NODE, Need::RrunCri),
    test!(
        remove_pod_sandbox_survives_each_fault,
        A_NODE,
        Need::RrunCri
    ),
    test!(pull_image_survives_each_fault, A_NODE, Need::RrunCri),
    test!(remove_image_survives_each_fault, A_NODE, Need::RrunCri),
    test!(
        the_start_of_the_server_survives_each_fault,
        A_NODE,
        Need::RrunCri
    ),
];

/// Returns a pod with many features, and the configuration of its container. The container's image
/// declares a volume.
fn rich(node: &Node) -> Result<Subject> {
    if !node.join("volume").exists() {
        push_with(node, "volume", "Volumes", json!({ "/fresh": {} }))?;
    }
    let mut subject = Subject {
        image: format!("127.0.0.1:{PORT}/demo/busybox:volume"),
        pod: pod("faults"),
        container: container(
            "main",
            &[
                "sh",
                "-c",
                "trap 'exit 0' TERM; echo ready; sleep 600 & wait",
            ],
        ),
        log: node.join("logs/faults/main.log"),
        ..Subject::default()
    };
    let options = NamespaceOption {
        pid: NamespaceMode::Container as i32,
        ..NamespaceOption::default()
    };
    let seccomp = SecurityProfile {
        profile_type: ProfileType::RuntimeDefault as i32,
        ..SecurityProfile::default()
    };
    subject.pod.log_directory = node.join("logs/faults").display().to_string();
    subject.pod.port_mappings = vec![PortMapping {
        container_port: 80,
        host_port: 8099,
        ..PortMapping::default()
    }];
    subject.pod.dns_config = Some(DnsConfig {
        servers: vec!["192.0.2.1".to_owned()],
        ..DnsConfig::default()
    });
    subject.pod.linux = Some(LinuxPodSandboxConfig {
        security_context: Some(LinuxSandboxSecurityContext {
            namespace_options: Some(options.clone()),
            ..LinuxSandboxSecurityContext::default()
        }),
        sysctls: [("net.ipv4.ip_default_ttl".to_owned(), "33".to_owned())].into(),
        ..LinuxPodSandboxConfig::default()
    });
    let image = subject.image.clone();
    subject.container.image = Some(crate::support::calls::image(&image));
    subject.container.log_path = "main.log".to_owned();
    subject.container.envs = vec![KeyValue {
        key: "NAME".to_owned(),
        value: b"value".to_vec(),
    }];
    subject.container.mounts = vec![Mount {
        container_path: "/data".to_owned(),
        host_path: node.join("cdi").display().to_string(),
        ..Mount::default()
    }];
    subject.container.linux = Some(LinuxContainerConfig {
        resources: Some(LinuxContainerResources {
            oom_score_adj: 500,
            unified: [("cgroup.max.descendants".to_owned(), "100".to_owned())].into(),
            ..LinuxContainerResources::default()
        }),
        security_context: Some(LinuxContainerSecurityContext {
            namespace_options: Some(options),
            seccomp: Some(seccomp),
            capabilities: Some(Capability {
                add_capabilities: vec!["NET_ADMIN".to_owned()],
                ..Capability::default()
            }),
            no_new_privs: true,
            ..LinuxContainerSecurityContext::default()
        }),
    });
    Ok(subject)
}

/// Returns a pod like [`rich`], but in a user namespace and with one PID namespace for all
/// containers.
fn users(node: &Node) -> Result<Subject> {
    let mut subject = rich(node)?;
    let ids = vec![IdMapping {
        host_id: FIRST,
        container_id: 0,
        length: 65536,
    }];
    let options = NamespaceOption {
        pid: NamespaceMode::Pod as i32,
        userns_options: Some(UserNamespace {
            mode: NamespaceMode::Pod as i32,
            uids: ids.clone(),
            gids: ids,
        }),
        ..NamespaceOption::default()
    };
    let pod = subject.pod.linux.as_mut();
    if let Some(context) = pod.and_then(|linux| linux.security_context.as_mut()) {
        context.namespace_options = Some(options.clone());
    }
    let container = subject.container.linux.as_mut();
    if let Some(context) = container.and_then(|linux| linux.security_context.as_mut()) {
        context.namespace_options = Some(options);
    }
    Ok(subject)
}

fn exiting(node: &Node) -> Result<Subject> {
    let mut subject = rich(node)?;
    let script = format!("echo {LINE}; exit {EXIT_CODE}");
    subject.container.command = ["sh", "-c", &script].map(String::from).to_vec();
    Ok(subject)
}

fn web_image(_: &Node) -> Result<Subject> {
    Ok(Subject {
        image: WEB.to_owned(),
        without_image: true,
        ..Subject::default()
    })
}

macro_rules! scenarios {
    ($($test:ident: $name:literal, $before:ident, $call:ident, $subject:ident;)*) => {
        $(fn $test() -> Result {
            each_fault(&Scenario {
                name: $name,
                before: Stage::$before,
                call: CriCall::$call,
                subject: $subject,
            })
        })*
    };
}

scenarios! {
    run_pod_sandbox_survives_each_fault: "RunPodSandbox", Image, RunPodSandbox, rich;
    create_container_survives_each_fault: "CreateContainer", Pod, CreateContainer, rich;
    run_pod_sandbox_with_users_survives_each_fault: "RunPodSandbox-users", Image, RunPodSandbox, users;
    create_container_with_users_survives_each_fault: "CreateContainer-users", Pod, CreateContainer, users;
    start_container_survives_each_fault: "StartContainer", Created, StartContainer, rich;
    the_exit_of_a_container_survives_each_fault: "exit", Created, Exit, exiting;
    exec_sync_survives_each_fault: "ExecSync", Running, ExecSync, rich;
    stop_container_survives_each_fault: "StopContainer", Running, StopContainer, rich;
    remove_container_survives_each_fault: "RemoveContainer", Running, RemoveContainer, rich;
    stop_pod_sandbox_survives_each_fault: "StopPodSandbox", Running, StopPodSandbox, rich;
    remove_pod_sandbox_survives_each_fault: "RemovePodSandbox", Running, RemovePodSandbox, rich;
    pull_image_survives_each_fault: "PullImage", Nothing, PullImage, web_image;
    remove_image_survives_each_fault: "RemoveImage", Image, RemoveImage, web_image;
    the_start_of_the_server_survives_each_fault: "start", Running, StartServer, rich;
}
