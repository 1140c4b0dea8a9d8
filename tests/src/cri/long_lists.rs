//! Tests of requests with very long lists. A pod's author determines the length of these lists. The
//! time that the server needs must not grow with the square of the length.

use std::fs;

use rrun_proto::v1::{
    ContainerConfig, CreateContainerRequest, Device, IdMapping, KeyValue, Mount, PodSandboxConfig,
    RemovePodSandboxRequest, RunPodSandboxRequest, UserNamespace,
};
use tonic::Status;

use crate::support::calls::{Calls, container, pod};
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_container_with_a_very_long_list_is_answered_in_time,
        A_NODE,
        Need::RrunCri,
        Need::Native
    ),
    test!(
        an_error_about_a_very_long_list_is_short,
        A_NODE,
        Need::RrunCri
    ),
];

/// The number of entries in a list. A server whose time grows with the square of this number does
/// not answer within the deadline of [`Calls::wait`].
const ENTRIES: u32 = 50_000;

/// Adds the entry with this number to a list of the request.
type List<'a> = &'a dyn Fn(u32, &mut ContainerConfig);

/// Runs a pod and creates a container in it. Returns the answer to CreateContainer.
fn create(
    calls: &Calls,
    handler: &str,
    config: ContainerConfig,
) -> Result<std::result::Result<(), Status>> {
    let mut client = calls.runtime();
    let request = RunPodSandboxRequest {
        config: Some(pod("long")),
        runtime_handler: handler.to_owned(),
    };
    let answer = calls.wait(async move { client.run_pod_sandbox(request).await })??;
    let pod_sandbox_id = answer.into_inner().pod_sandbox_id;
    let mut client = calls.runtime();
    let request = CreateContainerRequest {
        pod_sandbox_id: pod_sandbox_id.clone(),
        config: Some(config),
        sandbox_config: Some(pod("long")),
    };
    let created = calls.wait(async move { client.create_container(request).await })?;
    let mut client = calls.runtime();
    let request = RemovePodSandboxRequest { pod_sandbox_id };
    calls.wait(async move { client.remove_pod_sandbox(request).await })??;
    Ok(created.map(drop))
}

/// The pods have a runtime handler that always fails. The server therefore creates the whole bundle,
/// but no runtime has to handle the long lists.
fn a_container_with_a_very_long_list_is_answered_in_time() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        node.kill_server()?;
        let file = node.join("config.toml");
        let text = fs::read_to_string(&file)?;
        fs::write(
            &file,
            format!("container_mounts = {ENTRIES}\n{text}[runtime.fails]\npath = '/bin/false'\n"),
        )?;
        node.start_server()?;
        let calls = Calls::new(node)?;
        let lists: [(&str, List); 4] = [
            ("envs", &|number, config| {
                config.envs.push(KeyValue {
                    key: format!("A{number}"),
                    value: b"x".to_vec(),
                });
            }),
            ("mounts", &|number, config| {
                config.mounts.push(Mount {
                    container_path: format!("/mounts/{number}"),
                    host_path: "/tmp".to_owned(),
                    ..Mount::default()
                });
            }),
            ("devices", &|number, config| {
                config.devices.push(Device {
                    container_path: format!("/dev/device-{number}"),
                    host_path: "/dev/null".to_owned(),
                    permissions: "r".to_owned(),
                });
            }),
            ("CDI devices in an annotation", &|number, config| {
                let names = config.annotations.entry("cdi.k8s.io/x".to_owned());
                *names.or_default() += &format!("example.com/x={number},");
            }),
        ];
        for (name, add) in lists {
            let mut config = container("long", &["true"]);
            for number in 0..ENTRIES {
                add(number, &mut config);
            }
            let created = create(&calls, "fails", config)
                .map_err(|failed| format!("{ENTRIES} {name}: {failed:?}"))?;
            ensure!(
                created.is_err(),
                "a container with {ENTRIES} {name} was created, although its runtime fails"
            );
        }
        Ok(())
    })
}

/// gRPC sends an error's sentence in a header, and clients limit the size of headers.
fn an_error_about_a_very_long_list_is_short() -> Result {
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        let ranges: Vec<IdMapping> = (0..ENTRIES)
            .map(|number| IdMapping {
                container_id: number,
                host_id: 100_000 + number,
                length: 1,
            })
            .collect();
        let mut config: PodSandboxConfig = pod("ranges");
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        context
            .namespace_options
            .get_or_insert_default()
            .userns_options = Some(UserNamespace {
            uids: ranges.clone(),
            gids: ranges,
            ..UserNamespace::default()
        });
        let mut client = calls.runtime();
        let request = RunPodSandboxRequest {
            config: Some(config),
            ..RunPodSandboxRequest::default()
        };
        let answer = calls.wait(async move { client.run_pod_sandbox(request).await })?;
        let sentence = match &answer {
            Ok(_) => "",
            Err(status) => status.message(),
        };
        ensure!(
            sentence.contains("has too many ranges") && sentence.len() < 8192,
            "the answer to a user namespace with {ENTRIES} ranges is {answer:?}"
        );
        Ok(())
    })
}
