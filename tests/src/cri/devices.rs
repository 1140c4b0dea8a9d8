//! Devices by the Container Device Interface.

use std::fs;

use serde_json::json;

use crate::support::machine::Result;
use crate::support::needs::Test;
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[test!(a_cdi_device_brings_all_that_its_file_says, A_NODE)];

fn a_cdi_device_brings_all_that_its_file_says() -> Result {
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
            ensure_eq!(report["env"][name], value, "{name}");
        }
        let groups = report["groups"].as_array().cloned().unwrap_or_default();
        ensure!(groups.contains(&json!(4321)), "groups {groups:?}");
        ensure!(ran.exists(), "the hook did not run");

        let mut main = node.container("main", &["sleep", "600"]);
        main["CDI_devices"] = json!([{ "name": "example.com/thing=one" }]);
        main["annotations"] = json!({ "cdi.k8s.io/test": "example.com/thing=two" });
        let id = node.run(&pod_id, &pod, &main)?;
        let script = "echo x > /dev/thing && test -c /dev/thing && cat /thing/data && env";
        let text = node.asks(&["exec", "-s", &id, "sh", "-c", script])?;
        ensure!(text.contains("of the device"), "{text}");
        // The annotation's, besides.
        ensure!(text.contains("THING2=two"), "{text}");

        let mut wrong = node.container("wrong", &["true"]);
        wrong["CDI_devices"] = json!([{ "name": "example.com/thing=none" }]);
        let failed = node
            .create(&pod_id, &pod, &wrong)
            .err()
            .ok_or("it is made")?;
        let message = failed.message().unwrap_or_default();
        ensure!(message.contains("example.com/thing=none"), "{message}");
        Ok(())
    })
}
