//! Tests of devices of the Container Device Interface (CDI).

use std::fs;

use serde_json::json;

use crate::support::machine::Result;
use crate::support::needs::Test;
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[test!(
    a_container_with_a_cdi_device_gets_all_container_edits_of_the_cdi_file,
    A_NODE
)];

fn a_container_with_a_cdi_device_gets_all_container_edits_of_the_cdi_file() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let (data, ran) = (node.join("data"), node.join("ran"));
        fs::write(&data, "of the device")?;
        let text = format!(
            "# as a vendor's tool writes it\ncdiVersion: \"0.7.0\"\nkind: example.com/thing\n\
             containerEdits:\n  env:\n    - THING_ALL=1\ndevices:\n- name: one\n  containerEdits:\n    \
             env: [THING=one]\n    deviceNodes:\n    - path: /dev/thing\n      hostPath: /dev/null\n      \
             permissions: rw\n    mounts:\n    - hostPath: {}\n      containerPath: /thing/data\n      \
             options: [ro, nosuid, bind]\n    hooks:\n    - hookName: createRuntime\n      \
             path: /usr/bin/touch\n      args: [touch, {}]\n    additionalGids: [4321]\n\
             - name: two\n  containerEdits:\n    env: [THING2=two]\n",
            data.display(),
            ran.display()
        );
        fs::write(node.join("cdi/thing.yaml"), text)?;
        let pod = node.pod("cdi");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("report", &["/inside", "report"]);
        container["CDI_devices"] = json!([{ "name": "example.com/thing=one" }]);
        let report = node.report(&pod_id, &pod, &container)?;
        for (name, value) in [("THING", "one"), ("THING_ALL", "1")] {
            ensure_eq!(
                report["env"][name],
                value,
                "environment variable {name} in the container"
            );
        }
        let groups = report["groups"].as_array().cloned().unwrap_or_default();
        ensure!(
            groups.contains(&json!(4321)),
            "the container lacks the device's additional group 4321: {groups:?}"
        );
        ensure!(
            ran.exists(),
            "the createRuntime hook of the CDI device did not run"
        );

        let mut main = node.container("main", &["sleep", "600"]);
        main["CDI_devices"] = json!([{ "name": "example.com/thing=one" }]);
        main["annotations"] = json!({ "cdi.k8s.io/test": "example.com/thing=two" });
        let id = node.run(&pod_id, &pod, &main)?;
        let script = "echo x > /dev/thing && test -c /dev/thing && cat /thing/data && env";
        let text = node.asks(&["exec", "-s", &id, "sh", "-c", script])?;
        ensure!(
            text.contains("of the device"),
            "the container lacks the device's mount: {text}"
        );
        // The container's annotation requests a second CDI device.
        ensure!(
            text.contains("THING2=two"),
            "the container lacks the device that the annotation requests: {text}"
        );

        let mut wrong = node.container("wrong", &["true"]);
        wrong["CDI_devices"] = json!([{ "name": "example.com/thing=none" }]);
        let failed = node
            .create(&pod_id, &pod, &wrong)
            .err()
            .ok_or("the server created a container with an unknown CDI device")?;
        let message = failed.message().unwrap_or_default();
        ensure!(
            message.contains("example.com/thing=none"),
            "the error does not name the device: {message}"
        );
        Ok(())
    })
}
