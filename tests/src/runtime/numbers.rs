//! Tests of numbers that the kernel truncates, or interprets as "do not change". Such a number must
//! be refused. Otherwise, a process could become root, or a device could be another device.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::refusals::{complaint, refused};
use crate::{ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_container_is_refused_if_no_user_can_have_its_ids,
        Need::Rrun
    ),
    test!(
        exec_refuses_a_text_that_is_not_the_id_of_a_user_or_group,
        Need::Rrun
    ),
    test!(the_largest_user_id_is_accepted),
    test!(
        a_device_number_that_the_kernel_would_truncate_is_refused,
        Need::Rrun
    ),
    test!(an_id_mapping_beyond_the_largest_id_is_refused, Need::Rrun),
];

const NO_CHANGE: u64 = 4_294_967_295;

fn a_container_is_refused_if_no_user_can_have_its_ids() -> Result {
    for (user, words) in [
        (
            json!({ "uid": NO_CHANGE, "gid": 0 }),
            "process.user.uid: 4294967295",
        ),
        (
            json!({ "uid": 1000, "gid": NO_CHANGE }),
            "process.user.gid: 4294967295",
        ),
        (
            json!({ "uid": 1000, "gid": 1000, "additionalGids": [7, NO_CHANGE] }),
            "process.user.additionalGids: 4294967295",
        ),
        (
            json!({ "uid": NO_CHANGE + 1, "gid": 0 }),
            "integer `4294967296`",
        ),
        (
            json!({ "uid": 0, "gid": NO_CHANGE + 1001 }),
            "integer `4294968296`",
        ),
        (json!({ "uid": -1, "gid": 0 }), "integer `-1`"),
    ] {
        let mut bundle = Bundle::new(&["report"])?;
        bundle.set("/process/user", user).write_config()?;
        refused(&bundle, &[words])?;
    }
    Ok(())
}

fn exec_refuses_a_text_that_is_not_the_id_of_a_user_or_group() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    for text in [
        "4294967295",
        "4294967296",
        "18446744073709551616",
        "+0",
        "+1000",
        "-0",
        "-1",
        " 0",
        "0x0",
        "0:4294967295",
        "0:4294967296",
        "0:+0",
        "0:",
        "",
    ] {
        for flag in ["--user", "--additional-gids"] {
            let output = bundle.exec(&[flag, text], &["report"]).exits(255)?;
            complaint(&output, &["is not a user or group id"])?;
        }
    }
    let mut process = bundle.config["process"].clone();
    process["args"] = json!(["/bin/inside", "report"]);
    process["user"]["uid"] = json!(NO_CHANGE);
    let file = bundle.join("process.json");
    fs::write(&file, process.to_string())?;
    let output = bundle
        .runtime(&["exec", "--process"])
        .arg(&file)
        .arg(bundle.id())
        .exits(255)?;
    complaint(&output, &["process.user.uid: 4294967295"])?;
    bundle.end()?;
    Ok(())
}

fn the_largest_user_id_is_accepted() -> Result {
    let largest = NO_CHANGE - 1;
    let mut bundle = Bundle::new(&["report"])?;
    bundle.set(
        "/process/user",
        json!({ "uid": largest, "gid": largest, "additionalGids": [largest] }),
    );
    let report = bundle.run()?.json()?;
    ensure_eq!(
        (&report["uid"], &report["gid"], &report["groups"]),
        (&json!(largest), &json!(largest), &json!([largest])),
        "the ids of the container's process"
    );
    Ok(())
}

fn a_device_number_that_the_kernel_would_truncate_is_refused() -> Result {
    let device = |major: u64, minor: u64| -> Value {
        json!({ "path": "/dev/device", "type": "c", "major": major, "minor": minor })
    };
    for (major, minor) in [
        (4097, 3),
        ((1 << 32) + 1, 3),
        (1, (1 << 20) + 3),
        (1, (1 << 32) + 3),
    ] {
        let mut bundle = Bundle::new(&["stat", "/dev/device"])?;
        bundle
            .set("/linux/devices", json!([device(major, minor)]))
            .write_config()?;
        refused(&bundle, &[&format!("linux.devices[0]: {major}:{minor}")])?;
    }
    for owner in ["uid", "gid"] {
        let mut bundle = Bundle::new(&["stat", "/dev/device"])?;
        let mut device = device(1, 3);
        device[owner] = json!(NO_CHANGE);
        bundle
            .set("/linux/devices", json!([device]))
            .write_config()?;
        refused(&bundle, &["linux.devices[0]: 4294967295"])?;
    }
    let mut bundle = Bundle::new(&["stat", "/dev/device"])?;
    bundle.set("/linux/devices", json!([device(4095, (1 << 20) - 1)]));
    ensure_eq!(
        bundle.run()?.json()?["device"],
        json!([4095, (1 << 20) - 1]),
        "the number of the device"
    );
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let throttled = json!([{ "major": (1_u64 << 32) + 8, "minor": 0, "rate": 1 }]);
    bundle
        .set(
            "/linux/resources",
            json!({ "blockIO": { "throttleReadBpsDevice": throttled } }),
        )
        .write_config()?;
    refused(&bundle, &["blockIO.throttleReadBpsDevice: 4294967304:0"])
}

fn an_id_mapping_beyond_the_largest_id_is_refused() -> Result {
    for (inside, outside, size) in [
        (NO_CHANGE, 1000, 1),
        (0, NO_CHANGE, 1),
        (0, 100_000, NO_CHANGE),
        (1, 0, NO_CHANGE),
    ] {
        let map = json!([{ "containerID": inside, "hostID": outside, "size": size }]);
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle
            .add("/linux/namespaces", json!({ "type": "user" }))
            .set("/linux/uidMappings", map.clone())
            .set("/linux/gidMappings", map)
            .write_config()?;
        refused(&bundle, &["linux.uidMappings[0].size"])?;
    }
    Ok(())
}
